"""What may happen to Redis: how it is broken, and how it is mended."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any, Final

import redis
import redis.asyncio

from goodstanding.cache import value_key
from goodstanding.embedded import Valkey
from goodstanding.tasks import background
from tests.faults.scene import Scene
from tests.parts import SECONDS, eventually
from tests.topologies import named_master, password, plain, role

_STORM_SECONDS: Final = 0.05
_MANY: Final = 20


@asynccontextmanager
async def _again_and_again(work: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Do something twenty times a second until the block ends."""

    async def go_on() -> None:
        while True:
            await work()
            await asyncio.sleep(_STORM_SECONDS)

    async with background() as spawn:
        spawn(go_on())
        yield


@asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    """Kill it with SIGKILL; it comes back empty."""
    await scene.do(scene.valkey.kill)
    try:
        yield
    finally:
        await scene.do(scene.valkey.start)


@asynccontextmanager
async def frozen(scene: Scene) -> AsyncIterator[None]:
    """Stop it with SIGSTOP: it keeps its connections and answers nothing."""
    await scene.do(scene.valkey.pause)
    try:
        yield
    finally:
        await scene.do(scene.valkey.resume)


@asynccontextmanager
async def slow(scene: Scene) -> AsyncIterator[None]:
    """Hold back every reply for 2 s."""
    cable = scene.cables["redis"]
    await cable.slow(2.0)
    try:
        yield
    finally:
        await cable.slow(0.0)


@asynccontextmanager
async def refused(scene: Scene) -> AsyncIterator[None]:
    """End its connections, and refuse new ones."""
    cable = scene.cables["redis"]
    await cable.refuse()
    try:
        yield
    finally:
        await cable.accept()


@asynccontextmanager
async def full(scene: Scene) -> AsyncIterator[None]:
    """Let it be out of memory: OOM to every write."""
    async with scene.redis() as client:
        await client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            await client.config_set("maxmemory", 0)


@asynccontextmanager
async def read_only(scene: Scene) -> AsyncIterator[None]:
    """Make it a replica: READONLY to every write."""
    async with scene.redis() as client:
        await client.replicaof("127.0.0.1", "1")
        try:
            yield
        finally:
            await client.replicaof("NO", "ONE")


@asynccontextmanager
async def cannot_save(scene: Scene) -> AsyncIterator[None]:
    """Take its folder away, so that a snapshot fails: MISCONF to every write."""

    async def failed() -> bool:
        return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")

    async def done() -> bool:
        found = await client.info("persistence")
        return found["rdb_last_bgsave_status"] == "ok" and not found["rdb_bgsave_in_progress"]

    async with scene.redis() as client:
        with TemporaryDirectory(dir=scene.valkey.data_dir) as folder:
            await client.config_set("dir", folder)
            await client.config_set("save", "3600 1")
        await client.bgsave()
        await eventually(failed)
        try:
            yield
        finally:
            await client.config_set("dir", str(scene.valkey.data_dir))
            await client.bgsave()
            await eventually(done)
            await client.config_set("save", "")
            (scene.valkey.data_dir / "dump.rdb").unlink()


@asynccontextmanager
async def rewound(scene: Scene) -> AsyncIterator[None]:
    """Kill it with SIGKILL; it comes back with what it had before the last changes."""
    async with scene.redis() as client:
        await client.save()
    await asyncio.sleep(1.0)
    await scene.do(scene.valkey.kill)
    try:
        yield
    finally:
        await scene.do(scene.valkey.start)
        (scene.valkey.data_dir / "dump.rdb").unlink()


@asynccontextmanager
async def loading(scene: Scene) -> AsyncIterator[None]:
    """Let it read a snapshot for seconds: LOADING to everything."""
    async with scene.redis() as client, background() as spawn:
        await client.config_set("loading-process-events-interval-bytes", 1024)
        keys = await client.dbsize()
        await client.config_set("key-load-delay", int(4_000_000 / max(keys, 1)))

        async def reload() -> None:
            await client.execute_command("DEBUG", "RELOAD")  # type: ignore[no-untyped-call] # redis-py leaves it untyped

        reloading = spawn(reload())
        try:
            yield
        finally:
            await asyncio.wait([reloading], timeout=SECONDS)
            await client.config_set("key-load-delay", 0)
            (scene.valkey.data_dir / "dump.rdb").unlink()


async def _flush(client: "redis.asyncio.Redis") -> None:
    """Flush it, and see in the same transaction, before anything is filled again, that it is empty."""
    pipeline = client.pipeline(transaction=True)
    pipeline.flushall()
    pipeline.dbsize()
    _, keys = await pipeline.execute()
    assert keys == 0


@asynccontextmanager
async def flushed(scene: Scene) -> AsyncIterator[None]:
    """Flush it, twenty times a second."""
    async with scene.redis() as client, _again_and_again(lambda: _flush(client)):
        yield


@asynccontextmanager
async def flushed_once(scene: Scene) -> AsyncIterator[None]:
    """Flush it, once."""
    async with scene.redis() as client:
        await _flush(client)
    yield


@asynccontextmanager
async def connections_killed(scene: Scene) -> AsyncIterator[None]:
    """End every connection, twenty times a second."""
    ended = 0

    async with scene.redis() as client:

        async def kill() -> None:
            nonlocal ended
            ended += await _end_connections(client)

        async with _again_and_again(kill):
            yield
    # Each process has two at least, of which one hears what has changed.
    assert ended > _MANY, f"{ended} connections were ended"


async def _end_connections(client: "redis.asyncio.Redis") -> int:
    ended = [
        await client.client_kill_filter(_type="normal", skipme=True),
        await client.client_kill_filter(_type="pubsub"),
    ]
    return sum(map(int, ended))


@asynccontextmanager
async def password_changed(scene: Scene) -> AsyncIterator[None]:
    """Give it another password, and end every connection."""
    async with scene.redis() as client:
        before = client.connection_pool.connection_kwargs["password"]
        await client.config_set("requirepass", "changed")
        assert await _end_connections(client)
        try:
            yield
        finally:
            await client.config_set("requirepass", before)


@asynccontextmanager
async def failed_over(scene: Scene) -> AsyncIterator[None]:
    """Kill the master; Sentinel promotes its replica and names it to clients; what was the master comes back as one.

    Between the two Sentinel asks the replica once a second, and clients that ask Sentinel get the dead one.
    """
    master, replica = sorted(scene.redis_servers, key=lambda server: role(server) != "master")
    await scene.do(master.kill)
    sentinel = scene.served[0].environment["GOODSTANDING_REDIS_URL"]
    await eventually(lambda: named_master(sentinel) == replica.port)
    try:
        yield
    finally:
        await scene.do(master.start)
        with plain(master) as client:
            client.replicaof("127.0.0.1", str(replica.port))


@asynccontextmanager
async def resharded(scene: Scene) -> AsyncIterator[None]:
    """Move slots with their keys from node to node, as `--cluster reshard` moves them."""
    nodes = scene.redis_servers
    moving = asyncio.Event()
    moving.set()
    moved = 0

    async def move() -> None:
        nonlocal moved
        people = list(scene.load.oracle.people)
        while moving.is_set():
            person = scene.rng.choice(people[:200])
            await asyncio.to_thread(_move_slot, nodes, value_key(person.user))  # type: ignore[arg-type] # a user id
            moved += 1

    async with background() as spawn:
        going = spawn(move())
        try:
            yield
        finally:
            moving.clear()
            await asyncio.wait([going], timeout=SECONDS)
    assert moved > 10


def _ask(client: "redis.Redis", *words: str | int | bytes) -> Any:  # noqa: ANN401 - any command's reply
    return client.execute_command(*words)  # type: ignore[no-untyped-call] # redis-py leaves it untyped


def _move_slot(nodes: Sequence[Valkey], key: str) -> None:
    peers = [plain(node) for node in nodes]
    try:
        slot = _ask(peers[0], "CLUSTER KEYSLOT", key)
        names = [_ask(peer, "CLUSTER MYID").decode() for peer in peers]
        home = next(place for place, peer in enumerate(peers) if _owns(peer, slot))
        away = (home + 1) % len(nodes)
        _ask(peers[away], "CLUSTER SETSLOT", slot, "IMPORTING", names[home])
        _ask(peers[home], "CLUSTER SETSLOT", slot, "MIGRATING", names[away])
        while keys := _ask(peers[home], "CLUSTER GETKEYSINSLOT", slot, 100):
            to = ("127.0.0.1", nodes[away].port, "", 0, 5000, "AUTH", password(), "KEYS")
            _ask(peers[home], "MIGRATE", *to, *keys)
        for place in (away, home, *range(len(nodes))):
            _ask(peers[place], "CLUSTER SETSLOT", slot, "NODE", names[away])
    finally:
        for peer in peers:
            peer.close()


def _owns(peer: "redis.Redis", slot: int) -> bool:
    nodes = _ask(peer, "CLUSTER NODES")
    mine = next(node for node in nodes.values() if "myself" in node["flags"])
    return any(int(first) <= slot <= int(last[0] if last else first) for first, *last in mine["slots"])
