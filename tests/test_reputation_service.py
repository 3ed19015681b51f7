"""The service decides where an answer comes from: the same over Redis and over memory, on the real PostgreSQL."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from goodstanding import reputation_service as service_module
from goodstanding.cache import RedisCache, last_good_key, lease_key, value_key
from goodstanding.data import AtFault, BadgeColor, SessionId, UserId
from goodstanding.embedded import Postgres
from goodstanding.entry import Entry, Fetched, Lives, encode
from goodstanding.errors import CacheAwayError, SessionNotFoundError, TemporarilyUnavailableError, UserNotFoundError
from goodstanding.policy import LEGACY, STANDARD
from goodstanding.reputation_service import Answer, LoadReason, ReputationService, Source, _Flight
from tests.conftest import Database, fresh_database
from tests.parts import (
    LIVES,
    PATIENT,
    SECONDS,
    Kit,
    MovingClock,
    Proxy,
    Truth,
    admin,
    entry,
    eventually,
    every_read_is_due,
    loads_held,
    memory_kit,
    metric,
    open_redis,
    open_service,
    queries,
    redis_kit,
    settled,
    stranger,
    user,
)

_DEAD_DATABASE = "postgresql://nobody:nothing@127.0.0.1:1/none"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def database(postgres: Postgres, template: str) -> AsyncIterator[Database]:
    """Give one migrated database to all tests here: each has users of its own."""
    async with fresh_database(postgres, template) as fresh:
        yield fresh


@pytest_asyncio.fixture(loop_scope="module", params=["redis", "memory"])
async def kit(request: pytest.FixtureRequest) -> AsyncIterator[Kit]:
    """Give each cache in turn."""
    if request.param == "memory":
        async with memory_kit() as kit:
            yield kit
    else:
        async with redis_kit(request.getfixturevalue("redis_url")) as kit:
            yield kit


@pytest_asyncio.fixture(loop_scope="module")
async def service(kit: Kit, database: Database) -> AsyncIterator[ReputationService]:
    """Give a service over each cache in turn."""
    async with open_service(kit.cache, database.service_url) as service:
        yield service


def _seen(answer: Answer) -> tuple[int, str]:
    assert answer.data is not None
    return answer.data.completed_sessions, answer.source.value


async def _told(service: ReputationService, user_id: UserId, *, use_cache: bool = True) -> tuple[int, str]:
    """Read, with everything in the cache that was loaded before, and then what this read loaded."""
    await settled(service)
    answer = await service.read(user_id, use_cache=use_cache)
    await settled(service)
    return _seen(answer)


async def test_a_miss_then_hits(service: ReputationService, database: Database) -> None:
    """The first read counts and fills, the next ones need no query; the numbers are the sessions'."""
    truth = await Truth.of(database, 11)
    await database.add_session(truth.match_id, "no_show", a=False, b=True)
    before = queries()
    first = await service.read(truth.user_id)
    await settled(service)
    assert (
        (Source.MISS, 10, BadgeColor.GOLD, 11, 1)
        == (
            first.source,
            *(first.data.score, first.data.badge_color, first.data.completed_sessions, first.data.no_shows),
        )
        if first.data
        else False
    )
    assert 298 <= first.ttl <= 300
    second = await service.read(truth.user_id)
    assert Source.HIT == second.source
    assert first.data == second.data
    assert 298 <= second.ttl <= 300
    assert before + 1 == queries()


async def test_an_expired_value_is_loaded_anew(service: ReputationService, database: Database, kit: Kit) -> None:
    """After its life a value is a miss, and what is loaded then is the truth of then."""
    truth = await Truth.of(database, 1)
    assert (1, "miss") == await _told(service, truth.user_id)
    await truth.complete()
    assert (1, "hit") == await _told(service, truth.user_id)
    await kit.move_on(LIVES.value)
    assert (2, "miss") == await _told(service, truth.user_id)


async def test_an_unknown_user_is_remembered_for_half_a_minute(
    service: ReputationService, database: Database, kit: Kit
) -> None:
    """Asking again costs no query; once the memory ends, or the user is invalidated, a new user is seen."""
    one, two = stranger(), stranger()
    before = queries()
    for _ in range(3):
        with pytest.raises(UserNotFoundError):
            await service.read(one)
        await settled(service)
    assert before + 1 == queries()
    assert {one: (None, Source.HIT)} == {
        who: (answer.data, answer.source) for who, answer in (await service.read_many([one])).items()
    }
    await database.add_user(one)
    await kit.move_on(LIVES.unknown)
    assert (0, "miss") == await _told(service, one)
    with pytest.raises(UserNotFoundError):
        await service.read(two)
    await database.add_user(two)
    await service.invalidate([two])
    assert (0, "miss") == await _told(service, two)


async def test_a_new_user_has_a_green_badge(service: ReputationService, database: Database) -> None:
    """Nothing completed, nothing missed: 0, 0, 0, green."""
    data = (await service.read(await database.add_user())).data
    assert data is not None
    assert (0, BadgeColor.GREEN, 0, 0) == (data.score, data.badge_color, data.completed_sessions, data.no_shows)


async def test_an_invalidation_makes_the_next_read_count(service: ReputationService, database: Database) -> None:
    """One user's, or everybody's; invalidating somebody who is not cached, or unknown, is no error."""
    truth, other = await Truth.of(database), await Truth.of(database)
    for who in (truth, other):
        await service.read(who.user_id)
        await settled(service)
        await who.complete()
    before = metric("goodstanding_invalidations_total", result="done")
    await service.invalidate([truth.user_id, stranger()])
    assert before + 2 == metric("goodstanding_invalidations_total", result="done")
    assert (1, "miss") == await _told(service, truth.user_id)
    assert (0, "hit") == await _told(service, other.user_id)
    assert 2 == await service.invalidate_all()
    assert (1, "miss") == await _told(service, other.user_id)
    assert 1 == await service.invalidate_all()


async def test_use_cache_false_counts_and_refreshes(service: ReputationService, database: Database) -> None:
    """It never answers from the cache, and what it counted is what the next reader is served."""
    truth = await Truth.of(database)
    await service.read(truth.user_id)
    await truth.complete()
    assert (1, "request") == await _told(service, truth.user_id, use_cache=False)
    assert (1, "hit") == await _told(service, truth.user_id)
    with pytest.raises(UserNotFoundError):
        await service.read(stranger(), use_cache=False)


async def test_use_cache_false_seizes_the_lease(service: ReputationService, database: Database) -> None:
    """A load under way neither answers for it nor overwrites what it stores."""
    truth = await Truth.of(database)
    async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
        old = group.create_task(service.read(truth.user_id))
        await waiting(1)
        await truth.complete()
        new = group.create_task(service.read(truth.user_id, use_cache=False))
        joined = group.create_task(_never_joins_what_came_before(service, truth.user_id))
        # One query runs; the one that was asked for waits for it, and everybody after that joins the second.
        await waiting(1)
    assert (0, "miss") == _seen(old.result())
    assert (1, "request") == _seen(new.result())
    assert (1, "request") == _seen(joined.result())
    assert (1, "hit") == await _told(service, truth.user_id)


async def _never_joins_what_came_before(service: ReputationService, user_id: UserId) -> Answer:
    return await service.read(user_id, use_cache=False)


async def test_many_reads_with_use_cache_false_are_one_running_and_one_waiting(
    service: ReputationService, database: Database, kit: Kit
) -> None:
    """However many ask for a count at once, in however many waves, PostgreSQL sees two."""
    truth = await Truth.of(database)
    before = queries()
    async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
        first = group.create_task(service.read(truth.user_id, use_cache=False))
        await waiting(1)
        await truth.complete()
        rest = []
        for _ in range(3):
            rest += [group.create_task(service.read(truth.user_id, use_cache=False)) for _ in range(20)]
            await _let_things_happen(kit)
        await waiting(1)
    assert (0, "request") == _seen(first.result())
    assert [(1, "request")] * 60 == [_seen(task.result()) for task in rest]
    assert before + 2 == queries()


async def _let_things_happen(kit: Kit) -> None:
    """Let whatever could go on go on: many turns of the loop, many trips to the cache."""
    for _ in range(20):
        await kit.cache.fetch([user(1)])
        await asyncio.sleep(0)


async def test_use_cache_false_is_never_answered_by_another_processes_value(redis_url: str, database: Database) -> None:
    """It does not share a load that may end with what was cached meanwhile."""
    truth = await Truth.of(database, 1)
    async with (
        open_redis(redis_url) as cache,
        open_redis(redis_url) as elsewhere,
        open_service(cache, database.service_url) as service,
        asyncio.TaskGroup() as group,
    ):
        await elsewhere.lease([truth.user_id], "other")
        plain = group.create_task(service.read(truth.user_id))
        await eventually(lambda: truth.user_id in service._flights)  # noqa: SLF001 - it waits for the other
        asked = group.create_task(service.read(truth.user_id, use_cache=False))
        await asyncio.sleep(0)
        await elsewhere.fill({truth.user_id: entry(99)}, "other")
    assert (99, "miss") == _seen(plain.result())
    assert (1, "request") == _seen(asked.result())


# Refresh-ahead.


async def test_an_old_entry_is_served_and_refreshed_once(kit: Kit, database: Database) -> None:
    """It is served at once to everybody, while exactly one load replaces it; nobody waits for that load."""
    truth = await Truth.of(database)
    clock = MovingClock()
    refreshed = metric("goodstanding_loads_total", reason="refresh")
    async with open_service(kit.cache, database.service_url, clock=clock, uniform=every_read_is_due) as service:
        await service.read(truth.user_id)
        await settled(service)
        await truth.complete()
        clock.ahead = timedelta(milliseconds=0.89 * LIVES.value)
        assert (0, "hit") == _seen(await service.read(truth.user_id))
        assert refreshed == metric("goodstanding_loads_total", reason="refresh")
        clock.ahead = timedelta(milliseconds=0.91 * LIVES.value)
        async with loads_held(database) as waiting:
            answers = await asyncio.gather(*(service.read(truth.user_id) for _ in range(50)))
            assert {(0, "hit")} == {_seen(answer) for answer in answers}
            assert all(0 <= answer.ttl <= 28 for answer in answers)
            await waiting(1)
            assert (0, "hit") == _seen(await service.read(truth.user_id))

        async def is_fresh() -> bool:
            return (1, "hit") == await _told(service, truth.user_id)

        await eventually(is_fresh)
        assert refreshed + 1 == metric("goodstanding_loads_total", reason="refresh")


async def test_the_moment_of_a_refresh_is_jittered(kit: Kit, database: Database) -> None:
    """The drawn number moves it between 80 and 90 % of an entry's life, so that entries of one moment spread."""
    clock, drawn = MovingClock(), [0.0]

    def draw(low: float, high: float) -> float:
        return drawn[0] if (0.0, 0.1) == (low, high) else low

    refreshed = metric("goodstanding_loads_total", reason="refresh")
    async with open_service(kit.cache, database.service_url, clock=clock, uniform=draw) as service:
        for jitter, life, due in ((0.1, 0.89, False), (0.05, 0.84, False), (0.0, 0.79, False), (0.0, 0.81, True)):
            truth = await Truth.of(database)
            clock.ahead, drawn[0] = timedelta(), jitter
            await service.read(truth.user_id)
            await settled(service)
            clock.ahead = timedelta(milliseconds=life * LIVES.value)
            await service.read(truth.user_id)
            if due:
                await eventually(lambda: refreshed + 1 == metric("goodstanding_loads_total", reason="refresh"))
            else:
                assert refreshed == metric("goodstanding_loads_total", reason="refresh")


async def test_one_process_of_the_fleet_refreshes(redis_url: str, database: Database) -> None:
    """Two services see the same old entry: one lease, one load."""
    truth = await Truth.of(database)
    clock = MovingClock()
    async with (
        open_redis(redis_url) as one_cache,
        open_redis(redis_url) as two_cache,
        open_service(one_cache, database.service_url, clock=clock, uniform=every_read_is_due) as one,
        open_service(two_cache, database.service_url, clock=clock, uniform=every_read_is_due) as two,
    ):
        await one.read(truth.user_id)
        await settled(one)
        clock.ahead = timedelta(milliseconds=0.95 * LIVES.value)
        before = queries()
        async with loads_held(database) as waiting:
            for _ in range(20):
                await one.read(truth.user_id)
                await two.read(truth.user_id)
            await waiting(1)

        async def is_fresh() -> bool:
            return (await two.read(truth.user_id)).ttl > 200

        await eventually(is_fresh)
        assert before + 1 == queries()


async def test_an_invalidation_beats_a_refresh_under_way(kit: Kit, database: Database) -> None:
    """A refresh that began before it stores nothing, and no later read joins it."""
    truth = await Truth.of(database)
    clock = MovingClock()
    async with open_service(kit.cache, database.service_url, clock=clock, uniform=every_read_is_due) as service:
        await service.read(truth.user_id)
        await settled(service)
        clock.ahead = timedelta(milliseconds=0.95 * LIVES.value)
        async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
            await service.read(truth.user_id)
            await waiting(1)
            await truth.complete()
            await service.invalidate([truth.user_id])
            after = group.create_task(service.read(truth.user_id))
            await waiting(2)
        assert (1, "miss") == _seen(after.result())
        assert (1, "hit") == await _told(service, truth.user_id)


async def test_a_failed_refresh_leaves_the_entry(redis_url: str, database: Database) -> None:
    """While PostgreSQL is away an old entry is a hit until it expires; the first failures are all that is tried."""
    truth = await Truth.of(database, 1)
    clock = MovingClock()
    async with open_redis(redis_url) as cache:
        async with open_service(cache, database.service_url) as service:
            await service.read(truth.user_id)
        async with open_service(cache, _DEAD_DATABASE, clock=clock, uniform=every_read_is_due) as service:
            clock.ahead = timedelta(milliseconds=0.95 * LIVES.value)
            before = metric("goodstanding_loads_total", reason="refresh")

            async def gave_up() -> bool:
                assert (1, "hit") == await _told(service, truth.user_id)
                return 0 == metric("goodstanding_dependency_up", dependency="database")

            await eventually(gave_up)
            await eventually(lambda: not service._flights)  # noqa: SLF001 - the refreshes have ended
            tried = metric("goodstanding_loads_total", reason="refresh")
            assert before < tried <= before + 4
            async with admin(redis_url) as client:
                await client.config_resetstat()
                for _ in range(20):
                    assert (1, "hit") == await _told(service, truth.user_id)
                # With its circuit open not even a lease is asked for.
                assert "cmdstat_set" not in await client.info("commandstats")
                assert tried == metric("goodstanding_loads_total", reason="refresh")
                assert 0 == await client.exists(lease_key(truth.user_id))


# Single flight.


async def test_two_hundred_reads_of_a_cold_user_are_one_query(service: ReputationService, database: Database) -> None:
    """Inside one process a user's concurrent loads are one load."""
    truth = await Truth.of(database, 3)
    before = queries()
    answers = await asyncio.gather(*(service.read(truth.user_id) for _ in range(200)))
    assert {3} == {_seen(answer)[0] for answer in answers}
    assert before + 1 == queries()


async def test_late_readers_join_the_load_under_way(kit: Kit, database: Database) -> None:
    """A reader who comes while the query runs, and sees its lease, shares it."""
    truth = await Truth.of(database, 1)
    before = queries()
    async with (
        open_service(kit.cache, database.service_url, cache_wait=0.0) as service,
        asyncio.TaskGroup() as group,
        loads_held(database) as waiting,
    ):
        tasks = [group.create_task(service.read(truth.user_id))]
        await waiting(1)
        for _ in range(20):
            tasks.append(group.create_task(service.read(truth.user_id)))
            await asyncio.sleep(0)
        tasks.append(group.create_task(_one_of(service, truth.user_id)))
        await eventually(lambda: service._flights[truth.user_id].newest >= 21)  # noqa: SLF001 - all joined
        await waiting(1)
    assert {(1, "miss")} == {_seen(task.result()) for task in tasks}
    assert before + 1 == queries()


async def _one_of(service: ReputationService, user_id: UserId) -> Answer:
    return (await service.read_many([user_id]))[user_id]


async def test_cancelled_callers_harm_nobody(service: ReputationService, database: Database) -> None:
    """A third of the callers, the first one too, goes away at random moments; the others are answered."""
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    for _ in range(10):
        truth = await Truth.of(database, 1)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(service.read(truth.user_id)) for _ in range(60)]
            doomed = [tasks[0], *rng.sample(tasks[1:], 19)]
            for task in doomed:
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
                task.cancel()
        survivors = [task.result() for task in tasks if task not in doomed]
        assert {1} == {_seen(answer)[0] for answer in survivors}, f"seed {seed}"
    await eventually(lambda: not service._flights)  # noqa: SLF001 - nothing is left behind


async def test_a_load_whose_callers_all_went_away_still_fills(service: ReputationService, database: Database) -> None:
    """The load belongs to the service, not to whoever asked first."""
    truth = await Truth.of(database, 1)
    async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
        task = group.create_task(service.read(truth.user_id))
        await waiting(1)
        task.cancel()

    async def is_cached() -> bool:
        return (1, "hit") == await _told(service, truth.user_id)

    await eventually(is_cached)


async def test_a_hundred_cold_users_at_once_want_for_no_connection(kit: Kit, database: Database) -> None:
    """More users than connections wait for their turn; nobody is refused."""
    users = [await database.add_user() for _ in range(150)]
    async with open_service(kit.cache, database.service_url, pool_size=3) as service:
        answers = await asyncio.gather(*(service.read(who) for who in users))
    assert {(0, "miss")} == {_seen(answer) for answer in answers}


async def test_whoever_waits_too_long_for_a_turn_is_told_to_come_back(kit: Kit, database: Database) -> None:
    """While every connection is taken, a wait for one ends with the load deadline, and is no fault of PostgreSQL's."""
    users = [await database.add_user() for _ in range(8)]
    loop = asyncio.get_running_loop()
    async with (
        open_service(kit.cache, database.service_url, pool_size=1, load_deadline=0.3) as service,
        loads_held(database),
    ):
        began = loop.time()
        outcomes = await asyncio.gather(*(_outcome(service, who) for who in users))
        assert all(isinstance(outcome, TemporarilyUnavailableError) for outcome in outcomes)
        assert loop.time() - began < len(users) * 0.3


async def test_whoever_would_wait_in_vain_is_refused_at_once(kit: Kit, database: Database) -> None:
    """While loads wait for their turn longer than is any use, others are refused; what is cached is answered."""
    users = [await database.add_user() for _ in range(80)]
    cached, refused = await database.add_user(), metric("goodstanding_loads_refused_total")
    proxy = Proxy(database.service_url, delay=lambda: 0.05)
    async with proxy.serve(), open_service(kit.cache, proxy.url, pool_size=1, load_deadline=2.0) as service:
        await service.read(cached)
        first = await asyncio.gather(*(_outcome(service, who) for who in users[:20]))
        assert all(isinstance(outcome, Answer) for outcome in first)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_outcome(service, who)) for who in users[20:]]
            await eventually(lambda: any(task.done() for task in tasks))
            told = [task.result() for task in tasks if task.done()]
            assert (0, "hit") == _seen(await service.read(cached))
        assert all(isinstance(one, TemporarilyUnavailableError) for one in told)
        assert refused + len(told) == metric("goodstanding_loads_refused_total")
        assert any(isinstance(task.result(), Answer) for task in tasks)


# A read that begins after an invalidation never joins a load begun before it.


async def test_a_read_after_an_invalidation_does_not_join_the_load_before_it(
    service: ReputationService, database: Database
) -> None:
    """The earlier load ends with what it saw, stores nothing, and later readers share a load of their own."""
    truth = await Truth.of(database)
    lost = metric("goodstanding_cache_fills_total", result="lost")
    async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
        old = group.create_task(service.read(truth.user_id))
        await waiting(1)
        await truth.complete()
        await service.invalidate([truth.user_id])
        new = [group.create_task(service.read(truth.user_id)) for _ in range(10)]
        await waiting(2)
    assert (0, "miss") == _seen(old.result())
    assert {(1, "miss")} == {_seen(task.result()) for task in new}
    assert (1, "hit") == await _told(service, truth.user_id)
    assert lost + 1 == metric("goodstanding_cache_fills_total", result="lost")


@pytest.mark.parametrize("everybody", [False, True])
async def test_an_invalidation_by_another_process_counts_as_well(
    redis_url: str,
    database: Database,
    everybody: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """The lease that is gone, or is another's, tells a reader that the load in its process is too old."""
    truth = await Truth.of(database)
    async with open_redis(redis_url) as one_cache, open_redis(redis_url) as two_cache:
        async with (
            open_service(one_cache, database.service_url) as one,
            open_service(two_cache, database.service_url) as two,
            asyncio.TaskGroup() as group,
            loads_held(database) as waiting,
        ):
            old = group.create_task(one.read(truth.user_id))
            await waiting(1)
            await truth.complete()
            if everybody:
                await two.invalidate_all()
            else:
                await two.invalidate([truth.user_id])
            new = group.create_task(one.read(truth.user_id))
            await waiting(2)
            late = group.create_task(two.read(truth.user_id))
        assert (0, "miss") == _seen(old.result())
        assert (1, "miss") == _seen(new.result())
        assert 1 == _seen(late.result())[0]


async def test_without_redis_one_load_runs_and_one_waits(database: Database) -> None:
    """Nothing vouches for a running query then, so a later read never joins it; however many ask, it is two."""
    truth = await Truth.of(database)
    before = queries()
    async with (
        open_redis("redis://127.0.0.1:1/0", deadline=0.2) as cache,
        open_service(cache, database.service_url) as service,
        asyncio.TaskGroup() as group,
        loads_held(database) as waiting,
    ):
        old = group.create_task(service.read(truth.user_id))
        await waiting(1)
        await truth.complete()
        new = [group.create_task(service.read(truth.user_id)) for _ in range(50)]
        await waiting(1)
    assert (0, "bypass") == _seen(old.result())
    assert {(1, "bypass")} == {_seen(task.result()) for task in new}
    assert before + 2 == queries()


class _HeldCache(RedisCache):
    """A Redis cache whose answers that hold an entry can be held back after Redis gave them."""

    held: asyncio.Event | None = None
    holding = 0

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read as ever, and wait while `held` is set up."""
        found = await super().fetch(user_ids, token=token)
        await self._hold(read.entry for read in found)
        return found

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read as ever, and wait while `held` is set up."""
        found = await super().fetch_last_good(user_ids)
        await self._hold(found)
        return found

    async def _hold(self, found: Iterable[Entry | None]) -> None:
        if self.held is not None and any(found):
            self.holding += 1
            await self.held.wait()


@asynccontextmanager
async def _open_held(url: str) -> AsyncIterator[_HeldCache]:
    async with _HeldCache.open(url, deadline=PATIENT, policy=STANDARD.version, lives=LIVES) as cache:
        yield cache


async def test_a_wait_for_another_process_never_ends_with_what_an_invalidation_dropped(
    redis_url: str, database: Database
) -> None:
    """A reader who joins it after an invalidation is not given what it saw in the cache before that."""
    truth = await Truth.of(database)
    async with _open_held(redis_url) as cache, open_redis(redis_url) as elsewhere:
        async with open_service(cache, database.service_url) as service, asyncio.TaskGroup() as group:
            await elsewhere.lease([truth.user_id], "other")
            early = group.create_task(service.read(truth.user_id))
            await eventually(lambda: truth.user_id in service._flights)  # noqa: SLF001 - it waits for the other
            gate = cache.held = asyncio.Event()
            async with open_service(elsewhere, database.service_url) as filler:
                await filler.read(truth.user_id, use_cache=False)
            await eventually(lambda: cache.holding > 0)
            # The value was read, and is still on its way.
            cache.held = None
            await truth.complete()
            await elsewhere.invalidate([truth.user_id])
            late = group.create_task(service.read(truth.user_id))
            await eventually(lambda: service._flights[truth.user_id].newest > 0)  # noqa: SLF001 - it joined
            gate.set()
        assert (1, "miss") == _seen(late.result())
        assert _seen(early.result())[0] in {0, 1}


async def test_a_last_known_good_copy_never_comes_back_after_an_invalidation(
    redis_url: str, database: Database
) -> None:
    """A reader who comes after it does not share a copy that was read before it."""
    truth = await Truth.of(database, 1)
    async with _open_held(redis_url) as cache, open_redis(redis_url) as elsewhere:
        async with open_service(elsewhere, database.service_url) as service:
            await service.read(truth.user_id)
        async with open_service(cache, _DEAD_DATABASE) as service, asyncio.TaskGroup() as group:
            await eventually(lambda: _is_away(service))
            gate = cache.held = asyncio.Event()
            early = group.create_task(service.read(truth.user_id, use_cache=False))
            await eventually(lambda: cache.holding > 0)
            cache.held = None
            await elsewhere.invalidate([truth.user_id])
            late = group.create_task(_outcome(service, truth.user_id))
            await eventually(lambda: late.done() or _newest(service, truth.user_id) > 0)  # answered, or it joined
            gate.set()
        assert (1, "stale") == _seen(early.result())
        assert isinstance(late.result(), TemporarilyUnavailableError)


def _newest(service: ReputationService, user_id: UserId) -> int:
    flight = service._flights.get(user_id)  # noqa: SLF001 - nothing else tells that a read has joined
    return -1 if flight is None else flight.newest


async def _is_away(service: ReputationService) -> bool:
    return ("database",) == await service.check()


async def test_a_wait_ends_with_the_other_processes_value(redis_url: str, database: Database) -> None:
    """Whoever finds the lease taken is answered by its holder's load."""
    truth = await Truth.of(database, 2)
    before = queries()
    async with (
        open_redis(redis_url) as one_cache,
        open_redis(redis_url) as two_cache,
        open_service(one_cache, database.service_url) as one,
        open_service(two_cache, database.service_url) as two,
        asyncio.TaskGroup() as group,
        loads_held(database) as waiting,
    ):
        first = group.create_task(one.read(truth.user_id))
        await waiting(1)
        rest = [group.create_task(two.read(truth.user_id)) for _ in range(20)]
        await eventually(lambda: truth.user_id in two._flights)  # noqa: SLF001 - it waits for the other
    assert {(2, "miss")} == {_seen(task.result()) for task in (first, *rest)}
    assert before + 1 == queries()


async def test_a_wait_for_a_holder_that_gives_up_takes_over(redis_url: str, database: Database) -> None:
    """When the lease is given back without a value, the one who waits takes it, loads and fills."""
    truth = await Truth.of(database, 2)
    async with open_redis(redis_url) as cache, open_redis(redis_url) as elsewhere:
        await elsewhere.lease([truth.user_id], "other")
        async with open_service(cache, database.service_url) as service, asyncio.TaskGroup() as group:
            task = group.create_task(service.read(truth.user_id))
            await eventually(lambda: truth.user_id in service._flights)  # noqa: SLF001 - it waits for the other
            await elsewhere.release([truth.user_id], "other")
        assert (2, "miss") == _seen(task.result())
        assert 1 == sum(found.entry is not None for found in await elsewhere.fetch([truth.user_id]))


async def test_a_wait_for_a_holder_that_died_is_bounded(redis_url: str, database: Database) -> None:
    """After `cache_wait` it loads without filling: the lease is not its own."""
    truth = await Truth.of(database, 2)
    async with open_redis(redis_url) as cache, open_redis(redis_url) as elsewhere:
        await elsewhere.lease([truth.user_id], "dead")
        async with open_service(cache, database.service_url, cache_wait=0.1) as service:
            assert (2, "miss") == await _told(service, truth.user_id)
        assert [Fetched(None, "dead")] == await elsewhere.fetch([truth.user_id])


async def test_a_wait_leaves_time_for_a_query(redis_url: str, database: Database) -> None:
    """However long `cache_wait` is, half of the load deadline remains."""
    truth = await Truth.of(database, 2)
    async with open_redis(redis_url) as cache, open_redis(redis_url) as elsewhere:
        await elsewhere.lease([truth.user_id], "dead")
        async with open_service(cache, database.service_url, load_deadline=2.0, cache_wait=5.0) as service:
            assert (2, "miss") == await _told(service, truth.user_id)


@pytest.mark.parametrize(
    ("started", "begin", "lease", "expected"),
    [
        (None, 5, None, True),
        (6, 5, None, True),
        (6, 5, "another", True),
        (4, 5, None, False),
        (4, 5, "another", False),
        (4, 5, "ours", True),
    ],
)
async def test_who_may_share_a_load(*, started: int | None, begin: int, lease: str | None, expected: bool) -> None:
    """Reads that began before its query did, or that saw its lease: for them nothing can be missing from it."""
    loaded = asyncio.get_running_loop().create_future()
    flight = _Flight((user(1), user(2)), LoadReason.MISS, "ours", loaded, 0.0, leased={user(1)}, started=started)
    assert expected == flight.serves(user(1), begin=begin, lease=lease)
    assert (expected and lease != "ours") == flight.serves(user(2), begin=begin, lease=lease)


# Several at once.


async def test_a_batch_is_one_round_trip_and_at_most_one_query(redis_url: str, database: Database) -> None:
    """A hundred users, cold: one query; warm: none; and one trip to Redis to read them."""
    users = [*[await database.add_user() for _ in range(98)], stranger(), stranger()]
    proxy = Proxy(redis_url)
    async with proxy.serve(), open_redis(proxy.url) as cache, open_service(cache, database.service_url) as service:

        def reads() -> int:
            return sum(b"MGET" in turn for turn in proxy.turns)

        before = queries()
        cold = await service.read_many(users)
        await settled(service)
        assert users == list(cold)
        assert (before + 1, 1) == (queries(), reads())
        assert {Source.MISS} == {answer.source for answer in cold.values()}
        assert users[98:] == [who for who, answer in cold.items() if answer.data is None]
        warm = await service.read_many(users)
        assert (before + 1, 2) == (queries(), reads())
        assert {Source.HIT} == {answer.source for answer in warm.values()}
        assert [answer.data for answer in cold.values()] == [answer.data for answer in warm.values()]
        await service.invalidate(users[:3])
        mixed = await service.read_many(users)
        assert (before + 2, 3) == (queries(), reads())
        assert 3 == sum(answer.source is Source.MISS for answer in mixed.values())
        assert {} == await service.read_many([])


async def test_a_batch_from_memory_is_what_many_reads_give(database: Database) -> None:
    """All of them are there and none is due: their JSON, counted as hits. Else nothing, and nothing is counted."""
    users = [*[await database.add_user() for _ in range(3)], stranger()]
    clock = MovingClock()
    hits = metric("goodstanding_cache_reads_total", result="hit")
    async with memory_kit() as kit, open_service(kit.cache, database.service_url, clock=clock) as service:
        assert service.peek_many(users) is None
        answers = await service.read_many(users)
        await settled(service)
        expected = {user: answer.entry.body or b"null" for user, answer in answers.items()}
        assert expected == service.peek_many(users)
        assert b"null" == expected[users[3]]
        for unknown in (stranger(), users[0].upper(), "", '"'):
            assert service.peek_many([*users, unknown]) is None
        clock.ahead = -timedelta(days=1)
        assert expected == service.peek_many(users)
        clock.ahead = timedelta(milliseconds=0.79 * LIVES.value)
        assert expected == service.peek_many(users)
        assert hits + 3 * len(users) == metric("goodstanding_cache_reads_total", result="hit")
        clock.ahead = timedelta(milliseconds=0.81 * LIVES.value)
        assert service.peek_many(users) is None
        assert {users[3]: b"null"} == service.peek_many(users[3:])
        assert {} == service.peek_many([])
        assert hits + 3 * len(users) + 1 == metric("goodstanding_cache_reads_total", result="hit")


async def test_batches_and_single_reads_share_their_loads(service: ReputationService, database: Database) -> None:
    """A batch joins the loads under way and starts one for everybody else."""
    one, two, three = [await Truth.of(database, number) for number in (1, 2, 3)]
    before = queries()
    async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
        single = group.create_task(service.read(one.user_id))
        await waiting(1)
        batch = group.create_task(service.read_many([one.user_id, two.user_id, three.user_id]))
        await waiting(2)
        late = group.create_task(service.read(three.user_id))
        await asyncio.sleep(0)
    assert (1, "miss") == _seen(single.result())
    assert [1, 2, 3] == [_seen(answer)[0] for answer in batch.result().values()]
    assert 3 == _seen(late.result())[0]
    assert before + 2 == queries()


async def test_a_batch_does_not_wait_for_other_processes(redis_url: str, database: Database) -> None:
    """It loads the leased ones with the rest in its one query, and fills only what is its own."""
    truth, other = await Truth.of(database, 1), await Truth.of(database, 2)
    async with open_redis(redis_url) as cache:
        await cache.lease([truth.user_id], "other")
        async with open_service(cache, database.service_url) as service:
            before = queries()
            answers = await service.read_many([truth.user_id, other.user_id])
            assert [(1, "miss"), (2, "miss")] == [_seen(answer) for answer in answers.values()]
            assert before + 1 == queries()
            await settled(service)
            found = await cache.fetch([truth.user_id, other.user_id])
            assert [(None, "other"), (2, None)] == [
                (read.entry and read.entry.data and read.entry.data.completed_sessions, read.lease) for read in found
            ]


# Another policy, verdicts, last known good copies.


async def test_another_policy_never_serves_this_ones_score(redis_url: str, database: Database) -> None:
    """Two services of different policies on one Redis each answer by their own rules."""
    truth = await Truth.of(database)
    await database.add_session(truth.match_id, "cancelled")
    async with (
        open_redis(redis_url) as standard,
        open_redis(redis_url, policy=LEGACY) as legacy,
        open_service(standard, database.service_url) as now,
        open_service(legacy, database.service_url, policy=LEGACY) as then,
    ):
        for _ in range(3):
            for service, no_shows in ((now, 0), (then, 1)):
                data = (await service.read(truth.user_id)).data
                assert data is not None
                assert no_shows == data.no_shows


async def test_a_verdict_is_seen_by_the_next_read(service: ReputationService, database: Database) -> None:
    """Both users of the session are dropped from the cache; an unknown session changes nothing."""
    one, two = await database.add_user(), await database.add_user()
    session = await database.add_session(await database.add_match(one, two), "no_show")

    async def no_shows() -> list[int]:
        answers = await service.read_many([one, two])
        return [answer.data.no_shows for answer in answers.values() if answer.data is not None]

    assert [1, 1] == await no_shows()
    assert await service.attribute(session, AtFault.USER2, reason="user1 waited", said_by="support")
    assert [0, 1] == await no_shows()
    assert await service.attribute(session, AtFault.NOBODY, reason="snow", said_by="support")
    assert [0, 0] == await no_shows()
    with pytest.raises(SessionNotFoundError):
        await service.attribute(SessionId(stranger()), AtFault.BOTH, reason="x", said_by="y")


async def test_a_verdict_is_recorded_while_the_cache_is_away(database: Database) -> None:
    """The caller learns that badges will follow late; an invalidation, which is nothing else, fails and is counted."""
    one, two = await database.add_user(), await database.add_user()
    session = await database.add_session(await database.add_match(one, two), "no_show")
    async with (
        open_redis("redis://127.0.0.1:1/0", deadline=0.2) as cache,
        open_service(cache, database.service_url) as service,
    ):
        assert not await service.attribute(session, AtFault.USER2, reason="user1 waited", said_by="support")
        data = (await service.read(one)).data
        assert data is not None
        assert 0 == data.no_shows
        failed = metric("goodstanding_invalidations_total", result="failed")
        with pytest.raises(CacheAwayError):
            await service.invalidate([one, two])
        with pytest.raises(CacheAwayError):
            await service.invalidate_all()
        assert failed + 3 == metric("goodstanding_invalidations_total", result="failed")
        assert ("cache",) == await service.check()


async def test_the_last_known_good_copy_stands_in_for_postgres(kit: Kit, database: Database) -> None:
    """Only while PostgreSQL cannot answer, marked stale with a negative ttl; whoever has no copy is told to wait."""
    truth, other = await Truth.of(database, 4), await Truth.of(database)
    clock = MovingClock()
    async with open_service(kit.cache, database.service_url) as service:
        await service.read(truth.user_id)
    async with open_service(kit.cache, _DEAD_DATABASE, clock=clock) as service:
        assert (4, "hit") == await _told(service, truth.user_id)
        await kit.move_on(LIVES.value)
        clock.ahead = timedelta(seconds=400)
        served = metric("goodstanding_stale_served_total")
        for use_cache in (True, False):
            answer = await service.read(truth.user_id, use_cache=use_cache)
            assert (4, "stale") == _seen(answer)
            assert -102 <= answer.ttl <= -99
        assert served + 2 == metric("goodstanding_stale_served_total")
        with pytest.raises(TemporarilyUnavailableError):
            await service.read(other.user_id)
        with pytest.raises(TemporarilyUnavailableError):
            await service.read_many([truth.user_id, other.user_id])
        assert ("database",) == await service.check()
        # An invalidation drops it: nobody is served what is known to be wrong.
        await service.invalidate([truth.user_id])
        with pytest.raises(TemporarilyUnavailableError):
            await service.read(truth.user_id)
    async with open_service(kit.cache, database.service_url) as service:
        assert (4, "miss") == await _told(service, truth.user_id)


async def test_a_fresh_copy_that_stands_in_is_still_called_stale(kit: Kit, database: Database) -> None:
    """Nobody could be asked whether it holds, so its ttl is negative at any age."""
    truth = await Truth.of(database, 4)
    async with open_service(kit.cache, database.service_url) as service:
        await service.read(truth.user_id)
    async with open_service(kit.cache, _DEAD_DATABASE) as service:
        answer = await service.read(truth.user_id, use_cache=False)
    assert (Source.STALE, -1) == (answer.source, answer.ttl)


async def test_a_copy_serves_who_joined_a_batch_that_lacks_others(kit: Kit, database: Database) -> None:
    """Sharing a load with somebody who has no copy takes nobody's copy away."""
    truth, other = await Truth.of(database, 4), await Truth.of(database)
    async with open_service(kit.cache, database.service_url) as service:
        await service.read(truth.user_id)
    await kit.move_on(LIVES.value)
    async with open_service(kit.cache, _DEAD_DATABASE) as service:
        batch, single = await asyncio.gather(
            service.read_many([truth.user_id, other.user_id]), service.read(truth.user_id), return_exceptions=True
        )
    assert isinstance(batch, TemporarilyUnavailableError)
    assert isinstance(single, Answer)
    assert (4, "stale") == _seen(single)


async def test_a_read_that_shares_a_load_tells_its_own_reason(service: ReputationService, database: Database) -> None:
    """A reader who did not ask for a count is not told that it did."""
    truth = await Truth.of(database)
    async with asyncio.TaskGroup() as group, loads_held(database) as waiting:
        asked = group.create_task(service.read(truth.user_id, use_cache=False))
        await waiting(1)
        plain = group.create_task(service.read(truth.user_id))
        await asyncio.sleep(0)
        await waiting(1)
    assert (0, "request") == _seen(asked.result())
    assert (0, "miss") == _seen(plain.result())


async def test_an_entry_from_the_end_of_time_is_answered(redis_url: str, database: Database) -> None:
    """A value whose moment lies as far ahead as a clock can go is served, with no more life than any other."""
    truth = await Truth.of(database)
    async with open_redis(redis_url) as cache, open_service(cache, database.service_url) as service:
        await service.read(truth.user_id)
        await settled(service)
        async with admin(redis_url) as client:
            end = datetime.max.replace(tzinfo=UTC)
            text = encode(entry(0, at=end), user_id=truth.user_id, policy=STANDARD.version)
            await client.set(value_key(truth.user_id), text)
        answer = await service.read(truth.user_id)
        assert (0, "hit") == _seen(answer)
        assert 300 == answer.ttl


async def test_closing_the_service_ends_its_loads(kit: Kit, database: Database) -> None:
    """Whoever still waits for one is told to come back, whether it had begun or not."""
    began, cold = await Truth.of(database), await Truth.of(database)
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group, loads_held(database) as waiting:
        async with open_service(kit.cache, database.service_url) as service:
            first = group.create_task(_outcome(service, began.user_id))
            await waiting(1)
            second = group.create_task(_outcome(service, cold.user_id))
            # To close in the very turn in which its load was started, and has not begun.
            while cold.user_id not in service._flights:  # noqa: ASYNC110, SLF001 - see above
                await asyncio.sleep(0)
        assert isinstance(await first, TemporarilyUnavailableError)
        assert isinstance(await second, TemporarilyUnavailableError)


async def _outcome(service: ReputationService, user_id: UserId) -> object:
    try:
        return await service.read(user_id)
    except TemporarilyUnavailableError as error:
        return error


class _TardyCache(RedisCache):
    """A Redis cache whose fills take a while to be sent."""

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Fill a little later."""
        await asyncio.sleep(0.05)
        return await super().fill(entries, token)


async def test_what_was_answered_is_stored_before_the_service_closes(redis_url: str, database: Database) -> None:
    """A command that reads and ends leaves what it read in the cache."""
    truth = await Truth.of(database, 2)
    async with _TardyCache.open(redis_url, deadline=PATIENT, policy=STANDARD.version, lives=LIVES) as cache:
        async with open_service(cache, database.service_url) as service:
            await service.read(truth.user_id)
        [found] = await cache.fetch([truth.user_id])
        assert found.entry is not None
        assert found.lease is None


async def test_check_asks_the_database_at_most_once_a_second(service: ReputationService) -> None:
    """Health checks of any number of watchers cost PostgreSQL one query a second."""
    before = metric("goodstanding_query_seconds_count", query="ping")
    for _ in range(50):
        assert () == await service.check()
    assert before + 1 <= metric("goodstanding_query_seconds_count", query="ping") <= before + 2


async def test_one_slow_answer_to_a_check_takes_nothing_from_readers(
    redis_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to whoever asks meanwhile, and the next read is answered by PostgreSQL all the same."""
    truth = await Truth.of(database, 2)
    proxy = Proxy(database.service_url)
    async with (
        proxy.serve(),
        open_redis(redis_url) as cache,
        open_service(cache, proxy.url, load_deadline=1.0) as service,
    ):
        assert () == await service.check()
        proxy.delay = lambda: 60.0
        asked = metric("goodstanding_query_seconds_count", query="ping")
        with monkeypatch.context() as hasty:
            hasty.setattr(service_module, "_CHECK_SECONDS", 0.0)
            async with asyncio.TaskGroup() as group:
                first = group.create_task(service.check())
                await asyncio.sleep(0)
                assert () == await service.check()
        assert ("database",) == first.result()
        assert asked + 1 == metric("goodstanding_query_seconds_count", query="ping")
        proxy.delay = lambda: 0.0
        assert (2, "miss") == await _told(service, truth.user_id)
        assert 1 == metric("goodstanding_dependency_up", dependency="database")
        assert ("database",) == await service.check()
        await eventually(lambda: _is_well(service))


async def test_a_database_that_answers_no_check_is_away(
    redis_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first failed check says so; the third in a row opens the circuit, as three reads would."""
    monkeypatch.setattr(service_module, "_CHECK_SECONDS", 0.0)
    truth = await Truth.of(database, 2)
    async with open_redis(redis_url) as cache:
        async with open_service(cache, database.service_url) as service:
            await service.read(truth.user_id)
            await settled(service)
        async with open_service(cache, _DEAD_DATABASE) as service:
            for up in (1, 1, 0):
                assert ("database",) == await service.check()
                assert up == metric("goodstanding_dependency_up", dependency="database")
            assert (2, "hit") == await _told(service, truth.user_id)


async def _is_well(service: ReputationService) -> bool:
    return () == await service.check()


async def test_short_lives_are_told_as_they_are(redis_url: str, database: Database) -> None:
    """The remaining life that an answer tells never exceeds what was configured."""
    lives = Lives(value=5_000, unknown=2_000, last_good=0, lease=1_000)
    truth = await Truth.of(database)
    async with (
        open_redis(redis_url, lives=lives) as cache,
        admin(redis_url) as client,
        open_service(cache, database.service_url, lives=lives) as service,
    ):
        assert 4 <= (await service.read(truth.user_id)).ttl <= 5
        assert (await service.read(truth.user_id)).ttl <= 5
        assert 0 < await client.pttl(value_key(truth.user_id)) <= 5_000
        assert 0 == await client.exists(last_good_key(truth.user_id))
        [unknown] = (await service.read_many([stranger()])).values()
        assert (None, True) == (unknown.data, unknown.ttl <= 2)
