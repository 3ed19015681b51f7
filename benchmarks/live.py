"""From COMMIT to the new badge on every process, alone and while 10,000 changes a second rain; and what was stale."""

import asyncio
import json
import random
import statistics
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import asyncpg
import uvloop

from benchmarks.environment import HOST, USERS, Environment, Serving, user_id
from benchmarks.figures import Effort, Figure

PROCESSES: Final = 2
P50_MS: Final = 30.0
P99_MS: Final = 100.0
PROMISED_SECONDS: Final = 2.0
_RAIN: Final = 10_000
_COMMITS_A_SECOND: Final = 20
_READERS: Final = 2
_READ: Final = 20
_READ_PAUSE: Final = 0.005
_POLL: Final = 0.001
_SECONDS: Final = 60.0
_INSERT: Final = (
    "insert into public.wingman_sessions"
    " (match_id, status, scheduled_time, user1_completed_confirmed_by_user2)"
    " select md5('match-' || one.number || '-1')::uuid, 'completed', now(), true"
    " from unnest($1::integer[]) as one (number)"
)
_COUNTED: Final = "select completed from reputation.read_counts(array[$1::uuid], 'any', 'unconfirmed', 'nobody')"


@dataclass(slots=True)
class _User:
    """What was committed about one user, and when that was known."""

    number: int
    at_first: int
    committed: list[float] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Where the user's badge is read."""
        return f"/api/user/reputation/{user_id(self.number)}"


@dataclass(slots=True)
class _Line:
    """A kept connection to one process."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    token: str

    async def completed(self, user: _User) -> int:
        """Read how many sessions a user completed."""
        head = f"GET {user.path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {self.token}\r\n\r\n"
        self.writer.write(head.encode())
        async with asyncio.timeout(_SECONDS):
            answer = await self.reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await self.reader.readexactly(length)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer)
        return int(json.loads(body)["completed_sessions"])


@dataclass(slots=True)
class _Outcome:
    """Milliseconds from each COMMIT to the last process, answers that were read, and how old the stalest was."""

    delays: list[float] = field(default_factory=list)
    changes: int = 0
    rate: float = 0.0
    answers: int = 0
    stale: int = 0
    stalest: float = 0.0


def live(env: Environment, effort: Effort) -> list[Figure]:
    """Measure, with all cores for everybody: the processes, PostgreSQL, Valkey and who writes and reads."""
    with ExitStack() as stack:
        fleet = [stack.enter_context(env.goodstanding(pinned=False)) for _ in range(PROCESSES)]
        alone, rain = uvloop.run(_run(env, fleet, effort))
    raw = {
        "delays_milliseconds": alone.delays,
        "delays_under_rain_milliseconds": rain.delays,
        "rain_changes": rain.changes,
        "rain_changes_per_second": rain.rate,
        "rain_answers": rain.answers,
        "rain_stalest_seconds": rain.stalest,
    }
    where = f"COMMIT to new badge on {PROCESSES} processes"
    return [
        _quantile(where, alone, 50, P50_MS, raw),
        _quantile(where, alone, 99, P99_MS),
        _quantile(f"{where}, under {rain.rate:.0f} changes/s", rain, 50, P50_MS),
        _quantile(f"{where}, under {rain.rate:.0f} changes/s", rain, 99, P99_MS),
        Figure(
            "answers stale for longer than 2 s",
            [rain.stale],
            "",
            target="0",
            met=rain.stale == 0,
            note=f"of {rain.answers} while {rain.changes} changes came; the stalest was {rain.stalest:.2f} s old",
        ),
    ]


def _quantile(
    name: str, outcome: _Outcome, hundredth: int, target: float, raw: dict[str, object] | None = None
) -> Figure:
    value = statistics.quantiles(outcome.delays, n=100)[hundredth - 1]
    return Figure(
        f"{name}, p{hundredth}", [value], "ms", target=f"<= {target:.0f}", met=value <= target, raw=dict(raw or {})
    )


async def _run(env: Environment, fleet: Sequence[Serving], effort: Effort) -> tuple[_Outcome, _Outcome]:
    alone, rain = _Outcome(), _Outcome()
    rng = random.Random(0)  # noqa: S311 - repeatable
    tokens = [env.token(user_id(0)) for _ in fleet]
    writer = await asyncpg.connect(env.postgres.url("app"))
    # A session is completed for both, and the other one's number is greater by 37: of those who are chosen here nobody
    # is the other one of somebody who is, so of each it is known what was committed.
    watched = [await _user(writer, number) for number in range(0, 1000, 100)]
    wet = [await _user(writer, number) for number in range(2000, USERS) if number // 37 % 2 == 0]
    for _ in range(effort.reads // 10):  # connections, statements, the first beats
        await _time(writer, fleet, tokens, rng.choice(watched))
    for _ in range(effort.reads):
        alone.delays.append(await _time(writer, fleet, tokens, rng.choice(watched)))
        await asyncio.sleep(rng.random() * 0.03)
    seconds = 10.0 if effort.seconds > 1 else 2.0
    async with asyncio.TaskGroup() as group:
        raining = group.create_task(_rain(env, wet, rain, seconds, rng))
        readers = [
            group.create_task(_read(serving, token, wet[:_READ], rain, rng))
            for serving, token in zip(fleet, tokens, strict=True)
            for _ in range(_READERS)
        ]
        while not raining.done():
            rain.delays.append(await _time(writer, fleet, tokens, rng.choice(watched)))
            await asyncio.sleep(rng.random() * 0.03)
        await asyncio.sleep(PROMISED_SECONDS + 0.5)
        for reader in readers:
            reader.cancel()
    await writer.close()
    return alone, rain


async def _user(connection: "asyncpg.Connection[asyncpg.Record]", number: int) -> _User:
    return _User(number, await connection.fetchval(_COUNTED, user_id(number)))


async def _time(
    writer: "asyncpg.Connection[asyncpg.Record]", fleet: Sequence[Serving], tokens: Sequence[str], user: _User
) -> float:
    """Change one user, and give the milliseconds until the last process shows it; each had the old value cached."""
    await writer.execute("begin")
    await writer.execute(_INSERT, [user.number])
    began = time.monotonic()
    await writer.execute("commit")
    user.committed.append(began)

    async def shows(serving: Serving, token: str) -> None:
        async with _line(serving, token) as line:
            while True:
                if await line.completed(user) >= user.at_first + len(user.committed):
                    return
                await asyncio.sleep(_POLL)

    await asyncio.gather(*map(shows, fleet, tokens))
    return 1000 * (time.monotonic() - began)


async def _rain(
    env: Environment, users: Sequence[_User], outcome: _Outcome, seconds: float, rng: random.Random
) -> None:
    """Commit so many changes a second: a completed session is one change for each of its two users."""
    connection = await asyncpg.connect(env.postgres.url("app"))
    each = _RAIN // _COMMITS_A_SECOND // 2
    began = time.monotonic()
    for number in range(int(seconds * _COMMITS_A_SECOND)):
        await asyncio.sleep(max(0.0, began + number / _COMMITS_A_SECOND - time.monotonic()))
        some = rng.sample(users, each)
        await connection.execute(_INSERT, [user.number for user in some])
        now = time.monotonic()
        for user in some:
            user.committed.append(now)
        outcome.changes += 2 * each
    outcome.rate = outcome.changes / (time.monotonic() - began)
    await connection.close()


async def _read(serving: Serving, token: str, users: Sequence[_User], outcome: _Outcome, rng: random.Random) -> None:
    """Read who is rained on, and count what is staler than promised."""
    async with _line(serving, token) as line:
        while True:
            user = rng.choice(users)
            began = time.monotonic()
            behind = bisect_right(user.committed, began) - (await line.completed(user) - user.at_first)
            outcome.answers += 1
            if behind > 0:
                age = began - user.committed[max(0, bisect_right(user.committed, began) - behind)]
                outcome.stalest = max(outcome.stalest, age)
                outcome.stale += age > PROMISED_SECONDS
            await asyncio.sleep(_READ_PAUSE)


@asynccontextmanager
async def _line(serving: Serving, token: str) -> AsyncIterator[_Line]:
    reader, writer = await asyncio.open_connection(HOST, serving.port)
    try:
        yield _Line(reader, writer, token)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()
