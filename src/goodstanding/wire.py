"""The way to Redis: all commands of one loop tick are one write, and replies reach their callers as they arrive.

redis-py opens the connection (address, TLS, password, Sentinel) and speaks to a Cluster. On a connection that is open,
its streams and time-outs cost more than the round trip itself, so there hiredis reads what the transport receives.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby, islice, repeat
from operator import itemgetter
from typing import Any, Final

import hiredis
from redis.asyncio import ConnectionPool, RedisCluster

from goodstanding.breaker import Breaker
from goodstanding.errors import CacheAwayError
from goodstanding.tasks import Spawn, check_cancelled

Command = tuple[str | bytes | int, ...]
_LANES: Final = 2
_MOST_JOINED: Final = 100
_TICKS: Final = 10
_QUIET: Final = 3


@dataclass(frozen=True, slots=True)
class _Call:
    """Commands that somebody waits for."""

    commands: Sequence[Command]
    replies: "asyncio.Future[list[Any]]"

    def fail(self, cause: BaseException | None) -> None:
        if not self.replies.done():
            away = CacheAwayError()
            away.__cause__ = cause
            self.replies.set_exception(away)


@dataclass(slots=True)
class _Trip:
    """One write and the replies to it; `ticks` is what is left of its deadline."""

    calls: Sequence[_Call]
    runs: Sequence[Sequence[Command]]
    answers: list[Any] = field(default_factory=list)
    ticks: int = _TICKS

    def deliver(self) -> BaseException | None:
        """Give every call its replies; returns a refusal, if there is one."""
        parts = (part for run, answer in zip(self.runs, self.answers, strict=True) for part in _shares(run, answer))
        return _deliver(self.calls, parts)


def _deliver(calls: Sequence[_Call], replies: Iterator[Any]) -> BaseException | None:
    refused = None
    for call in calls:
        mine = list(islice(replies, len(call.commands)))
        refusal = next((reply for reply in mine if isinstance(reply, Exception)), None)
        if refusal is not None:
            refused = refusal
            call.fail(refusal)
        elif not call.replies.done():
            call.replies.set_result(mine)
    return refused


class Wire(asyncio.Protocol):
    """One pipelined connection to a single server, or to a Sentinel service's primary; made anew when it was lost.

    A trip that is not answered within `deadline` seconds ends the connection, and with it all others under way.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        breaker: Breaker,
        spawn: Spawn,
        *,
        deadline: float,
        connected: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._breaker = breaker
        self._spawn = spawn
        self._deadline = deadline
        self._connected = connected
        self._loop = asyncio.get_running_loop()
        self._pending: list[_Call] = []
        self._flushing = False
        self._closed = False
        self._connecting: asyncio.Task[None] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader = hiredis.Reader()
        self._trips: deque[_Trip] = deque()
        self._clock: asyncio.TimerHandle | None = None

    def send(self, commands: Sequence[Command]) -> "asyncio.Future[list[Any]]":
        """Send commands with whatever else this loop tick brings; the future fails with CacheAwayError."""
        call = _Call(commands, self._loop.create_future())
        self._pending.append(call)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return call.replies

    def close(self) -> None:
        """Give up what is under way and what waits, and the connection."""
        self._closed = True
        self._drop(None)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is None:
            if self._closed:
                self._drop(None)
            elif self._connecting is None:
                self._connecting = self._spawn(self._connect())
            return
        calls, self._pending = [call for call in self._pending if not call.replies.done()], []
        if not calls:
            return
        runs = [*_runs([command for call in calls for command in call.commands])]
        joined = [(run[0][0], *(word for command in run for word in command[1:])) for run in runs]
        self._transport.write(b"".join([hiredis.pack_command(command) for command in joined]))  # type: ignore[arg-type] # a tuple of any length
        self._trips.append(_Trip(calls, runs))
        if self._clock is None:
            self._clock = self._loop.call_later(self._deadline / _TICKS, self._tick)

    async def _connect(self) -> None:
        try:
            writer = await open_writer(self._pool, deadline=self._deadline)
        except Exception as error:  # noqa: BLE001 - redis-py raises more than RedisError when a connection fails
            self._connecting = None
            self._breaker.failed()
            self._drop(error)
            return
        self._writer = writer
        self._connecting = None
        self._reader = hiredis.Reader()
        transport = writer.transport
        transport.set_protocol(self)
        self._transport = transport
        if self._closed:
            self._drop(None)
        else:
            self._connected()
            self._flush()

    def _tick(self) -> None:
        """Let a tenth of the deadline pass for every trip, in the loop's own time.

        What the loop was late does not count: one that is busy for longer than the deadline finds its timers due
        before it has read anything, and a burst of requests would look like a hung Redis.
        """
        self._clock = None
        if not self._trips:
            return
        for trip in self._trips:
            trip.ticks -= 1
        if self._trips[0].ticks <= 0:
            self._breaker.failed()
            self._drop(TimeoutError())
        else:
            self._clock = self._loop.call_later(self._deadline / _TICKS, self._tick)

    def data_received(self, data: bytes) -> None:
        """Collect replies, and deliver those that are complete."""
        self._reader.feed(data)
        try:
            while self._trips:
                # Under RESP 2 no reply is False, which is what an incomplete one looks like.
                reply = self._reader.gets()
                if reply is False:
                    return
                trip = self._trips[0]
                trip.answers.append(reply)
                if len(trip.answers) == len(trip.runs):
                    self._trips.popleft()
                    self._arrived(trip)
        except hiredis.ProtocolError as error:
            self._breaker.failed()
            self._drop(error)

    def _arrived(self, trip: _Trip) -> None:
        self._breaker.succeeded()
        refusal = trip.deliver()
        if refusal is not None:
            # OOM, READONLY, MISCONF, NOAUTH ...: Redis answered, and said that it cannot do its part. After a failover
            # the next connection finds the server that can.
            self._breaker.open()
            self._drop(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what was under way; a connection that was idle is missed by nobody."""
        if self._trips:
            self._breaker.failed()
        self._drop(exc)

    def _drop(self, cause: BaseException | None) -> None:
        transport, self._transport = self._transport, None
        calls = [call for trip in self._trips for call in trip.calls]
        if self._closed or transport is None or not self._breaker.closed:
            # Nobody gets these a connection any more, or should.
            calls += self._pending
            self._pending = []
        self._trips.clear()
        if transport is not None:
            # The transport forgets us first: it reports its end later, when there may be another one.
            transport.set_protocol(asyncio.Protocol())
            transport.abort()
            self._writer = None
        for call in calls:
            call.fail(cause)
        if self._pending and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)


async def open_writer(pool: ConnectionPool, *, deadline: float) -> asyncio.StreamWriter:
    """Let redis-py open a connection, within `deadline` seconds, and take over what it writes to."""
    opener: Any = pool.make_connection()  # type: ignore[no-untyped-call] # redis-py leaves it untyped
    async with within(deadline):
        await opener.connect()
    # redis-py has no public way to hand a connection over. Its writer is kept, since it closes what it wrote to when
    # nobody holds it any more.
    writer: asyncio.StreamWriter = opener._writer  # noqa: SLF001 - see above
    opener._writer = opener._reader = None  # noqa: SLF001 - see above
    return writer


class Subscription(asyncio.Protocol):
    """A connection that listens to one channel; `receive` gets each message at the moment it arrives, in order.

    `lost` is called once, when no more will come, and `answered` when a question of `wait_until_lost` is.
    """

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        channel: str,
        receive: Callable[[bytes], None],
        lost: Callable[[], None],
        answered: Callable[[], None],
    ) -> None:
        self._receive = receive
        self._tell_answered = answered
        self._tell_lost = lost
        self._reader = hiredis.Reader()
        self._writer = writer
        self._quiet = 0
        self._confirmed = asyncio.Event()
        self._lost = asyncio.Event()
        writer.transport.set_protocol(self)
        writer.transport.write(hiredis.pack_command(("SUBSCRIBE", channel)))  # type: ignore[arg-type] # a tuple of any length

    async def wait_until_confirmed(self) -> None:
        """Wait until every message from now on arrives here, or the connection is lost."""
        await self._confirmed.wait()

    async def wait_until_lost(self, every: float, *, wanted: Callable[[], bool] = lambda: True) -> None:
        """Ask every `every` seconds whether the server is still there; the third time that nothing came is the last.

        Counted in questions and not in seconds: what a busy loop has not read yet is no silence. It also ends when
        it is no longer `wanted`, which is asked as often.
        """
        while not self._lost.is_set() and self._quiet < _QUIET and wanted():
            self._quiet += 1
            self._writer.transport.write(hiredis.pack_command(("PING",)))
            with suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await self._lost.wait()

    def close(self) -> None:
        """End the connection; nothing is received any more."""
        if self._lost.is_set():
            return
        self._lost.set()
        self._confirmed.set()
        self._tell_lost()
        self._writer.transport.set_protocol(asyncio.Protocol())
        self._writer.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Hand over what is complete."""
        self._quiet = 0
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                match reply:
                    case [b"message", _, bytes(message)]:
                        self._receive(message)
                    case [b"subscribe", *_]:
                        self._confirmed.set()
                    case [b"pong", *_]:
                        self._tell_answered()
                    case Exception():
                        self.close()
                        return
        except hiredis.ProtocolError:
            self.close()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Tell whoever waits."""
        self.close()


class ClusterWire:
    """The same for a Cluster: its client knows whom to ask, and asks several servers at once."""

    def __init__(self, client: RedisCluster, breaker: Breaker, spawn: Spawn, *, deadline: float) -> None:
        self._client = client
        self._breaker = breaker
        self._deadline = deadline
        self._pending: list[_Call] = []
        self._wake = asyncio.Event()
        for _ in range(_LANES):
            spawn(self._lane())

    def send(self, commands: Sequence[Command]) -> "asyncio.Future[list[Any]]":
        """Send commands with whatever else this loop tick brings; the future fails with CacheAwayError."""
        call = _Call(commands, asyncio.get_running_loop().create_future())
        self._pending.append(call)
        self._wake.set()
        return call.replies

    def close(self) -> None:
        """Give up what waits."""
        for call in self._pending:
            call.fail(None)

    async def _lane(self) -> None:
        """Carry what is pending to the Cluster, one round trip after another, until cancelled."""
        while True:
            check_cancelled()
            await self._wake.wait()
            self._wake.clear()
            calls, self._pending = [call for call in self._pending if not call.replies.done()], []
            if calls and self._breaker.closed:
                await self._round_trip(calls)
            else:
                # The circuit opened while these waited for a lane: they need not find out for themselves.
                for call in calls:
                    call.fail(None)

    async def _round_trip(self, calls: Sequence[_Call]) -> None:
        try:
            async with within(self._deadline):
                pipeline = self._client.pipeline(transaction=False)
                for call in calls:
                    for command in call.commands:
                        pipeline.execute_command(*command)
                replies = await pipeline.execute(raise_on_error=False)
        except asyncio.CancelledError as error:
            for call in calls:
                call.fail(error)
            raise
        except Exception as error:  # noqa: BLE001 - redis-py raises more than RedisError when a connection dies under it
            self._breaker.failed()
            for call in calls:
                call.fail(error)
            return
        self._breaker.succeeded()
        if _deliver(calls, iter(replies)) is not None:
            self._breaker.open()


def _runs(commands: Sequence[Command]) -> Iterator[Sequence[Command]]:
    """Put neighbouring MGETs together to be sent as one: Redis and its client work per command more than per key."""
    if len(commands) == 1:
        yield commands
        return
    for name, group in groupby(commands, itemgetter(0)):
        run = [*group]
        step = _MOST_JOINED if name == "MGET" else 1
        yield from (run[start : start + step] for start in range(0, len(run), step))


def _shares(run: Sequence[Command], answer: Any) -> Iterator[Any]:  # noqa: ANN401 - any command's reply
    """Give each command of a run its part of the answer; an error is everybody's."""
    if len(run) == 1 or isinstance(answer, Exception):
        return repeat(answer, len(run))
    values = iter(answer)
    return ([*islice(values, len(command) - 1)] for command in run)


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Bound a wait as asyncio.timeout does, but in the event loop's own time: what the loop was late does not count."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        handle = loop.call_later(seconds / _TICKS, lambda: tick(_TICKS - 1))

        def tick(left: int) -> None:
            nonlocal handle
            if left:
                handle = loop.call_later(seconds / _TICKS, tick, left - 1)
            else:
                timeout.reschedule(loop.time())

        try:
            yield
        finally:
            handle.cancel()
