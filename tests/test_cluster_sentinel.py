"""A real Cluster of three servers, and a real Sentinel with one failover."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path

import pytest
import redis

from goodstanding.broadcast import Broadcast, Freshness, beat, hear_redis
from goodstanding.cache import RedisCache, lease_key, value_key
from goodstanding.data import UserId
from goodstanding.embedded import Valkey
from goodstanding.entry import Fetched
from goodstanding.errors import CacheAwayError
from goodstanding.main import utc_now
from goodstanding.reputation_service import Source
from goodstanding.tasks import background
from tests.conftest import Database
from tests.parts import SECONDS, Truth, entry, eventually, metric, open_redis, open_service, settled, user
from tests.topologies import agreed, cluster_url, plain, role, running_cluster, watched_pair

_SECRET = secrets.token_urlsafe(16)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[Valkey]]:
    """Run three primaries that share the slots."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture
async def cluster(nodes: Sequence[Valkey]) -> AsyncIterator[RedisCache]:
    """Give a cache on the empty cluster, whose address is any one node's."""
    for node in nodes:
        with plain(node) as client:
            client.flushall()
            client.config_set("maxmemory", 0)
            client.config_resetstat()
    async with open_redis(cluster_url(nodes)) as cache:
        await eventually(lambda: cache.available)
        yield cache


async def test_the_protocol_holds_in_a_cluster(cluster: RedisCache, nodes: Sequence[Valkey]) -> None:
    """A user's three keys share a slot, users spread over the nodes, and one call still serves them all."""
    users = [user(number) for number in range(100)]
    assert [True] * 100 == await cluster.lease(users, "t1")
    assert [False] * 100 == await cluster.lease(users, "t2")
    assert [Fetched(None, "t1")] * 100 == await cluster.fetch(users)
    assert [True] * 100 == await cluster.fill({me: entry(number) for number, me in enumerate(users)}, "t1")
    assert [Fetched(entry(number), None) for number in range(100)] == await cluster.fetch(users)
    assert [entry(number) for number in range(100)] == await cluster.fetch_last_good(users)
    sizes = []
    for node in nodes:
        with plain(node) as client:
            sizes.append(client.dbsize())
            errors = client.info("errorstats")
            assert not {"errorstat_CROSSSLOT", "errorstat_MOVED"} & errors.keys()
    assert all(size > 20 for size in sizes)
    await cluster.lease(users[:1], "t3")
    await cluster.release(users[:1], "t3")
    await cluster.invalidate(users[:10])
    assert [Fetched(None, None)] * 10 == await cluster.fetch(users[:10])
    assert {"a": 1, "b": 2} == await cluster.add({"a": 1, "b": 2}, 60)


async def test_everybody_is_dropped_on_every_node(cluster: RedisCache, nodes: Sequence[Valkey]) -> None:
    """The sweep visits all primaries, counts each value once, and uses no KEYS and no FLUSH."""
    users = [user(number) for number in range(1500)]
    await cluster.lease(users, "t1")
    assert [True] * 1400 == await cluster.fill(dict.fromkeys(users[:1400], entry()), "t1")
    for node in nodes:
        with plain(node) as client:
            client.config_resetstat()
    assert 1400 == await cluster.invalidate_all()
    for node in nodes:
        with plain(node) as client:
            commands = client.info("commandstats")
            assert "cmdstat_scan" in commands
            assert not {"cmdstat_keys", "cmdstat_flushall", "cmdstat_flushdb"} & commands.keys()
            assert [] == client.keys("*reputation*")


async def test_one_full_node_is_noticed(cluster: RedisCache, nodes: Sequence[Valkey]) -> None:
    """A node that takes no writes takes no invalidations, whichever of them it is: away within 2 s, back within 2 s."""
    for node in nodes:
        with plain(node) as client:
            client.config_set("maxmemory", 1)
            await eventually(lambda: not cluster.available, within=3.5)
            client.config_set("maxmemory", 0)
            await eventually(lambda: cluster.available, within=3.5)


async def test_one_dead_node_is_survived(cluster: RedisCache, nodes: Sequence[Valkey], database: Database) -> None:
    """Its users' answers come from PostgreSQL, and it is used again when it is back."""
    truths = [await Truth.of(database, 1) for _ in range(10)]
    async with open_service(cluster, database.service_url, cache_wait=0.2) as service:
        users = [truth.user_id for truth in truths]
        await service.read_many(users)
        await settled(service)
        assert {Source.HIT} == {answer.source for answer in (await service.read_many(users)).values()}
        nodes[2].kill()
        try:
            await eventually(lambda: not cluster.available, within=SECONDS)
            for answer in (await service.read_many(users)).values():
                assert answer.data is not None
                assert (1, Source.BYPASS) == (answer.data.completed_sessions, answer.source)
            with pytest.raises(CacheAwayError):
                await service.invalidate(users)
        finally:
            nodes[2].start()
        await eventually(lambda: agreed(nodes))
        await eventually(lambda: cluster.available, within=3.5)
        await service.invalidate(users)
        await service.read_many(users)
        await settled(service)
        assert {Source.HIT} == {answer.source for answer in (await service.read_many(users)).values()}


async def test_a_moved_slot_is_followed(cluster: RedisCache, nodes: Sequence[Valkey]) -> None:
    """A slot may move to another node and back: the client finds it again by itself."""
    me = user(1)
    with ExitStack() as stack:
        peers = [stack.enter_context(plain(node)) for node in nodes]
        names = [peer.execute_command("CLUSTER MYID").decode() for peer in peers]
        slot = int(peers[0].execute_command("CLUSTER KEYSLOT", value_key(me)))
        home = next(number for number, last in enumerate((5460, 10922, 16383)) if slot <= last)
        for score, place in enumerate(((home + 1) % 3, home)):
            await cluster.invalidate([me])
            for peer in (peers[place], *peers):
                peer.execute_command("CLUSTER SETSLOT", slot, "NODE", names[place])

            async def works(score: int = score) -> bool:
                try:
                    await cluster.lease([me], "t1", seize=True)
                    stored = await cluster.fill({me: entry(score)}, "t1")
                    return [True] == stored and [Fetched(entry(score), None)] == await cluster.fetch([me])
                except CacheAwayError:
                    return False

            await eventually(works)
            assert 2 == peers[place].execute_command("CLUSTER COUNTKEYSINSLOT", slot)


async def test_what_is_said_is_heard_in_the_whole_cluster(cluster: RedisCache, nodes: Sequence[Valkey]) -> None:
    """Whichever node a process listens to, it hears invalidations of all users, and only after all are gone."""
    users = [user(number) for number in range(2000)]
    async with AsyncExitStack() as stack:
        heard: list[list[bytes]] = []
        for node in nodes:
            url = node.url().replace("redis://", "redis+cluster://").removesuffix("/0")
            listener = await stack.enter_async_context(open_redis(url))
            heard.append([])
            await stack.enter_async_context(listener.subscription(heard[-1].append, lambda: None, lambda: None))
        async with open_redis(cluster_url(nodes), deadline=0.05) as hasty:
            await eventually(lambda: _done(hasty.invalidate(users)))
        await cluster.say("end")
        for one in heard:
            await eventually(lambda one=one: one[-1:] == [b"end"])  # type: ignore[misc] # mypy cannot tell its type
            named = {each for said in one if said.startswith(b"changed ") for each in said.split(b" ")[1:]}
            assert {each.encode() for each in users} == named


async def _done(work: Awaitable[None]) -> bool:
    with suppress(CacheAwayError):
        await work
        return True
    return False


async def test_every_node_of_a_cluster_is_vouched_for(cluster: RedisCache, nodes: Sequence[Valkey]) -> None:
    """One node that was restarted, or emptied, is enough for everything to be dropped before a beat is said."""
    heard: list[bytes] = []
    users = [user(number) for number in range(100)]
    async with cluster.subscription(heard.append, lambda: None, lambda: None):
        for node in nodes:
            await eventually(lambda: _is_said(cluster, heard))
            await cluster.lease(users, "t1", seize=True)
            await cluster.fill(dict.fromkeys(users, entry()), "t1")
            with plain(node) as client:
                assert 1 == len(client.keys("{goodstanding:probe*}:run"))
                client.flushall()
            assert {b"all", b"hello"} >= set(heard)
            heard.clear()
            await cluster.say_vouched("hello")
            await eventually(lambda: b"all" in heard)
            assert b"hello" not in heard
            assert [Fetched(None, None)] * 100 == await cluster.fetch(users)


async def _is_said(cache: RedisCache, heard: list[bytes]) -> bool:
    with suppress(CacheAwayError):
        await cache.say_vouched("hello")
    return b"hello" in heard


# Sentinel.


@pytest.mark.slow
async def test_a_failover_is_followed(tmp_path: Path, database: Database) -> None:
    """Sentinel names the master; when it dies, PostgreSQL answers until the new one is found, with the same service."""
    truth = await Truth.of(database, 1)
    async with (
        watched_pair(tmp_path) as (master, replica, url),
        open_redis(url, deadline=0.5) as cache,
        open_service(cache, database.service_url, cache_wait=0.2) as service,
    ):
        await eventually(lambda: cache.available)
        assert Source.MISS is (await service.read(truth.user_id)).source
        await settled(service)
        assert Source.HIT is (await service.read(truth.user_id)).source
        with plain(master) as client:
            assert 1 == client.exists(value_key(truth.user_id))
        master.kill()
        sources = set()

        async def is_away() -> bool:
            sources.add((await service.read(truth.user_id)).source)
            return 0 == metric("goodstanding_dependency_up", dependency="redis")

        await eventually(is_away)
        assert Source.BYPASS is (await service.read(truth.user_id)).source
        await eventually(lambda: cache.available)
        assert "master" == role(replica)
        await truth.complete()
        await service.invalidate([truth.user_id])
        answer = await service.read(truth.user_id)
        assert answer.data is not None
        assert (2, Source.MISS) == (answer.data.completed_sessions, answer.source)
        await settled(service)
        assert Source.HIT is (await service.read(truth.user_id)).source
        with plain(replica) as client:
            assert 1 == client.exists(value_key(truth.user_id))


@pytest.mark.slow
async def test_what_is_said_is_heard_across_a_failover(tmp_path: Path) -> None:
    """Listeners learn that the master died, and hear the next one, which is emptied before it says a beat."""
    me = user(1)
    listener = Freshness(clock=utc_now)
    heard: list[Sequence[UserId] | None] = []
    async with (
        watched_pair(tmp_path) as (master, replica, url),
        open_redis(url, deadline=0.5) as cache,
        background() as spawn,
    ):
        await eventually(lambda: cache.available)
        spawn(hear_redis(Broadcast(listener, [heard.append]), cache))
        await eventually(lambda: _beaten(cache, listener))
        await cache.lease([me], "t1", seize=True)
        assert [True] == await cache.fill({me: entry()}, "t1")
        with plain(replica) as client:
            await eventually(lambda: bool(client.exists(value_key(me), "{goodstanding:probe}:run") == 2))
        heard.clear()
        master.kill()
        await eventually(lambda: not listener.trusted())
        await eventually(lambda: None in heard)
        await eventually(lambda: cache.available)
        await eventually(lambda: _beaten(cache, listener))
        with plain(replica) as client:
            assert 0 == client.exists(value_key(me))
        heard.clear()
        await cache.invalidate([me])
        await eventually(lambda: [me] in heard)


async def _beaten(cache: RedisCache, listener: Freshness) -> bool:
    with suppress(CacheAwayError):
        await cache.say_vouched(beat(1, asyncio.get_running_loop().time()))
    return listener.trusted()


@pytest.mark.slow
async def test_a_demoted_master_is_left(tmp_path: Path) -> None:
    """In a planned switch the old master lives on as a replica: its refusal sends the client to the new one."""
    async with watched_pair(tmp_path) as (master, replica, url), open_redis(url, deadline=0.5) as cache:
        await eventually(lambda: cache.available)
        await cache.lease([user(1)], "t1")
        port = int(url.rpartition(":")[2].partition("/")[0])
        with redis.Redis(port=port, socket_timeout=SECONDS) as watcher:
            watcher.execute_command("SENTINEL FAILOVER", "main")
        await eventually(lambda: "master" == role(replica))
        # The Sentinel does this, too, but takes ten seconds to get around to it.
        with plain(master) as client:
            client.replicaof("127.0.0.1", str(replica.port))
        assert "slave" == role(master)

        async def is_written() -> bool:
            try:
                await cache.lease([user(2)], "t2", seize=True)
            except CacheAwayError:
                return False
            with plain(replica) as client:
                return bool(b"t2" == client.get(lease_key(user(2))))

        await eventually(is_written)
        await eventually(lambda: cache.available)


@pytest.mark.slow
async def test_a_sentinel_that_hangs_is_passed_over(tmp_path: Path) -> None:
    """The first of the named Sentinels may be gone without a word, as when its host lost power: the next is asked."""
    # The system completes its connections, and nobody ever reads from them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with watched_pair(tmp_path) as (_, _, url):
            two = url.replace("@127.0.0.1", f"@127.0.0.1:{port},127.0.0.1")
            async with open_redis(two, deadline=0.2) as cache:
                await eventually(lambda: cache.available)
                assert [True] == await cache.lease([user(1)], "t1")
