"""A model of Redis, and of what redis-py does before the product's own wire takes over.

Only what the product sends is known, and each command does what the real one does: test_simulation compares them.
"""

import asyncio
import fnmatch
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any, Final

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from goodstanding import cache
from tests.simulation.world import Link, Peer, Process, Route, World, connect

_PATIENCE: Final = 10
"""So many of the product's deadlines does redis-py wait for a reply."""

Reply = int | bytes | str | Exception | None | list[Any]
Keys = dict[bytes, tuple[bytes, float]]
"""Each key's value, and when it expires."""


def pack(reply: Reply) -> bytes:
    """Write a reply as RESP 2 does; a `str` is a status."""
    match reply:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case str():
            return b"+%b\r\n" % reply.encode()
        case Exception():
            return b"-%b\r\n" % str(reply).encode()
        case _:
            return b"*%d\r\n" % len(reply) + b"".join(map(pack, reply))


class _Client:
    """The server's end of a connection."""

    def __init__(self, server: "Redis", link: Link) -> None:
        self.link = link
        self.reader = hiredis.Reader()
        self.commands: deque[list[bytes]] = deque()
        self.protocol: asyncio.Protocol | None = None
        self.working = False
        self._server = server

    def sent(self, data: bytes) -> None:
        """Take what the process wrote."""
        self.reader.feed(data)
        while (command := self.reader.gets()) is not False:
            self.commands.append(command)
        self._server.work(self)

    def say(self, data: bytes) -> None:
        """Write to the process."""
        self.link.down(self._received, data)

    def gone(self) -> None:
        """Note that the connection has ended; what it sent before is carried out all the same."""
        self._server.forget(self)

    def _received(self, data: bytes) -> None:
        if self.protocol is not None:
            self.protocol.data_received(data)


class Redis:
    """The server. `hang`, `stop`, `restart` and `refuse_writes` are its faults."""

    def __init__(self, world: World, *, pause: float) -> None:
        self.world = world
        self.keys: Keys = {}
        self.run = "run0"
        self.hung = False
        self.down = False
        self.refusing = False
        self.listeners: dict[_Client, bytes] = {}
        self.scripts: dict[bytes, Callable[..., Reply]] = {
            cache._LOOK.encode(): self.look,
            cache._FILL.encode(): self.fill,
            cache._RELEASE.encode(): self.release,
            cache._VOUCH.encode(): self.vouch,
        }
        self._pause = pause
        self._clients: dict[_Client, None] = {}
        self._stalled: list[Callable[[], None]] = []
        self._runs = count(1)
        self._cursors: dict[int, bytes] = {}

    def accept(self, link: Link, answer: Callable[[Peer | OSError], None]) -> None:
        """Take a connection; one that hangs accepts and does not go on."""
        if self.down:
            answer(ConnectionRefusedError())
        elif self.hung:
            self._stalled.append(lambda: self.accept(link, answer))
        else:
            client = _Client(self, link)
            self._clients[client] = None
            answer(client)

    def hang(self, seconds: float) -> None:
        """Answer nothing for a while; what is sent meanwhile is carried out afterwards."""
        self.hung = True
        self.world.after(seconds, self._go_on)

    def stop(self) -> None:
        """End at once, and with it every connection."""
        self.down = True
        for client in list(self._clients):
            client.commands.clear()
            client.link.lose()
        self._clients.clear()
        self.listeners.clear()

    def restart(self, keys: Keys) -> None:
        """Start again, with the keys that were kept."""
        self.down = False
        self.keys = dict(keys)
        self.run = f"run{next(self._runs)}"

    def forget(self, client: _Client) -> None:
        """Note that a connection has ended."""
        self._clients.pop(client, None)
        self.listeners.pop(client, None)

    def work(self, client: _Client) -> None:
        """Carry out what a client sent, in order, each command by itself; others may come in between."""
        if client.working:
            return
        replies = []
        while client.commands and not self.down:
            if self.hung:
                self._stalled.append(lambda: self.work(client))
                break
            replies.append(pack(self.execute(client, client.commands.popleft())))
            if client.commands and self.world.rng.random() < self._pause:
                client.working = True
                self.world.after(self.world.rng.random() * 0.001, self._go_on_with, client)
                break
        if replies:
            client.say(b"".join(replies))

    def execute(self, client: "_Client | None", command: list[bytes]) -> Reply:
        """Carry out one command."""
        name, *words = command
        if self.world.traced:
            said = b" ".join(b"(script)" if len(word) > 90 else word for word in command)
            self.world.note("redis", said.decode()[:150])
        self.world.happened(name.decode())
        if self.refusing and name in {b"SET", b"EVAL", b"DEL", b"UNLINK"}:
            return ResponseError("READONLY You can't write against a read only replica.")
        match name:
            case b"MGET":
                return [self.get(key) for key in words]
            case b"SET":
                return self._set(words[0], words[1], words[2:])
            case b"DEL" | b"UNLINK":
                return sum(self._drop(key) for key in words)
            case b"EXISTS":
                return sum(self.get(key) is not None for key in words)
            case b"PUBLISH":
                return self._publish(words[0], words[1])
            case b"EVAL":
                keys = int(words[1])
                return self.scripts[words[0]](*words[2 : 2 + keys], *words[2 + keys :])
            case b"SUBSCRIBE" if client is not None:
                self.listeners[client] = words[0]
                return [b"subscribe", words[0], 1]
            case b"PING":
                return [b"pong", b""] if client in self.listeners else "PONG"
            case b"SCAN":
                return self._scan(int(words[0]), words[2].decode())
        return ResponseError(f"ERR unknown command '{name.decode()}'")

    def get(self, key: bytes) -> bytes | None:
        """Give a key's value, unless it has expired."""
        found = self.keys.get(key)
        if found is None:
            return None
        if self.world.now >= found[1]:
            del self.keys[key]
            return None
        return found[0]

    def look(self, value: bytes, lease: bytes, token: bytes, life: bytes) -> Reply:
        """Do what look.lua does."""
        found = [self.get(value), self.get(lease)]
        if found == [None, None]:
            self._set(lease, token, [b"PX", life])
            found[1] = token
        return found

    def fill(self, value: bytes, lease: bytes, good: bytes, token: bytes, text: bytes, *lives: bytes) -> Reply:
        """Do what fill.lua does."""
        if self.get(lease) != token:
            return 0
        return self.store(value, lease, good, text, *lives)

    def store(self, value: bytes, lease: bytes, good: bytes, text: bytes, life: bytes, good_life: bytes) -> Reply:
        """Do the second half of it."""
        self._set(value, text, [b"PX", life])
        if good_life == b"0":
            self._drop(good)
        else:
            self._set(good, text, [b"PX", good_life])
        self._drop(lease)
        return 1

    def release(self, lease: bytes, token: bytes) -> Reply:
        """Do what release.lua does."""
        return self._drop(lease) if self.get(lease) == token else 0

    def vouch(self, key: bytes, run: bytes, channel: bytes, said: bytes) -> Reply:
        """Do what vouch.lua does."""
        own = self.run.encode()
        if run == own:
            self._set(key, own, [])
        if self.get(key) != own:
            return own
        if said:
            self._publish(channel, said)
        return 1

    def _set(self, key: bytes, value: bytes, options: list[bytes]) -> Reply:
        if b"NX" in options and self.get(key) is not None:
            return None
        life = int(options[options.index(b"PX") + 1]) / 1000 if b"PX" in options else float("inf")
        self.keys[key] = (value, self.world.now + life)
        return "OK"

    def _drop(self, key: bytes) -> int:
        dropped = self.get(key) is not None
        self.keys.pop(key, None)
        return int(dropped)

    def _publish(self, channel: bytes, said: bytes) -> int:
        hearing = [client for client, heard in self.listeners.items() if heard == channel]
        for client in hearing:
            client.say(pack([b"message", channel, said]))
        return len(hearing)

    def _scan(self, cursor: int, pattern: str) -> Reply:
        """Walk in the order of the keys, a few at a time: what is there all the while is found."""
        last = self._cursors.pop(cursor, b"")
        ahead = sorted(key for key in list(self.keys) if key > last and self.get(key) is not None)
        found = ahead[: self.world.rng.randint(1, 4)]
        following = 0
        if len(found) < len(ahead):
            following = max(self._cursors, default=0) + 1
            self._cursors[following] = found[-1]
        return [b"%d" % following, [key for key in found if fnmatch.fnmatchcase(key.decode(), pattern)]]

    def _go_on_with(self, client: _Client) -> None:
        client.working = False
        self.work(client)

    def _go_on(self) -> None:
        self.hung = False
        stalled, self._stalled = self._stalled, []
        for go_on in stalled:
            go_on()


class _Transport:
    """What the product writes to."""

    def __init__(self, link: Link, client: _Client) -> None:
        self._link = link
        self._client = client
        link.on_lost = self._lost

    def write(self, data: bytes) -> None:
        """Send to the server."""
        if self._link.is_open:
            self._link.up.send(self._client.sent, data)

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        """Note who receives."""
        self._client.protocol = protocol

    def abort(self) -> None:
        """Close the connection."""
        self._link.close()

    def _lost(self) -> None:
        if self._client.protocol is not None:
            self._client.protocol.connection_lost(None)


class _Opener:
    """What redis-py calls a connection, as far as the product uses one."""

    def __init__(self, client: "RedisClient") -> None:
        self._client = client
        self._writer: Any = None
        self._reader: Any = None

    async def connect(self) -> None:
        """Connect, and introduce oneself; raises RedisError."""
        try:
            link = await connect(self._client.process, self._client.route, self._client.server)
        except OSError as error:
            raise RedisConnectionError from error
        peer = link.peer
        if not isinstance(peer, _Client):
            link.close()
            raise RedisConnectionError
        self._writer = self
        self.transport = _Transport(link, peer)


class _Replies(asyncio.Protocol):
    """Who waits for replies on redis-py's own connection."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.lost = False
        self._reader = hiredis.Reader()

    def data_received(self, data: bytes) -> None:
        """Hand each reply to who waits for it."""
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            future = self.waiting.popleft()
            if not future.done():
                future.set_result(reply)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Tell who waits that nothing will come."""
        self.lost = True
        for future in self.waiting:
            if not future.done():
                future.set_exception(RedisConnectionError())
                future.exception()
        self.waiting.clear()


class RedisClient:
    """What the product uses of redis-py's client: connections, the probe's pipeline, and a walk over the keys."""

    def __init__(self, process: Process, route: Route, server: Redis, *, deadline: float) -> None:
        self.process = process
        self.route = route
        self.server = server
        self.connection_pool = self
        self.connection_kwargs = {"db": 0}
        self._patience = deadline * _PATIENCE
        self._transport: _Transport | None = None
        self._replies = _Replies()

    def make_connection(self) -> _Opener:
        """Give a connection that is not open yet."""
        return _Opener(self)

    async def initialize(self) -> None:
        """Do nothing, as a client of a single server does."""

    def pipeline(self, *, transaction: bool) -> "_Pipeline":
        """Collect commands."""
        assert not transaction
        return _Pipeline(self)

    async def scan_iter(self, match: str, count: int) -> AsyncIterator[bytes]:
        """Walk over the keys."""
        cursor = b"0"
        while True:
            [(cursor, keys)] = await self.ask([("SCAN", cursor, "MATCH", match, "COUNT", count)])
            for key in keys:
                yield key
            if cursor == b"0":
                return

    async def ask(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send commands and wait for their replies; raises RedisError."""
        try:
            async with asyncio.timeout(self._patience):
                if self._transport is None or self._replies.lost:
                    opener = self.make_connection()
                    await opener.connect()
                    self._transport, self._replies = opener.transport, _Replies()
                    self._transport.set_protocol(self._replies)
                futures = [self.process.create_future() for _ in commands]
                self._replies.waiting.extend(futures)
                self._transport.write(b"".join([hiredis.pack_command(command) for command in commands]))
                replies = [await future for future in futures]
        except TimeoutError as error:
            self._give_up()
            raise RedisTimeoutError from error
        except (asyncio.CancelledError, RedisError):
            self._give_up()
            raise
        for reply in replies:
            if isinstance(reply, Exception):
                raise ResponseError(str(reply))
        return replies

    async def aclose(self) -> None:
        """Close the connection."""
        self._give_up()

    def _give_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None


class _Pipeline:
    """Commands that are sent together."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._commands: list[tuple[Any, ...]] = []

    def set(self, key: str, value: bytes, *, px: int) -> None:
        """Add a SET."""
        self._commands.append(("SET", key, value, "PX", px))

    async def execute(self) -> list[Any]:
        """Send them and wait; raises RedisError."""
        return await self._client.ask(self._commands)
