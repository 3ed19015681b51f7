"""Real servers for the session, a fresh database for every test that asks for one."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg
import pytest
import redis

from goodstanding.data import SessionId, UserId
from goodstanding.embedded import Postgres, Valkey, kept_secret
from tests import mutation

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

HOST_SQL: Final = Path(__file__).parent.parent / "src" / "goodstanding" / "host.sql"
OWNER: Final = "host_owner"
SERVICE: Final = "app_login"
SCHEDULED: Final = datetime(2026, 5, 1, 18, 0, tzinfo=UTC)
# `make mutation` has a PostgreSQL with both templates, of which each of its many sessions runs a copy.
_PREPARED: Final = os.environ.get(mutation.PREPARED)
_PASSWORD: Final = kept_secret(Path(_PREPARED) / "password") if _PREPARED else secrets.token_urlsafe(16)
_SECONDS: Final = 30.0


def pytest_configure(config: pytest.Config) -> None:
    """Let `make mutation` have its own order and its own deadlines."""
    if _PREPARED:
        config.pluginmanager.register(mutation)


@dataclass(frozen=True, slots=True)
class Database:
    """One test's own database, with the host's tables, which `host_owner` (no superuser) owns.

    `service_url` logs in as a member of goodstanding_service, `superuser_url` as postgres.
    """

    name: str
    owner_url: str
    service_url: str
    superuser_url: str
    _pool: "asyncpg.Pool[asyncpg.Record]"

    @asynccontextmanager
    async def owner(self) -> AsyncIterator["Connection"]:
        """Lend a connection as the tables' owner."""
        async with self._pool.acquire(timeout=_SECONDS) as connection:
            yield connection

    async def add_user(self, user_id: str | None = None, *, display_name: str | None = None) -> UserId:
        """Insert a user, by default with a random id."""
        return UserId(
            await self._insert(
                "insert into public.user_profiles (id, display_name)"
                " values (coalesce($1, gen_random_uuid()), $2) returning id::text",
                user_id,
                display_name,
            )
        )

    async def add_match(self, user1: str, user2: str) -> str:
        """Insert a match of two users; gives its id."""
        return await self._insert(
            "insert into public.wingman_matches (user1_id, user2_id) values ($1, $2) returning id::text", user1, user2
        )

    async def add_session(
        self,
        match_id: str,
        status: str = "scheduled",
        *,
        a: bool | None = False,
        b: bool | None = False,
        scheduled_time: datetime = SCHEDULED,
        notes: str = "",
    ) -> SessionId:
        """Insert a session of a match; `a` and `b` confirm user1 and user2."""
        return SessionId(
            await self._insert(
                "insert into public.wingman_sessions (match_id, status, user1_completed_confirmed_by_user2,"
                " user2_completed_confirmed_by_user1, scheduled_time, notes, venue_name)"
                " values ($1, $2, $3, $4, $5, $6, 'Corner Café') returning id::text",
                match_id,
                status,
                a,
                b,
                scheduled_time,
                notes,
            )
        )

    async def _insert(self, query: str, *values: object) -> str:
        return str(await self._pool.fetchval(query, *values, timeout=_SECONDS))


@asynccontextmanager
async def connect(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Open a connection of one's own, with deadlines."""
    connection = await asyncpg.connect(url, timeout=_SECONDS, command_timeout=_SECONDS)
    try:
        yield connection
    finally:
        connection.terminate()


async def command(connection: "asyncpg.Connection[asyncpg.Record] | Connection", template: str, *words: str) -> None:
    """Run a statement that takes no parameters; PostgreSQL quotes the words (`%I` a name, `%L` a text)."""
    await connection.execute(await connection.fetchval("select format($1, variadic $2::text[])", template, words))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run PostgreSQL for the session; a test may pause or kill it."""
    folder = mutation.copy_of(Path(_PREPARED)) if _PREPARED else tmp_path_factory.mktemp("postgres")
    with Postgres(folder, durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Run Valkey for the session; a test may pause or kill it."""
    with Valkey(tmp_path_factory.mktemp("valkey"), options=("--enable-debug-command", "yes")) as server:
        yield server


@pytest.fixture(scope="session")
def bare_template(postgres: Postgres) -> str:
    """Give the name of a template database with the host's tables and nothing of ours."""
    if not _PREPARED:
        _run(make_bare_template(postgres))
    return "bare_template"


@pytest.fixture(scope="session")
def template(postgres: Postgres, bare_template: str) -> str:
    """Give the name of a template database with the host's tables and our migration."""
    if not _PREPARED:
        _run(make_template(postgres, bare_template))
    return "template"


@pytest.fixture
async def database(postgres: Postgres, template: str) -> AsyncIterator[Database]:
    """Give a fresh migrated database."""
    async with fresh_database(postgres, template) as fresh:
        yield fresh


@pytest.fixture
async def bare_database(postgres: Postgres, bare_template: str) -> AsyncIterator[Database]:
    """Give a fresh database with the host's tables, not migrated."""
    async with fresh_database(postgres, bare_template) as fresh:
        yield fresh


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """Give the URL of an empty, writable Valkey, whatever the test before did to it."""
    return emptied(valkey)


def emptied(valkey: Valkey) -> str:
    """Make Valkey run, writable and empty; gives its URL."""
    if valkey.running:
        valkey.resume()
    else:
        valkey.start()
    url = valkey.url()
    with redis.Redis.from_url(url, socket_timeout=_SECONDS) as client:
        client.replicaof("NO", "ONE")
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
        client.script_flush()
        client.flushall()
        assert client.ping()
    return url


def _run(coroutine: Coroutine[None, None, None]) -> None:
    # With a factory the runner leaves the current event loop, which pytest-asyncio owns, alone.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(coroutine)


async def make_bare_template(postgres: Postgres) -> None:
    """Make the template database `bare_template`: the host's tables, and the logins of owner and service."""
    async with connect(postgres.url()) as admin:
        await command(admin, "create role %I login createrole password %L", OWNER, _PASSWORD)
        await command(admin, "create role %I login password %L", SERVICE, _PASSWORD)
        await command(admin, "create database bare_template owner %I", OWNER)
    async with connect(postgres.url("bare_template")) as admin:
        await admin.execute(HOST_SQL.read_text())
    async with connect(postgres.url()) as admin:
        await admin.execute("alter database bare_template is_template true allow_connections false")


async def make_template(postgres: Postgres, bare_template: str) -> None:
    """Make the template database `template`: the other one, migrated."""
    from goodstanding.migrate import upgrade  # noqa: PLC0415 - a broken migration must not break the tests without one

    async with connect(postgres.url()) as admin:
        await command(admin, "create database template template %I owner %I", bare_template, OWNER)
    await upgrade(postgres.url("template", user=OWNER, password=_PASSWORD))
    async with connect(postgres.url("template", user=OWNER, password=_PASSWORD)) as owner:
        await command(owner, "grant goodstanding_service to %I", SERVICE)
    async with connect(postgres.url()) as admin:
        await admin.execute("alter database template is_template true allow_connections false")


@asynccontextmanager
async def fresh_database(postgres: Postgres, template: str) -> AsyncIterator[Database]:
    """Make a database from a template, lend it, and drop it."""
    if postgres.running:
        postgres.resume()
    else:
        postgres.start()
    name = f"test_{secrets.token_hex(8)}"
    async with connect(postgres.url()) as admin:
        await command(admin, "create database %I template %I owner %I", name, template, OWNER)
    owner_url = postgres.url(name, user=OWNER, password=_PASSWORD)
    pool = await asyncpg.create_pool(owner_url, min_size=0, max_size=8, timeout=_SECONDS, command_timeout=_SECONDS)
    try:
        yield Database(
            name=name,
            owner_url=owner_url,
            service_url=postgres.url(name, user=SERVICE, password=_PASSWORD),
            superuser_url=postgres.url(name),
            _pool=pool,
        )
    finally:
        pool.terminate()
        postgres.resume()
        if postgres.running:  # a test that killed it leaves its database to the server's own end
            async with connect(postgres.url()) as admin:
                await command(admin, "drop database %I with (force)", name)
