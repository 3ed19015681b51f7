"""Faults of the real servers: every answer stays right and comes in time, and what recovers is used again soon."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle

import psutil
import pytest
import pytest_asyncio
import redis.asyncio

from goodstanding.cache import RedisCache, value_key
from goodstanding.embedded import Postgres, Valkey
from goodstanding.entry import Lives
from goodstanding.errors import CacheAwayError, TemporarilyUnavailableError
from goodstanding.reputation_service import ReputationService, Source
from tests.conftest import Database, connect, fresh_database
from tests.parts import (
    SECONDS,
    Proxy,
    Truth,
    admin,
    eventually,
    every_read_is_due,
    metric,
    open_redis,
    open_service,
    queries,
    settled,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

_PROMISED = 2.0
_SLACK = 1.5
"""What a busy machine may add to a promised time, in seconds."""
_LONGEST_ANSWER = 1.5
"""A generous bound: 0.3 s is the figure on an idle machine."""

_ORDINARY = Lives(value=300_000, unknown=30_000, last_good=3_600_000, lease=1000)
"""The defaults of the settings."""

Step = Callable[[], Awaitable[object]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def database(postgres: Postgres, template: str) -> AsyncIterator[Database]:
    """Give one migrated database to all tests here: each has users of its own."""
    async with fresh_database(postgres, template) as fresh:
        yield fresh


@dataclass(slots=True)
class _Readers:
    """Readers who never stop, and what they saw."""

    service: ReputationService
    truths: list[Truth]
    floor: int = 0
    """The least that every answer must tell."""
    longest: float = 0.0
    answers: int = 0
    sources: set[Source] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Read one user after another, until cancelled."""
        loop = asyncio.get_running_loop()
        for truth in cycle(self.truths):
            floor, began = self.floor, loop.time()
            answer = await self.service.read(truth.user_id)
            self.longest = max(self.longest, loop.time() - began)
            self.answers += 1
            self.sources.add(answer.source)
            if answer.data is None or answer.data.completed_sessions < floor:
                self.wrong.append(f"{answer}: less than {floor}")
            await asyncio.sleep(0.001)

    async def some(self) -> None:
        """Wait until a few more answers have come."""
        self.sources.clear()
        goal = self.answers + 3 * len(self.truths)
        await eventually(lambda: self.answers >= goal)


@asynccontextmanager
async def _reading(service: ReputationService, truths: list[Truth]) -> AsyncIterator[_Readers]:
    readers = _Readers(service, truths)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(readers.run()) for _ in range(10)]
        try:
            await readers.some()
            yield readers
        finally:
            for task in tasks:
                task.cancel()


async def _in_a_thread(call: Callable[[], None]) -> None:
    await asyncio.to_thread(call)


@dataclass(frozen=True, slots=True)
class _Fault:
    """How to break Redis and how to mend it again."""

    url: str
    strike: Step
    mend: Step


@asynccontextmanager
async def _fault(name: str, valkey: Valkey, url: str) -> AsyncIterator[_Fault]:
    async with admin(url) as client, Proxy(url).serve() as proxy:

        async def start() -> None:
            valkey.start()  # not in a thread: the server ends with the thread that started it

        async def lock() -> None:
            await client.config_set("requirepass", "changed")
            await client.client_kill_filter(_type="normal", skipme=True)

        async def slow() -> None:
            proxy.delay = lambda: 0.2

        async def fast() -> None:
            proxy.delay = lambda: 0.0

        async def refuse(command: str) -> None:
            await client.acl_setuser("default", enabled=True, commands=[command])

        password = client.connection_pool.connection_kwargs["password"]
        faults: dict[str, tuple[Step, Step]] = {
            "refused": (lambda: _in_a_thread(valkey.kill), start),
            "hung": (lambda: _in_a_thread(valkey.pause), lambda: _in_a_thread(valkey.resume)),
            "full": (lambda: client.config_set("maxmemory", 1), lambda: client.config_set("maxmemory", 0)),
            "read-only": (lambda: client.replicaof("127.0.0.1", "1"), lambda: client.replicaof("NO", "ONE")),
            "password changed": (lock, lambda: client.config_set("requirepass", password)),
            "no rights": (lambda: refuse("-@write"), lambda: refuse("+@all")),
            "slow": (slow, fast),
        }
        strike, mend = faults[name]
        try:
            yield _Fault(proxy.url if name == "slow" else url, strike, mend)
        finally:
            await mend()


@pytest.mark.parametrize("name", ["refused", "hung", "full", "read-only", "password changed", "no rights", "slow"])
async def test_redis_may_fail_in_any_way(
    name: str, valkey: Valkey, redis_url: str, database: Database, record_property: Callable[[str, object], None]
) -> None:
    """It counts as away within 2 s, PostgreSQL answers rightly and in time, and it is back 2 s after it recovered."""
    truths = [await Truth.of(database) for _ in range(5)]
    async with (
        _fault(name, valkey, redis_url) as fault,
        open_redis(fault.url, deadline=0.05) as cache,
        open_service(cache, database.service_url, load_deadline=5.0, cache_wait=0.2) as service,
        _reading(service, truths) as readers,
    ):
        await eventually(lambda: cache.available)
        readers.longest = 0.0
        await fault.strike()
        away = await eventually(lambda: not cache.available, within=_PROMISED + _SLACK)
        # From here on nothing can be invalidated, so nothing that is cached may be served.
        await asyncio.gather(*(truth.complete() for truth in truths))
        await readers.some()
        readers.floor = 1
        await readers.some()
        assert {Source.BYPASS} == readers.sources
        with pytest.raises(CacheAwayError):
            await service.invalidate([truths[0].user_id])
        assert ("cache",) == await service.check()
        assert 0 == metric("goodstanding_dependency_up", dependency="redis")
        longest = readers.longest
        readers.floor = 0
        await fault.mend()
        back = await eventually(lambda: cache.available, within=_PROMISED + _SLACK)

        async def are_dropped() -> bool:
            try:
                await service.invalidate([truth.user_id for truth in truths])
            except CacheAwayError:
                return False
            return True

        await eventually(are_dropped)
        readers.floor = 1

        async def hit() -> bool:
            return Source.HIT is (await service.read(truths[0].user_id)).source

        await eventually(hit)
        assert [] == readers.wrong
    record_property("longest_answer", longest)
    print(f"{name}: longest answer {longest:.3f} s, away after {away:.2f} s, back after {back:.2f} s")  # noqa: T201 - shown with -rP
    assert longest < _LONGEST_ANSWER


@pytest.mark.parametrize("name", ["full", "read-only", "hung", "slow"])
async def test_an_idle_service_notices_too(name: str, valkey: Valkey, redis_url: str) -> None:
    """Without a single request, a Redis that takes no writes is away within 2 s, and back 2 s after it takes them."""
    async with _fault(name, valkey, redis_url) as fault, open_redis(fault.url, deadline=0.05) as cache:
        await eventually(lambda: cache.available)
        await fault.strike()
        await eventually(lambda: not cache.available, within=_PROMISED + _SLACK)
        await fault.mend()
        await eventually(lambda: cache.available, within=_PROMISED + _SLACK)


async def test_a_redis_that_takes_no_writes_is_not_read(redis_url: str, database: Database) -> None:
    """Hits alone would never notice; the truth that could not be announced is read from PostgreSQL."""
    truth = await Truth.of(database)
    async with (
        admin(redis_url) as client,
        open_redis(redis_url) as cache,
        open_service(cache, database.service_url) as service,
    ):
        await service.read(truth.user_id)
        await settled(service)
        await client.replicaof("127.0.0.1", "1")
        try:
            assert Source.HIT is (await service.read(truth.user_id)).source
            await truth.complete()

            async def is_right() -> bool:
                answer = await service.read(truth.user_id)
                return answer.data is not None and 1 == answer.data.completed_sessions

            await eventually(is_right, within=_PROMISED + _SLACK)
            assert Source.BYPASS is (await service.read(truth.user_id)).source
        finally:
            await client.replicaof("NO", "ONE")


async def test_a_flushed_redis_is_an_empty_one(redis_url: str, database: Database) -> None:
    """Values and leases may vanish at any moment, also in the middle of loads: answers stay right."""
    truths = [await Truth.of(database, 1) for _ in range(5)]
    async with (
        admin(redis_url) as client,
        open_redis(redis_url) as cache,
        open_service(cache, database.service_url) as service,
        _reading(service, truths) as readers,
    ):
        readers.floor = 1
        for _ in range(10):
            await client.flushall()
            await readers.some()
        assert [] == readers.wrong
        assert Source.BYPASS not in readers.sources
        assert cache.available


async def test_killed_connections_are_replaced(redis_url: str, database: Database) -> None:
    """An administrator who ends every connection costs a retry from PostgreSQL at most."""
    truths = [await Truth.of(database, 1) for _ in range(5)]
    async with (
        admin(redis_url) as client,
        open_redis(redis_url, lives=_ORDINARY) as cache,
        open_service(cache, database.service_url, lives=_ORDINARY, cache_wait=0.2) as service,
        _reading(service, truths) as readers,
    ):
        readers.floor = 1
        for _ in range(10):
            await client.client_kill_filter(_type="normal", skipme=True)
            await readers.some()
        assert [] == readers.wrong
        await eventually(lambda: cache.available, within=_PROMISED + _SLACK)


async def test_a_fallback_is_no_stampede(redis_url: str, database: Database) -> None:
    """Without Redis a thousand reads of ten users are a few queries, and never more at once than connections."""
    truths = [await Truth.of(database, 1) for _ in range(10)]
    async with (
        open_redis("redis://127.0.0.1:1/0", deadline=0.05) as cache,
        open_service(cache, database.service_url, pool_size=3) as service,
    ):
        before = queries()
        answers = await asyncio.gather(*(service.read(truth.user_id) for _ in range(100) for truth in truths))
        assert {1} == {answer.data.completed_sessions for answer in answers if answer.data is not None}
        assert queries() - before <= 20
        async with database.owner() as observer:
            connections = await observer.fetchval(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and application_name = 'goodstanding'"
            )
        assert connections <= 3
    assert redis_url  # only so that the server of the other tests is in order afterwards


# PostgreSQL.


@asynccontextmanager
async def _outlived(url: str) -> AsyncIterator[tuple[RedisCache, "redis.asyncio.Redis"]]:
    async with open_redis(url) as cache, admin(url) as client:
        yield cache, client


async def test_postgres_may_crash_and_come_back(postgres: Postgres, redis_url: str, database: Database) -> None:
    """Hits stay hits, expired values are served stale, strangers wait; 2 s after it is back all is as before."""
    known, stale, cold = [await Truth.of(database, number) for number in (1, 2, 3)]
    async with (
        _outlived(redis_url) as (cache, client),
        open_service(cache, database.service_url, load_deadline=0.5, cache_wait=0.1) as service,
    ):
        for truth in (known, stale):
            await service.read(truth.user_id)
        await settled(service)
        await client.delete(value_key(stale.user_id))
        await asyncio.to_thread(postgres.kill)
        try:
            for _ in range(10):
                assert Source.HIT is (await service.read(known.user_id)).source
                answer = await service.read(stale.user_id)
                assert (Source.STALE, True) == (answer.source, answer.ttl < 0)
                assert answer.data is not None
                assert 2 == answer.data.completed_sessions
                with pytest.raises(TemporarilyUnavailableError):
                    await service.read(cold.user_id)
            assert ("database",) == await service.check()
            # An invalidation needs Redis alone, and what it dropped is not served stale either.
            await service.invalidate([stale.user_id])
            with pytest.raises(TemporarilyUnavailableError):
                await service.read(stale.user_id)
        finally:
            postgres.start()

        async def is_answered() -> bool:
            try:
                return Source.MISS is (await service.read(cold.user_id)).source
            except TemporarilyUnavailableError:
                return False

        await eventually(is_answered, within=_PROMISED + _SLACK)
        assert Source.MISS is (await service.read(stale.user_id)).source
        await eventually(lambda: _is_well(service))


async def _is_well(service: ReputationService) -> bool:
    return () == await service.check()


async def test_postgres_may_hang(postgres: Postgres, redis_url: str, database: Database) -> None:
    """No answer takes much longer than the load deadline, and once its circuit is open none takes any time."""
    stale, cold = await Truth.of(database, 2), await Truth.of(database, 3)
    loop = asyncio.get_running_loop()
    async with (
        _outlived(redis_url) as (cache, client),
        open_service(cache, database.service_url, load_deadline=0.3, cache_wait=0.1) as service,
    ):
        await service.read(stale.user_id)
        await settled(service)
        await client.delete(value_key(stale.user_id))
        await asyncio.to_thread(postgres.pause)
        try:
            longest = 0.0

            async def is_open() -> bool:
                nonlocal longest
                began = loop.time()
                assert Source.STALE is (await service.read(stale.user_id)).source
                longest = max(longest, loop.time() - began)
                return 0 == metric("goodstanding_dependency_up", dependency="database")

            await eventually(is_open)
            assert longest < 0.3 + _SLACK
            began = loop.time()
            for _ in range(50):
                assert Source.STALE is (await service.read(stale.user_id)).source
                with pytest.raises(TemporarilyUnavailableError):
                    await service.read(cold.user_id)
            assert (loop.time() - began) / 100 < 0.1
        finally:
            await asyncio.to_thread(postgres.resume)

        async def is_answered() -> bool:
            try:
                return Source.MISS is (await service.read(cold.user_id)).source
            except TemporarilyUnavailableError:
                return False

        await eventually(is_answered, within=_PROMISED + _SLACK)


async def test_ended_connections_of_postgres_go_unnoticed(redis_url: str, database: Database) -> None:
    """An administrator who ends the idle connections, as a pooler or a failover does, costs no reader an error."""
    truth = await Truth.of(database, 1)
    async with (
        open_redis(redis_url) as cache,
        open_service(cache, database.service_url) as service,
        connect(database.superuser_url) as superuser,
    ):
        for _ in range(5):
            assert Source.REQUEST is (await service.read(truth.user_id, use_cache=False)).source
            ended = await superuser.fetch(
                "select pid, pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and application_name = 'goodstanding'"
            )
            assert ended
            await eventually(lambda: not any(psutil.pid_exists(row["pid"]) for row in ended))  # noqa: B023 - awaited here
            await cache.fetch([truth.user_id])  # a turn of the loop, in which the ends arrive


async def test_with_both_away_the_answer_is_to_come_back(valkey: Valkey, redis_url: str, database: Database) -> None:
    """Nobody waits long for nothing: 503, at once when both circuits are open."""
    truth = await Truth.of(database, 1)
    loop = asyncio.get_running_loop()
    async with (
        open_redis(redis_url, deadline=0.05) as cache,
        open_service(
            cache, "postgresql://nobody:nothing@127.0.0.1:1/none", load_deadline=0.3, uniform=every_read_is_due
        ) as service,
    ):
        await asyncio.to_thread(valkey.kill)

        async def both_away() -> bool:
            with pytest.raises(TemporarilyUnavailableError):
                await service.read(truth.user_id)
            return {"database", "cache"} == set(await service.check())

        await eventually(both_away, within=SECONDS)
        began = loop.time()
        for _ in range(50):
            with pytest.raises(TemporarilyUnavailableError):
                await service.read(truth.user_id)
        assert (loop.time() - began) / 50 < 0.1
