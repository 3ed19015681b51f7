"""Installing and removing: idempotent, alone, in the open, and without a trace left."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest

from goodstanding.embedded import Postgres
from goodstanding.errors import ConfigurationError, TemporarilyUnavailableError
from goodstanding.migrate import COVERING_INDEXES, MIGRATIONS, downgrade, plan, upgrade

from .conftest import OWNER, Database, command, connect

if TYPE_CHECKING:
    from .conftest import Connection

PATIENCE = 30.0
# Everything that a migration could leave behind in a database, as text that is the same in another one.
CATALOGUE = """
select 'schema' as kind, nspname::text as name, nspacl::text as detail from pg_namespace
union all
select 'relation', oid::regclass::text, concat(relkind, relacl, relrowsecurity, relforcerowsecurity, reloptions)
from pg_class where relnamespace not in ('pg_toast'::regnamespace, 'pg_catalog'::regnamespace)
union all
select 'column', concat(attrelid::regclass, '.', attname), concat(atttypid::regtype, attnotnull, attacl, attidentity)
from pg_attribute join pg_class on pg_class.oid = attrelid
where relnamespace not in ('pg_toast'::regnamespace, 'pg_catalog'::regnamespace) and attnum > 0
union all
select 'index', indexrelid::regclass::text, concat(pg_get_indexdef(indexrelid), indisvalid) from pg_index
where indrelid > 16384 and indrelid::regclass::text not like 'pg_toast%'
union all
select 'constraint', concat(conrelid::regclass, conname), pg_get_constraintdef(oid) from pg_constraint
where conrelid > 16384
union all
select 'function', oid::regprocedure::text, concat(pg_get_functiondef(oid), proacl) from pg_proc
where oid > 16384 and prokind = 'f'
union all
select 'trigger', concat(tgrelid::regclass, tgname), concat(pg_get_triggerdef(oid), tgenabled) from pg_trigger
where not tgisinternal
union all
select 'type', oid::regtype::text, typacl::text from pg_type where oid > 16384 and typrelid = 0
union all
select 'policy', concat(polrelid::regclass, polname), polcmd::text from pg_policy
"""
ROLES = "select rolname::text from pg_roles"
WHO = "select rolname::text from pg_auth_members join pg_roles on pg_roles.oid = member where roleid = $1::regrole"


async def catalogue(owner: "Connection") -> set[tuple[str, str, str | None]]:
    """Describe the database."""
    return {tuple(row) for row in await owner.fetch(CATALOGUE)}


@asynccontextmanager
async def login(database: Database, attributes: str) -> AsyncIterator[str]:
    """Give the URL of a new login of the same database."""
    name, password = f"login_{secrets.token_hex(4)}", secrets.token_urlsafe(8)
    async with connect(database.superuser_url) as admin:
        await command(admin, f"create role %I login {attributes} password %L", name, password)
        try:
            yield re.sub("//[^@]*@", f"//{name}:{password}@", database.superuser_url)
        finally:
            await command(admin, "reassign owned by %I to postgres", name)
            await command(admin, "drop owned by %I", name)
            await command(admin, "drop role %I", name)


async def test_the_owner_who_is_no_superuser_can_install(bare_database: Database) -> None:
    """CREATEROLE and the ownership of the tables are enough; every step is told."""
    told: list[str] = []
    await upgrade(bare_database.owner_url, report=told.append)
    async with connect(bare_database.owner_url) as owner:
        assert [1, 2] == [version for (version,) in await owner.fetch("select version from reputation.migrations")]
    assert [
        "applied 0001 sessions",
        "applied 0002 changes",
        "the triggers are on the host's tables",
        "the database is up to date",
    ] == told
    async with bare_database.owner() as owner:
        assert [(1, "sessions"), (2, "changes")] == [
            tuple(row) for row in await owner.fetch("select version, name from reputation.migrations")
        ]
        assert await owner.fetchval("select not rolsuper from pg_roles where rolname = current_user")


async def test_installing_again_changes_nothing(database: Database) -> None:
    """The second run applies nothing and keeps what is there."""
    told: list[str] = []
    async with database.owner() as owner:
        before = await catalogue(owner)
        await upgrade(database.owner_url, report=told.append)
        assert before == await catalogue(owner)
    assert ["the database is up to date"] == told


async def test_installing_twice_at_once_installs_once(bare_database: Database) -> None:
    """Of several at the same time one does it and the others find it done."""
    told: list[str] = []
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(upgrade(bare_database.owner_url, covering_indexes=True, report=told.append))
    assert told.count("applied 0001 sessions") == 1
    assert told.count("the database is up to date") == 4
    async with bare_database.owner() as owner:
        assert set(COVERING_INDEXES) == {
            row[0]
            for row in await owner.fetch(
                "select indexrelid::regclass::text from pg_index where indisvalid"
                " and indexrelid::regclass::text like 'goodstanding%'"
            )
        }


async def test_the_dry_run_is_what_is_executed(bare_database: Database, database: Database) -> None:
    """The printed SQL, run by hand, gives the same database as the command; and so does its way back."""
    await upgrade(database.owner_url, covering_indexes=True)
    async with bare_database.owner() as by_hand, database.owner() as by_command:
        bare = await catalogue(by_hand)
        await _run_by_hand(by_hand, plan(covering_indexes=True))
        installed = await catalogue(by_hand)
        assert bare < installed
        assert await catalogue(by_command) == installed
        await _run_by_hand(by_hand, plan(down=True))
        assert bare == await catalogue(by_hand)


def test_the_plan_leaves_out_what_is_applied() -> None:
    """The plan of an installed database holds no step, and the plan is the files' text and nothing else."""
    assert all(migration.sql in plan() for migration in MIGRATIONS)
    done = plan(applied=[migration.version for migration in MIGRATIONS])
    assert not any(migration.sql in done for migration in MIGRATIONS)
    assert "concurrently" not in plan()


def test_every_migration_records_itself() -> None:
    """A file's number and name are those that it writes down, and the numbers have no gap."""
    assert list(range(1, len(MIGRATIONS) + 1)) == [migration.version for migration in MIGRATIONS]
    for migration in MIGRATIONS:
        *_, record = migration.sql.strip().splitlines()
        values = f"values ({migration.version}, '{migration.name}');"
        assert ("insert into reputation.migrations (version, name)", values) == (record[:49], record[50:])


async def test_removing_leaves_no_trace(bare_database: Database) -> None:
    """Afterwards the database is what it was, with verdicts recorded in between; twice is as good as once."""
    async with bare_database.owner() as owner:
        before = await catalogue(owner)
        await upgrade(bare_database.owner_url, covering_indexes=True)
        await owner.execute(
            "insert into reputation.attributions (session_id, at_fault, reason, said_by)"
            " values (gen_random_uuid(), 'both', 'x', 'y')"
        )
        assert before != await catalogue(owner)
        for _ in range(2):
            await downgrade(bare_database.owner_url)
            assert before == await catalogue(owner)


async def test_the_role_goes_with_its_last_use(postgres: Postgres) -> None:
    """While another database uses the role it stays, and that is told; then it goes, with its memberships."""
    # A server of its own: on the shared one the template keeps the role in use.
    with Postgres(postgres.data_dir.parent / f"alone_{secrets.token_hex(4)}", durable=False) as alone:
        urls = [alone.url(name) for name in ("one", "two")]
        async with connect(alone.url()) as admin:
            await admin.execute("create role member login")
            for name in ("one", "two"):
                await command(admin, "create database %I", name)
            for url in urls:
                async with connect(url) as host:
                    await host.execute(
                        "create table public.user_profiles (id uuid primary key);"
                        "create table public.wingman_matches (id uuid primary key, user1_id uuid, user2_id uuid);"
                        "create table public.wingman_sessions (id uuid primary key, match_id uuid, status text,"
                        " scheduled_time timestamptz, user1_completed_confirmed_by_user2 boolean,"
                        " user2_completed_confirmed_by_user1 boolean);"
                    )
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
                for url in urls:  # the role is made by both at the same time
                    tasks.create_task(upgrade(url))
            await admin.execute("grant goodstanding_service to member")
            told: list[str] = []
            await downgrade(urls[0], report=told.append)
            assert "the role goodstanding_service is kept: something else still uses it" in told
            assert "goodstanding_service" in {row[0] for row in await admin.fetch(ROLES)}
            assert ["member"] == [
                row[0] for row in await admin.fetch(WHO, "goodstanding_service") if row[0] == "member"
            ]
            told.clear()
            await downgrade(urls[1], report=told.append)
            assert ["nothing of Goodstanding is left in the database"] == told
            assert "goodstanding_service" not in {row[0] for row in await admin.fetch(ROLES)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("drop table public.wingman_sessions", r"public\.wingman_sessions\.id \(uuid\) does not exist"),
        (
            "alter table public.wingman_matches rename user2_id to other",
            r"public\.wingman_matches\.user2_id \(uuid\) does",
        ),
        (
            (
                "alter table public.wingman_sessions drop user1_completed_confirmed_by_user2,"
                " add user1_completed_confirmed_by_user2 text"
            ),
            r"public\.wingman_sessions\.user1_completed_confirmed_by_user2 \(bool\) does not exist",
        ),
        ("create schema reputation", "a schema named reputation exists already"),
    ],
)
async def test_a_database_of_another_kind_is_refused(bare_database: Database, damage: str, message: str) -> None:
    """What is missing is named in one line, and nothing is changed."""
    async with bare_database.owner() as owner:
        await owner.execute(damage)
        before = await catalogue(owner)
        with pytest.raises(ConfigurationError, match=message) as caught:
            await upgrade(bare_database.owner_url)
        assert "\n" not in str(caught.value)
        assert before == await catalogue(owner)


async def test_only_the_owner_may_install(bare_database: Database) -> None:
    """Another login is told whose work it is, even one that may create what it likes."""
    async with login(bare_database, "createrole") as url:
        with pytest.raises(ConfigurationError, match=r"must run as the owner of public\."):
            await upgrade(url)


async def test_a_login_that_may_not_create_is_told_so(bare_database: Database) -> None:
    """Owning the tables is not enough where the database lets its owner alone create schemas."""
    async with login(bare_database, "") as url, connect(bare_database.superuser_url) as admin:
        name = re.search("//([^:]*):", url)
        assert name is not None
        for table in ("user_profiles", "wingman_matches", "wingman_sessions"):
            await command(admin, "alter table public.%I owner to %I", table, name[1])
        with pytest.raises(ConfigurationError, match="needs the right CREATE on this database"):
            await upgrade(url)


async def test_a_role_that_may_not_be_created_is_asked_for(postgres: Postgres) -> None:
    """Without CREATEROLE the message holds the statement for the administrator; once the role exists, it works."""
    with Postgres(postgres.data_dir.parent / f"alone_{secrets.token_hex(4)}", durable=False) as alone:
        async with connect(alone.url()) as admin:
            await admin.execute("create role plain login password 'plain'")
            await admin.execute("create database host owner plain")
            url = alone.url("host", user="plain", password="plain")
            async with connect(url) as host:
                await host.execute(
                    "create table public.user_profiles (id uuid primary key);"
                    "create table public.wingman_matches (id uuid primary key, user1_id uuid, user2_id uuid);"
                    "create table public.wingman_sessions (id uuid primary key, match_id uuid, status text,"
                    " scheduled_time timestamptz, user1_completed_confirmed_by_user2 boolean,"
                    " user2_completed_confirmed_by_user1 boolean);"
                )
            with pytest.raises(ConfigurationError, match="create role goodstanding_service nologin"):
                await upgrade(url)
            await admin.execute("create role goodstanding_service nologin bypassrls")
            with pytest.raises(ConfigurationError, match="may bypass every right"):
                await upgrade(url)
            await admin.execute("alter role goodstanding_service nobypassrls")
            await upgrade(url)
            told: list[str] = []
            await downgrade(url, report=told.append)
            assert "the role goodstanding_service is kept: this login may not drop it" in told


async def test_a_newer_database_is_left_alone(database: Database) -> None:
    """An older program does not touch what a newer one made."""
    async with database.owner() as owner:
        await owner.execute("insert into reputation.migrations (version, name) values (9999, 'later')")
    with pytest.raises(ConfigurationError, match="newer version"):
        await upgrade(database.owner_url)


async def test_a_failing_step_leaves_nothing(bare_database: Database) -> None:
    """It is all one transaction: when a step fails, the schema is not there."""
    async with bare_database.owner() as owner, connect(bare_database.superuser_url) as admin:
        await admin.execute(
            "create function public.refuse() returns event_trigger language plpgsql as"
            " $$ begin raise exception 'no triggers here'; end $$;"
            " create event trigger refuse on ddl_command_start when tag in ('CREATE TRIGGER')"
            " execute function public.refuse()"
        )
        before = await catalogue(owner)
        with pytest.raises(ConfigurationError, match=r"refused a step \(SQLSTATE P0001\)"):
            await upgrade(bare_database.owner_url)
        assert before == await catalogue(owner)


async def test_a_server_that_is_away_or_refuses_is_told_apart(bare_database: Database) -> None:
    """Nobody there is for later; a wrong password or database is for the operator; neither shows the address."""
    with pytest.raises(TemporarilyUnavailableError):
        await upgrade("postgresql://nobody:hidden@127.0.0.1:1/nowhere")
    for wrong in (
        re.sub("//[^@]*@", f"//{OWNER}:wrong@", bare_database.owner_url),
        bare_database.owner_url.replace(bare_database.name, "nowhere"),
    ):
        with pytest.raises(ConfigurationError, match="refused the login or knows no such database"):
            await upgrade(wrong)


async def test_an_interrupted_build_is_built_again(database: Database) -> None:
    """An invalid index is dropped and rebuilt; a valid one is left alone."""
    told: list[str] = []
    async with database.owner() as owner:
        users = [await database.add_user() for _ in range(2)]
        for _ in range(2):
            await database.add_match(*users)
        with pytest.raises(asyncpg.UniqueViolationError):
            await owner.execute(
                "create unique index concurrently goodstanding_matches_user1 on public.wingman_matches (user1_id)"
            )
        await upgrade(database.owner_url, covering_indexes=True, report=told.append)
        assert "goodstanding_matches_user1: dropping what an interrupted build left" in told
        assert await owner.fetchval(
            "select indisvalid and not indisunique from pg_index"
            " where indexrelid = 'public.goodstanding_matches_user1'::regclass"
        )
        oids = await owner.fetch("select indexrelid from pg_index where indexrelid::regclass::text like 'goodst%'")
        await upgrade(database.owner_url, covering_indexes=True)
        assert oids == await owner.fetch(
            "select indexrelid from pg_index where indexrelid::regclass::text like 'goodst%'"
        )


async def test_a_long_build_tells_how_far_it_is_and_blocks_no_writer(database: Database) -> None:
    """While a build waits for an old transaction, its phase is reported and the host goes on writing."""
    told: list[str] = []
    waiting = asyncio.Event()

    def report(line: str) -> None:
        told.append(line)
        if "waiting for" in line:
            waiting.set()

    async with (
        asyncio.timeout(PATIENCE),
        asyncio.TaskGroup() as tasks,
        connect(database.superuser_url) as old,
        old.transaction(isolation="repeatable_read"),
    ):
        await old.execute("delete from public.wingman_matches where false")
        tasks.create_task(upgrade(database.owner_url, covering_indexes=True, report=report))
        await waiting.wait()
        await database.add_match(await database.add_user(), await database.add_user())
    assert "goodstanding_matches_user1: built" in told


async def _run_by_hand(connection: "Connection", script: str) -> None:
    # As psql does: one statement after the other, outside any transaction but the script's own.
    blocks = re.split(r"(?m)^(begin;.*?^commit;)$", script, flags=re.DOTALL)
    for block in blocks:
        if block.startswith("begin;"):
            await connection.execute(block)
            continue
        for statement in block.split(";"):
            if statement.strip():
                await connection.execute(statement)
