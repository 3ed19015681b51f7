"""Parts that several test modules put together: open caches and services, the metrics, waiting for a condition."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import urlsplit
from uuid import uuid4

import redis.asyncio
from prometheus_client import REGISTRY

from goodstanding.cache import Cache, RedisCache
from goodstanding.data import BadgeColor, ReputationData, UserId
from goodstanding.entry import Entry, Lives
from goodstanding.history import SessionHistory
from goodstanding.main import utc_now
from goodstanding.memory import MemoryCache
from goodstanding.policy import STANDARD, ReputationPolicy
from goodstanding.reputation_service import ReputationService
from tests.conftest import Database

SECONDS: Final = 30.0
NOON: Final = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
LIVES: Final = Lives(value=300_000, unknown=30_000, last_good=3_600_000, lease=10_000)
PATIENT: Final = 5.0
"""A Redis deadline, in seconds, that a busy machine does not miss: for tests in which nothing is slow on purpose."""


def user(number: int) -> UserId:
    """Give a user id that is easy to tell apart."""
    return UserId(f"00000000-0000-4000-8000-{number:012x}")


def stranger() -> UserId:
    """Give a user id that no test had before."""
    return UserId(str(uuid4()))


def entry(score: int = 7, *, at: datetime = NOON) -> Entry:
    """Give an entry of that many completed sessions and no no-show."""
    badge = BadgeColor.GOLD if score >= 10 else BadgeColor.GREEN
    return Entry.of(ReputationData(score, badge, score, 0, at))


def metric(name: str, **labels: str) -> float:
    """Read a metric; 0 where it has not been touched."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def queries() -> float:
    """Count the statements that were sent to count sessions, since the process began."""
    return metric("goodstanding_query_seconds_count", query="counts")


async def eventually(condition: Callable[[], Awaitable[bool] | bool], *, within: float = SECONDS) -> float:
    """Wait until a condition holds; gives the seconds that it took, and fails when it takes longer than `within`."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        result = condition()
        if await result if isinstance(result, Awaitable) else result:
            return loop.time() - began
        assert loop.time() - began < within, "the condition did not come true in time"
        await asyncio.sleep(0.002)


async def settled(service: ReputationService) -> None:
    """Wait until what was loaded is in the cache: a cold read is answered before that."""
    await eventually(lambda: not service._flights)  # noqa: SLF001 - nothing else tells


def every_read_is_due(_low: float, high: float) -> float:
    """Stand in for `random.uniform`: with the largest jitter."""
    return high


@dataclass(slots=True)
class MovingClock:
    """The wall clock, moved on by `ahead`."""

    ahead: timedelta = timedelta()

    def __call__(self) -> datetime:
        """Give the moment."""
        return utc_now() + self.ahead


@asynccontextmanager
async def open_redis(
    url: str, *, deadline: float = PATIENT, policy: ReputationPolicy = STANDARD, lives: Lives = LIVES
) -> AsyncIterator[RedisCache]:
    """Open a Redis cache."""
    async with RedisCache.open(url, deadline=deadline, policy=policy.version, lives=lives) as cache:
        yield cache


@asynccontextmanager
async def admin(url: str) -> AsyncIterator["redis.asyncio.Redis"]:
    """Open a plain client, to look at a server and to disturb it."""
    async with redis.asyncio.Redis.from_url(url, socket_timeout=SECONDS) as client:
        yield client


@asynccontextmanager
async def open_service(  # noqa: PLR0913 - one wiring, all by name
    cache: Cache,
    database_url: str,
    *,
    policy: ReputationPolicy = STANDARD,
    lives: Lives = LIVES,
    load_deadline: float = 10.0,
    cache_wait: float = 5.0,
    pool_size: int = 10,
    clock: Callable[[], datetime] = utc_now,
    uniform: Callable[[float, float], float] = random.uniform,
    history_class: type[SessionHistory] = SessionHistory,
) -> AsyncIterator[ReputationService]:
    """Open a service on a cache and a database; patient by default."""
    async with (
        history_class.open(
            database_url, pool_size=pool_size, transaction_pooler=False, deadline=load_deadline
        ) as history,
        ReputationService.open(
            cache=cache,
            history=history,
            policy=policy,
            lives=lives,
            load_deadline=load_deadline,
            cache_wait=cache_wait,
            concurrent_loads=pool_size,
            clock=clock,
            random=uniform,
        ) as service,
    ):
        yield service


class Kit:
    """A cache under test, whose time can be moved on."""

    def __init__(self, cache: Cache, move_on: Callable[[int], Awaitable[None]]) -> None:
        self.cache = cache
        self.move_on = move_on
        """Lets so many milliseconds pass, as far as the cache can tell."""


@asynccontextmanager
async def redis_kit(url: str, *, lives: Lives = LIVES) -> AsyncIterator[Kit]:
    """Give a Redis cache; its time passes by shortening every key's life by as much."""
    async with open_redis(url, lives=lives) as cache, admin(url) as client:

        async def move_on(milliseconds: int) -> None:
            for key in await client.keys("*"):
                await client.pexpire(key, await client.pttl(key) - milliseconds)

        yield Kit(cache, move_on)


@asynccontextmanager
async def memory_kit(*, lives: Lives = LIVES) -> AsyncIterator[Kit]:
    """Give a cache in memory; its time is a number."""
    now = [1000.0]

    async def move_on(milliseconds: int) -> None:
        now[0] += milliseconds / 1000

    yield Kit(MemoryCache(lives=lives, capacity=100_000, monotonic=lambda: now[0]), move_on)


@dataclass(slots=True)
class Truth:
    """One user, whose completed sessions a test adds one by one."""

    database: Database
    user_id: UserId
    match_id: str

    @classmethod
    async def of(cls, database: Database, completed: int = 0) -> "Truth":
        """Make a user with so many completed sessions."""
        user_id, other = await database.add_user(), await database.add_user()
        truth = cls(database, user_id, await database.add_match(user_id, other))
        for _ in range(completed):
            await truth.complete()
        return truth

    async def complete(self) -> None:
        """Add a completed session, which `user_id` was confirmed for."""
        await self.database.add_session(self.match_id, "completed", a=True)


@asynccontextmanager
async def loads_held(database: Database) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Make every count wait in PostgreSQL until the block ends; gives a wait for so many waiting counts.

    A count that waits has its snapshot already: what is committed meanwhile it does not see.
    """
    async with database.owner() as holder, database.owner() as observer:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("lock table public.user_profiles in access exclusive mode")

        async def waiting(expected: int) -> None:
            async def are() -> bool:
                found: int = await observer.fetchval(
                    "select count(*) from pg_locks where not granted"
                    " and database = (select oid from pg_database where datname = current_database())"
                )
                return expected == found

            await eventually(are)

        try:
            yield waiting
        finally:
            await transaction.rollback()


@dataclass(slots=True)
class Proxy:
    """A TCP proxy on loopback in front of a server: it counts round trips, and can be made slow.

    `delay` holds back every answer so many seconds; `turns` are the pieces that clients sent after an answer.
    """

    target: str
    delay: Callable[[], float] = lambda: 0.0
    turns: list[bytes] = field(default_factory=list)
    _port: int = 0

    @property
    def url(self) -> str:
        """The target's URL, by way of this proxy."""
        parts = urlsplit(self.target)
        credentials, _, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{credentials}@127.0.0.1:{self._port}").geturl()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Proxy"]:
        """Serve until the block ends."""
        handlers: set[asyncio.Task[None]] = set()

        def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handlers.add(group.create_task(carry(reader, writer)))

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            parts = urlsplit(self.target)
            upstream_reader, upstream = await asyncio.open_connection(parts.hostname, parts.port)
            answered = True

            async def ask() -> None:
                nonlocal answered
                while piece := await reader.read(1 << 16):
                    if answered:
                        self.turns.append(b"")
                    answered = False
                    self.turns[-1] += piece
                    upstream.write(piece)
                    await upstream.drain()
                upstream.close()

            async def answer() -> None:
                nonlocal answered
                while piece := await upstream_reader.read(1 << 16):
                    answered = True
                    await asyncio.sleep(self.delay())
                    writer.write(piece)
                    await writer.drain()
                writer.close()

            try:
                with suppress(OSError):
                    await asyncio.gather(ask(), answer())
            finally:
                writer.close()
                upstream.close()

        async with asyncio.TaskGroup() as group:
            server = await asyncio.start_server(on_client, "127.0.0.1", 0)
            self._port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for handler in handlers:
                    handler.cancel()
