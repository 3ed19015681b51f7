"""The relay: what it carries, in which order, and that nothing is lost whatever ends it between two steps."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import asyncpg
import pytest
import redis.asyncio
from structlog.testing import capture_logs

from goodstanding import changes, tallies
from goodstanding.cache import RedisCache, value_key
from goodstanding.changes import BEAT_SECONDS, Ledger, NotifyPublisher, Publisher, RedisPublisher, Relay, SessionLedger
from goodstanding.data import Clock, UserId
from goodstanding.embedded import Postgres, Valkey
from goodstanding.errors import CacheAwayError, TemporarilyUnavailableError
from goodstanding.main import utc_now
from goodstanding.policy import STANDARD
from goodstanding.reputation_service import ReputationService, Source
from goodstanding.tallies import Folded, Recounted
from goodstanding.tasks import background
from tests.conftest import Database, connect
from tests.parts import Proxy, Truth, admin, eventually, metric, open_redis, open_service, settled

_FAILOVER = 3.5
"""2 s are promised; the rest is what a busy machine may add."""
_SERVED_BY = "datname = current_database() and usename = 'app_login'"
_END_SESSIONS = f"select count(pg_terminate_backend(pid)) from pg_stat_activity where {_SERVED_BY}"  # noqa: S608 - no input
_LEADERS = (
    "select count(*) from pg_locks where locktype = 'advisory' and granted"
    " and database = (select oid from pg_database where datname = current_database())"
)


@dataclass(slots=True)
class _Told:
    """A publisher that notes what it is told, and may fail before or after it has told Redis."""

    to: Publisher
    told: list[Sequence[UserId] | None] = field(default_factory=list)
    beats: list[tuple[int, float]] = field(default_factory=list)
    before: Callable[[], Awaitable[None]] | None = None
    after: Callable[[], Awaitable[None]] | None = None

    @property
    def available(self) -> bool:
        """Whether Redis takes writes."""
        return self.to.available

    async def lead(self, ledger: Ledger, term: int) -> None:
        """Pass it on."""
        await self.to.lead(ledger, term)

    async def changed(self, ledger: Ledger, users: Sequence[UserId] | None) -> None:
        """Pass it on, between what the test does before and after."""
        if self.before is not None:
            await self.before()
        await self.to.changed(ledger, users)
        self.told.append(users)
        if self.after is not None:
            await self.after()

    async def beat(self, ledger: Ledger, term: int, looked: float) -> None:
        """Pass it on."""
        await self.to.beat(ledger, term, looked)
        self.beats.append((term, looked))


def _relay(
    database: Database,
    publisher: Publisher,
    *,
    clock: Clock = utc_now,
    monotonic: Callable[[], float] = time.monotonic,
) -> Relay:
    return Relay(
        partial(SessionLedger.open, database.service_url),
        publisher,
        poll_seconds=0.005,
        clock=clock,
        random=random.uniform,
        monotonic=monotonic,
    )


@asynccontextmanager
async def _relaying(
    database: Database, url: str, *, deadline: float = 0.5, monotonic: Callable[[], float] = time.monotonic
) -> AsyncIterator[_Told]:
    """Run a relay until the block ends."""
    async with open_redis(url, deadline=deadline) as cache, background() as spawn:
        told = _Told(RedisPublisher(cache))
        spawn(_relay(database, told, monotonic=monotonic).run())
        await eventually(lambda: bool(told.beats))
        yield told


@asynccontextmanager
async def _serving(database: Database, url: str) -> AsyncIterator[tuple[ReputationService, RedisCache]]:
    async with open_redis(url) as cache, open_service(cache, database.service_url) as service:
        yield service, cache


async def _counted(service: ReputationService, truth: Truth) -> int:
    data = (await service.read(truth.user_id)).data
    assert data is not None
    return data.completed_sessions


async def _is_folded(database: Database) -> bool:
    async with database.owner() as owner:
        return not await owner.fetchval("select reputation.pending()")


async def _leaders(database: Database) -> int:
    async with database.owner() as owner:
        count: int = await owner.fetchval(_LEADERS)
        return count


async def _fail() -> None:
    raise CacheAwayError


class TestCarrying:
    """From a commit to every cache."""

    async def test_a_change_drops_what_is_cached(self, database: Database, redis_url: str) -> None:
        """What is cached stays cached until it changes, and then the next read counts."""
        truth, other = await Truth.of(database, 1), await Truth.of(database, 1)
        async with _relaying(database, redis_url) as told, _serving(database, redis_url) as (service, _):
            await eventually(lambda: _is_folded(database))
            for one in (truth, other):
                assert 1 == await _counted(service, one)
            await settled(service)
            told.told.clear()
            before = metric("goodstanding_changes_folded_total"), metric("goodstanding_change_seconds_count")
            await truth.complete()
            await eventually(lambda: bool(told.told))
            assert 2 == await _counted(service, truth)
            assert Source.HIT is (await service.read(other.user_id)).source
            await eventually(lambda: _is_folded(database))
            assert truth.user_id in (told.told[0] or ())
            assert (1, 1) == (
                metric("goodstanding_changes_folded_total") - before[0],
                metric("goodstanding_change_seconds_count") - before[1],
            )
            assert 1 == metric("goodstanding_relay_leading")
        assert 0 == metric("goodstanding_relay_leading")

    async def test_caches_are_told_before_the_fold_is_committed(self, database: Database, redis_url: str) -> None:
        """While they are told the changes still wait, and the value is gone from Redis before the commit."""
        seen: list[tuple[bool, int]] = []
        async with (
            _relaying(database, redis_url) as told,
            _serving(database, redis_url) as (service, _),
            admin(redis_url) as client,
        ):
            truth = await Truth.of(database, 1)
            await eventually(lambda: _is_folded(database))
            await service.read(truth.user_id)
            await settled(service)

            async def look() -> None:
                seen.append((await _is_folded(database), await client.exists(value_key(truth.user_id))))

            told.before = told.after = look
            await truth.complete()
            await eventually(lambda: _is_folded(database))
            assert [(False, 1), (False, 0)] == seen

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_nothing_is_lost_when_telling_fails(self, database: Database, redis_url: str, when: str) -> None:
        """Before or after Redis was told: nothing is committed, every read stays exact, and it is told again."""
        async with _relaying(database, redis_url) as told, _serving(database, redis_url) as (service, _):
            truth = await Truth.of(database, 1)
            await eventually(lambda: _is_folded(database))
            await service.read(truth.user_id)
            await settled(service)
            fails = asyncio.Event()

            async def fail() -> None:
                fails.set()
                raise CacheAwayError

            setattr(told, when, fail)
            told.told.clear()
            await truth.complete()
            async with asyncio.timeout(30):
                await fails.wait()
            beats = len(told.beats)
            async with database.owner() as owner:
                assert await owner.fetchval("select reputation.pending()")
            assert 2 == (await service.read(truth.user_id, use_cache=False)).data.completed_sessions  # type: ignore[union-attr] # known
            assert beats == len(told.beats)
            setattr(told, when, None)
            await eventually(lambda: _is_folded(database))
            assert {truth.user_id} <= {each for users in told.told for each in users or ()}
            assert 2 == await _counted(service, truth)

    async def test_without_redis_nothing_is_committed(self, database: Database, valkey: Valkey, redis_url: str) -> None:
        """While Redis is away nobody leads; once it is back everything is told that happened meanwhile."""
        truths = [await Truth.of(database, 1) for _ in range(3)]
        async with _relaying(database, redis_url, deadline=0.05) as told:
            await eventually(lambda: _is_folded(database))
            await asyncio.to_thread(valkey.pause)
            try:
                for truth in truths:
                    await truth.complete()
                await eventually(lambda: not told.available)
                async with database.owner() as owner:
                    assert await owner.fetchval("select reputation.pending()")
                await eventually(lambda: _nobody_leads(database))
                told.told.clear()
            finally:
                await asyncio.to_thread(valkey.resume)
            await eventually(lambda: _is_folded(database), within=_FAILOVER)
            assert {truth.user_id for truth in truths} <= {each for users in told.told for each in users or ()}

    @pytest.mark.parametrize("how", ["truncate", "rebuild"])
    async def test_some_changes_are_everybodys(self, database: Database, redis_url: str, how: str) -> None:
        """A table that was emptied, or tallies that mean something else, drop everybody."""
        async with _relaying(database, redis_url) as told, _serving(database, redis_url) as (service, _):
            truth, lonely = await Truth.of(database, 1), await Truth.of(database)
            await eventually(lambda: _is_folded(database))
            for one in (truth, lonely):
                await service.read(one.user_id)
            await settled(service)
            told.told.clear()
            if how == "truncate":
                async with database.owner() as owner:
                    await owner.execute("truncate public.wingman_sessions cascade")
            else:
                await tallies.rebuild(database.owner_url, STANDARD)
            await eventually(lambda: None in told.told)
            assert Source.MISS is (await service.read(lonely.user_id)).source
            assert (0 if how == "truncate" else 1) == await _counted(service, truth)
            await eventually(lambda: _is_folded(database))

    async def test_a_batch_has_a_bound(self, database: Database, redis_url: str) -> None:
        """However much waits, at most 2,000 changes are one transaction, and everybody is told."""
        async with _relaying(database, redis_url) as told:
            told.told.clear()
            async with database.owner() as owner:
                users = {
                    str(row["id"])
                    for row in await owner.fetch(
                        "insert into public.user_profiles (id) select gen_random_uuid() from generate_series(1, 7000)"
                        " returning id"
                    )
                }
            await eventually(lambda: _is_folded(database))
            assert all(1 <= len(batch or ()) <= 2000 for batch in told.told)
            assert users == {each for batch in told.told for each in batch or ()}

    @pytest.mark.parametrize(
        ("users", "seconds", "expected"),
        [
            # Three batches: only the last look found no more than was told.
            (5000, 0.3, [0.0, 0.6, 0.9]),
            # Two batches that take as long as a look may be past.
            (3000, 0.4, [0.0, 0.8]),
        ],
    )
    async def test_a_beat_is_of_a_look_at_all_there_was_and_not_long_past(
        self, database: Database, redis_url: str, users: int, seconds: float, expected: list[float]
    ) -> None:
        """While more waits than one fold takes nothing is said to be told, nor is what was so too long ago."""
        now = 0.0

        async def take() -> None:
            nonlocal now
            now += seconds

        async with _relaying(database, redis_url, monotonic=lambda: now) as told, database.owner() as owner:
            await eventually(lambda: _is_folded(database))
            told.before = take
            await owner.execute(
                "insert into public.user_profiles (id) select gen_random_uuid() from generate_series(1, $1::int)", users
            )
            await eventually(lambda: len(told.beats) >= len(expected))
        assert expected == pytest.approx([looked for _, looked in told.beats])
        assert 1 == len({term for term, _ in told.beats})

    async def test_how_long_a_change_took_is_measured(self, database: Database, redis_url: str) -> None:
        """From the commit until it is told; a clock that is behind the database's makes it nothing, never less."""
        for clock, least, most in ((utc_now, 0.0001, 30.0), (lambda: utc_now() - timedelta(days=1), 0.0, 0.0)):
            async with open_redis(redis_url) as cache, background() as spawn:
                spawn(_relay(database, RedisPublisher(cache), clock=clock).run())
                # What the migration left is as old as the database.
                await eventually(lambda: _is_folded(database))
                before = metric("goodstanding_change_seconds_sum"), metric("goodstanding_change_seconds_count")
                await Truth.of(database, 1)
                await eventually(lambda: _is_folded(database))
            assert before[1] < metric("goodstanding_change_seconds_count")
            assert least <= metric("goodstanding_change_seconds_sum") - before[0] <= most

    async def test_it_counts_again_who_is_due(self, database: Database, redis_url: str) -> None:
        """Who cannot be counted by differences is counted again for good, and it says how many."""
        async with _relaying(database, redis_url):
            truth = await Truth.of(database, 2)
            await eventually(lambda: _is_folded(database))
            before = metric("goodstanding_users_recounted_total")
            await tallies.rebuild_user(database.owner_url, truth.user_id, STANDARD)

            async def is_recounted() -> bool:
                async with database.owner() as owner:
                    return not await owner.fetchval("select exists (select from reputation.recounts)")

            await eventually(lambda: metric("goodstanding_users_recounted_total") > before)
            await eventually(is_recounted)
            async with database.owner() as owner:
                assert 2 == await owner.fetchval(
                    "select completed from reputation.tallies where user_id = $1", truth.user_id
                )

    async def test_it_counts_again_a_hundred_at_a_time(
        self, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One batch soon follows the other while somebody is due; else it looks once a second."""
        async with database.owner() as owner:
            await owner.execute(
                "insert into public.user_profiles (id) select gen_random_uuid() from generate_series(1, 250)"
            )
            while await owner.fetchval("select reputation.pending()"):
                await owner.execute("select reputation.fold(2000)")
        monkeypatch.setattr(changes, "_RECOUNT_TAKES", 60.0)  # however busy this machine is
        recounts: list[tuple[float, int]] = []
        recount = SessionLedger.recount

        async def noted(ledger: SessionLedger, batch: int) -> Recounted:
            recounted = await recount(ledger, batch)
            recounts.append((asyncio.get_running_loop().time(), recounted.users))
            return recounted

        monkeypatch.setattr(SessionLedger, "recount", noted)
        async with _relaying(database, redis_url) as told:
            await eventually(lambda: len(recounts) >= 6)
            assert 1 == len({term for term, _ in told.beats})
        moments, users = zip(*recounts, strict=True)
        assert (100, 100, 50, 0, 0, 0) == users[:6]
        assert moments[3] - moments[0] < 2
        assert min(moments[4] - moments[3], moments[5] - moments[4]) >= 1

    async def test_it_counts_again_as_many_as_take_a_quarter_of_a_second(
        self, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Users with many sessions are counted a few at a time, for folds and beats wait; then soon a hundred again."""
        recounts: list[tuple[int, int]] = []
        recount = SessionLedger.recount
        slow, passed = 0.01, 0.0

        async def noted(ledger: SessionLedger, batch: int) -> Recounted:
            nonlocal passed
            recounted = await recount(ledger, batch)
            passed += slow * recounted.users
            recounts.append((batch, recounted.users))
            return recounted

        monkeypatch.setattr(SessionLedger, "recount", noted)
        async with database.owner() as owner, open_redis(redis_url) as cache, background() as spawn:
            await owner.execute(
                "insert into public.user_profiles (id) select gen_random_uuid() from generate_series(1, 200)"
            )
            while await owner.fetchval("select reputation.pending()"):
                await owner.execute("select reputation.fold(2000)")
            spawn(_relay(database, RedisPublisher(cache), monotonic=lambda: time.monotonic() + passed).run())
            await eventually(lambda: sum(users for _, users in recounts) == 200)
            assert (100, 100) == recounts[0]
            assert all(1 <= batch <= 25 for batch, users in recounts[1:] if users)
            slow = 0.0
            await eventually(lambda: recounts[-1] == (100, 0))

    async def test_beats_are_regular_and_true(self, database: Database, redis_url: str) -> None:
        """Four times a second while nothing is left; none while something is: it may not be known everywhere."""
        async with _relaying(database, redis_url) as told:
            began = len(told.beats)
            await eventually(lambda: len(told.beats) >= began + 8)
            looks = [looked for _, looked in told.beats[began:]]
            steps = sorted(later - earlier for earlier, later in pairwise(looks))
            assert BEAT_SECONDS <= steps[len(steps) // 2] < 2 * BEAT_SECONDS
            assert 1 == len({term for term, _ in told.beats})
            held = asyncio.Event()
            arrived = asyncio.Event()

            async def hold() -> None:
                arrived.set()
                await held.wait()

            told.before = hold
            await Truth.of(database, 1)
            async with asyncio.timeout(30):
                await arrived.wait()
            before = len(told.beats)
            async with database.owner() as owner:  # the time of a few beats, as PostgreSQL counts it
                await owner.execute("select pg_sleep(0.9)")
            assert before == len(told.beats)
            told.before = None
            held.set()
            await eventually(lambda: len(told.beats) > before)

    async def test_redis_tells_whose_beats_they_are(self, database: Database, redis_url: str) -> None:
        """Who listens hears of the new term first, then beats of that term, and when the relay looked."""
        heard: list[bytes] = []
        async with (
            open_redis(redis_url) as cache,
            cache.subscription(heard.append, lambda: None, lambda: None),
            _relaying(database, redis_url) as told,
        ):
            await eventually(lambda: sum(said.startswith(b"beat ") for said in heard) >= 2)
            term, looked = told.beats[-1]
        words = [said.decode().split(" ") for said in heard]
        assert ["lead", str(term), "0"] == next(said for said in words if said != ["all"] and said[0] != "changed")
        beats = [(int(said[1]), int(said[2])) for said in words if said[0] == "beat"]
        assert {term} == {term for term, _ in beats}
        assert abs(beats[-1][1] / 1000 - looked) < 60


async def _nobody_leads(database: Database) -> bool:
    return 0 == await _leaders(database)


@pytest.mark.slow
class TestLeading:
    """One of the fleet leads, and another takes over."""

    async def test_one_of_three_leads(self, database: Database, redis_url: str) -> None:
        """However many run, one carries; when its session ends another goes on within 2 s, with a greater term."""
        async with AsyncExitStack() as stack, connect(database.superuser_url) as killer:
            cache = await stack.enter_async_context(open_redis(redis_url))
            spawn = await stack.enter_async_context(background())
            fleet = [_Told(RedisPublisher(cache)) for _ in range(3)]
            for one in fleet:
                spawn(_relay(database, one).run())

            def leading() -> int:
                """Give the newest term: the last beats of a leader may come after its session was ended."""
                return max((term for one in fleet for term, _ in one.beats), default=0)

            terms = [0]
            await eventually(lambda: leading() > terms[-1])
            for _ in range(3):
                assert 1 == await _leaders(database)
                assert 1 == metric("goodstanding_relay_leading")
                terms.append(leading())
                assert 1 == sum(any(terms[-1] == term for term, _ in one.beats) for one in fleet)
                assert 3 == await killer.fetchval(_END_SESSIONS)
                truth = await Truth.of(database, 1)
                await eventually(lambda: leading() > terms[-1], within=_FAILOVER)
                await eventually(lambda: _is_folded(database))
                assert any(truth.user_id in (users or ()) for one in fleet for users in one.told)
                await eventually(lambda: _sessions(killer, 3))

    async def test_a_silent_leader_is_replaced(self, database: Database, redis_url: str) -> None:
        """A leader that freezes, in a fold or between two, loses the lead after a second to one that does not."""
        frozen = asyncio.Event()

        async def freeze() -> None:
            await frozen.wait()

        async with _relaying(database, redis_url) as first, _relaying_beside(database, redis_url) as second:
            first.before = freeze
            truth = await Truth.of(database, 1)
            await eventually(lambda: bool(second.beats), within=_FAILOVER)
            await eventually(lambda: _is_folded(database), within=_FAILOVER)
            assert any(truth.user_id in (users or ()) for users in second.told)
            # What it does when it wakes up does no harm: its session is over.
            first.before = None
            frozen.set()
            beats = len(second.beats)
            await eventually(lambda: len(second.beats) > beats + 4)
            assert second.beats[-1][0] > first.beats[-1][0]
            assert 1 == await _leaders(database)

    async def test_postgresql_may_restart(self, database: Database, postgres: Postgres, redis_url: str) -> None:
        """Whoever led before a crash, somebody leads after it, and nothing of before it is lost."""
        async with _relaying(database, redis_url) as told:
            truth = await Truth.of(database, 1)
            told.before = _fail
            await truth.complete()
            await asyncio.to_thread(postgres.kill)
            told.before = None
            told.told.clear()
            told.beats.clear()
            postgres.start()
            await eventually(lambda: bool(told.beats))
            assert any(truth.user_id in (users or ()) for users in told.told)

    async def test_a_database_without_the_schema_is_waited_for(self, bare_database: Database, redis_url: str) -> None:
        """Before `migrate` there is nothing to carry: it tries again and again, says so once, and sends no beat."""
        async with open_redis(redis_url) as cache, background() as spawn:
            told = _Told(RedisPublisher(cache))
            tried = [0]

            @asynccontextmanager
            async def open_ledger() -> AsyncIterator[Ledger]:
                tried[0] += 1
                async with SessionLedger.open(bare_database.owner_url) as ledger:
                    yield ledger

            relay = Relay(open_ledger, told, poll_seconds=0.005, clock=utc_now, random=random.uniform)
            with capture_logs() as lines:
                spawn(relay.run())
                await eventually(lambda: tried[0] >= 3)
            assert [] == told.beats
            assert ["InvalidSchemaNameError"] == _interruptions(lines)

    async def test_any_other_failure_is_outlived(self, database: Database, redis_url: str) -> None:
        """An error of ours is logged, and the relay begins anew: the process that serves beside it must not end."""
        async with _relaying(database, redis_url) as told:

            async def fail_once() -> None:
                told.before = None
                raise ZeroDivisionError

            told.before = fail_once
            with capture_logs() as lines:
                truth = await Truth.of(database, 1)
                await eventually(lambda: any(truth.user_id in (users or ()) for users in told.told))
            assert 1 == sum(line["event"] == "relay_failed" for line in lines)

    async def test_why_it_cannot_carry_is_said_once_until_it_can(self, database: Database, redis_url: str) -> None:
        """A right that was taken away: each attempt counts, the first one is told, and so is the next loss of it."""

        def failures() -> float:
            return metric("goodstanding_relay_failures_total", cause="InsufficientPrivilegeError")

        async with _relaying(database, redis_url) as told, database.owner() as owner:
            await eventually(lambda: _is_folded(database))
            with capture_logs() as lines:
                for times in (1, 2):
                    await owner.execute("revoke execute on function reputation.fold(integer) from goodstanding_service")
                    before = failures()
                    await Truth.of(database, 1)
                    await eventually(lambda: failures() >= before + 3)  # noqa: B023 - awaited here
                    assert ["InsufficientPrivilegeError"] * times == _interruptions(lines)
                    beats = len(told.beats)
                    await owner.execute("grant execute on function reputation.fold(integer) to goodstanding_service")
                    await eventually(lambda: len(told.beats) > beats + 1)  # noqa: B023 - awaited here
                    assert await _is_folded(database)
            assert {"event", "log_level", "cause"} == {
                name for line in lines if line["event"] == "relay_interrupted" for name in line
            }


def _interruptions(lines: Sequence[MutableMapping[str, Any]]) -> list[str]:
    """Give the causes that were told, in order."""
    return [line["cause"] for line in lines if line["event"] == "relay_interrupted"]


@asynccontextmanager
async def _relaying_beside(database: Database, url: str) -> AsyncIterator[_Told]:
    """Run a relay that waits for its turn."""
    async with open_redis(url) as cache, background() as spawn, connect(database.superuser_url) as observer:
        told = _Told(RedisPublisher(cache))
        spawn(_relay(database, told).run())
        await eventually(lambda: _sessions(observer, 2))
        yield told


async def _sessions(observer: "asyncpg.Connection[asyncpg.Record]", expected: int) -> bool:
    found: int = await observer.fetchval(f"select count(*) from pg_stat_activity where {_SERVED_BY}")  # noqa: S608 - no input
    return expected == found


@pytest.mark.slow
class TestSession:
    """What the relay does in the database, over one session."""

    async def test_whatever_fails_is_an_outage(self, database: Database, bare_database: Database) -> None:
        """Nobody there, no right, no schema, a session that was ended: all of them mean that somebody else may try."""
        for url in ("postgresql://app@127.0.0.1:1/app", "postgresql://app@host.invalid/app"):
            with pytest.raises(TemporarilyUnavailableError):
                async with SessionLedger.open(url):
                    pass
        for url in (bare_database.owner_url, database.owner_url.replace("host_owner", "nobody")):
            with pytest.raises(TemporarilyUnavailableError):
                async with SessionLedger.open(url) as ledger:
                    await ledger.pending()
        async with connect(database.superuser_url) as killer:

            async def outlive_the_session() -> None:
                async with SessionLedger.open(database.service_url) as ledger:
                    await killer.fetchval(_END_SESSIONS)
                    await ledger.pending()

            with pytest.raises(TemporarilyUnavailableError):
                await outlive_the_session()

    async def test_the_lead_ends_with_the_session(self, database: Database) -> None:
        """One leads; when its session ends, the next one's term is greater."""
        async with SessionLedger.open(database.service_url) as waiting:
            async with SessionLedger.open(database.service_url) as leading:
                first = await leading.lead()
                assert first is not None
                assert await waiting.lead() is None
            terms: list[int | None] = []

            async def leads() -> bool:
                terms.append(await waiting.lead())
                return terms[-1] is not None

            await eventually(leads)
            assert first < (terms[-1] or 0)

    async def test_a_session_that_is_silent_for_a_second_ends(self, database: Database) -> None:
        """In a fold or not: the server ends it, and what was not committed is as if it had not been."""
        await Truth.of(database, 1)
        async with SessionLedger.open(database.service_url) as watching:

            async def hang(*, fold: bool) -> Folded | None:
                async with SessionLedger.open(database.service_url) as ledger:
                    assert await ledger.lead() is not None
                    if not fold:
                        await eventually(lambda: _can_lead(watching), within=_FAILOVER)
                        await ledger.pending()
                    async with ledger.folding(10) as folded:
                        await eventually(lambda: _can_lead(watching), within=_FAILOVER)
                    return folded

            for fold in (True, False):
                with pytest.raises(TemporarilyUnavailableError):
                    await hang(fold=fold)
                async with database.owner() as owner:
                    assert await owner.fetchval("select reputation.pending()")

    async def test_a_recount_may_take_longer_than_a_fold(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The deadline of every other statement is not that of a recount, which counts a user with many sessions."""
        truth = await Truth.of(database, 2)
        monkeypatch.setattr(changes, "_DEADLINE_SECONDS", 0.5)
        async with SessionLedger.open(database.service_url) as ledger, database.owner() as owner:
            async with ledger.folding(100):
                pass
            await tallies.rebuild_user(database.owner_url, truth.user_id, STANDARD)
            async with asyncio.TaskGroup() as group, owner.transaction():
                await owner.execute("lock table public.wingman_sessions in access exclusive mode")
                recount = group.create_task(ledger.recount(100))
                await owner.execute("select pg_sleep(1)")
                assert not recount.done()
        assert recount.result().users >= 1

    async def test_a_long_purge_keeps_the_session(self, database: Database, redis_url: str) -> None:
        """To drop everybody may take Redis longer than a second: the fold waits for it, and is committed."""
        proxy = Proxy(redis_url)
        async with (
            proxy.serve(),
            _relaying(database, proxy.url, deadline=5.0) as told,
            admin(redis_url) as client,
        ):
            await Truth.of(database, 1)
            await eventually(lambda: _is_folded(database))
            await _populate(client)
            term = told.beats[-1][0]
            proxy.delay = lambda: 0.03
            loop = asyncio.get_running_loop()
            began = loop.time()
            async with database.owner() as owner:
                await owner.execute("truncate public.wingman_sessions cascade")
            await eventually(lambda: _is_folded(database))
            assert loop.time() - began > 1.5
            proxy.delay = lambda: 0.0
            beats = len(told.beats)
            await eventually(lambda: len(told.beats) > beats)
            assert term == told.beats[-1][0]

    async def test_a_session_that_ends_in_a_long_purge_is_survived(self, database: Database, redis_url: str) -> None:
        """Whatever ends it while Redis is being emptied, the relay begins anew and does it again."""
        proxy = Proxy(redis_url)
        async with (
            proxy.serve(),
            _relaying(database, proxy.url, deadline=5.0) as told,
            admin(redis_url) as client,
            connect(database.superuser_url) as killer,
        ):
            await eventually(lambda: _is_folded(database))
            await _populate(client)
            purging = asyncio.Event()

            async def note() -> None:
                purging.set()

            told.before, term = note, told.beats[-1][0]
            proxy.delay = lambda: 0.03
            async with database.owner() as owner:
                await owner.execute("truncate public.wingman_sessions cascade")
            async with asyncio.timeout(30):
                await purging.wait()
            await killer.fetchval(_END_SESSIONS)
            await eventually(lambda: not told.told or None in told.told)
            proxy.delay = lambda: 0.0
            await eventually(lambda: _is_folded(database))
            await eventually(lambda: told.beats[-1][0] > term)

    async def test_a_beat_is_not_older_than_its_purge(self, database: Database, redis_url: str) -> None:
        """A Redis that had to be emptied first is believed only after the relay has looked again."""
        proxy = Proxy(redis_url)
        loop = asyncio.get_running_loop()
        heard: list[tuple[bytes, float]] = []
        async with (
            proxy.serve(),
            _relaying(database, proxy.url, deadline=5.0),
            admin(redis_url) as client,
            open_redis(redis_url) as cache,
        ):
            await _populate(client)
            async with cache.subscription(lambda said: heard.append((said, loop.time())), lambda: None, lambda: None):
                proxy.delay = lambda: 0.03
                await client.delete("{goodstanding:probe}:run")
                await eventually(lambda: any(said == b"all" for said, _ in heard))
                emptied = len(heard)
                await eventually(lambda: len(heard) > emptied + 1)
        assert not any(said.startswith(b"lead ") for said, _ in heard)
        late = [at - int(said.split(b" ")[2]) / 1000 for said, at in heard if said.startswith(b"beat ")]
        assert max(late) < 1.0


async def _populate(client: "redis.asyncio.Redis") -> None:
    """Put so many keys of another app into Redis that a walk over them takes many round trips."""
    await client.execute_command("DEBUG POPULATE 40000 another-app")  # type: ignore[no-untyped-call] # redis-py leaves it untyped


class TestNotify:
    """Without Redis the relay's words travel with its transaction."""

    async def test_changes_and_beats_arrive(self, database: Database) -> None:
        """Who listens in the database hears the lead, who changed once that is committed, and the beats."""
        heard: list[str] = []
        async with connect(database.service_url) as listening, background() as spawn:
            await listening.add_listener("goodstanding", lambda *said: heard.append(str(said[3])))
            assert NotifyPublisher.available
            spawn(_relay(database, NotifyPublisher()).run())

            async def beats() -> bool:
                await listening.execute("select")
                return any(said.startswith("beat ") for said in heard)

            await eventually(beats)
            lead, beat = (next(said.split(" ") for said in heard if said.startswith(word)) for word in ("lead", "beat"))
            assert ["lead", beat[1], "0"] == lead == heard[0].split(" ")
            assert 0 < int(beat[1])
            assert abs(int(beat[2]) / 1000 - time.monotonic()) < 60
            truth = await Truth.of(database, 1)

            async def is_told() -> bool:
                await listening.execute("select")
                return any(said.startswith("changed ") and truth.user_id in said for said in heard)

            await eventually(is_told)
            async with database.owner() as owner:
                await owner.execute("truncate public.wingman_sessions cascade")

            async def is_everybody() -> bool:
                await listening.execute("select")
                return "all" in heard

            await eventually(is_everybody)
            await eventually(lambda: _is_folded(database))

    async def test_a_large_batch_is_several_notifications(self, database: Database) -> None:
        """2,000 users of a batch are told whole."""
        heard: list[str] = []
        async with connect(database.service_url) as listening, background() as spawn:
            await listening.add_listener("goodstanding", lambda *said: heard.append(str(said[3])))
            async with database.owner() as owner:
                await owner.execute("select reputation.fold(10)")  # what the migration left is everybody's
                await owner.execute(
                    "insert into public.user_profiles (id) select gen_random_uuid() from generate_series(1, 5000)"
                )
            spawn(_relay(database, NotifyPublisher()).run())
            await eventually(lambda: _is_folded(database))

            async def are_told() -> bool:
                await listening.execute("select")
                return 5000 == len(
                    {each for said in heard if said.startswith("changed ") for each in said.split(" ")[1:]}
                )

            await eventually(are_told)


async def _can_lead(ledger: Ledger) -> bool:
    """Tell whether the lead is free; gives it back."""
    term = await ledger.lead()
    if term is not None and isinstance(ledger, SessionLedger):
        await ledger._connection.execute("select pg_advisory_unlock_all()")  # noqa: SLF001 - a test's way to give it back
    return term is not None
