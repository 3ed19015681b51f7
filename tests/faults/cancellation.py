"""Requests of which a third vanish at random points: nothing leaks, nothing is crossed, nothing stays locked.

`python -m tests.faults.cancellation --requests 1000000`
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from goodstanding.tasks import background
from tests.conftest import connect
from tests.faults.ours import vanish
from tests.faults.scene import PROCESSES, Scene, scene
from tests.live import Line, Served
from tests.parts import SECONDS, eventually, loads_held

_AT_ONCE: Final = 50
_WARM: Final = 2000
_VANISH: Final = 1 / 3
_POOL: Final = 10
_LEASE_SECONDS: Final = 1.0
_SLACK: Final = 1.0
_MOMENT: Final = 0.1
_ATTEMPTS: Final = 3
_FEW: Final = 3
_EXCUSED: Final = 0.001
"""Of all requests so many at most may leave a lease to its end: a busy machine misses the 50 ms in which Redis is told.
"""
_HARMLESS: Final = ("debug ", "info ", "warning ")
_STEADY: Final = 30
"""Looks, five a second, that see the same number: longer than the server keeps an idle connection."""
_KEPT_ALIVE_SECONDS: Final = 5.0
_STREAMS: Final = "goodstanding_streams"
_ENDED: Final = "goodstanding_streams_ended_total"
_BUSY: Final = (
    "select count(*) filter (where state <> 'idle'), count(*) from pg_stat_activity"
    " where datname = current_database() and application_name = 'goodstanding'"
)

_PAGE: Final = """\
# Requests that vanish

`make cancellation REQUESTS={requests}` (seed {seed}): requests to two processes, fifty at a time, of which a third are
given up at a random point: within the request, while it is answered, or within the answer. Those are reads, streams
and invalidations; of the others, which are reads, every answer is judged.

| | |
|---|---|
| vanished | {vanished} |
| streams that had been opened | {streams} |
| answered, by status | {statuses} |
| file descriptors of each process before | {before} |
| after | {after} |

A load goes on without whoever asked for it, and gives up its lease: next to none may run out. Afterwards there must be
no lease in Redis once the deadline of a load has passed, no busy connection to PostgreSQL, no open stream, no file
descriptor more than before, no error in a log, and each process must run as many loads at once as it has connections.

{found}
"""


@dataclass(slots=True)
class Outcome:
    """What came of it; nothing in `wrong` is as it must be."""

    answered: int = 0
    vanished: int = 0
    streams: int = 0
    """So many streams had been opened, and have ended."""
    statuses: Counter[int] = field(default_factory=Counter)
    descriptors: tuple[Sequence[int], Sequence[int]] = ((), ())
    """Of each process, before and after."""
    wrong: list[str] = field(default_factory=list)


async def run(made: Scene, requests: int) -> Outcome:
    """Send so many requests, fifty at once, and see what is left behind; nobody else asks meanwhile."""
    rate, made.load.rate = made.load.rate, 0.0
    await _send(made, _WARM, Outcome())
    before, logged = await _settled(made), made.logged()
    outcome = Outcome()
    async with _leases_that_run_out(made) as leases:
        await _send(made, requests, outcome)
        await _check_leases(made, outcome)
        await _check_connections(made, outcome)
        await _check_streams(made, outcome)
    if len(leases) > max(_FEW, _EXCUSED * requests):
        outcome.wrong.append(f"{len(leases)} leases were not given up, and ran out: {leases[:5]!r}")
    outcome.descriptors = before, await _settled(made, at_most=before)
    for process, (was, now) in enumerate(zip(*outcome.descriptors, strict=True)):
        if now > was:
            outcome.wrong.append(f"process {process} had {was} file descriptors, and has {now}")
    await _check_loads(made, outcome)
    for process, lines in enumerate(made.said(logged)):
        outcome.wrong += [f"process {process} logged {line}" for line in lines if not line.startswith(_HARMLESS)]
    await made.ready()
    made.load.rate = rate
    return outcome


async def _send(made: Scene, requests: int, outcome: Outcome) -> None:
    load = made.load
    left = requests

    async def go_on() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if load.rng.random() < _VANISH:
                outcome.vanished += 1
                with suppress(OSError):
                    await vanish(load.rng.choice(made.served).port, load.request_of_any_kind(), load.rng)
                continue
            await load.one()
            seen = load.seen.pop()
            outcome.answered += 1
            outcome.statuses[seen.status] += 1
            if seen.finding.wrong or seen.status not in {200, 404}:
                outcome.wrong.append(f"{seen.kind}: {seen.status}: {seen.finding.wrong}")

    async with background() as spawn:
        await asyncio.wait([spawn(go_on()) for _ in range(_AT_ONCE)])


@asynccontextmanager
async def _leases_that_run_out(made: Scene) -> AsyncIterator[Sequence[str]]:
    """Gather the leases that nobody gives up: a load goes on without whoever asked for it, and gives up its lease."""
    keys: list[str] = []
    async with made.redis() as client, client.pubsub() as listener, background() as spawn:
        await client.config_set("notify-keyspace-events", "Ex")
        await listener.psubscribe("__keyevent@*__:expired")

        async def listen() -> None:
            while True:
                message = await listener.get_message(ignore_subscribe_messages=True, timeout=SECONDS)
                if message is not None and message["data"].endswith(b":lease"):
                    keys.append(message["data"].decode())

        spawn(listen())
        try:
            yield keys
        finally:
            await client.config_set("notify-keyspace-events", "")


async def _check_leases(made: Scene, outcome: Outcome) -> None:
    """Nobody asks: within the deadline of a load every lease has been given up, or has run out."""
    keys: list[bytes | str] = []
    async with made.redis() as client:

        async def are_gone() -> bool:
            keys[:] = await client.keys("*:lease")
            return not keys

        try:
            await eventually(are_gone, within=_LEASE_SECONDS + _SLACK)
        except AssertionError:
            outcome.wrong += [f"a lease that lives for {await client.pttl(key)} ms more: {key!r}" for key in keys]


async def _check_connections(made: Scene, outcome: Outcome) -> None:
    found: Any = None

    async def idle() -> bool:
        nonlocal found
        async with connect(made.database.superuser_url) as superuser:
            found = await superuser.fetchrow(_BUSY)
        return bool(found[0] == 0)

    try:
        await eventually(idle, within=_LEASE_SECONDS + _SLACK)
    except AssertionError:
        outcome.wrong.append(f"{found[0]} connections to PostgreSQL are still busy")
    if found[1] > PROCESSES * _POOL:
        outcome.wrong.append(f"{found[1]} connections to PostgreSQL, of {PROCESSES * _POOL} at most")


async def _check_streams(made: Scene, outcome: Outcome) -> None:
    """Nobody listens any more, so no stream is open, and each that was begun has ended."""
    metrics: Sequence[dict[str, float]] = ()

    async def are_closed() -> bool:
        nonlocal metrics
        metrics = await made.metrics()
        return all(one.get(_STREAMS) == 0.0 for one in metrics)

    try:
        await eventually(are_closed, within=_LEASE_SECONDS + _SLACK)
    except AssertionError:
        outcome.wrong += [
            f"process {process} has {one.get(_STREAMS)} open streams" for process, one in enumerate(metrics)
        ]
    outcome.streams = int(sum(value for one in metrics for name, value in one.items() if name.startswith(_ENDED)))
    if not outcome.streams:
        outcome.wrong.append("no stream was ever open")


async def _check_loads(made: Scene, outcome: Outcome) -> None:
    """Each process can run as many loads at once as it has connections: none is lent out, and no turn is taken."""
    for process, one in enumerate(made.served):
        held, answers = await _hold_loads(made, one)
        if not held:
            outcome.wrong.append(f"process {process} did not run {_POOL} loads at once")
        outcome.wrong += [f"process {process}: {status}" for status in answers if held and status != 200]


async def _hold_loads(made: Scene, served: Served) -> tuple[bool, Sequence[int]]:
    """Hold as many loads in PostgreSQL as a process may run, for less than their deadline; give what was answered."""
    async with background() as spawn, AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(Line.to(served.port)) for _ in range(_POOL)]
        people = made.load.oracle.people[:_POOL]
        statuses: list[int] = []
        held = False

        async def ask(line: Line, request: bytes) -> None:
            status, _, _ = await line.ask(request)
            statuses.append(status)

        # All connections are open before it counts: to open them takes a while, and no part in the deadline.
        for _ in range(_ATTEMPTS):
            statuses.clear()
            held = True
            async with loads_held(made.database) as waiting:
                asking = [
                    spawn(ask(line, made.load.past_the_cache(person)))
                    for line, person in zip(lines, people, strict=True)
                ]
                try:
                    async with asyncio.timeout(_LEASE_SECONDS - _MOMENT):
                        await waiting(_POOL)
                except TimeoutError:
                    held = False
            await asyncio.wait(asking)
            if held and statuses == [200] * _POOL:
                break
        return held, statuses


async def _settled(made: Scene, *, at_most: Sequence[int] = ()) -> Sequence[int]:
    """Count the file descriptors of each process when clients' have ended, but those for PostgreSQL."""
    await made.load.close_idle()
    counts: Sequence[int] = ()
    steady = 0

    async def are_steady() -> bool:
        nonlocal counts, steady
        before, counts = counts, [made.descriptors(process) for process in range(PROCESSES)]
        steady = steady + 1 if counts == before else 0
        await asyncio.sleep(0.2)
        few = at_most and all(now <= most for now, most in zip(counts, at_most, strict=True))
        return steady >= _STEADY or bool(few)

    await eventually(are_steady, within=4 * _KEPT_ALIVE_SECONDS)
    return counts


def _report(outcome: Outcome, *, seed: int) -> str:
    (first, second), (first_after, second_after) = outcome.descriptors
    found = "\n".join(f"- {line}" for line in outcome.wrong[:20])
    return _PAGE.format(
        requests=outcome.answered + outcome.vanished,
        seed=seed,
        vanished=outcome.vanished,
        streams=outcome.streams,
        statuses=", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items())),
        before=f"{first} and {second}",
        after=f"{first_after} and {second_after}",
        found=found or "Nothing was left behind, and no answer was wrong.",
    )


def main() -> int:
    """Give 1 where something was left behind, or an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cancellation", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--report", type=Path, help="write the page here")
    arguments = parser.parse_args()

    async def work() -> Outcome:
        with tempfile.TemporaryDirectory(prefix="goodstanding-faults-", ignore_cleanup_errors=True) as folder:
            async with scene(Path(folder), seed=arguments.seed, rate=0.0) as made:
                return await run(made, arguments.requests)

    print(f"seed {arguments.seed}", flush=True)
    outcome = uvloop.run(work())
    if arguments.report is not None:
        arguments.report.write_text(_report(outcome, seed=arguments.seed), "utf-8")
    print(f"{outcome.answered} answered {dict(outcome.statuses)}, {outcome.vanished} vanished,", end=" ")
    print(f"file descriptors {outcome.descriptors[0]} before and {outcome.descriptors[1]} after")
    print("\n".join(outcome.wrong[:20]) or "nothing was left behind, and no answer was wrong")
    return bool(outcome.wrong)


if __name__ == "__main__":
    sys.exit(main())
