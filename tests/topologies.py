"""Redis of more than one server: a Cluster of three primaries, and a pair that a Sentinel watches."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import redis

from goodstanding.embedded import Valkey
from tests.parts import SECONDS, eventually

_SECRET: Final = secrets.token_urlsafe(16)
SLOTS: Final = ((0, 5460), (5461, 10922), (10923, 16383))


def _folder(path: Path) -> Path:
    """Make a server's folder, with the password that all servers here share."""
    path.mkdir()
    (path / "password").write_text(_SECRET)
    return path


class _Node(Valkey):
    """A node of a Cluster."""

    title = "Cluster node"

    def _command(self) -> list[str]:
        # Its second port is by default one that the system may have given to any client meanwhile.
        bus = str(self.port + 700)
        return [
            *super()._command(),
            "--cluster-enabled",
            "yes",
            "--cluster-port",
            bus,
            "--cluster-node-timeout",
            "2000",
        ]


def plain(server: Valkey) -> "redis.Redis":
    """Open a plain client, to look at a server and to disturb it."""
    return redis.Redis.from_url(server.url(), socket_timeout=SECONDS)


async def agreed(servers: Sequence[Valkey]) -> bool:
    """Tell whether every node has all slots covered by the three."""
    for server in servers:
        with plain(server) as client:
            info: dict[str, str] = client.execute_command("CLUSTER INFO")
            if "ok" != info["cluster_state"] or "3" != info["cluster_size"]:
                return False
    return True


@contextmanager
def running_cluster(folder: Path) -> Iterator[Sequence[Valkey]]:
    """Run three primaries that share the slots."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_Node(_folder(folder / str(number)))) for number in range(3)]
        for server, (first, last) in zip(servers, SLOTS, strict=True):
            with plain(server) as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port, servers[0].port + 700)
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(_until_agreed(servers))
        yield servers


async def _until_agreed(servers: Sequence[Valkey]) -> None:
    await eventually(lambda: agreed(servers))


def password() -> str:
    """Give the password that all servers here share."""
    return _SECRET


def cluster_url(nodes: Sequence[Valkey]) -> str:
    """Give the Cluster's URL: its address is any one node's."""
    return nodes[0].url().replace("redis://", "redis+cluster://").removesuffix("/0")


class _Sentinel(Valkey):
    """A Sentinel that watches one master, under the name `main`; it asks for no password."""

    title = "Sentinel"

    def __init__(self, data_dir: Path, *, master: Valkey) -> None:
        super().__init__(data_dir, options=("--sentinel",))
        self._master = master

    def _prepare(self) -> None:
        (self.data_dir / "valkey.conf").write_text(
            f"sentinel monitor main 127.0.0.1 {self._master.port} 1\n"
            f"sentinel auth-pass main {_SECRET}\n"
            # Sentinel connects anew once a second: with less it holds the master that it has just made for down.
            "sentinel down-after-milliseconds main 1500\n"
            "sentinel failover-timeout main 3000\n"
        )

    def _ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


@asynccontextmanager
async def watched_pair(folder: Path) -> AsyncIterator[tuple[Valkey, Valkey, str]]:
    """Run a master, its replica and their Sentinel; gives the URL by which a client finds the master."""
    shared = ("--masterauth", _SECRET, "--repl-diskless-sync-delay", "0")
    with (
        Valkey(_folder(folder / "master"), options=shared) as master,
        Valkey(_folder(folder / "replica"), options=(*shared, "--replicaof", f"127.0.0.1 {master.port}")) as replica,
        _Sentinel(_folder(folder / "sentinel"), master=master) as sentinel,
    ):
        port = urlsplit(sentinel.url()).port
        with redis.Redis(port=port or 0, socket_timeout=SECONDS) as watcher, plain(replica) as second:

            def is_watched() -> bool:
                known = watcher.execute_command("SENTINEL REPLICAS", "main")
                return 1 == len(known) and "up" == second.info("replication")["master_link_status"]

            await eventually(is_watched)
        yield master, replica, f"redis+sentinel://:{_SECRET}@127.0.0.1:{port}/main/0"


def named_master(url: str) -> int:
    """Ask the Sentinel of a URL for the port of the master that clients are to use; 0 while it holds it for down."""
    parts = urlsplit(url)
    with redis.Redis(port=parts.port or 0, socket_timeout=SECONDS, decode_responses=True) as sentinel:
        told = sentinel.sentinel_masters()[parts.path.split("/")[1]]
    return 0 if told["is_sdown"] or told["is_odown"] else int(told["port"])


def role(server: Valkey) -> str:
    """Tell what a server says it is; a switch ends its connections."""
    with suppress(redis.ConnectionError), plain(server) as client:
        return str(client.info("replication")["role"])
    return "unknown"
