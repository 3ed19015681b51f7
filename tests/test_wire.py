"""The way to Redis: one write per loop tick, replies in order, and nobody waits for a connection that is gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from goodstanding.breaker import Breaker
from goodstanding.cache import connect
from goodstanding.errors import CacheAwayError
from goodstanding.tasks import background
from goodstanding.wire import Wire, within
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
