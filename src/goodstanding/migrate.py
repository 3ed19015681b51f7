"""Install, upgrade and remove what Goodstanding keeps in the host app's database.

Every step is plain SQL beside this module; `plan` gives exactly what `upgrade` and `downgrade` execute.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import asyncpg

from goodstanding import tallies
from goodstanding.errors import ConfigurationError, GoodstandingError
from goodstanding.history import named_queries
from goodstanding.owner import Report, connected, silent
from goodstanding.policy import STANDARD, ReputationPolicy

if TYPE_CHECKING:
    from goodstanding.owner import Connection

_LOCK_SECONDS: Final = 60.0
_LOCK_PAUSE_SECONDS: Final = 0.2
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
_TRIGGERS: Final = _read("triggers.sql")
_TRIGGERS_DOWN: Final = _read("triggers_down.sql")
_DOWN: Final = _read("down.sql")

_APPLIED: Final = "select version from reputation.migrations"
_INSTALLED: Final = "select pg_catalog.to_regclass('reputation.migrations') is not null"
_TRACKED: Final = "select reputation.tracked()"
_UNTRIGGERED: Final = """
select not exists (
    select from pg_catalog.pg_trigger as ours
    where ours.tgname like 'goodstanding\\_%'
        and ours.tgrelid in (
            'public.user_profiles'::regclass, 'public.wingman_matches'::regclass, 'public.wingman_sessions'::regclass
        )
)
"""
_REBUILD_BY_HAND: Final = "select reputation.rebuild('{}', '{}', '{}');"
_COUNT_BY_HAND: Final = "-- Count everybody who is here already.\nselect reputation.recount(2147483647);"
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


def plan(
    *,
    down: bool = False,
    covering_indexes: bool = False,
    triggers: bool = True,
    policy: ReputationPolicy = STANDARD,
    applied: Collection[int] = (),
) -> str:
    """Give the SQL that `upgrade` (or, with `down`, `downgrade`) executes, as one script for psql."""
    if down:
        return "\n".join((*_COVERING_INDEXES_DOWN.values(), "", "begin;", _PROLOGUE, _DOWN, "commit;", ""))
    steps = [migration.sql for migration in MIGRATIONS if migration.version not in applied]
    if steps and policy.meaning != STANDARD.meaning:
        steps.append(_REBUILD_BY_HAND.format(*policy.meaning))
    tracking = ("begin;", _PROLOGUE, _TRIGGERS, "commit;", "", _COUNT_BY_HAND, "") if triggers else ()
    indexes = COVERING_INDEXES.values() if covering_indexes else ()
    return "\n".join(("begin;", _PROLOGUE, *steps, "commit;", "", *tracking, *indexes, ""))


async def upgrade(
    database_url: str,
    *,
    covering_indexes: bool = False,
    triggers: bool = True,
    policy: ReputationPolicy = STANDARD,
    report: Report | None = None,
) -> None:
    """Bring the database to this version; nothing happens to one that is there already.

    Must run as the owner of the host's tables. The schema is one transaction; the triggers are another, which never
    makes the host's writers wait for longer than half a second; then everybody who is there already is counted, and
    the covering indexes are built, both beside every writer. `policy` is what new tallies mean; without `triggers`
    those that exist are taken off. Raises ConfigurationError for what the operator can mend,
    TemporarilyUnavailableError when nobody answers.
    """
    say = report or silent
    async with connected(database_url, say) as connection:
        async with connection.transaction():
            await connection.execute(_PROLOGUE)
            applied = await _applied(connection)
            for migration in MIGRATIONS:
                if migration.version not in applied:
                    await connection.execute(migration.sql)
                    say(f"applied {migration.version:04} {migration.name}")
            if len(applied) < len(MIGRATIONS) and policy.meaning != STANDARD.meaning:
                await connection.execute(tallies.QUERIES["rebuild"], *policy.meaning)
        await _track(connection, say, wanted=triggers)
        if triggers:
            await tallies.count_everybody(connection, say)
            if not (await tallies.status(connection, policy)).same_policy:
                say("the tallies mean another policy than this one: run goodstanding rebuild")
        if covering_indexes:
            for name in COVERING_INDEXES:
                await _cover(connection, database_url, name, say)
    say("the database is up to date")


async def downgrade(database_url: str, *, report: Report | None = None) -> None:
    """Remove every trace; the role stays, with a line that says so, while something else uses it.

    Raises ConfigurationError for what the operator can mend, TemporarilyUnavailableError when nobody answers.
    """
    say = report or silent
    async with connected(database_url, say) as connection:
        for statement in _COVERING_INDEXES_DOWN.values():
            await connection.execute(statement)
        await _locked(connection, _DOWN, say)
    say("nothing of Goodstanding is left in the database")


async def _applied(connection: "Connection") -> frozenset[int]:
    if not await connection.fetchval(_INSTALLED):
        return frozenset()
    applied = frozenset(row["version"] for row in await connection.fetch(_APPLIED))
    if applied - {migration.version for migration in MIGRATIONS}:
        message = "the database was migrated by a newer version of Goodstanding"
        raise ConfigurationError(message)
    return applied


async def _track(connection: "Connection", say: Report, *, wanted: bool) -> None:
    """Leave every trigger on the host's tables, or none."""
    unless = _TRACKED if wanted else _UNTRIGGERED
    if await _locked(connection, _TRIGGERS if wanted else _TRIGGERS_DOWN, say, unless=unless):
        say("the triggers are on the host's tables" if wanted else "no trigger is left on the host's tables")


async def _locked(connection: "Connection", sql: str, say: Report, *, unless: str | None = None) -> bool:
    """Run a step that locks the host's tables: again and again, each time with a short wait that hurts no writer.

    Tells whether it ran: not when the query `unless` says that it is done already.
    """
    try:
        async with asyncio.timeout(_LOCK_SECONDS):
            while True:
                try:
                    async with connection.transaction():
                        await connection.execute(_PROLOGUE)
                        if unless is not None and await connection.fetchval(unless):
                            return False
                        await connection.execute(sql)
                except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                    say("a long transaction holds one of the host's tables, trying again")
                    await asyncio.sleep(_LOCK_PAUSE_SECONDS)
                else:
                    return True
    except TimeoutError:
        message = "a transaction held one of the host's tables for a minute: end it, or try again later"
        raise ConfigurationError(message) from None


async def _cover(connection: "Connection", database_url: str, name: str, say: Report) -> None:
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


async def _build(connection: "Connection", database_url: str, name: str, say: Report) -> None:
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
        async with connected(database_url, silent) as observer:
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
