"""What a process hears and how long it believes it: the rules first, then over a real Redis and a real PostgreSQL."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import asyncpg
import pytest
import redis.asyncio

from goodstanding.broadcast import (
    BELIEF_SECONDS,
    Announcer,
    Broadcast,
    Freshness,
    Heard,
    beat,
    hear_redis,
    lead,
    messages,
    notify,
)
from goodstanding.cache import RedisCache
from goodstanding.data import UserId
from goodstanding.embedded import Postgres, Valkey
from goodstanding.errors import CacheAwayError
from goodstanding.tasks import background
from tests.conftest import Database, connect
from tests.parts import NOON, SECONDS, admin, eventually, metric, open_redis, user

_NOTICED = 3.5
"""2 s are promised; the rest is what a busy machine may add."""

_RELAY_CLOCK = 5000.0
"""The relay's clock has nothing to do with a listener's."""


@dataclass(slots=True)
class _Listener:
    """A process that hears, what it heard, and its time."""

    passed: float = 100.0
    heard: list[Sequence[UserId] | None] = field(default_factory=list)
    terms: set[int] = field(default_factory=set)
    freshness: Freshness = field(init=False)
    broadcast: Broadcast = field(init=False)

    def __post_init__(self) -> None:
        self.freshness = Freshness(clock=lambda: NOON + timedelta(seconds=self.passed), monotonic=lambda: self.passed)
        self.broadcast = Broadcast(self.freshness, [self.heard.append])

    def trusts(self) -> bool:
        """Tell whether what is cached is believed now."""
        return self.freshness.trusted()

    def hear_beat(self, term: int = 1, *, looked: float | None = None, late: float = 0.0) -> None:
        """Hear a beat, whose relay looked `late` seconds before now; in a new term after one to measure it by."""
        looked = self.passed - late + _RELAY_CLOCK if looked is None else looked
        self.freshness.answer(self.passed)
        if term not in self.terms:
            self.terms.add(term)
            self.broadcast.receive(beat(term, looked - 0.25).encode())
        self.broadcast.receive(beat(term, looked).encode())


@pytest.fixture
def listener() -> _Listener:
    """Give a listener that has heard nothing yet."""
    return _Listener()


class TestFreshness:
    """How long what is cached is believed."""

    def test_nothing_is_believed_before_the_first_beat(self, listener: _Listener) -> None:
        """Until then only what was computed within 1.5 s may be served."""
        assert not listener.trusts()
        assert NOON + timedelta(seconds=listener.passed - BELIEF_SECONDS) == listener.freshness.oldest()

    def test_a_beat_is_believed_for_a_while(self, listener: _Listener) -> None:
        """For 1.5 s anything may be served, and then again only what is new."""
        listener.hear_beat()
        assert listener.trusts()
        assert listener.freshness.oldest() is None
        listener.passed += BELIEF_SECONDS - 0.01
        assert listener.trusts()
        listener.passed += 0.02
        assert not listener.trusts()
        assert NOON + timedelta(seconds=listener.passed - BELIEF_SECONDS) == listener.freshness.oldest()

    def test_beats_follow_each_other(self, listener: _Listener) -> None:
        """While they come, belief never ends, though clocks of two hosts run apart by a second in a few minutes."""
        for term, drift in enumerate((1.0, 1.0005, 0.9995), 1):
            for _ in range(40_000):
                listener.passed += 0.25
                listener.hear_beat(term, looked=_RELAY_CLOCK + listener.passed * drift)
                assert listener.trusts()
                listener.passed += 1.0
                assert listener.trusts()
                listener.passed -= 1.0
            listener.freshness.lose()

    def test_losing_is_at_once(self, listener: _Listener) -> None:
        """What may have been missed ends belief, and everything kept is forgotten; the next beat begins anew."""
        listener.hear_beat()
        listener.broadcast.lose()
        assert not listener.trusts()
        assert [None] == listener.heard
        listener.hear_beat()
        assert listener.trusts()

    def test_a_late_beat_is_believed_for_less_long(self, listener: _Listener) -> None:
        """How late is seen from the quickest: what a frozen process finds in its socket is old."""
        listener.hear_beat()
        listener.passed += 10.0
        for late in (9.0, 2.0, 1.52):
            listener.hear_beat(late=late)
            assert not listener.trusts()
        listener.hear_beat(late=1.0)
        assert listener.trusts()
        listener.passed += 0.52
        assert not listener.trusts()

    def test_no_beat_is_believed_before_an_answer_nor_for_longer_than_one(self, listener: _Listener) -> None:
        """Two beats may be equally late: in the socket of a process that was frozen before it heard any."""
        for looked in (listener.passed - 2.0, listener.passed - 1.5):
            listener.broadcast.receive(beat(1, _RELAY_CLOCK + looked).encode())
        assert not listener.trusts()
        listener.freshness.answer(listener.passed - 2.1)  # asked before it froze
        listener.broadcast.receive(beat(1, _RELAY_CLOCK + listener.passed - 1.4).encode())
        assert not listener.trusts()
        listener.freshness.answer(listener.passed)
        assert not listener.trusts()
        listener.broadcast.receive(beat(1, _RELAY_CLOCK + listener.passed).encode())
        assert listener.trusts()
        listener.broadcast.lose()
        listener.broadcast.receive(beat(1, _RELAY_CLOCK + listener.passed).encode())
        assert not listener.trusts()

    def test_the_first_beat_of_a_term_is_only_measured_by(self, listener: _Listener) -> None:
        """It may have been under way for long, and nobody could tell; the second one shows how late it was."""
        listener.freshness.answer(listener.passed)
        listener.broadcast.receive(beat(1, _RELAY_CLOCK + listener.passed - 5.0).encode())
        assert not listener.trusts()
        listener.broadcast.receive(beat(1, _RELAY_CLOCK + listener.passed).encode())
        assert listener.trusts()
        listener.broadcast.receive(beat(1, _RELAY_CLOCK + listener.passed - 5.0).encode())
        assert not listener.trusts()

    def test_a_late_beat_is_known_on_a_new_connection_too(self, listener: _Listener) -> None:
        """How the clocks differ is remembered for as long as the relay leads, whatever connection tells of it."""
        listener.hear_beat()
        listener.broadcast.lose()
        listener.passed += 10.0
        listener.hear_beat(late=5.0)
        assert not listener.trusts()
        listener.hear_beat()
        assert listener.trusts()

    def test_a_new_term_ends_the_one_before(self, listener: _Listener) -> None:
        """What the relay before said counts no longer, and a beat of its own, late as it is, counts for nothing."""
        listener.hear_beat(1)
        listener.broadcast.receive(lead(2).encode())
        assert not listener.trusts()
        listener.hear_beat(1)
        assert not listener.trusts()
        listener.hear_beat(2, looked=1.0)
        assert listener.trusts()
        listener.broadcast.receive(lead(1).encode())
        listener.broadcast.receive(lead(2).encode())
        assert listener.trusts()

    def test_a_term_may_begin_with_its_beat(self, listener: _Listener) -> None:
        """Whoever begins to listen later hears no `lead`; another relay's clock is another one."""
        listener.hear_beat(1)
        listener.hear_beat(7, looked=3.0)
        assert listener.trusts()
        listener.passed += BELIEF_SECONDS - 0.01
        assert listener.trusts()
        listener.hear_beat(6)
        listener.passed += 0.02
        assert not listener.trusts()


class TestBroadcast:
    """What messages mean."""

    def test_everybody_hears_in_order(self) -> None:
        """Each listener is told of everything, in the order in which it was said."""
        one: list[Sequence[UserId] | None] = []
        other: list[Sequence[UserId] | None] = []
        broadcast = Broadcast(Freshness(clock=lambda: NOON), [one.append, other.append])
        for message in (*messages([user(1), user(2)]), *messages(None), *messages([user(3)])):
            broadcast.receive(message.encode())
        assert [[user(1), user(2)], None, [user(3)]] == one == other

    def test_whoever_joins_later_hears_too(self) -> None:
        """Listeners may be added while it is open."""
        heard: list[Heard] = []
        broadcast = Broadcast(Freshness(clock=lambda: NOON), heard)
        told: list[Sequence[UserId] | None] = []
        heard.append(told.append)
        broadcast.receive(b"all")
        assert [None] == told

    @pytest.mark.parametrize(
        "message",
        [
            *(
                b"",
                b" ",
                b"beat",
                b"beat ",
                b"beat 1",
                b"beat x 1",
                b"beat 1 x",
                b"beat -1 1",
                b"beat 1 1 1",
                b"beat 1  1",
            ),
            *(
                b"lead",
                b"lead 1",
                b"lead one 0",
                b"BEAT 1 1",
                b"all 1"[:-2] + b"x",
                b"\xff\xfe\x00",
                b"beat \xc2\xb2 1",
            ),
            *(b"beat " + b"9" * 10_000 + b" 1", b"lead " + b"9" * 10_000 + b" 1", b"{}", b"*" * 100_000),
        ],
    )
    def test_what_is_none_of_ours_is_passed_over(self, listener: _Listener, message: bytes) -> None:
        """Anybody may write to a channel: nothing of it is believed, nobody is told, and nothing fails."""
        listener.broadcast.receive(message)
        assert not listener.trusts()
        assert [] == listener.heard
        listener.hear_beat(1)
        assert listener.trusts()

    def test_messages_fit_into_a_notification(self) -> None:
        """However many users changed, each is named once, and no message is longer than PostgreSQL takes."""
        users = [user(number) for number in range(1001)]
        said = [*messages(users)]
        assert all(len(message) < 8000 for message in said)
        assert users == [each for message in said for each in message.split(" ")[1:]]
        assert [] == [*messages([])]


# Redis.


@asynccontextmanager
async def _hearing(url: str, listener: _Listener, *, deadline: float = 0.5) -> AsyncIterator[RedisCache]:
    """Open a cache, and listen until the block ends."""
    async with open_redis(url, deadline=deadline) as cache, background() as spawn:
        before = _listeners()
        spawn(hear_redis(listener.broadcast, cache))
        await eventually(lambda: _listeners() > before)
        yield cache


def _listeners() -> float:
    return metric("goodstanding_broadcast_listeners")


async def _is_heard(listener: _Listener, say: Callable[[], Awaitable[object]]) -> None:
    """Wait until something that is said arrives."""
    listener.heard.clear()

    async def arrives() -> bool:
        try:
            await say()
        except CacheAwayError:
            return False
        return [user(1)] in listener.heard

    await eventually(arrives)


class TestRedis:
    """Over Redis: every process hears what any process says."""

    async def test_what_is_said_is_heard_in_order(self, redis_url: str, listener: _Listener) -> None:
        """Invalidations by any process arrive at every process, each after its users' keys are gone, in order."""
        other = _Listener()
        async with _hearing(redis_url, listener) as cache, _hearing(redis_url, other), open_redis(redis_url) as third:
            said: list[Sequence[UserId] | None] = []
            for number in range(300):
                users = [user(each) for each in range(number, number + 1 + number % 3)]
                await (cache if number % 2 else third).invalidate(users)
                said.append(users)
            await third.invalidate_all()
            said.append(None)
            await eventually(lambda: len(listener.heard) == len(other.heard) == len(said))
            assert said == listener.heard == other.heard

    async def test_many_users_are_several_messages(self, redis_url: str, listener: _Listener) -> None:
        """A batch of 2,000 is told whole."""
        users = [user(number) for number in range(2000)]
        async with _hearing(redis_url, listener) as cache:
            await cache.invalidate(users)
            await eventually(lambda: len(users) == sum(len(told or ()) for told in listener.heard))
            assert users == [each for told in listener.heard for each in told or ()]

    async def test_another_database_of_the_server_is_not_heard(self, redis_url: str, listener: _Listener) -> None:
        """Channels are the server's, and another database is another app's."""
        elsewhere = redis_url.removesuffix("/0") + "/1"
        async with _hearing(redis_url, listener) as cache, open_redis(elsewhere) as stranger:
            await stranger.invalidate([user(2)])
            await stranger.invalidate_all()
            await stranger.say_vouched(beat(5, 1.0))
            await cache.invalidate([user(1)])
            await eventually(lambda: bool(listener.heard))
            assert [[user(1)]] == listener.heard
            assert not listener.trusts()

    async def test_beats_are_believed(self, redis_url: str, listener: _Listener) -> None:
        """A beat that Redis vouches for arrives, and is believed."""
        async with _hearing(redis_url, listener) as cache:
            for looked in (1.0, 1.0, 1.25):  # the first one only finds a Redis that nobody vouches for yet
                await cache.say_vouched(beat(5, looked))
            await eventually(listener.trusts)

    @pytest.mark.parametrize("kind", ["pubsub", "normal"])
    async def test_a_connection_that_is_ended_is_noticed_and_replaced(
        self, redis_url: str, listener: _Listener, kind: str
    ) -> None:
        """That of the broadcast, or that of the commands when it is made anew: both end belief at once."""
        async with _hearing(redis_url, listener) as cache, admin(redis_url) as client:
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))
            listener.hear_beat()
            await client.client_kill_filter(_type=kind, skipme=True)
            await cache.fetch([user(1)])
            await eventually(lambda: not listener.trusts(), within=_NOTICED)
            assert None in listener.heard
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))
            assert 1 == int((await client.pubsub_numsub("goodstanding:0"))[0][1])

    @pytest.mark.slow
    async def test_a_redis_that_dies_is_noticed(self, valkey: Valkey, redis_url: str, listener: _Listener) -> None:
        """Its end is noticed at once, and what its successor says is heard."""
        async with _hearing(redis_url, listener) as cache:
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))
            listener.hear_beat()
            await asyncio.to_thread(valkey.kill)
            try:
                await eventually(lambda: not listener.trusts(), within=_NOTICED)
                assert 0 == _listeners()
            finally:
                valkey.start()
            await eventually(lambda: cache.available)
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))

    @pytest.mark.slow
    async def test_a_half_open_connection_is_noticed(self, valkey: Valkey, redis_url: str, listener: _Listener) -> None:
        """A Redis that keeps the connection and says nothing is noticed within 2 s, by asking it."""
        async with _hearing(redis_url, listener) as cache:
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))
            listener.hear_beat()
            await asyncio.to_thread(valkey.pause)
            try:
                await eventually(lambda: not listener.trusts(), within=_NOTICED)
                assert 0 == _listeners()
            finally:
                await asyncio.to_thread(valkey.resume)
            await eventually(lambda: cache.available)
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))

    @pytest.mark.slow
    async def test_a_server_from_which_no_beat_comes_is_left(self, redis_url: str, listener: _Listener) -> None:
        """It may be there and belong to the Cluster no longer: after some seconds another connection is made."""
        async with _hearing(redis_url, listener), admin(redis_url) as client:
            [before] = await client.client_list(_type="pubsub")

            async def is_another() -> bool:
                return [] != [one for one in await client.client_list(_type="pubsub") if one["id"] != before["id"]]

            assert await eventually(is_another) > 3.0

    @pytest.mark.slow
    async def test_silence_alone_is_no_loss(self, redis_url: str, listener: _Listener) -> None:
        """While nothing is said the connection stays: asking is enough."""
        async with _hearing(redis_url, listener), admin(redis_url) as client:
            [before] = await client.client_list(_type="pubsub")
            listener.hear_beat()
            await eventually(lambda: _age_reached(client, int(before["age"]) + 3))
            [after] = await client.client_list(_type="pubsub")
            assert before["id"] == after["id"]
            assert listener.trusts()

    async def test_a_redis_that_forbids_the_channel_is_not_believed(self, redis_url: str, listener: _Listener) -> None:
        """Without the right to subscribe nothing is heard, nothing believed, and it tries again until it may."""
        async with admin(redis_url) as client, open_redis(redis_url) as cache, background() as spawn:
            await client.acl_setuser("default", enabled=True, keys=["*"], channels=[], reset_channels=True)
            spawn(hear_redis(listener.broadcast, cache))
            await eventually(lambda: len(listener.heard) > 1)
            assert not listener.trusts()
            await client.acl_setuser("default", enabled=True, keys=["*"], channels=["*"])
            await _is_heard(listener, lambda: cache.invalidate([user(1)]))


async def _age_reached(client: "redis.asyncio.Redis", seconds: int) -> bool:
    [listening] = await client.client_list(_type="pubsub")
    return int(listening["age"]) >= seconds


# PostgreSQL.


@asynccontextmanager
async def _hearing_notifications(database: Database, listener: _Listener) -> AsyncIterator[Announcer]:
    """Listen over PostgreSQL until the block ends."""
    announcer = Announcer()
    async with background() as spawn:
        before = _listeners()
        spawn(announcer.hear(listener.broadcast, database.service_url))
        await eventually(lambda: _listeners() > before)
        assert [None] == listener.heard  # what was known before it listened
        listener.heard.clear()
        yield announcer


_END_LISTENERS = (
    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
    " where datname = current_database() and usename = 'app_login'"
)


class TestNotify:
    """Over PostgreSQL: the same where there is no Redis."""

    async def test_what_is_said_is_heard_by_all(self, database: Database, listener: _Listener) -> None:
        """Each process hears what any process says, itself included, in order, however much it is."""
        other = _Listener()
        users = [user(number) for number in range(1000)]
        async with (
            _hearing_notifications(database, listener) as announcer,
            _hearing_notifications(database, other) as second,
        ):
            await announcer.say(users)
            await second.say(None)
            await announcer.say([user(1)])
            await eventually(lambda: len(listener.heard) == len(other.heard) == 7)
            for heard in (listener.heard, other.heard):
                assert users == [each for told in heard[:5] for each in told or ()]
                assert [None, [user(1)]] == heard[5:]

    async def test_what_is_rolled_back_is_not_said(self, database: Database, listener: _Listener) -> None:
        """A relay's words travel with its transaction."""
        async with _hearing_notifications(database, listener) as announcer, database.owner() as connection:
            undone = connection.transaction()
            await undone.start()
            await notify(connection, "all", beat(3, 0.75), beat(3, 1.0))  # type: ignore[arg-type] # a lent connection is one
            await undone.rollback()
            async with connection.transaction():
                await notify(connection, *messages([user(2)]), beat(4, 0.75), beat(4, 1.0))  # type: ignore[arg-type] # as above
            await announcer.say([user(1)])
            await eventually(lambda: len(listener.heard) == 2)
            assert [[user(2)], [user(1)]] == listener.heard
            assert listener.trusts()

    async def test_nobody_can_be_told_without_a_connection(self, listener: _Listener) -> None:
        """Whoever invalidates then is told so."""
        announcer = Announcer()
        async with background() as spawn:
            spawn(announcer.hear(listener.broadcast, "postgresql://app@127.0.0.1:1/app"))
            with pytest.raises(CacheAwayError):
                await announcer.say([user(1)])

    async def test_a_backend_that_is_ended_is_noticed_and_replaced(
        self, database: Database, listener: _Listener
    ) -> None:
        """The end of the connection ends belief, and the next one hears."""
        async with _hearing_notifications(database, listener) as announcer, connect(database.superuser_url) as killer:
            await _is_heard(listener, lambda: announcer.say([user(1)]))
            listener.hear_beat()
            ended = await killer.fetchval(_END_LISTENERS)
            assert 1 == ended
            await eventually(lambda: not listener.trusts(), within=_NOTICED)
            assert None in listener.heard
            await _is_heard(listener, lambda: announcer.say([user(1)]))

    @pytest.mark.slow
    async def test_a_server_that_hangs_is_noticed(
        self, postgres: Postgres, database: Database, listener: _Listener
    ) -> None:
        """A PostgreSQL that keeps the connection and says nothing is noticed within 2 s."""
        async with _hearing_notifications(database, listener) as announcer:
            await _is_heard(listener, lambda: announcer.say([user(1)]))
            listener.hear_beat()
            await asyncio.to_thread(postgres.pause)
            try:
                await eventually(lambda: not listener.trusts(), within=_NOTICED)
                with pytest.raises(CacheAwayError):
                    await announcer.say([user(1)])
            finally:
                await asyncio.to_thread(postgres.resume)
            await _is_heard(listener, lambda: announcer.say([user(1)]))

    @pytest.mark.slow
    async def test_a_server_that_restarts_is_found_again(
        self, postgres: Postgres, database: Database, listener: _Listener
    ) -> None:
        """Whoever listened before a crash listens after it."""
        async with _hearing_notifications(database, listener) as announcer:
            await asyncio.to_thread(postgres.kill)
            try:
                await eventually(lambda: 0 == _listeners(), within=_NOTICED)
            finally:
                postgres.start()
            await _is_heard(listener, lambda: announcer.say([user(1)]))

    async def test_a_login_that_hears_needs_nothing_more(self, database: Database) -> None:
        """The role that serves may listen and notify, and another database is not heard."""
        heard: list[str] = []
        async with connect(database.service_url) as one, connect(database.superuser_url) as two:
            await one.add_listener("goodstanding", lambda *said: heard.append(str(said[3])))
            elsewhere = await asyncpg.connect(database.superuser_url.rpartition("/")[0] + "/postgres")
            await notify(elsewhere, "all")
            await elsewhere.close()
            await notify(two, json.dumps({"not": "ours"}), "all")
            async with asyncio.timeout(SECONDS):
                while len(heard) < 2:
                    await one.execute("select")
            assert ['{"not": "ours"}', "all"] == heard
