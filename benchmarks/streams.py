"""How long after COMMIT the last of 2,000 streams of one process shows the change.

Run it as `python -m benchmarks.streams`. `goodstanding serve` has a core to itself, as in the other benchmarks; the
clients, PostgreSQL and Valkey share the other one. The time begins before COMMIT is sent and ends when the last client
has read its event, so the relay, the broadcast, the read and everybody's sockets are in it.
"""

import asyncio
import json
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import asyncpg
import uvloop

from benchmarks.environment import HOST, Cores, Environment, Serving, describe, opened, user_id

STREAMS: Final = 2000
CHANGES: Final = 200
TARGET_MS: Final = 250.0
_STREAMS_A_CALLER: Final = 20
_SECONDS: Final = 60.0
_IDLE_SECONDS: Final = 2.0
_FILES: Final = 10_000
_RESULTS: Final = Path(__file__).parent / "results" / "streams.json"
_MISSED: Final = """
insert into public.wingman_sessions (match_id, status, scheduled_time, user2_completed_confirmed_by_user1)
select md5('match-' || number || '-1')::uuid, 'no_show', now(), true from generate_series(0, $1::integer - 1) as number
"""


class _Clients:
    """All clients together: they count the events that have arrived."""

    def __init__(self) -> None:
        self.missing = 0
        self.lost = 0
        self.last = 0.0
        self._all = asyncio.Event()

    def expect(self, events: int) -> None:
        """Begin to count."""
        self.missing = events
        self._all.clear()

    def arrived(self, events: int) -> None:
        """Count."""
        self.missing -= events
        if self.missing <= 0:
            self.last = asyncio.get_running_loop().time()
            self._all.set()

    async def wait(self) -> None:
        """Wait for the last one."""
        async with asyncio.timeout(_SECONDS):
            await self._all.wait()


class _Client(asyncio.Protocol):
    """One stream."""

    def __init__(self, clients: _Clients, request: bytes) -> None:
        self._clients = clients
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count events."""
        events = data.count(b"event: reputation")
        if events:
            self._clients.arrived(events)

    def connection_lost(self, _error: Exception | None) -> None:
        """Note that the stream has ended."""
        self._clients.lost += 1


@dataclass(slots=True)
class Outcome:
    """Milliseconds from COMMIT to the last stream, one for each change; and what the process needed for an event."""

    name: str
    last_ms: list[float] = field(default_factory=list)
    cpu_us_per_event: float = 0.0

    def quantile(self, share: float) -> float:
        """Give the time within which this share of the changes had reached everybody."""
        return sorted(self.last_ms)[min(len(self.last_ms) - 1, round(share * len(self.last_ms)))]


async def _measure(env: Environment, serving: Serving, name: str, users: Sequence[str], changes: int) -> Outcome:
    loop = asyncio.get_running_loop()
    clients = _Clients()
    clients.expect(len(users))
    transports = []
    for place, user in enumerate(users):
        request = (
            f"GET /api/user/reputation/stream?user_id={user} HTTP/1.1\r\nHost: {HOST}\r\n"
            f"Authorization: Bearer {env.token(f'{name} {place // _STREAMS_A_CALLER}')}\r\n\r\n"
        ).encode()
        transport, _ = await loop.create_connection(lambda r=request: _Client(clients, r), HOST, serving.port)  # type: ignore[misc] # a lambda's default
        transports.append(transport)
    await clients.wait()
    outcome = Outcome(name)
    changed = len(set(users))
    writer = await asyncpg.connect(env.postgres.url("app"))
    idle = -serving.cpu_seconds()
    await asyncio.sleep(_IDLE_SECONDS)
    idle = (idle + serving.cpu_seconds()) / _IDLE_SECONDS
    start, cpu = loop.time(), serving.cpu_seconds()
    for _ in range(changes):
        clients.expect(len(users))
        await writer.execute("begin")
        await writer.execute(_MISSED, changed)
        began = loop.time()
        await writer.execute("commit")
        await clients.wait()
        outcome.last_ms.append(1000 * (clients.last - began))
        # Not in step with the relay, and long enough for nothing to be left over.
        await asyncio.sleep(0.05 + 0.02 * (len(outcome.last_ms) % 7) / 7)
    used = serving.cpu_seconds() - cpu - idle * (loop.time() - start)
    outcome.cpu_us_per_event = 1e6 * used / (changes * len(users))
    await writer.close()
    if clients.lost:
        message = f"{clients.lost} streams ended"
        raise RuntimeError(message)
    for transport in transports:
        transport.close()
    return outcome


async def _run(env: Environment, serving: Serving) -> list[Outcome]:
    return [
        await _measure(env, serving, "one user, whom all streams watch", [user_id(0)] * STREAMS, CHANGES),
        await _measure(
            env,
            serving,
            "a user for each stream, all changed by one transaction",
            [user_id(number) for number in range(STREAMS)],
            CHANGES // 4,
        ),
    ]


def main() -> None:
    """Measure, print, write the raw numbers; exits with 1 when the figure is missed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _FILES), hard))
    machine = describe(Cores.choose())
    with opened() as env, env.goodstanding() as serving:
        outcomes = uvloop.run(_run(env, serving))
    for outcome in outcomes:
        p50, p99, worst = statistics.median(outcome.last_ms), outcome.quantile(0.99), max(outcome.last_ms)
        print(
            f"{outcome.name:56} p50 {p50:5.0f} ms   p99 {p99:5.0f} ms   worst {worst:5.0f} ms"
            f"   {outcome.cpu_us_per_event:.0f} us of processor per event"
        )
    missed = outcomes[0].quantile(0.99) > TARGET_MS
    print(f"{STREAMS} streams; the first one's p99, target {TARGET_MS:.0f} ms: {'MISSED' if missed else 'met'}")
    print(f"Before the run the machine was {machine['busy_percent_before']:.0f} % busy with other work.")
    raw = {outcome.name: [round(one, 1) for one in outcome.last_ms] for outcome in outcomes}
    _RESULTS.write_text(json.dumps({"machine": machine, "streams": STREAMS, "last_ms": raw}, indent=2) + "\n", "utf-8")
    sys.exit(missed)


if __name__ == "__main__":
    main()
