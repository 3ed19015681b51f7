"""A load generator in a process of its own: keep-alive HTTP/1.1 on bare asyncio protocols, bounded in count and time.

Reads one JSON specification on standard input and writes one JSON result on standard output:

- `closed`: each connection sends its next request when the last one is answered, for `seconds`, or until every
  request was sent once where `once` says so.
- `open`: requests are due at `rate` per second for `seconds`, answered or not; latencies count from when one was due,
  so that a server that stalls cannot hide it.
- `burst`: one request on every connection, all in the same turn of the event loop.

The requests are listed, and every latency told; or a crowd's, drawn as they are sent, and counted as they are answered.
"""

import asyncio
import gc
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from typing import Final, Literal, TypeVar, cast

import uvloop
from pydantic import TypeAdapter

from benchmarks.spread import Spread

_HOST: Final = "127.0.0.1"
_GRACE_SECONDS: Final = 60.0
_MOST_REQUESTS: Final = 2_000_000
_SLICE_SECONDS: Final = 10.0
_SENT_AT_ONCE: Final = 32
_DRAWN_AT_ONCE: Final = 1000
_Ranked = TypeVar("_Ranked")


@dataclass(frozen=True, slots=True)
class Crowd:
    """Reads too many to be listed: who asks (by token) and for whom is drawn at random, each time the same.

    The first of the `users` is asked for most often, by Zipf's law with this exponent. A `share` of the reads asks
    instead for the `fresh` ones, one after the other, each of whom nobody has asked for.
    """

    users: Sequence[str]
    tokens: Sequence[str]
    exponent: float = 1.0
    seed: int = 0
    fresh: Sequence[str] = ()
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: connection i talks to port i of `ports` (in turn) and sends request i, i + connections, ...

    A `crowd` sends instead of the `requests`. It has `patience`, in seconds: what finds no connection free for so long
    is given up, and an answer that comes later is no good one. It goes on when a connection is lost.
    """

    mode: Literal["closed", "open", "burst"]
    ports: Sequence[int]
    requests: Sequence[str]
    connections: int
    seconds: float = 0.0
    rate: float = 0.0
    once: bool = False
    crowd: Crowd | None = None
    patience: float = 60.0


@dataclass(slots=True)
class Result:
    """What came back. `latencies` in milliseconds; `due` in seconds of this machine's monotonic clock.

    `busy` is the share of its core that the generator used: near 1 it would measure itself.
    """

    seconds: float = 0.0
    busy: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    """`lost`: the server closed the connection instead of answering; `unanswered`: it did neither; `given up`: no
    connection was free in time."""
    sources: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    # Of a crowd, instead of the two lists:
    since_due: dict[str, Spread] = field(default_factory=dict)
    """Latencies by status, from when each request was due."""
    since_sent: dict[str, Spread] = field(default_factory=dict)
    """The same from when it was sent."""
    late: Spread = field(default_factory=Spread)
    """From when each request was due until it was sent: what the generator, or the lack of a connection, costs."""
    good: int = 0
    """Answers 200 that came in time, before the load's `seconds` were over."""
    hits: list[tuple[int, int]] = field(default_factory=list)
    """Answers, and those among them that were hits, of every ten seconds."""

    @property
    def answers(self) -> int:
        """How many requests were answered."""
        return sum(self.sources.values())

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.answers / self.seconds


def get(user: str, token: str) -> str:
    """Write a read of one user."""
    return (
        f"GET /api/user/reputation/{user} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        "Accept: application/json\r\n\r\n"
    )


def post(path: str, body: str, token: str) -> str:
    """Write a request with a JSON body."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )


def zipf(ranked: Sequence[_Ranked], exponent: float, rng: random.Random) -> Iterator[_Ranked]:
    """Draw for ever: the one of rank r (from 1) in proportion to 1 / r ** exponent."""
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(len(ranked))))
    while True:
        yield from rng.choices(ranked, cum_weights=weights, k=_DRAWN_AT_ONCE)


def reads(crowd: Crowd) -> Iterator[str]:
    """Write what a crowd asks, for ever; ends when all of its fresh users were asked for."""
    rng = random.Random(crowd.seed)  # noqa: S311 - repeatable
    fresh = iter(crowd.fresh)
    for user in zipf(crowd.users, crowd.exponent, rng):
        asked: str | None = user
        if crowd.share and rng.random() < crowd.share:
            asked = next(fresh, None)
        if asked is None:
            return
        yield get(asked, rng.choice(crowd.tokens))


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(
        self, port: int, answered: "Callable[[Connection, bytes], None]", lost: "Callable[[Connection], None] | None"
    ) -> None:
        self.port = port
        self._answered = answered
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._length = 0
        self._head_end = -1
        self.due = 0.0
        self.sent = 0.0
        self.under_way = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail loudly, unless somebody counts it: a benchmark over lost connections measures nothing."""
        if self._transport is None:
            return
        self._transport = None
        if self._lost is not None:
            self._lost(self)
        else:
            asyncio.get_running_loop().call_exception_handler({"message": "connection lost", "exception": exc})

    def send(self, request: bytes, due: float) -> None:
        """Send a request that was due at a moment of the monotonic clock."""
        if self._transport is None:
            message = "the server closed a connection"
            raise RuntimeError(message)
        self.due = due
        self.sent = time.monotonic()
        self.under_way = True
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
            self.under_way = False
            self._answered(self, head)


class Listed:
    """Keeps every latency, and looks at the answers in the end."""

    def __init__(self) -> None:
        self._heads: list[bytes] = []
        self._result = Result()

    def note(self, connection: Connection, head: bytes, now: float) -> None:
        """Keep an answer."""
        self._heads.append(head)
        self._result.latencies.append((now - connection.due) * 1000)
        self._result.due.append(connection.due)

    def miss(self, why: str) -> None:
        """Fail: nothing that is listed may be left unanswered."""
        raise RuntimeError(why)

    def result(self, seconds: float, busy: float) -> Result:
        """Give what was kept."""
        result = self._result
        result.seconds, result.busy = seconds, busy
        for head in self._heads:
            _count(result.statuses, head[9:12].decode())
            _count(result.sources, _source(head))
        return result


class Counted:
    """Counts the answers as they come."""

    def __init__(self, began: float, load: Load) -> None:
        self._began = began
        self._load = load
        self._result = Result()

    def note(self, connection: Connection, head: bytes, now: float) -> None:
        """Count an answer."""
        result = self._result
        status, source, latency = head[9:12].decode(), _source(head), now - connection.due
        _count(result.statuses, status)
        _count(result.sources, source)
        result.since_due.setdefault(status, Spread()).add(latency * 1000)
        result.since_sent.setdefault(status, Spread()).add((now - connection.sent) * 1000)
        result.late.add((connection.sent - connection.due) * 1000)
        if status == "200" and latency <= self._load.patience and now <= self._began + self._load.seconds:
            result.good += 1
        number = int((now - self._began) / _SLICE_SECONDS)
        while len(result.hits) <= number:
            result.hits.append((0, 0))
        answers, hits = result.hits[number]
        result.hits[number] = (answers + 1, hits + (source == "hit"))

    def miss(self, why: str) -> None:
        """Count a request that gets no answer."""
        _count(self._result.statuses, why)

    def result(self, seconds: float, busy: float) -> Result:
        """Give what was counted."""
        self._result.seconds, self._result.busy = seconds, busy
        return self._result


class Generator:
    """Runs one load."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._requests = _encoded(reads(load.crowd)) if load.crowd else cycle([*_encoded(load.requests)])
        self._sent = 0
        self._group = asyncio.TaskGroup()
        self._connections: list[Connection] = []
        self._idle: deque[Connection] = deque()
        self._waiting: list[float] = []
        self._rng = random.Random(0)  # noqa: S311 - repeatable
        self._under_way = 0
        self._until = 0.0
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._record: Listed | Counted = Listed()
        self._on_answer = {"closed": self._on_closed, "open": self._on_open, "burst": self._on_burst}[load.mode]

    async def run(self) -> Result:
        """Connect, send, wait for every answer, and count."""
        self._loop.set_exception_handler(self._failed)
        async with self._group:
            for number in range(self._load.connections):
                await self._connect(self._load.ports[number % len(self._load.ports)])
            gc.collect()
            gc.freeze()
            began, cpu = time.monotonic(), time.process_time()
            self._until = began + self._load.seconds
            if self._load.crowd is not None:
                self._record = Counted(began, self._load)
            # Whatever a crowd is not answered by then is counted as that.
            with suppress(TimeoutError) if self._load.crowd is not None else nullcontext():
                async with asyncio.timeout(self._load.seconds + _GRACE_SECONDS):
                    if self._load.mode == "open":
                        await self._schedule(began)
                    else:
                        self._under_way = len(self._connections)
                        for connection in self._connections:
                            connection.send(self._next(), time.monotonic())
                    await self._done
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            self._end()
        return self._record.result(seconds, cpu / seconds)

    async def _connect(self, port: int) -> Connection:
        lost = self._lost if self._load.crowd is not None else None
        _, connection = await self._loop.create_connection(lambda: Connection(port, self._answered, lost), _HOST, port)
        self._connections.append(connection)
        return connection

    def _end(self) -> None:
        for connection in self._connections:
            if connection.under_way:
                self._record.miss("unanswered")
            connection.close()
        for _ in range(round(self._load.rate * self._load.seconds) - self._sent):
            self._record.miss("given up")

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        if not self._done.done():
            self._done.set_exception(_failure(context))

    def _answered(self, connection: Connection, head: bytes) -> None:
        now = time.monotonic()
        self._record.note(connection, head, now)
        if self._load.crowd is not None and b"\r\nconnection: close" in head.lower():
            connection.close()
            self._connections.remove(connection)
            self._group.create_task(self._replace(connection.port))
        else:
            self._turn(connection, now)

    def _turn(self, connection: Connection, now: float) -> None:
        """Go on with a connection on which nothing is under way any more."""
        self._on_answer(connection, now)
        if self._under_way == 0 and (now >= self._until or self._load.once) and not self._done.done():
            self._done.set_result(None)

    def _lost(self, connection: Connection) -> None:
        self._connections.remove(connection)
        if connection.under_way:
            self._record.miss("lost")
        else:
            self._idle.remove(connection)
            self._under_way += 1  # until there is another one
        self._group.create_task(self._replace(connection.port))

    async def _replace(self, port: int) -> None:
        connection = await self._connect(port)
        if not self._done.done():
            self._turn(connection, time.monotonic())

    def _next(self) -> bytes:
        request = next(self._requests, None)
        if request is None or self._sent >= _MOST_REQUESTS:
            message = "more requests than a benchmark may send, or has"
            raise RuntimeError(message)
        self._sent += 1
        return request

    def _on_closed(self, connection: Connection, now: float) -> None:
        if now < self._until and not (self._load.once and self._sent == len(self._load.requests)):
            connection.send(self._next(), now)
        else:
            self._under_way -= 1

    def _on_open(self, connection: Connection, now: float) -> None:
        waiting = self._waiting
        while waiting:
            # Callers do not queue: each is on its own, and whoever is lucky gets the connection.
            chosen = self._rng.randrange(len(waiting))
            waiting[chosen], waiting[-1] = waiting[-1], waiting[chosen]
            due = waiting.pop()
            if now - due <= self._load.patience:
                connection.send(self._next(), due)
                return
        self._under_way -= 1
        self._idle.append(connection)

    def _on_burst(self, _connection: Connection, _now: float) -> None:
        self._under_way -= 1

    async def _schedule(self, began: float) -> None:
        self._idle.extend(self._connections)
        for number in range(round(self._load.rate * self._load.seconds)):
            due = began + number / self._load.rate
            wait = due - time.monotonic()
            # Who is late sends at once, but reads what was answered all the same.
            if wait > 0 or number % _SENT_AT_ONCE == 0:
                await asyncio.sleep(max(0.0, wait))
            if self._done.done():
                return
            if self._idle:
                self._under_way += 1
                self._idle.popleft().send(self._next(), due)
            else:
                self._waiting.append(due)
        self._until = 0.0
        if self._under_way == 0 and not self._done.done():
            self._done.set_result(None)


def _encoded(requests: Iterable[str]) -> Iterator[bytes]:
    return (text.encode("latin-1") for text in requests)


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _source(head: bytes) -> str:
    """Read the first word after the cache's name in Cache-Status, such as `hit` or `fwd=miss`."""
    _, found, rest = head.lower().partition(b"cache-status: goodstanding; ")
    return rest.partition(b"\r\n")[0].partition(b";")[0].decode() if found else "unknown"


def _failure(context: dict[str, object]) -> Exception:
    cause = context.get("exception")
    return cause if isinstance(cause, Exception) else RuntimeError(str(context.get("message")))


def main() -> None:
    """Run the load of standard input."""
    load = TypeAdapter(Load).validate_json(sys.stdin.buffer.read())

    async def run() -> Result:
        return await Generator(load).run()

    sys.stdout.buffer.write(TypeAdapter(Result).dump_json(uvloop.run(run())))


if __name__ == "__main__":
    main()
