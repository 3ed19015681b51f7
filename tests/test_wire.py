"""The way to Redis: one write per loop tick, replies in order, and nobody waits for a connection that is gone."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import redis.asyncio

from goodstanding.breaker import Breaker
from goodstanding.cache import connect
from goodstanding.errors import CacheAwayError
from goodstanding.tasks import background
from goodstanding.wire import Subscription, Wire, open_writer, within
from tests.parts import eventually

_DEADLINE = 2.0


@asynccontextmanager
async def _wire(url: str, *, deadline: float = _DEADLINE) -> AsyncIterator[tuple[Wire, Breaker]]:
    client = connect(url, deadline=deadline)
    assert isinstance(client, redis.asyncio.Redis)
    breaker = Breaker("redis")
    async with background() as spawn:
        wire = Wire(client.connection_pool, breaker, spawn, deadline=deadline)
        try:
            yield wire, breaker
        finally:
            wire.close()
    await client.aclose()


@asynccontextmanager
async def _server(answer: bytes) -> AsyncIterator[str]:
    """Listen on loopback and answer every write with the same bytes; nothing: hang."""
    async with background() as spawn:

        async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.read(65536):
                    writer.write(answer)
            except ConnectionError:
                pass
            finally:
                writer.transport.abort()

        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            spawn(answering(reader, writer))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()


async def test_replies_reach_their_callers_in_order(redis_url: str) -> None:
    """Calls of one tick and of many ticks travel on one connection, and each gets its own replies."""
    async with _wire(redis_url) as (wire, breaker):
        assert [[b"OK"]] * 200 == await asyncio.gather(*(wire.send([("SET", f"k{n}", n)]) for n in range(200)))
        calls = [wire.send([("MGET", f"k{n}", "absent"), ("INCR", f"k{n}")]) for n in range(200)]
        for n, call in enumerate(calls):
            assert [[str(n).encode(), None], n + 1] == await call
        assert breaker.closed


async def test_a_refusal_is_its_callers_alone(redis_url: str) -> None:
    """A command that Redis refuses fails its caller, opens the circuit, and harms no other call of the same write."""
    async with _wire(redis_url) as (wire, breaker):
        good, bad, other = wire.send([("SET", "k", "v")]), wire.send([("INCR", "k")]), wire.send([("GET", "k")])
        assert [b"OK"] == await good
        with pytest.raises(CacheAwayError):
            await bad
        assert [b"v"] == await other
        assert not breaker.closed


async def test_a_caller_that_goes_away_harms_nobody(redis_url: str) -> None:
    """The reply to a call that nobody waits for any more is not the next caller's."""
    async with _wire(redis_url) as (wire, _):
        await wire.send([("MSET", "a", "1", "b", "2")])
        gone, kept = wire.send([("GET", "a")]), wire.send([("GET", "b")])
        await asyncio.sleep(0)
        gone.cancel()
        assert [b"2"] == await kept
        assert [b"1"] == await wire.send([("GET", "a")])


async def test_an_idle_connection_that_ends_is_missed_by_nobody(redis_url: str) -> None:
    """A server that closes an idle connection costs no call anything: the next one makes another."""
    async with _wire(redis_url) as (wire, breaker), redis.asyncio.Redis.from_url(redis_url) as admin:
        for number in range(3):
            assert [b"OK"] == await wire.send([("SET", "k", number)])
            await admin.client_kill_filter(_type="normal", skipme=True)
        assert breaker.closed


async def test_a_late_answer_ends_every_trip_under_way() -> None:
    """A server that hangs fails what was sent within the deadline, and counts as one failure."""
    async with _server(b"") as url, _wire(url, deadline=0.1) as (wire, breaker):
        calls = [wire.send([("GET", str(n))]) for n in range(5)]
        for call in calls:
            with pytest.raises(CacheAwayError):
                await call
        assert breaker.closed


async def test_garbage_is_an_outage() -> None:
    """Bytes that are no reply fail the call instead of being waited for."""
    async with _server(b"?what\r\n") as url, _wire(url) as (wire, _):
        with pytest.raises(CacheAwayError):
            await asyncio.wait_for(wire.send([("GET", "k")]), _DEADLINE / 2)


async def test_nobody_listening_opens_the_circuit(redis_url: str) -> None:
    """Three connections refused in a row open the circuit, and each failed its callers at once."""
    async with _server(b"") as url:
        pass
    async with _wire(url) as (wire, breaker):
        for _ in range(3):
            assert breaker.closed
            with pytest.raises(CacheAwayError):
                await wire.send([("GET", "k")])
        assert not breaker.closed
    assert redis_url != url


async def test_closing_fails_what_is_under_way() -> None:
    """Whoever waits when the wire is closed is told so."""
    async with _server(b"") as url, _wire(url) as (wire, _):
        call = wire.send([("GET", "k")])
        await eventually(lambda: bool(wire._trips))  # noqa: SLF001 - until it is under way
        waiting = wire.send([("GET", "k")])
        wire.close()
        for one in (call, waiting):
            with pytest.raises(CacheAwayError):
                await one


async def test_a_bounded_wait_ends() -> None:
    """A wait that never ends by itself ends with the bound; one that ends in time is not touched."""
    with pytest.raises(TimeoutError):
        async with within(0.05):
            await asyncio.Event().wait()
    async with within(_DEADLINE):
        await asyncio.sleep(0)


# Subscriptions.


@dataclass(slots=True)
class _Heard:
    """What a subscription handed over, and how often it was lost."""

    messages: list[bytes] = field(default_factory=list)
    lost: int = 0
    answers: int = 0

    def lose(self) -> None:
        """Note the end."""
        self.lost += 1

    def answer(self) -> None:
        """Note an answer."""
        self.answers += 1


@asynccontextmanager
async def _subscribed(url: str) -> AsyncIterator[tuple[Subscription, _Heard]]:
    client = connect(url, deadline=_DEADLINE)
    assert isinstance(client, redis.asyncio.Redis)
    heard = _Heard()
    writer = await open_writer(client.connection_pool, deadline=_DEADLINE)
    subscription = Subscription(writer, "channel", heard.messages.append, heard.lose, heard.answer)
    try:
        yield subscription, heard
    finally:
        subscription.close()
        await client.aclose()


@asynccontextmanager
async def _publisher(written: bytes, *, every: float | None = None) -> AsyncIterator[str]:
    """Listen on loopback; to whoever writes send these bytes, in pieces of one byte, or again and again."""
    async with background() as spawn:

        async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read(65536)
                while True:
                    for byte in [written] if every else [bytes([each]) for each in written]:
                        writer.write(byte)
                        await writer.drain()
                        await asyncio.sleep(every or 0)
                    if every is None:
                        await reader.read()
                        break
            except ConnectionError:
                pass
            finally:
                writer.transport.abort()

        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            spawn(write(reader, writer))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()


_CONFIRMED = b"*3\r\n$9\r\nsubscribe\r\n$7\r\nchannel\r\n:1\r\n"
_MESSAGE = b"*3\r\n$7\r\nmessage\r\n$7\r\nchannel\r\n$5\r\nhello\r\n"
_PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


async def test_a_subscription_hears_everything_from_its_confirmation_on(redis_url: str) -> None:
    """Messages arrive whole, in order, and of no other channel."""
    async with _subscribed(redis_url) as (subscription, heard), redis.asyncio.Redis.from_url(redis_url) as client:
        await subscription.wait_until_confirmed()
        for number in range(1000):
            await client.publish("channel" if number % 2 else "other", str(number) * 100)
        await client.publish("channel", "end")
        await eventually(lambda: heard.messages[-1:] == [b"end"])
        assert [str(number).encode() * 100 for number in range(1, 1000, 2)] == heard.messages[:-1]
        assert 0 == heard.lost
    assert 1 == heard.lost


async def test_messages_may_come_in_pieces() -> None:
    """However the bytes are cut, each message is handed over once, when it is whole."""
    async with _publisher(_CONFIRMED + 3 * _MESSAGE + _PONG) as url, _subscribed(url) as (subscription, heard):
        await subscription.wait_until_confirmed()
        await eventually(lambda: [b"hello"] * 3 == heard.messages)
        assert 0 == heard.lost


@pytest.mark.parametrize("written", [b"-NOPERM no\r\n", b"?what\r\n", b"", b"-ERR\r\n" + _CONFIRMED + _MESSAGE])
async def test_a_refusal_garbage_and_the_end_are_the_end(written: bytes) -> None:
    """A server that says no, that speaks another language, or that leaves: lost once, and nothing is waited for."""
    async with _publisher(written, every=0.01) as url, _subscribed(url) as (subscription, heard):
        if not written:
            subscription.connection_lost(None)
        await asyncio.wait_for(subscription.wait_until_confirmed(), _DEADLINE)
        await asyncio.wait_for(subscription.wait_until_lost(60.0), _DEADLINE)
        assert ([], 1) == (heard.messages, heard.lost)
    assert 1 == heard.lost


async def test_silence_is_the_end() -> None:
    """A server that does not answer three questions in a row is gone, though its connection is there."""
    loop = asyncio.get_running_loop()
    async with _publisher(_CONFIRMED) as url, _subscribed(url) as (subscription, _):
        await subscription.wait_until_confirmed()
        began = loop.time()
        await asyncio.wait_for(subscription.wait_until_lost(0.1), _DEADLINE)
        assert 0.25 < loop.time() - began


async def test_any_word_is_a_sign_of_life() -> None:
    """Whatever comes, a message or an answer, the server is there."""
    async with _publisher(_MESSAGE, every=0.05) as url, _subscribed(url) as (subscription, heard):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(subscription.wait_until_lost(0.1), 1.0)
        assert len(heard.messages) > 5
        assert 0 == heard.lost


async def test_a_busy_loop_is_no_silence(redis_url: str) -> None:
    """What a busy loop has not read yet is there all the same: the questions count, not the seconds."""
    async with _subscribed(redis_url) as (subscription, heard), asyncio.TaskGroup() as group:
        await subscription.wait_until_confirmed()
        waiting = group.create_task(subscription.wait_until_lost(0.05))
        for _ in range(10):
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 - this is the burst
        assert not waiting.done()
        subscription.close()
    assert 1 == heard.lost


async def test_a_closed_subscription_hears_nothing_more(redis_url: str) -> None:
    """After `close` nothing is handed over, also of what has arrived already."""
    async with _subscribed(redis_url) as (subscription, heard):
        await subscription.wait_until_confirmed()
        subscription.close()
        subscription.close()
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            await eventually(lambda: _nobody(client))
        assert ([], 1) == (heard.messages, heard.lost)


async def _nobody(client: "redis.asyncio.Redis") -> bool:
    return 0 == await client.publish("channel", "late")


async def test_a_connection_that_is_made_anew_is_told(redis_url: str) -> None:
    """Whoever listens beside the wire learns of each of its connections, before anything travels on it."""
    client = connect(redis_url, deadline=_DEADLINE)
    assert isinstance(client, redis.asyncio.Redis)
    events: list[object] = []
    async with background() as spawn, redis.asyncio.Redis.from_url(redis_url) as other:
        wire = Wire(
            client.connection_pool,
            Breaker("redis"),
            spawn,
            deadline=_DEADLINE,
            connected=lambda: events.append("connected"),
        )
        for number in range(2):
            events += await wire.send([("SET", "k", number)])
            events += await wire.send([("GET", "k")])
            await other.client_kill_filter(_type="normal", skipme=True)
        wire.close()
    await client.aclose()
    assert ["connected", b"OK", b"0", "connected", b"OK", b"1"] == events
