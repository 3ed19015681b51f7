"""What may happen to PostgreSQL: how it is broken, and how it is mended."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Final

import asyncpg

from goodstanding import tallies
from goodstanding.migrate import upgrade
from goodstanding.policy import STANDARD
from tests.conftest import connect
from tests.faults.scene import Scene
from tests.live import END_THE_LEAD
from tests.parts import SECONDS, eventually

_OURS: Final = "from pg_stat_activity where datname = current_database() and usename = 'app_login'"
SLOW_SECONDS: Final = 0.05
_DISK_FULL: Final = """
create function public.no_space() returns trigger language plpgsql as $$
begin
    raise exception 'could not extend file: No space left on device' using errcode = 'disk_full';
end $$;
create trigger no_space before insert or update on reputation.tallies
    for each statement execute function public.no_space();
"""


@asynccontextmanager
async def sessions_ended(scene: Scene) -> AsyncIterator[None]:
    """End every session of ours, as an administrator or a pooler does."""
    async with connect(scene.database.superuser_url) as superuser:
        assert await superuser.fetchval(f"select count(*) filter (where pg_terminate_backend(pid)) {_OURS}")
    yield


@asynccontextmanager
async def backend_killed(scene: Scene) -> AsyncIterator[None]:
    """Kill one backend with SIGKILL; PostgreSQL then ends all the others, and recovers."""
    async with connect(scene.database.superuser_url) as superuser:
        ours = [pid for (pid,) in await superuser.fetch(f"select pid {_OURS}")]
    os.kill(ours[0], signal.SIGKILL)

    async def answers() -> bool:
        try:
            async with connect(scene.database.superuser_url) as superuser:
                return bool(await superuser.fetchval("select true"))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False

    await asyncio.sleep(0.1)
    await eventually(answers)
    async with connect(scene.database.superuser_url) as superuser:
        assert not await superuser.fetchval(
            "select count(*) from pg_stat_activity where pid = any ($1::integer[])", ours
        )
    yield


@asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    """Kill the postmaster and every backend with SIGKILL; it comes back by crash recovery."""
    await scene.do(scene.postgres.kill)
    try:
        yield
    finally:
        await scene.do(scene.postgres.start)


@asynccontextmanager
async def frozen(scene: Scene) -> AsyncIterator[None]:
    """Stop all of it with SIGSTOP: it keeps its connections and answers nothing."""
    await scene.do(scene.postgres.pause)
    try:
        yield
    finally:
        await scene.do(scene.postgres.resume)


@asynccontextmanager
async def _slowed(scene: Scene, seconds: float) -> AsyncIterator[None]:
    cable = scene.cables["postgres"]
    await cable.slow(seconds)
    try:
        yield
    finally:
        await cable.slow(0.0)


@asynccontextmanager
async def slow(scene: Scene) -> AsyncIterator[None]:
    """Hold back every reply for 50 ms."""
    async with _slowed(scene, SLOW_SECONDS):
        yield


@asynccontextmanager
async def too_slow(scene: Scene) -> AsyncIterator[None]:
    """Hold back every reply for longer than a load may take."""
    async with _slowed(scene, 2.0):
        yield


@asynccontextmanager
async def pool_exhausted(scene: Scene) -> AsyncIterator[None]:
    """Hold back every reply for 0.6 s, so that more is asked for than the connections of a process can carry."""
    async with _slowed(scene, 0.6):
        yield


@asynccontextmanager
async def promoted(scene: Scene) -> AsyncIterator[None]:
    """Kill the primary, promote its synchronous standby, and lead everybody there."""
    standby = scene.standby
    assert standby is not None
    await scene.do(scene.postgres.kill)
    async with connect(standby.url()) as superuser:
        assert await superuser.fetchval("select pg_promote()")
    await scene.cables["postgres"].lead_to(standby.url())
    was, now = (f":{server.port}/" for server in (scene.postgres, standby))
    database = scene.database
    scene.database = replace(
        database,
        owner_url=database.owner_url.replace(was, now),
        service_url=database.service_url.replace(was, now),
        superuser_url=database.superuser_url.replace(was, now),
    )
    yield


@asynccontextmanager
async def _locked(scene: Scene, statement: str) -> AsyncIterator[None]:
    async with connect(scene.database.owner_url) as owner, owner.transaction():
        await owner.execute(statement)
        yield


@asynccontextmanager
async def users_locked(scene: Scene) -> AsyncIterator[None]:
    """Hold an ACCESS EXCLUSIVE lock on the users, for which every count must wait."""
    async with _locked(scene, "lock table public.user_profiles in access exclusive mode"):
        yield


@asynccontextmanager
async def sessions_locked(scene: Scene) -> AsyncIterator[None]:
    """Hold an ACCESS EXCLUSIVE lock on the sessions, as an ALTER TABLE of the host does."""
    async with _locked(scene, "lock table public.wingman_sessions in access exclusive mode"):
        yield


@asynccontextmanager
async def migrated(scene: Scene) -> AsyncIterator[None]:
    """Migrate again, build the covering indexes and rebuild everybody's tally."""
    url = scene.database.owner_url
    await upgrade(url)
    await upgrade(url, covering_indexes=True)
    await tallies.rebuild(url, STANDARD)
    yield


@asynccontextmanager
async def connections_used_up(scene: Scene) -> AsyncIterator[None]:
    """Take every connection that PostgreSQL gives, those of ours first.

    A backend that has not quite ended keeps its place, and whoever comes first gets it. So ours may have none of the
    places until all are given back: both processes are without a connection, and nothing else is left to chance.
    """
    async with AsyncExitStack() as stack, connect(scene.database.superuser_url) as superuser:
        await superuser.execute("alter role app_login connection limit 0")
        await superuser.execute(f"select pg_terminate_backend(pid) {_OURS}")

        async def ended() -> bool:
            return not await superuser.fetchval(f"select count(*) {_OURS}")

        async def used_up() -> bool:
            try:
                await stack.enter_async_context(connect(scene.database.owner_url))
            except asyncpg.TooManyConnectionsError:
                return True
            return False

        await eventually(ended)
        await eventually(used_up)
        try:
            yield
        finally:
            await superuser.execute("alter role app_login connection limit -1")


@asynccontextmanager
async def nobody_leads(scene: Scene) -> AsyncIterator[None]:
    """Take the lead from the relay, and carry nothing."""
    async with connect(scene.database.superuser_url) as superuser:

        async def is_taken() -> bool:
            await superuser.execute(END_THE_LEAD, tallies.LEAD)
            return bool(await superuser.fetchval("select pg_try_advisory_lock($1)", tallies.LEAD))

        await eventually(is_taken)
        yield


@asynccontextmanager
async def disk_full(scene: Scene) -> AsyncIterator[None]:
    """Fail every fold of the relay with SQLSTATE 53100.

    A full disk itself takes a file system of one's own, which an ordinary user cannot mount.
    """
    async with connect(scene.database.superuser_url) as superuser:
        await superuser.execute(_DISK_FULL)
        try:
            yield
        finally:
            await superuser.execute("drop function public.no_space cascade", timeout=SECONDS)
