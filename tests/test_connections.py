"""Connections to a real server: who gets which, and how many are opened."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import asyncpg
import pytest

from goodstanding.connections import AT_ONCE, Connections, is_closed
from goodstanding.tasks import background

from .conftest import Database, connect
from .parts import SECONDS, eventually

if TYPE_CHECKING:
    from goodstanding.connections import Lent

MOST: Final = 10
DEADLINE: Final = 5.0
_OURS: Final = "from pg_stat_activity where datname = current_database() and usename = 'app_login'"


@asynccontextmanager
async def opened(url: str, *, timeout: float = SECONDS) -> AsyncIterator[Connections]:  # noqa: ASYNC109 - of one attempt
    """Open at most MOST connections."""
    async with background() as spawn:
        pool = await asyncpg.create_pool(url, min_size=0, max_size=MOST, timeout=timeout)
        try:
            yield Connections(pool, spawn, most=MOST, deadline=DEADLINE)
        finally:
            pool.terminate()


async def ask(connections: Connections, query: str = "select 1") -> object:
    """Ask something over a lent connection, as a history does."""
    connection = await connections.acquire()
    try:
        found: object = await connection.fetchval(query)
    except asyncio.CancelledError:
        connections.discard(connection)
        raise
    except BaseException:
        connections.give_back(connection)
        raise
    connections.give_back(connection)
    return found


async def test_one_connection_serves_everybody_where_no_other_can_be_had(database: Database) -> None:
    """Who finds none free waits for one that is open, though PostgreSQL refuses to open another."""
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        await ask(connections)
        await superuser.execute("alter role app_login connection limit 1")
        try:
            assert [1] * 50 == await asyncio.gather(*(ask(connections) for _ in range(50)))
        finally:
            await superuser.execute("alter role app_login connection limit -1")


async def test_a_refusal_is_not_the_end_of_trying(database: Database) -> None:
    """Who waits while the open ones stay lent gets another one once PostgreSQL gives it."""
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        lent = await connections.acquire()
        await superuser.execute("alter role app_login connection limit 1")
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(ask(connections))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await superuser.execute("alter role app_login connection limit -1")
        assert 1 == waiting.result()
        connections.give_back(lent)


async def test_what_one_connection_carries_opens_no_other(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is given another connection before he has waited for a while for one that is open."""
    monkeypatch.setattr("goodstanding.connections._PATIENCE_SECONDS", SECONDS)
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        await ask(connections)
        assert [1] * 50 == await asyncio.gather(*(ask(connections) for _ in range(50)))
        assert await superuser.fetchval(f"select count(*) {_OURS}") == 1


async def test_where_none_can_be_had_everybody_is_told_at_once(database: Database) -> None:
    """One refusal is enough for all who wait, and a freed place for the next who asks."""
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        await superuser.execute("alter role app_login connection limit 0")
        try:
            found = await asyncio.gather(*(ask(connections) for _ in range(50)), return_exceptions=True)
            assert {asyncpg.TooManyConnectionsError} == {type(one) for one in found}
        finally:
            await superuser.execute("alter role app_login connection limit -1")
        assert await ask(connections) == 1


async def test_few_are_opened_at_once() -> None:
    """A server that says nothing is not asked for more connections, however many wait."""
    taken: list[asyncio.StreamWriter] = []

    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened(f"postgresql://nobody@127.0.0.1:{port}/nothing", timeout=0.3) as connections:
            found = await asyncio.gather(*(ask(connections) for _ in range(50)), return_exceptions=True)
            assert {TimeoutError} == {type(one) for one in found}
        assert len(taken) == AT_ONCE
        for writer in taken:
            writer.transport.abort()


async def test_all_of_them_work_at_once_and_no_more(database: Database) -> None:
    """As many as there may be are opened for those who wait; the next in line waits for its turn."""
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        await superuser.execute("select pg_advisory_lock(1)")
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * MOST):
                group.create_task(ask(connections, "select pg_advisory_xact_lock_shared(1)"))
            await eventually(lambda: _working(superuser))
            await superuser.execute("select pg_advisory_unlock(1)")
        assert await superuser.fetchval(f"select count(*) {_OURS}") == MOST


async def _working(superuser: "asyncpg.Connection[asyncpg.Record]") -> bool:
    await superuser.execute("select pg_stat_clear_snapshot()")
    return bool(await superuser.fetchval(f"select count(*) = {MOST} {_OURS} and wait_event = 'advisory'"))


async def test_whoever_goes_away_takes_no_connection_along(database: Database) -> None:
    """Hundreds who give up at random moments, waiting or asking, leave all connections to those who come then."""
    rng = random.Random(1)  # noqa: S311 - repeatable
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        for _ in range(300):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(rng.random() * 0.003):
                    await asyncio.gather(*(ask(connections, "select pg_sleep(0.01)") for _ in range(3)))
        await superuser.execute("select pg_advisory_lock(1)")
        async with asyncio.TaskGroup() as group:
            for _ in range(MOST):
                group.create_task(ask(connections, "select pg_advisory_xact_lock_shared(1)"))
            await eventually(lambda: _working(superuser))
            await superuser.execute("select pg_advisory_unlock(1)")


async def test_ended_connections_are_replaced(database: Database) -> None:
    """What the server has ended while it was idle is lent to nobody."""
    async with connect(database.superuser_url) as superuser, opened(database.service_url) as connections:
        for most in (1, MOST):
            lent = [await connections.acquire() for _ in range(MOST)]
            pids = {one.get_server_pid() for one in lent[:most]}
            for one in lent:
                connections.give_back(one)
            await superuser.execute("select pg_terminate_backend(pid) from unnest($1::int[]) as one (pid)", pids)
            await eventually(partial(_are_closed, lent[:most]))
            assert [1] * MOST == await asyncio.gather(*(ask(connections) for _ in range(MOST)))


def _are_closed(lent: "Sequence[Lent]") -> bool:
    return all(is_closed(one) for one in lent)


async def test_what_nobody_needs_is_left_to_the_pool(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections beyond those in use go back to the pool, which ends them when they stay there."""
    monkeypatch.setattr("goodstanding.connections._UNUSED_SECONDS", 0.05)
    async with background() as spawn:
        pool = await asyncpg.create_pool(
            database.service_url, min_size=0, max_size=MOST, max_inactive_connection_lifetime=0.05
        )
        connections = Connections(pool, spawn, most=MOST, deadline=DEADLINE)
        await asyncio.gather(*(ask(connections, "select pg_sleep(0.05)") for _ in range(MOST)))
        assert pool.get_size() > 1
        spawn(connections.close_unused())
        await eventually(lambda: pool.get_size() == 0)
        assert await ask(connections) == 1
        pool.terminate()
