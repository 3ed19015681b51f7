"""A load generator in a process of its own: keep-alive HTTP/1.1 on bare asyncio protocols, bounded in count and time.

Reads one JSON specification on standard input and writes one JSON result on standard output:

- `closed`: each connection sends its next request when the last one is answered, for `seconds`, or until every
  request was sent once where `once` says so.
- `open`: requests are due at `rate` per second for `seconds`, answered or not; latencies count from when one was due,
  so that a server that stalls cannot hide it.
- `burst`: one request on every connection, all in the same turn of the event loop.
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, cast

import uvloop

_HOST: Final = "127.0.0.1"
_GRACE_SECONDS: Final = 60.0
_MOST_REQUESTS: Final = 2_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: connection i talks to port i of `ports` (in turn) and sends request i, i + connections, ..."""

    mode: Literal["closed", "open", "burst"]
    ports: Sequence[int]
    requests: Sequence[str]
    connections: int
    seconds: float = 0.0
    rate: float = 0.0
    once: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What came back. `latencies` in milliseconds; `due` in seconds of this machine's monotonic clock.

    `busy` is the share of its core that the generator used: near 1 it would measure itself.
    """

    seconds: float
    busy: float
    statuses: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    due: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, answered: "Callable[[Connection, bytes], None]") -> None:
        self._answered = answered
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._length = 0
        self._head_end = -1
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail loudly: a benchmark over lost connections measures nothing."""
        if self._transport is not None:
            self._transport = None
            asyncio.get_running_loop().call_exception_handler({"message": "connection lost", "exception": exc})

    def send(self, request: bytes, due: float) -> None:
        """Send a request that was due at a moment of the monotonic clock."""
        self.due = due
        if self._transport is None:
            message = "the server closed a connection"
            raise RuntimeError(message)
        self._transport.write(request)

    def close(self) -> None:
        """Close on purpose."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Collect one answer; its body is as long as Content-Length says."""
        self._buffer += data
        if self._head_end < 0:
            self._head_end = self._buffer.find(b"\r\n\r\n")
            if self._head_end < 0:
                return
            head = self._buffer[: self._head_end].lower()
            start = head.find(b"\r\ncontent-length:")
            length = head[start + 17 :].partition(b"\r\n")[0] if start >= 0 else b"0"
            self._length = self._head_end + 4 + int(length)
        if len(self._buffer) >= self._length:
            head = self._buffer[: self._head_end]
            self._buffer = b""
            self._head_end = -1
            self._answered(self, head)


class Generator:
    """Runs one load."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._requests = [text.encode("latin-1") for text in load.requests]
        self._sent = 0
        self._connections: list[Connection] = []
        self._idle: deque[Connection] = deque()
        self._waiting: deque[float] = deque()
        self._under_way = 0
        self._until = 0.0
        self._heads: list[bytes] = []
        self._latencies: list[float] = []
        self._due: list[float] = []

    async def run(self) -> Result:
        """Connect, send, wait for every answer, and count."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def failed(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
            if not done.done():
                done.set_exception(_failure(context))

        loop.set_exception_handler(failed)
        on_answer = {"closed": self._on_closed, "open": self._on_open, "burst": self._on_burst}[self._load.mode]

        def answered(connection: Connection, head: bytes) -> None:
            now = time.monotonic()
            self._heads.append(head)
            self._latencies.append((now - connection.due) * 1000)
            self._due.append(connection.due)
            on_answer(connection, now)
            if self._under_way == 0 and (now >= self._until or self._load.once) and not done.done():
                done.set_result(None)

        for number in range(self._load.connections):
            port = self._load.ports[number % len(self._load.ports)]
            _, connection = await loop.create_connection(lambda: Connection(answered), _HOST, port)
            self._connections.append(connection)
        began, cpu = time.monotonic(), time.process_time()
        self._until = began + self._load.seconds
        async with asyncio.timeout(self._load.seconds + _GRACE_SECONDS):
            if self._load.mode == "open":
                await self._schedule(began, done)
            else:
                self._under_way = len(self._connections)
                for connection in self._connections:
                    connection.send(self._next(), time.monotonic())
            await done
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        for connection in self._connections:
            connection.close()
        return self._result(seconds, cpu)

    def _next(self) -> bytes:
        if self._sent >= _MOST_REQUESTS:
            message = "more requests than a benchmark may send"
            raise RuntimeError(message)
        self._sent += 1
        return self._requests[(self._sent - 1) % len(self._requests)]

    def _on_closed(self, connection: Connection, now: float) -> None:
        if now < self._until and not (self._load.once and self._sent == len(self._requests)):
            connection.send(self._next(), now)
        else:
            self._under_way -= 1

    def _on_open(self, connection: Connection, _now: float) -> None:
        if self._waiting:
            connection.send(self._next(), self._waiting.popleft())
        else:
            self._under_way -= 1
            self._idle.append(connection)

    def _on_burst(self, _connection: Connection, _now: float) -> None:
        self._under_way -= 1

    async def _schedule(self, began: float, done: "asyncio.Future[None]") -> None:
        self._idle.extend(self._connections)
        for number in range(round(self._load.rate * self._load.seconds)):
            due = began + number / self._load.rate
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if done.done():
                return
            if self._idle:
                self._under_way += 1
                self._idle.popleft().send(self._next(), due)
            else:
                self._waiting.append(due)
        self._until = 0.0
        if self._under_way == 0 and not done.done():
            done.set_result(None)

    def _result(self, seconds: float, cpu: float) -> Result:
        result = Result(seconds, cpu / seconds, latencies=self._latencies, due=self._due)
        for head in self._heads:
            status = head[9:12].decode()
            result.statuses[status] = result.statuses.get(status, 0) + 1
            source = _source(head)
            result.sources[source] = result.sources.get(source, 0) + 1
        return result


def _source(head: bytes) -> str:
    """Read the first word after the cache's name in Cache-Status, such as `hit` or `fwd=miss`."""
    _, found, rest = head.lower().partition(b"cache-status: goodstanding; ")
    return rest.partition(b"\r\n")[0].partition(b";")[0].decode() if found else "unknown"


def _failure(context: dict[str, object]) -> Exception:
    cause = context.get("exception")
    return cause if isinstance(cause, Exception) else RuntimeError(str(context.get("message")))


def main() -> None:
    """Run the load of standard input."""
    load = Load(**json.load(sys.stdin))
    json.dump(asdict(uvloop.run(Generator(load).run())), sys.stdout)


if __name__ == "__main__":
    main()
