"""Install, upgrade and remove what Goodstanding keeps in the host app's database.

Every step is plain SQL beside this module; `plan` gives exactly what `upgrade` and `downgrade` execute.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg

from goodstanding.errors import ConfigurationError, GoodstandingError, TemporarilyUnavailableError
from goodstanding.history import named_queries

if TYPE_CHECKING:
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

Report = Callable[[str], None]
"""Receives one line per step, for people."""

_CONNECT_SECONDS: Final = 10.0
_PROGRESS_SECONDS: Final = 0.5
_INDEX_SECONDS: Final = 24 * 3600.0
_FOLDER: Final = files("goodstanding") / "migrations"


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step of the schema; its SQL records itself in reputation.migrations."""

    version: int
    name: str
    sql: str


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _migrations() -> tuple[Migration, ...]:
    names = sorted(entry.name for entry in _FOLDER.iterdir() if entry.name[:4].isdigit())
    return tuple(Migration(int(name[:4]), name[5:].removesuffix(".sql"), _read(name)) for name in names)


MIGRATIONS: Final = _migrations()
COVERING_INDEXES: Final = named_queries(_read("covering_indexes.sql"))
_COVERING_INDEXES_DOWN: Final = named_queries(_read("covering_indexes_down.sql"))
_PROLOGUE: Final = _read("prologue.sql")
_DOWN: Final = _read("down.sql")

_APPLIED: Final = "select version from reputation.migrations"
_INSTALLED: Final = "select pg_catalog.to_regclass('reputation.migrations') is not null"
_INDEX_STATE: Final = """
select
    index.indisvalid as valid,
    exists (
        select from pg_catalog.pg_stat_progress_create_index as progress
        where progress.datid = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
            and progress.relid = index.indrelid
    ) as building
from pg_catalog.pg_index as index
where index.indexrelid = pg_catalog.to_regclass('public.' || $1)
"""
_INDEX_PROGRESS: Final = """
select progress.phase, progress.blocks_done, progress.blocks_total
from pg_catalog.pg_stat_progress_create_index as progress
where progress.datname = pg_catalog.current_database()
limit 1
"""


def plan(*, down: bool = False, covering_indexes: bool = False, applied: Collection[int] = ()) -> str:
    """Give the SQL that `upgrade` (or, with `down`, `downgrade`) executes, as one script for psql."""
    if down:
        return "\n".join((*_COVERING_INDEXES_DOWN.values(), "", "begin;", _PROLOGUE, _DOWN, "commit;", ""))
    steps = [migration.sql for migration in MIGRATIONS if migration.version not in applied]
    indexes = COVERING_INDEXES.values() if covering_indexes else ()
    return "\n".join(("begin;", _PROLOGUE, *steps, "commit;", "", *indexes, ""))


async def upgrade(database_url: str, *, covering_indexes: bool = False, report: Report | None = None) -> None:
    """Bring the database to this version, in one transaction; nothing happens to one that is there already.

    Must run as the owner of the host's tables. The covering indexes are built afterwards, without blocking writers.
    Raises ConfigurationError for what the operator can mend, TemporarilyUnavailableError when nobody answers.
    """
    say = report or _silent
    async with _connection(database_url, say) as connection:
        async with connection.transaction():
            await connection.execute(_PROLOGUE)
            applied = await _applied(connection)
            for migration in MIGRATIONS:
                if migration.version not in applied:
                    await connection.execute(migration.sql)
                    say(f"applied {migration.version:04} {migration.name}")
        if covering_indexes:
            for name in COVERING_INDEXES:
                await _cover(connection, database_url, name, say)
    say("the database is up to date")


async def downgrade(database_url: str, *, report: Report | None = None) -> None:
    """Remove every trace; the role stays, with a line that says so, while something else uses it.

    Raises ConfigurationError for what the operator can mend, TemporarilyUnavailableError when nobody answers.
    """
    say = report or _silent
    async with _connection(database_url, say) as connection:
        for statement in _COVERING_INDEXES_DOWN.values():
            await connection.execute(statement)
        async with connection.transaction():
            await connection.execute(_PROLOGUE)
            await connection.execute(_DOWN)
    say("nothing of Goodstanding is left in the database")


async def applied_versions(database_url: str) -> frozenset[int]:
    """Give the versions that the database has; none when it was never migrated."""
    async with _connection(database_url, _silent) as connection, connection.transaction():
        return await _applied(connection)


async def _applied(connection: "_Connection") -> frozenset[int]:
    if not await connection.fetchval(_INSTALLED):
        return frozenset()
    applied = frozenset(row["version"] for row in await connection.fetch(_APPLIED))
    if applied - {migration.version for migration in MIGRATIONS}:
        message = "the database was migrated by a newer version of Goodstanding"
        raise ConfigurationError(message)
    return applied


async def _cover(connection: "_Connection", database_url: str, name: str, say: Report) -> None:
    """Leave a valid index of this name, whatever an interrupted or a concurrent build left behind."""
    async with asyncio.timeout(_INDEX_SECONDS):
        while True:
            async with connection.transaction():
                state = await connection.fetchrow(_INDEX_STATE, name)
            if state is not None and state["valid"]:
                return
            if state is not None and state["building"]:
                say(f"{name}: waiting for another build on this table")
                await asyncio.sleep(_PROGRESS_SECONDS)
                continue
            try:
                if state is not None:
                    say(f"{name}: dropping what an interrupted build left")
                    await connection.execute(_COVERING_INDEXES_DOWN[name])
                await _build(connection, database_url, name, say)
            except asyncpg.DeadlockDetectedError:
                say(f"{name}: another build got in the way, trying again")


async def _build(connection: "_Connection", database_url: str, name: str, say: Report) -> None:
    built = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_watch(database_url, name, built, say))
            try:
                await connection.execute(COVERING_INDEXES[name])
            finally:
                built.set()
    except* asyncpg.PostgresError as errors:
        raise errors.exceptions[0] from None
    say(f"{name}: built")


async def _watch(database_url: str, name: str, built: asyncio.Event, say: Report) -> None:
    """Report a build's progress, from a connection of its own, until it is over; never a reason for it to fail."""
    try:
        async with _connection(database_url, _silent) as observer:
            while not built.is_set():
                async with observer.transaction():
                    row = await observer.fetchrow(_INDEX_PROGRESS)
                if row is not None:
                    share = f" {100 * row['blocks_done'] // row['blocks_total']} %" if row["blocks_total"] else ""
                    say(f"{name}: {row['phase']}{share}")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PROGRESS_SECONDS):
                        await built.wait()
    except GoodstandingError:
        say(f"{name}: its progress cannot be watched")


@asynccontextmanager
async def _connection(database_url: str, say: Report) -> AsyncIterator["_Connection"]:
    """Connect so that a pooler in transaction mode works too: no named statements, no session state."""
    try:
        connection = await asyncpg.connect(database_url, timeout=_CONNECT_SECONDS, statement_cache_size=0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
        raise _explained(error) from error

    def warn(_: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.severity_en == "WARNING":
            say(str(message.message))

    connection.add_log_listener(warn)
    try:
        yield connection
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise _explained(error) from error
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


def _explained(error: Exception) -> Exception:
    """Turn a database's failure into one line for the operator, without the text of a query or an address."""
    if isinstance(error, asyncpg.PostgresError):
        if error.sqlstate == "GS001":
            return ConfigurationError(str(error.args[0]))
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            return ConfigurationError("this login lacks a right: migrate must run as the owner of the host's tables")
        if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError | asyncpg.InvalidCatalogNameError):
            return ConfigurationError("PostgreSQL refused the login or knows no such database")
        if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
            return TemporarilyUnavailableError("PostgreSQL ended the connection.")
        return ConfigurationError(f"PostgreSQL refused a step of the migration (SQLSTATE {error.sqlstate})")
    return TemporarilyUnavailableError("PostgreSQL cannot be reached.")


def _silent(_: str) -> None:
    return
