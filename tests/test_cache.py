"""The cache protocol, the same for Redis and for memory; then what only Redis can get wrong."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Connection, Redis, RedisCluster, SSLConnection

from goodstanding import cache as cache_module
from goodstanding import wire as wire_module
from goodstanding.cache import RedisCache, connect, last_good_key, lease_key, value_key
from goodstanding.data import UserId, parse_user_id
from goodstanding.embedded import Valkey
from goodstanding.entry import Entry, Fetched, Lives, decode, encode
from goodstanding.errors import CacheAwayError
from goodstanding.policy import LEGACY, STANDARD
from goodstanding.tasks import background
from tests.parts import (
    LIVES,
    NOON,
    PATIENT,
    Kit,
    Proxy,
    admin,
    entry,
    eventually,
    memory_kit,
    metric,
    open_redis,
    redis_kit,
    user,
)

_ME, _OTHER = user(1), user(2)
_UNKNOWN = Entry(None, NOON)
_NOTHING = Fetched(None, None)


@pytest.fixture(params=["redis", "memory"])
async def kit(request: pytest.FixtureRequest) -> AsyncIterator[Kit]:
    """Give each cache in turn."""
    if request.param == "memory":
        async with memory_kit() as kit:
            yield kit
    else:
        async with redis_kit(request.getfixturevalue("redis_url")) as kit:
            yield kit


@pytest.fixture
async def redis_cache(redis_url: str) -> AsyncIterator[RedisCache]:
    """Give the Redis cache alone."""
    async with open_redis(redis_url) as cache:
        yield cache


async def test_an_empty_cache_knows_nobody(kit: Kit) -> None:
    """A miss is no entry and no lease, for as many users as asked, and none when none is asked."""
    assert [_NOTHING, _NOTHING] == await kit.cache.fetch([_ME, _OTHER])
    assert [None, None] == await kit.cache.fetch_last_good([_ME, _OTHER])
    assert [] == await kit.cache.fetch([])
    assert kit.cache.available


async def test_who_finds_nothing_is_leased_under_the_token(kit: Kit) -> None:
    """A look with a token leases whom nobody knows and nobody loads, once; a value or a lease is left as it is."""
    assert [Fetched(None, "t1")] == await kit.cache.fetch([_ME], token="t1")
    assert [Fetched(None, "t1"), Fetched(None, "t2")] == await kit.cache.fetch([_ME, _OTHER], token="t2")
    assert [True] == await kit.cache.fill({_ME: entry()}, "t1")
    assert [Fetched(entry(), None), Fetched(None, "t2")] == await kit.cache.fetch([_ME, _OTHER], token="t3")
    await kit.cache.invalidate([_ME])
    assert [Fetched(None, "t4")] == await kit.cache.fetch([_ME], token="t4")
    await kit.move_on(LIVES.lease)
    assert [Fetched(None, "t5")] == await kit.cache.fetch([_ME], token="t5")
    assert [False] == await kit.cache.fill({_ME: entry()}, "t4")


async def test_the_holder_of_a_lease_fills(kit: Kit) -> None:
    """Lease, fill, read back: the lease ends with the fill."""
    assert [True, True] == await kit.cache.lease([_ME, _OTHER], "t1")
    assert [Fetched(None, "t1")] == await kit.cache.fetch([_ME])
    assert [True, True] == await kit.cache.fill({_ME: entry(3), _OTHER: entry(4)}, "t1")
    assert [Fetched(entry(4), None), Fetched(entry(3), None)] == await kit.cache.fetch([_OTHER, _ME])
    assert [entry(3), entry(4)] == await kit.cache.fetch_last_good([_ME, _OTHER])


async def test_a_lease_has_one_holder(kit: Kit) -> None:
    """A lease that is out is not given again, except to one who seizes it."""
    await kit.cache.lease([_ME], "t1")
    assert [False, True] == await kit.cache.lease([_ME, _OTHER], "t2")
    assert [True] == await kit.cache.lease([_ME], "t3", seize=True)
    assert [Fetched(None, "t3")] == await kit.cache.fetch([_ME])
    assert [False] == await kit.cache.fill({_ME: entry()}, "t1")
    assert [True] == await kit.cache.fill({_ME: entry()}, "t3")


async def test_a_lease_of_a_filled_value_is_left_where_it_is_not_wanted(kit: Kit) -> None:
    """Whoever missed, and was overtaken by another's load and fill, does not load again; a refresh still may."""
    assert [True] == await kit.cache.lease([_ME], "t1", unless_cached=True)
    assert [True] == await kit.cache.fill({_ME: entry()}, "t1")
    assert [False] == await kit.cache.lease([_ME], "t2", unless_cached=True)
    assert [Fetched(entry(), None)] == await kit.cache.fetch([_ME])
    assert [True] == await kit.cache.lease([_ME], "t3")


async def test_nobody_fills_without_a_lease(kit: Kit) -> None:
    """Without a lease, with somebody else's, or a second time: nothing is stored."""
    assert [False] == await kit.cache.fill({_ME: entry()}, "t1")
    await kit.cache.lease([_ME], "t1")
    assert [False] == await kit.cache.fill({_ME: entry()}, "t2")
    assert [True] == await kit.cache.fill({_ME: entry(1)}, "t1")
    assert [False] == await kit.cache.fill({_ME: entry(2)}, "t1")
    assert [Fetched(entry(1), None)] == await kit.cache.fetch([_ME])


async def test_an_invalidation_drops_value_lease_and_last_known_good(kit: Kit) -> None:
    """After it nothing is left, and a load that began before it cannot fill; other users keep what they have."""
    await kit.cache.lease([_ME, _OTHER], "t1")
    await kit.cache.fill({_ME: entry(), _OTHER: entry()}, "t1")
    await kit.cache.lease([_ME], "t2")
    await kit.cache.invalidate([_ME])
    assert [_NOTHING, Fetched(entry(), None)] == await kit.cache.fetch([_ME, _OTHER])
    assert [None, entry()] == await kit.cache.fetch_last_good([_ME, _OTHER])
    assert [False] == await kit.cache.fill({_ME: entry()}, "t2")
    assert [_NOTHING] == await kit.cache.fetch([_ME])


async def test_a_stale_load_cannot_use_its_successors_lease(kit: Kit) -> None:
    """A lease taken after an invalidation is not the one that was taken before it."""
    await kit.cache.lease([_ME], "before")
    await kit.cache.invalidate([_ME])
    assert [True] == await kit.cache.lease([_ME], "after")
    assert [False] == await kit.cache.fill({_ME: entry(1)}, "before")
    assert [True] == await kit.cache.fill({_ME: entry(2)}, "after")
    assert [Fetched(entry(2), None)] == await kit.cache.fetch([_ME])


async def test_a_lease_is_given_back_by_its_holder_alone(kit: Kit) -> None:
    """A release ends the own lease, nobody else's, and no value."""
    await kit.cache.lease([_ME], "t1")
    await kit.cache.release([_ME, _OTHER], "t2")
    assert [Fetched(None, "t1")] == await kit.cache.fetch([_ME])
    await kit.cache.release([_ME], "t1")
    assert [_NOTHING] == await kit.cache.fetch([_ME])
    await kit.cache.release([], "t1")


async def test_a_value_lives_as_long_as_told(kit: Kit) -> None:
    """A known user's value is gone after its life; the last known good copy stays for its own."""
    await kit.cache.lease([_ME], "t1")
    await kit.cache.fill({_ME: entry()}, "t1")
    await kit.move_on(LIVES.value - 10_000)
    assert [Fetched(entry(), None)] == await kit.cache.fetch([_ME])
    await kit.move_on(10_000)
    assert [_NOTHING] == await kit.cache.fetch([_ME])
    assert [entry()] == await kit.cache.fetch_last_good([_ME])
    await kit.move_on(LIVES.last_good - LIVES.value)
    assert [None] == await kit.cache.fetch_last_good([_ME])


async def test_an_unknown_user_is_remembered_shortly(kit: Kit) -> None:
    """It has a shorter life, and no last known good copy: the one of the time before it was deleted goes."""
    await kit.cache.lease([_ME], "t1")
    await kit.cache.fill({_ME: entry()}, "t1")
    await kit.cache.lease([_ME], "t2")
    await kit.cache.fill({_ME: _UNKNOWN}, "t2")
    assert [Fetched(_UNKNOWN, None)] == await kit.cache.fetch([_ME])
    assert [None] == await kit.cache.fetch_last_good([_ME])
    await kit.move_on(LIVES.unknown)
    assert [_NOTHING] == await kit.cache.fetch([_ME])


async def test_a_lease_ends_by_itself(kit: Kit) -> None:
    """A holder that died blocks nobody for longer than a load may take, and cannot fill any more."""
    await kit.cache.lease([_ME], "t1")
    await kit.move_on(LIVES.lease)
    assert [_NOTHING] == await kit.cache.fetch([_ME])
    assert [False] == await kit.cache.fill({_ME: entry()}, "t1")
    assert [True] == await kit.cache.lease([_ME], "t2")


async def test_everybody_is_dropped_at_once(kit: Kit) -> None:
    """It tells how many values went; leases and last known good copies go too."""
    users = [user(number) for number in range(10)]
    await kit.cache.lease(users, "t1")
    await kit.cache.fill({**dict.fromkeys(users[:6], entry()), users[6]: _UNKNOWN}, "t1")
    assert 7 == await kit.cache.invalidate_all()
    assert [_NOTHING] * 10 == await kit.cache.fetch(users)
    assert [None] * 10 == await kit.cache.fetch_last_good(users)
    assert [False] * 3 == await kit.cache.fill(dict.fromkeys(users[7:], entry()), "t1")
    assert 0 == await kit.cache.invalidate_all()


@pytest.mark.parametrize("kind", ["redis", "memory"])
async def test_without_a_life_there_is_no_last_known_good_copy(kind: str, request: pytest.FixtureRequest) -> None:
    """A life of 0 turns the copies off, and drops one that another process left."""
    lives = Lives(value=300_000, unknown=30_000, last_good=0, lease=1000)
    opened = (
        memory_kit(lives=lives) if kind == "memory" else redis_kit(request.getfixturevalue("redis_url"), lives=lives)
    )
    async with opened as kit:
        await kit.cache.lease([_ME], "t1")
        assert [True] == await kit.cache.fill({_ME: entry()}, "t1")
        assert [None] == await kit.cache.fetch_last_good([_ME])
        assert [Fetched(entry(), None)] == await kit.cache.fetch([_ME])


async def test_only_one_of_many_gets_the_lease(kit: Kit) -> None:
    """A hundred at once: one holder."""
    got = await asyncio.gather(*(kit.cache.lease([_ME], f"t{number}") for number in range(100)))
    assert 1 == sum(is_ours for [is_ours] in got)


# What only Redis can get wrong.


async def test_keys_are_named_as_documented(redis_cache: RedisCache, redis_url: str) -> None:
    """The value is under reputation:user:<id>, lower case, and all three keys of a user share a Cluster slot."""
    me = parse_user_id("AAAAAAAA-BBBB-4CCC-8DDD-EEEEEEEEEEEE")
    await redis_cache.lease([me], "t1")
    async with admin(redis_url) as client:
        assert b"t1" == await client.get("{reputation:user:aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee}:lease")
        await redis_cache.fill({me: entry()}, "t1")
        keys = {key async for key in client.scan_iter("*reputation*")}
        assert {
            b"reputation:user:aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
            b"{reputation:user:aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee}:good",
        } == keys
        value = json.loads(await client.get(value_key(me)) or b"")
        assert (7, "green", 7, 0) == tuple(value.values())[:4]
        assert [me, STANDARD.version] == [value["user_id"], value["policy"]]
    cluster = RedisCluster(host="localhost")
    assert 1 == len({cluster.keyslot(name(me)) for name in (value_key, lease_key, last_good_key)})


async def test_every_key_expires_by_itself(redis_cache: RedisCache, redis_url: str) -> None:
    """At most 300 s for a value, 30 s for an unknown user, an hour for a last known good copy."""
    await redis_cache.lease([_ME, _OTHER, user(3)], "t1")
    await redis_cache.fill({_ME: entry(), _OTHER: _UNKNOWN}, "t1")
    async with admin(redis_url) as client:
        assert 290_000 < await client.pttl(value_key(_ME)) <= 300_000
        assert 20_000 < await client.pttl(value_key(_OTHER)) <= 30_000
        assert 3_590_000 < await client.pttl(last_good_key(_ME)) <= 3_600_000
        assert 0 < await client.pttl(lease_key(user(3))) <= LIVES.lease
        assert all([await client.pttl(key) > 0 async for key in client.scan_iter("*")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"not json", "corrupt"),
        (b"", "corrupt"),
        (encode(entry(), user_id=_ME, policy=STANDARD.version)[:-5], "corrupt"),
        (encode(entry(), user_id=_ME, policy=LEGACY.version), "other_policy"),
        (encode(entry(), user_id=_OTHER, policy=STANDARD.version), "other_user"),
    ],
)
async def test_a_bad_entry_is_a_miss_counted_and_replaced(
    redis_cache: RedisCache, redis_url: str, text: bytes, reason: str
) -> None:
    """Corrupt, of another policy or of another user: not served, told apart in the metrics, and overwritten."""
    async with admin(redis_url) as client:
        await client.set(value_key(_ME), text)
        await client.set(last_good_key(_ME), text)
        before = metric("goodstanding_cache_rejected_total", reason=reason)
        assert [_NOTHING] == await redis_cache.fetch([_ME])
        assert [None] == await redis_cache.fetch_last_good([_ME])
        assert before + 2 == metric("goodstanding_cache_rejected_total", reason=reason)
        assert [True] == await redis_cache.lease([_ME], "t1")
        assert [True] == await redis_cache.fill({_ME: entry()}, "t1")
        assert [Fetched(entry(), None)] == await redis_cache.fetch([_ME])
        assert [entry()] == await redis_cache.fetch_last_good([_ME])
        assert await client.pttl(value_key(_ME)) > 0


async def test_a_lease_in_a_strange_spelling_is_a_lease(redis_cache: RedisCache, redis_url: str) -> None:
    """Whatever bytes stand there, somebody loads; and nobody's token is that."""
    async with admin(redis_url) as client:
        await client.set(lease_key(_ME), b"\xfft1")
        assert [Fetched(None, "\ufffdt1")] == await redis_cache.fetch([_ME])
        assert [Fetched(None, "\ufffdt1")] == await redis_cache.fetch([_ME], token="t1")
        assert [False] == await redis_cache.lease([_ME], "t1")


async def test_the_same_text_is_read_once(
    redis_cache: RedisCache, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not changed since it was read is not parsed again, as far as a bounded memory goes."""
    read: list[bytes] = []
    original = decode

    def noted(text: bytes, **about: Any) -> Any:  # noqa: ANN401 - as it is
        read.append(text)
        return original(text, **about)

    monkeypatch.setattr(cache_module, "decode", noted)
    monkeypatch.setattr(cache_module, "_MOST_DECODED", 2)
    await redis_cache.lease([_ME, _OTHER, user(3)], "t1")
    await redis_cache.fill({_ME: entry(1), _OTHER: entry(2), user(3): entry(3)}, "t1")
    for _ in range(3):
        assert [Fetched(entry(1), None), Fetched(entry(2), None)] == await redis_cache.fetch([_ME, _OTHER])
    assert 2 == len(read)
    assert [Fetched(entry(3), None)] == await redis_cache.fetch([user(3)])
    assert [Fetched(entry(1), None)] == await redis_cache.fetch([_ME])
    assert 4 == len(read)
    async with admin(redis_url) as client:
        await client.set(value_key(_ME), encode(entry(5), user_id=_ME, policy=STANDARD.version))
    assert [Fetched(entry(5), None)] == await redis_cache.fetch([_ME])
    assert 5 == len(read)


async def test_keys_of_another_type_break_nothing(redis_cache: RedisCache, redis_url: str) -> None:
    """A list where a text should be is a miss; a fill, a seized lease or an invalidation replaces it."""
    async with admin(redis_url) as client:
        for name in (value_key, lease_key, last_good_key):
            await client.rpush(name(_ME), "x")
        assert [_NOTHING, _NOTHING] == await redis_cache.fetch([_ME, _OTHER])
        assert [None] == await redis_cache.fetch_last_good([_ME])
        assert [False] == await redis_cache.lease([_ME], "t1")
        assert [False] == await redis_cache.fill({_ME: entry()}, "t1")
        await redis_cache.release([_ME], "t1")
        assert redis_cache.available
        assert [True] == await redis_cache.lease([_ME], "t2", seize=True)
        assert [True] == await redis_cache.fill({_ME: entry()}, "t2")
        assert [Fetched(entry(), None)] == await redis_cache.fetch([_ME])
        await client.delete(value_key(_ME))
        await client.rpush(value_key(_ME), "x")
        await redis_cache.invalidate([_ME])
        assert 0 == await client.exists(value_key(_ME), last_good_key(_ME))


async def test_a_hundred_users_cost_one_round_trip(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes any number of users at the price of one, and calls of the same moment share it."""
    users = [user(number) for number in range(100)]
    trips: list[set[object]] = []
    trip = wire_module._Trip  # noqa: SLF001 - what is written in one piece

    def noted(calls: Sequence[Any], runs: Sequence[Sequence[wire_module.Command]]) -> Any:  # noqa: ANN401 - as it is
        trips.append({command[0] for run in runs for command in run})
        return trip(calls, runs)

    monkeypatch.setattr(wire_module, "_Trip", noted)
    async with open_redis(redis_url) as cache:
        await cache.fetch(users)
        await cache.lease(users, "t1")
        await cache.fill(dict.fromkeys(users, entry()), "t1")
        await asyncio.gather(*(cache.fetch([me]) for me in users))
        await asyncio.gather(*(cache.fetch([me], token="t2") for me in users))
        await cache.invalidate(users)
        reads_and_writes = [{"MGET"}, {"SET"}, {"EVAL"}, {"MGET"}, {"EVAL"}, {"DEL", "PUBLISH"}]
        assert reads_and_writes == trips
        trips.clear()
        await cache.fetch_last_good(users)
        await cache.lease(users, "t3", unless_cached=True)
        await cache.release(users, "t3")
        await cache.add(dict.fromkeys(users, 1), 60)
        await cache.say("hello")
        await cache.say_vouched("hello")
    others = [{"MGET"}, {"SET", "MGET"}, {"EVAL"}, {"INCRBY", "EXPIRE"}, {"PUBLISH"}, {"EVAL"}]
    assert others == trips[:6]


async def test_everybody_is_dropped_without_blocking_redis(redis_url: str) -> None:
    """Five thousand users go by SCAN and UNLINK; no KEYS, no FLUSH, and no key that merely looks similar."""
    users = [user(number) for number in range(5000)]
    similar = [
        "reputation:user:",
        "reputation:user:someone",
        f"reputation:user:{_ME}:settings",
        f"xreputation:user:{_ME}",
        f"app:reputation:user:{_ME}",
        f"{{reputation:user:{_ME}}}:leases",
        f"{{reputation:user:{_ME}}}",
        f"reputation:users:{_ME}",
        f"reputation:user:{_ME.replace('-', '_')}",
        "goodstanding:limit:read:x:1",
        "other",
    ]
    async with open_redis(redis_url) as cache, admin(redis_url) as client:
        for start in range(0, 5000, 1000):
            batch = users[start : start + 1000]
            await cache.lease(batch, "t1")
            await cache.fill(dict.fromkeys(batch[:990], entry()), "t1")
        for key in similar:
            await client.set(key, "mine")
        await client.config_resetstat()
        assert 4950 == await cache.invalidate_all()
        commands = await client.info("commandstats")
        assert {"cmdstat_scan", "cmdstat_unlink"} <= commands.keys()
        assert not {"cmdstat_keys", "cmdstat_flushall", "cmdstat_flushdb"} & commands.keys()
        left = {key.decode() async for key in client.scan_iter("*") if not key.startswith(b"goodstanding:probe")}
        assert set(similar) == left


async def test_a_load_begun_before_everybody_was_dropped_cannot_fill(redis_url: str) -> None:
    """However the two interleave: what was leased before never stays, what is leased after does."""
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    async with open_redis(redis_url) as cache, open_redis(redis_url) as elsewhere:
        for _ in range(30):
            before = [user(number) for number in range(40)]
            await cache.lease(before, "before")

            async def fill(users: Sequence[UserId], turns: int) -> None:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await cache.fill(dict.fromkeys(users, entry()), "before")

            await asyncio.gather(
                elsewhere.invalidate_all(),
                *(fill(before[start : start + 4], rng.randrange(60)) for start in range(0, 40, 4)),
            )
            assert [_NOTHING] * 40 == await cache.fetch(before), f"seed {seed}"
            assert [None] * 40 == await cache.fetch_last_good(before), f"seed {seed}"
            await cache.lease(before[:1], "after")
            assert [True] == await cache.fill({before[0]: entry()}, "after"), f"seed {seed}"


async def test_counters_add_up(redis_url: str) -> None:
    """Increments of all processes add up, 0 only reads, and each counter expires by itself."""
    async with open_redis(redis_url) as one, open_redis(redis_url) as two, admin(redis_url) as client:
        assert {"a": 3, "b": 1} == await one.add({"a": 3, "b": 1}, 60)
        assert {"a": 5, "b": 1} == await two.add({"a": 2, "b": 0}, 60)
        assert 50 < await client.ttl("a") <= 60
        assert {} == await one.add({}, 60)


async def test_answers_are_never_mixed_up(redis_url: str) -> None:
    """Deadlines that strike in the middle of answers leave no connection from which the next reads a stranger's."""
    users = [user(number) for number in range(50)]
    rng = random.Random(7)  # noqa: S311 - reproducible, not secret
    proxy = Proxy(redis_url)
    before = metric("goodstanding_cache_rejected_total", reason="other_user")
    async with open_redis(redis_url) as direct:
        await direct.lease(users, "t1")
        await direct.fill({me: entry(number) for number, me in enumerate(users)}, "t1")
    async with proxy.serve(), open_redis(proxy.url, deadline=0.03) as cache:
        proxy.delay = lambda: rng.choice((0.0, 0.0, 0.02, 0.06))
        answered = away = 0

        async def read(number: int) -> None:
            nonlocal answered, away
            try:
                [found] = await cache.fetch([users[number]])
            except CacheAwayError:
                away += 1
            else:
                assert Fetched(entry(number), None) == found
                answered += 1

        for _ in range(40):
            await asyncio.gather(*(read(rng.randrange(50)) for _ in range(5)))
            cache._breaker.close()  # noqa: SLF001 - this is about connections, not about the circuit
        proxy.delay = lambda: 0.0
    assert answered > 0
    assert away > 0
    assert before == metric("goodstanding_cache_rejected_total", reason="other_user")


async def test_an_answer_between_late_ones_keeps_the_circuit_closed(redis_url: str) -> None:
    """A Redis that is late now and then is late, not away."""
    proxy = Proxy(redis_url)
    async with proxy.serve(), open_redis(proxy.url, deadline=0.1) as cache:

        async def answers() -> bool:
            return [_NOTHING] == await _outcome(cache.fetch([_ME]))

        for _ in range(6):
            proxy.delay = lambda: 3600.0
            assert isinstance(await _outcome(cache.fetch([_ME])), CacheAwayError)
            assert cache.available
            proxy.delay = lambda: 0.0
            await eventually(answers)


async def test_a_caller_that_goes_away_harms_nobody(redis_cache: RedisCache) -> None:
    """A cancelled call is neutral: its neighbours in the same round trip are answered, the circuit stays closed."""
    for _ in range(20):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(redis_cache.fetch([user(number)])) for number in range(30)]
            await asyncio.sleep(0)
            for task in tasks[::3]:
                task.cancel()
        assert all(task.cancelled() for task in tasks[::3])
        assert all([_NOTHING] == task.result() for task in tasks if not task.cancelled())
    assert redis_cache.available


async def test_a_busy_event_loop_is_no_hung_redis(redis_url: str) -> None:
    """A burst that holds up the loop for longer than the deadline takes nobody's answer away."""
    async with open_redis(redis_url, deadline=0.04) as cache, asyncio.TaskGroup() as group:
        await cast("Redis", cache._client).connection_pool.disconnect()  # noqa: SLF001 - so that it has to connect, too
        read = group.create_task(cache.fetch([_ME]))
        while not read.done():
            await asyncio.sleep(0)
            time.sleep(0.05)  # noqa: ASYNC251 - this is the burst
    assert [_NOTHING] == read.result()


async def test_a_closed_cache_answers_at_once(redis_url: str) -> None:
    """Whoever still asks when it closes, or asks later, is told that it is away, and waits for nothing."""
    proxy = Proxy(redis_url)
    loop = asyncio.get_running_loop()
    async with proxy.serve(), asyncio.TaskGroup() as group:
        async with open_redis(proxy.url) as cache:
            proxy.delay = lambda: 3600.0
            calls, sent = [], len(proxy.turns)
            for number in range(6):
                calls.append(group.create_task(_outcome(cache.fetch([user(number)]))))
                await eventually(lambda: len(proxy.turns) >= sent + min(2, len(calls)))
            began = loop.time()
        assert all([isinstance(await call, CacheAwayError) for call in calls])
        assert isinstance(await _outcome(cache.fetch([_ME])), CacheAwayError)
        assert loop.time() - began < PATIENT / 2


async def test_a_wait_for_a_lane_ends_when_the_circuit_opens(redis_url: str) -> None:
    """Calls that have not been sent yet do not find out for themselves that Redis hangs."""
    proxy = Proxy(redis_url)
    loop = asyncio.get_running_loop()
    async with proxy.serve(), open_redis(proxy.url, deadline=2.0) as cache, asyncio.TaskGroup() as group:
        proxy.delay = lambda: 3600.0
        calls, sent = [], len(proxy.turns)
        began = loop.time()
        for number in range(6):
            calls.append(group.create_task(_outcome(cache.fetch([user(number)]))))
            await eventually(lambda: len(proxy.turns) >= sent + min(2, len(calls)))
        cache._breaker.open()  # noqa: SLF001 - as a refusal or a probe would do at that moment
        assert all([isinstance(await call, CacheAwayError) for call in calls])
        assert loop.time() - began < 3.5
        assert not cache.available


async def _outcome(call: Any) -> object:  # noqa: ANN401 - any call, any outcome
    try:
        return await call
    except CacheAwayError as error:
        return error


async def test_the_circuit_opens_on_a_refusal(redis_cache: RedisCache, redis_url: str) -> None:
    """A Redis that answers that it cannot do its part is away at once, and back with the next good probe."""
    async with admin(redis_url) as client:
        await client.config_set("maxmemory", 1)
        with pytest.raises(CacheAwayError):
            await redis_cache.lease([_ME], "t1")
        assert not redis_cache.available
        assert 0 == metric("goodstanding_dependency_up", dependency="redis")
        for call in (
            redis_cache.fetch([_ME]),
            redis_cache.fetch_last_good([_ME]),
            redis_cache.fill({_ME: entry()}, "t1"),
            redis_cache.release([_ME], "t1"),
            redis_cache.invalidate([_ME]),
            redis_cache.invalidate_all(),
            redis_cache.add({"a": 1}, 60),
        ):
            with pytest.raises(CacheAwayError):
                await call
        await client.config_set("maxmemory", 0)
    await eventually(lambda: redis_cache.available)
    assert 1 == metric("goodstanding_dependency_up", dependency="redis")


async def test_dropping_everybody_fails_when_redis_goes_away(
    redis_cache: RedisCache, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that could not be finished is never told as done."""
    users = [user(number) for number in range(10)]
    await redis_cache.lease(users, "t1")
    monkeypatch.setattr(cache_module, "_SCAN_COUNT", 2)
    async with admin(redis_url) as client:
        await client.acl_setuser("default", enabled=True, keys=["*"], commands=["+@all", "-unlink"])
        try:
            with pytest.raises(CacheAwayError):
                await redis_cache.invalidate_all()
            await client.acl_setuser("default", enabled=True, keys=["*"], commands=["+@all", "-scan"])
            await eventually(lambda: redis_cache.available)
            with pytest.raises(CacheAwayError):
                await redis_cache.invalidate_all()
        finally:
            await client.acl_setuser("default", enabled=True, keys=["*"], commands=["+@all"])


async def test_opening_does_not_need_redis() -> None:
    """A Redis that is away when the service starts is only noted."""
    async with open_redis("redis://127.0.0.1:1/0", deadline=0.5) as cache:
        assert not cache.available
        with pytest.raises(CacheAwayError):
            await cache.fetch([_ME])


def test_urls_of_every_kind_are_understood() -> None:
    """Single, TLS, socket, Sentinel with credentials and Cluster; nothing is connected yet."""
    single: Any = connect("redis://me:p%40ss@example:7000/3", deadline=0.05)
    kwargs = single.connection_pool.connection_kwargs
    assert ("example", 7000, 3, "me", "p@ss") == tuple(
        kwargs[name] for name in ("host", "port", "db", "username", "password")
    )
    assert (0.5, 0.5) == (kwargs["socket_timeout"], kwargs["socket_connect_timeout"])
    assert 0 == kwargs["retry"].get_retries()
    assert isinstance(connect("rediss://example", deadline=0.05), Redis)
    assert isinstance(connect("unix:///run/redis.sock", deadline=0.05), Redis)
    sentinel: Any = connect("rediss+sentinel://me:p%40ss@one:1,two/main/4", deadline=0.05)
    pool = sentinel.connection_pool
    assert "main" == pool.service_name
    assert [("one", 1), ("two", 26379)] == [
        (peer.connection_pool.connection_kwargs["host"], peer.connection_pool.connection_kwargs["port"])
        for peer in pool.sentinel_manager.sentinels
    ]
    assert (4, "me", "p@ss") == tuple(pool.connection_kwargs[name] for name in ("db", "username", "password"))
    assert "SSL" in pool.connection_class.__name__
    plain: Any = connect("redis+sentinel://one/main", deadline=0.05)
    assert (0, None) == (
        plain.connection_pool.connection_kwargs["db"],
        plain.connection_pool.connection_kwargs["password"],
    )
    assert isinstance(connect("redis+cluster://example:7000", deadline=0.05), RedisCluster)


@pytest.mark.parametrize(
    "url",
    ["redis://example/3", "rediss://example", "redis+sentinel://one,two/main", "redis+cluster://example:7000"],
)
def test_no_client_waits_or_tries_again(url: str) -> None:
    """The sockets' own deadlines are ten of ours, the last resort; nothing is retried, nobody is greeted."""
    client: Any = connect(url, deadline=0.06)
    if isinstance(client, RedisCluster):
        kwargs, retry = client.connection_kwargs, client.retry
        assert ["example:7000"] == [node.name for node in client.startup_nodes]
    else:
        kwargs = client.connection_pool.connection_kwargs
        retry = kwargs["retry"]
        assert kwargs["driver_info"] is None
    assert [0.6, 0.6] == pytest.approx([kwargs["socket_timeout"], kwargs["socket_connect_timeout"]])
    assert 2 == kwargs["protocol"]
    assert 0 == retry.get_retries()


def test_a_sentinel_that_hangs_leaves_time_for_the_next() -> None:
    """Each is asked within a third of the deadline, once; its credentials are its own, not those of the master."""
    client: Any = connect("redis+sentinel://me:p%40ss@one:1,two/main/4", deadline=0.06)
    pool = client.connection_pool
    assert "SSL" not in pool.connection_class.__name__
    assert (4, "me", "p@ss") == tuple(pool.connection_kwargs[name] for name in ("db", "username", "password"))
    for peer in pool.sentinel_manager.sentinels:
        kwargs = peer.connection_pool.connection_kwargs
        assert [0.02, 0.02] == pytest.approx([kwargs["socket_timeout"], kwargs["socket_connect_timeout"]])
        assert (None, None, 2, None, 0) == (
            *(kwargs[name] for name in ("username", "password", "protocol", "driver_info")),
            kwargs["retry"].get_retries(),
        )


def test_a_sentinel_may_need_no_name_and_no_database() -> None:
    """Without credentials there are none, a password may stand without a name, and the database is 0."""
    for credentials, expected in (("", (None, None)), (":p%3Aw@", (None, "p:w")), ("m%65:p:w@", ("me", "p:w"))):
        client: Any = connect(f"redis+sentinel://{credentials}one/X/", deadline=0.05)
        assert "X" == client.connection_pool.service_name
        kwargs = client.connection_pool.connection_kwargs
        assert (*expected, 0) == (kwargs["username"], kwargs["password"], kwargs["db"])


@pytest.mark.parametrize(("scheme", "expected"), [("redis", Connection), ("rediss", SSLConnection)])
async def test_a_cluster_is_listened_to_the_way_it_is_asked(
    scheme: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where commands go over TLS, what is heard comes over TLS too."""
    client: Any = connect(f"{scheme}+cluster://example:7000", deadline=0.05)
    monkeypatch.setattr(client, "get_random_node", lambda: client.startup_nodes[0])
    async with background() as spawn:
        cache = RedisCache(client, spawn, deadline=0.05, policy="", lives=LIVES, oldest=lambda: None)
        pool = cache._listening_pool()  # noqa: SLF001 - no Cluster here speaks TLS
    assert (expected, "example") == (pool.connection_class, pool.connection_kwargs["host"])


async def test_no_connection_to_a_sentinel_is_left(valkey: Valkey, redis_url: str) -> None:
    """A closed cache has closed its connections to the Sentinels too, also to one that gave no answer of use."""
    async with admin(redis_url) as client:
        mine = len(await client.client_list())
        password = str((await client.config_get("requirepass"))["requirepass"])
        await client.config_set("requirepass", "")  # a Sentinel asks for none; one that did would be left at once
        try:
            async with open_redis(f"redis+sentinel://127.0.0.1:{valkey.port}/main") as cache:
                assert mine < len(await client.client_list())
        finally:
            await client.config_set("requirepass", password)

        async def is_left() -> bool:
            return mine == len(await client.client_list())

        await eventually(is_left)
        assert not cache.available


async def test_a_new_connection_logs_in_and_nothing_else(redis_url: str) -> None:
    """No greeting of the client library costs a round trip, which the deadline would have to pay for."""
    proxy = Proxy(redis_url)
    async with proxy.serve(), open_redis(proxy.url) as cache:
        assert [_NOTHING] == await cache.fetch([_ME])
        async with cache.subscription(lambda _: None, lambda: None, lambda: None):
            pass
    written = b"".join(proxy.turns)
    assert b"AUTH" in written
    assert b"HELLO" not in written
    assert b"CLIENT" not in written


async def test_databases_of_one_server_hear_nothing_of_each_other(valkey: Valkey, redis_url: str) -> None:
    """Another database is another app's, although a server's databases share their channels."""
    async with open_redis(redis_url) as mine, open_redis(valkey.url(3)) as other, admin(redis_url) as client:
        async with _heard(mine) as heard, _heard(other) as heard_there:
            assert {b"goodstanding:0", b"goodstanding:3"} == set(await client.pubsub_channels())
            await other.say("there")
            await mine.say("here")
            await eventually(lambda: bool(heard and heard_there))
        assert ([b"here"], [b"there"]) == (heard[:1], heard_there[:1])


async def test_the_life_of_a_value_counts_from_the_fill(redis_cache: RedisCache) -> None:
    """An entry's own moment does not matter to Redis; whether it is due is the service's question."""
    old = entry(at=NOON - timedelta(days=400))
    await redis_cache.lease([_ME], "t1")
    await redis_cache.fill({_ME: old}, "t1")
    assert [Fetched(old, None)] == await redis_cache.fetch([_ME])


# What was computed before a moment.


async def test_what_is_too_old_is_a_miss(redis_url: str) -> None:
    """A value not computed since `oldest()` is not served and may be loaded anew; the good copy stays what it is."""
    oldest: list[datetime | None] = [None]
    async with RedisCache.open(
        redis_url, deadline=PATIENT, policy=STANDARD.version, lives=LIVES, oldest=lambda: oldest[0]
    ) as cache:
        await cache.lease([_ME, _OTHER], "t1")
        await cache.fill({_ME: entry(at=NOON), _OTHER: Entry(None, NOON)}, "t1")
        # A clock that was set back a day makes what is cached seem to be of tomorrow: it may be of any age.
        floors = ((None, True), (NOON, True), (NOON + timedelta(milliseconds=1), False))
        for floor, served in (*floors, (NOON - timedelta(seconds=2), True), (NOON - timedelta(days=1), False)):
            oldest[0] = floor
            found = await cache.fetch([_ME, _OTHER])
            assert [entry(), _UNKNOWN] == [each.entry for each in found] if served else [_NOTHING, _NOTHING] == found
            assert [not served] == await cache.lease([_ME], "t2", unless_cached=True)
            await cache.release([_ME], "t2")
        assert [entry(), None] == await cache.fetch_last_good([_ME, _OTHER])


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
async def test_a_beat_between_question_and_answer_does_not_vouch_for_it(
    redis_url: str, *, before: bool, after: bool
) -> None:
    """What was read before a beat may have been dropped before it; what is read over a new connection may be old."""
    bounds: list[datetime | None] = []
    async with RedisCache.open(
        redis_url,
        deadline=PATIENT,
        policy=STANDARD.version,
        lives=LIVES,
        oldest=lambda: bounds.pop(0) if bounds else None,
    ) as cache:
        await cache.lease([_ME], "t1")
        await cache.fill({_ME: entry(at=NOON)}, "t1")
        young = NOON + timedelta(seconds=1)
        bounds[:] = [young if before else None, young if after else None]
        assert [_NOTHING] == await cache.fetch([_ME])
        bounds[:] = [young if before else None, young if after else None]
        assert [True] == await cache.lease([_ME], "t2", unless_cached=True)


# What Redis says to every process.


@asynccontextmanager
async def _heard(cache: RedisCache) -> AsyncIterator[list[bytes]]:
    """Listen to what is said, until the block ends."""
    said: list[bytes] = []
    async with cache.subscription(said.append, lambda: said.append(b"lost"), lambda: None):
        yield said


async def _say(cache: RedisCache, message: str, heard: list[bytes]) -> bool:
    """Say it vouched, and tell whether it was heard; what is said after it is heard after it."""
    await cache.say_vouched(message)
    await cache.say("end")
    await eventually(lambda: heard[-1:] == [b"end"])
    told = message.encode() in heard
    heard.clear()
    return told


async def _remembers(cache: RedisCache) -> bool:
    return [_NOTHING] != await cache.fetch([_ME]) or [None] != await cache.fetch_last_good([_ME])


async def _fill(cache: RedisCache) -> None:
    await cache.lease([_ME], "t1", seize=True)
    assert [True] == await cache.fill({_ME: entry()}, "t1")


async def test_a_redis_that_is_vouched_for_speaks(redis_url: str) -> None:
    """A Redis that nobody vouched for is emptied, and says nothing of it yet; then it speaks, and keeps what it has."""
    async with open_redis(redis_url) as cache, open_redis(redis_url) as other, _heard(other) as heard:
        await _fill(cache)
        await cache.say_vouched("hello")
        assert not await _remembers(cache)
        await eventually(lambda: heard == [b"all"])
        heard.clear()
        await _fill(cache)
        for number in range(3):
            assert await _say(cache if number % 2 else other, f"hello {number}", heard)
        assert await _remembers(cache)


@pytest.mark.parametrize("how", ["flushed", "marker evicted", "marker of another type", "marker of another run"])
async def test_a_redis_that_may_have_lost_something_is_emptied(redis_url: str, how: str) -> None:
    """Whatever became of the marker, nothing of before is believed, and one beat later it is vouched for again."""
    marker = "{goodstanding:probe}:run"
    async with open_redis(redis_url) as cache, _heard(cache) as heard, admin(redis_url) as client:
        await cache.say_vouched("hello")
        assert await _say(cache, "hello", heard)
        await _fill(cache)
        if how == "flushed":
            await client.flushall()
        elif how == "marker evicted":
            await client.delete(marker)
        elif how == "marker of another type":
            await client.delete(marker)
            await client.rpush(marker, "x")
        else:
            await client.set(marker, "0" * 40)
        assert not await _say(cache, "hello", heard)
        assert not await _remembers(cache)
        assert await _say(cache, "hello", heard)


async def test_a_redis_that_comes_back_with_old_values_is_emptied(tmp_path: Path) -> None:
    """A snapshot brings back what was dropped after it was taken; none of it is left when Redis speaks again."""
    with Valkey(tmp_path / "valkey") as server:
        async with open_redis(server.url()) as cache, admin(server.url()) as client:
            await cache.say_vouched("hello")
            await cache.say_vouched("hello")
            await _fill(cache)
            await client.save()
            await cache.invalidate([_ME])
            assert not await _remembers(cache)
            server.kill()
            server.start()
            await eventually(lambda: _answers(cache))
            await eventually(lambda: cache.available)
            assert await _remembers(cache)
            async with _heard(cache) as heard:
                assert not await _say(cache, "hello", heard)
                assert not await _remembers(cache)
                assert await _say(cache, "hello", heard)


async def _answers(cache: RedisCache) -> bool:
    try:
        await cache.fetch([_ME])
    except CacheAwayError:
        return False
    return True


async def test_a_promoted_replica_is_emptied(tmp_path: Path) -> None:
    """A replica has the marker, too, but is another run: what it had not been told of is dropped."""
    with Valkey(tmp_path / "one") as primary, Valkey(tmp_path / "two") as replica:
        async with (
            open_redis(primary.url()) as cache,
            admin(replica.url()) as second,
        ):
            await cache.say_vouched("hello")
            password = (tmp_path / "one" / "password").read_text()
            await second.config_set("masterauth", password)
            await second.replicaof("127.0.0.1", str(primary.port))
            await _fill(cache)

            async def is_copied() -> bool:
                return bool(await second.exists(value_key(_ME)) and await second.exists("{goodstanding:probe}:run"))

            await eventually(is_copied)
            await second.replicaof("NO", "ONE")
            await cache.invalidate([_ME])
        async with open_redis(replica.url()) as promoted, _heard(promoted) as heard:
            assert await _remembers(promoted)
            assert not await _say(promoted, "hello", heard)
            assert not await _remembers(promoted)
            assert await _say(promoted, "hello", heard)


async def test_a_redis_that_cannot_be_vouched_for_says_nothing(redis_url: str) -> None:
    """One that takes no writes, or whose channel is forbidden, is away, and no beat comes from it."""
    async with open_redis(redis_url) as cache, admin(redis_url) as client:
        await client.config_set("maxmemory", 1)
        with pytest.raises(CacheAwayError):
            await cache.say_vouched("hello")
        await client.config_set("maxmemory", 0)
        await eventually(lambda: cache.available)
        await client.acl_setuser("default", enabled=True, keys=["*"], channels=[], reset_channels=True)
        try:
            for say in (cache.say("hello"), cache.invalidate([_ME])):
                await eventually(lambda: cache.available)
                with pytest.raises(CacheAwayError):
                    await say
        finally:
            await client.acl_setuser("default", enabled=True, keys=["*"], channels=["*"])


async def test_a_redis_that_does_not_tell_its_run_is_believed_all_the_same(redis_url: str) -> None:
    """Many a login may not call INFO: its Redis is vouched for once, and then speaks."""
    async with open_redis(redis_url) as cache, _heard(cache) as heard, admin(redis_url) as client:
        await client.acl_setuser("default", enabled=True, keys=["*"], channels=["*"], commands=["+@all", "-info"])
        try:
            assert not await _say(cache, "hello", heard)
            await _fill(cache)
            assert await _say(cache, "hello", heard)
            assert await _remembers(cache)
        finally:
            await client.acl_setuser("default", enabled=True, keys=["*"], channels=["*"], commands=["+@all"])


async def test_nobody_listens_to_a_redis_that_is_away(redis_url: str) -> None:
    """A subscription is refused while the circuit is open, by a server that is not there, and after the end."""
    async with open_redis("redis://127.0.0.1:1/0", deadline=0.5) as away:
        assert isinstance(await _outcome(_listen(away)), CacheAwayError)
        away._breaker.close()  # noqa: SLF001 - as if it had not been noticed yet
        assert isinstance(await _outcome(_listen(away)), CacheAwayError)
    async with open_redis(redis_url) as cache:
        assert await _outcome(_listen(cache)) is None
    assert isinstance(await _outcome(_listen(cache)), CacheAwayError)


async def test_a_subscription_that_nobody_confirms_fails(redis_url: str) -> None:
    """A server that says nothing to SUBSCRIBE is left within the deadline."""
    proxy = Proxy(redis_url)
    async with proxy.serve(), open_redis(proxy.url, deadline=0.3) as cache:
        proxy.delay = lambda: 0.2 if proxy.turns[-1].startswith(b"*2\r\n$9\r\nSUBSCRIBE") else 0.0
        assert await _outcome(_listen(cache)) is None
        proxy.delay = lambda: 3600.0 if proxy.turns[-1].startswith(b"*2\r\n$9\r\nSUBSCRIBE") else 0.0
        assert isinstance(await _outcome(_listen(cache)), CacheAwayError)
        assert cache.available


async def _listen(cache: RedisCache) -> None:
    async with cache.subscription(lambda _: None, lambda: None, lambda: None):
        pass


async def test_a_new_connection_for_commands_ends_the_subscription(redis_url: str) -> None:
    """It may lead to another Redis, of which nothing was heard so far."""
    lost = asyncio.Event()
    async with (
        open_redis(redis_url) as cache,
        admin(redis_url) as client,
        cache.subscription(lambda _: None, lost.set, lambda: None),
    ):
        assert [_NOTHING] == await cache.fetch([_ME])
        assert not lost.is_set()
        await client.client_kill_filter(_type="normal", skipme=True)
        await eventually(lambda: _answers(cache))
        async with asyncio.timeout(PATIENT):
            await lost.wait()


async def test_what_is_said_comes_after_what_is_done(redis_url: str) -> None:
    """Whoever hears of an invalidation finds nothing of before it any more, whoever asks."""
    async with open_redis(redis_url) as cache, open_redis(redis_url) as other:
        users = [user(number) for number in range(600)]
        await cache.lease(users, "t1")
        await cache.fill(dict.fromkeys(users, entry()), "t1")
        found: list[Sequence[Fetched]] = []
        told: list[list[str]] = []
        async with asyncio.TaskGroup() as group:

            async def look() -> None:
                found.append(await other.fetch(users))

            def hear(said: bytes) -> None:
                told.append(said.decode().split(" "))
                group.create_task(look())

            async with other.subscription(hear, lambda: None, lambda: None):
                await cache.invalidate(users)
                await eventually(lambda: len(found) == 2)
    assert [[_NOTHING] * len(users)] * 2 == found
    assert [["changed", *users[:500]], ["changed", *users[500:]]] == told
