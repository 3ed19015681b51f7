"""What the service's role can do, and how little: refused by the database, whatever the code does."""

import re

import asyncpg
import pytest

from goodstanding.data import AtFault, SessionCounts
from goodstanding.history import QUERIES
from goodstanding.main import utc_now
from goodstanding.migrate import upgrade
from goodstanding.policy import STANDARD

from .conftest import SERVICE, Database, command, connect
from .test_changes_sql import settled

FUNCTIONS = {
    "reputation.attribute(uuid,text,text,text)",
    "reputation.counts(uuid[],text,text,text)",
    "reputation.fold(integer)",
    "reputation.most_active(integer)",
    "reputation.pending()",
    "reputation.read_counts(uuid[],text,text,text)",
    "reputation.recount(integer)",
    "reputation.status(text,text,text)",
}
SYNTAX = {"and", "any", "coalesce", "if", "or"}
QUALIFIED = re.compile(r"(pg_catalog|reputation|public)\.\w+$")
# These run inside the host's own statements.
TRIGGERS = {
    "reputation.attributed()",
    "reputation.everybody_changed()",
    "reputation.match_changed()",
    "reputation.session_changed()",
    "reputation.user_changed()",
}
EVERY_GRANT = """
with grants as (
    select 'schema ' || nspname as object, (aclexplode(nspacl)).* from pg_namespace
    union all
    select 'table ' || oid::regclass, (aclexplode(relacl)).* from pg_class
    union all
    select 'column ' || attrelid::regclass || '.' || attname, (aclexplode(attacl)).* from pg_attribute
    union all
    select 'function ' || oid::regprocedure, (aclexplode(coalesce(proacl, acldefault('f', proowner)))).* from pg_proc
    union all
    select 'database ' || datname, (aclexplode(datacl)).* from pg_database
    union all
    select 'type ' || oid::regtype, (aclexplode(typacl)).* from pg_type
)
select object, privilege_type, is_grantable from grants where grantee = $1::regrole
"""
FOREIGN_GRANTS = """
select object, grantee from (
    select 'schema' as object, (aclexplode(nspacl)).* from pg_namespace where nspname = 'reputation'
    union all
    select oid::regclass::text, (aclexplode(relacl)).* from pg_class where relnamespace = 'reputation'::regnamespace
    union all
    select oid::regprocedure::text, (aclexplode(coalesce(proacl, acldefault('f', proowner)))).*
    from pg_proc where pronamespace = 'reputation'::regnamespace
) as granted
where grantee not in ($1::regrole, 'goodstanding_service'::regrole)
"""
GENEROUS = "alter default privileges"


MEMBERSHIPS = "select roleid::regrole::text from pg_auth_members where member = 'goodstanding_service'::regrole"


async def test_the_role_has_exactly_the_rights_it_needs(database: Database) -> None:
    """By the catalogues: usage of one schema and execution of its functions, none of it grantable, nothing else.

    Nor does it inherit anything: it is a member of no other role.
    """
    async with database.owner() as owner:
        granted = {tuple(row) for row in await owner.fetch(EVERY_GRANT, "goodstanding_service")}
        role = await owner.fetchrow("select * from pg_roles where rolname = 'goodstanding_service'")
        owned = await owner.fetchval(
            "select count(*) from pg_shdepend where refobjid = 'goodstanding_service'::regrole and deptype = 'o'"
        )
        memberships = await owner.fetch(MEMBERSHIPS)
    assert {
        ("schema reputation", "USAGE", False),
        *((f"function {name}", "EXECUTE", False) for name in FUNCTIONS),
    } == granted
    assert role is not None
    for attribute in ("rolsuper", "rolbypassrls", "rolcreaterole", "rolcreatedb", "rolcanlogin", "rolreplication"):
        assert role[attribute] is False
    assert owned == 0
    assert [] == memberships


async def test_a_membership_of_the_role_is_seen(database: Database) -> None:
    """What the catalogues are asked above finds a role whose rights ours would inherit."""
    async with connect(database.superuser_url) as admin:
        transaction = admin.transaction()
        await transaction.start()
        await admin.execute("grant pg_read_all_stats to goodstanding_service")
        assert ["pg_read_all_stats"] == [row["roleid"] for row in await admin.fetch(MEMBERSHIPS)]
        await transaction.rollback()


@pytest.mark.parametrize("generous", [False, True])
async def test_nobody_else_has_any_right(bare_database: Database, *, generous: bool) -> None:
    """Neither PUBLIC nor Supabase's roles get in, even where the host's default privileges would let them."""
    async with bare_database.owner() as owner:
        if generous:
            for kind in ("schemas", "tables", "sequences", "functions"):
                await command(
                    owner, f"alter default privileges grant all on {kind} to anon, authenticated, service_role"
                )
    await upgrade(bare_database.owner_url)
    async with bare_database.owner() as owner:
        assert [] == await owner.fetch(FOREIGN_GRANTS, "host_owner")


@pytest.mark.parametrize(
    "query",
    [
        "select notes from public.wingman_sessions",
        "select venue_name from public.wingman_sessions",
        "select scheduled_time from public.wingman_sessions",
        "select count(*) from public.wingman_sessions",
        "select 1 from public.wingman_matches",
        "select id from public.user_profiles",
        "select reason from reputation.attributions",
        "select version from reputation.migrations",
        (
            "insert into reputation.attributions (session_id, at_fault, reason, said_by)"
            " values (gen_random_uuid(), 'both', 'x', 'y')"
        ),
        "update public.wingman_sessions set status = 'completed'",
        "delete from public.wingman_sessions",
        "copy public.wingman_sessions to stdout",
        "select reputation.outcome('completed', true, true, 1, null, 'any', 'both', 'both')",
        "create table reputation.mine ()",
        "create function reputation.counts(uuid[]) returns integer language sql return 1",
        "alter function reputation.counts(uuid[], text, text, text) owner to app_login",
        "select nextval('reputation.attributions_id_seq')",
        "set role host_owner",
    ],
)
async def test_the_service_login_is_refused(database: Database, query: str) -> None:
    """Notes, venues, times, rows and verdicts: PostgreSQL itself refuses, for every way of asking."""
    match = await database.add_match(await database.add_user(), await database.add_user())
    await database.add_session(match, notes="private")
    async with connect(database.service_url) as service:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await service.execute(query)


async def test_what_the_service_gets_is_ids_and_counts(database: Database) -> None:
    """The service's functions give nothing that a note, a venue or a session's time could be in."""
    async with database.owner() as owner:
        results = await owner.fetch(
            "select oid::regprocedure::text as name, pg_get_function_result(oid) as result from pg_proc"
            " where pronamespace = 'reputation'::regnamespace"
            " and has_function_privilege('goodstanding_service', oid, 'execute')"
        )
    assert {
        "reputation.attribute(uuid,text,text,text)": "TABLE(user1_id uuid, user2_id uuid)",
        "reputation.counts(uuid[],text,text,text)": "TABLE(user_id uuid, completed bigint, no_shows bigint)",
        "reputation.pending()": "boolean",
        "reputation.fold(integer)": (
            "TABLE(folded bigint, everybody boolean, user_ids uuid[], oldest timestamp with time zone)"
        ),
        "reputation.most_active(integer)": "SETOF uuid",
        "reputation.read_counts(uuid[],text,text,text)": "TABLE(user_id uuid, completed bigint, no_shows bigint)",
        "reputation.recount(integer)": "TABLE(recounted integer, counting boolean)",
        "reputation.status(text,text,text)": (
            "TABLE(tracked boolean, same_policy boolean, counting boolean, waiting boolean, pending boolean)"
        ),
    } == {row["name"]: row["result"] for row in results}


async def test_every_definer_function_is_armoured(database: Database) -> None:
    """What runs with the owner's rights fixes its search_path, pg_temp last; or has nothing that one could lead astray.

    It turns row security into an error, except inside the host's statements, which must not fail because of us: there
    it never depends on what the writer set.
    """
    async with database.owner() as owner:
        rows = await owner.fetch(
            "select oid::regprocedure::text as name, proconfig, prosrc from pg_proc"
            " where prosecdef and proowner = 'host_owner'::regrole"
        )
    assert {row["name"] for row in rows} > FUNCTIONS | TRIGGERS
    for row in rows:
        if row["proconfig"] is None:
            assert "reputation.session_changed()" == row["name"]
            assert [] == _unqualified(row["prosrc"])
            continue
        settings = set(row["proconfig"])
        assert "search_path=pg_catalog, pg_temp" in settings
        if row["name"] not in TRIGGERS:
            assert "row_security=off" in settings
        else:
            assert "row_security=on" in settings or "from public." not in row["prosrc"]
            assert "row_security=off" not in settings


def _unqualified(body: str) -> list[str]:
    """Find what a search_path would be asked about: operators, types and calls by their bare names."""
    code = re.sub(r"--[^\n]*|'[^']*'|operator\(pg_catalog\.\W+?\)|::pg_catalog\.\w+", " ", body)
    operators = re.findall(r"[-+*/<>=~!@#%^&|`?:]+", code)
    words = re.findall(r"\b(?:in|like|ilike|similar|between|distinct|overlaps|case|declare|execute)\b", code)
    calls = [name for name in re.findall(r"([\w.]+)\s*\(", code) if name not in SYNTAX and not QUALIFIED.match(name)]
    tables = [name for name in re.findall(r"\b(?:from|join|into|update)\s+([\w.]+)", code) if not QUALIFIED.match(name)]
    return [*operators, *words, *calls, *tables]


def test_what_is_not_qualified_is_found() -> None:
    """The check of a body without a search_path finds what such a body must not have."""
    assert [] == _unqualified(
        "a operator(pg_catalog.=) b or c is null and pg_catalog.now() -- x = y\n 'x'::pg_catalog.text"
    )
    for bad in ("a = b", "a in (b)", "x'y'::text", "now()", "select from changes", "a is distinct from b"):
        assert _unqualified(bad), bad


EVIL = """
create function evil.trap(varchar, varchar) returns boolean language plpgsql as
    $$ begin raise exception 'ran as %', current_user; end $$;
do $$
declare
    known record;
begin
    for known in
        select distinct oprname, oprleft::regtype as arguments_left, oprright::regtype as arguments_right
        from pg_operator
        where oprleft <> 0
            and oprleft in ('text'::regtype, 'varchar'::regtype, 'uuid'::regtype, 'boolean'::regtype, 'bpchar'::regtype)
            and oprright = oprleft
    loop
        execute format(
            'create function evil.trap_%s(%s, %s) returns boolean language plpgsql as %L',
            md5(known::text), known.arguments_left, known.arguments_right,
            'begin raise exception ''ran as %'', current_user; end'
        );
        execute format(
            'create operator evil.%s (leftarg = %s, rightarg = %s, function = evil.trap_%s)',
            known.oprname, known.arguments_left, known.arguments_right, md5(known::text)
        );
    end loop;
end
$$;
create operator evil.= (leftarg = varchar, rightarg = varchar, function = evil.trap);
create operator evil.<> (leftarg = varchar, rightarg = varchar, function = evil.trap);
create table evil.wingman_matches (id uuid, user1_id uuid, user2_id uuid);
create table evil.changes (user_id uuid);
create type evil.text as enum ('x');
create type evil.uuid as enum ('x');
create type evil.regclass as enum ('x');
"""
SHADOWS = """
create temporary table user_profiles (id uuid);
create temporary table wingman_matches (id uuid, user1_id uuid, user2_id uuid);
create temporary table wingman_sessions (id uuid, match_id uuid, status text);
create temporary table changes (user_id uuid);
create temporary table marks (recount boolean);
create temporary table tallies (user_id uuid, completed bigint, no_shows bigint);
create temporary table recounts (user_id uuid);
create temporary table policy (the_only boolean);
create temporary table upkeep (the_only boolean);
create temporary table attributions (session_id uuid, at_fault text);
create type pg_temp.int4 as enum ('x');
create type pg_temp.bool as enum ('x');
create function pg_temp.count(anyelement) returns bigint language plpgsql as $$ begin raise exception 'ran'; end $$;
create function pg_temp.now() returns timestamptz language plpgsql as $$ begin raise exception 'ran'; end $$;
create function pg_temp.outcome(text, boolean, boolean, integer, text, text, text, text) returns smallint
    language plpgsql as $$ begin raise exception 'ran'; end $$;
set row_security = on;
set standard_conforming_strings = off;
"""
ME = "00000000-0000-4000-8000-000000000001"
WRITES = {
    (
        "insert into public.wingman_sessions (id, match_id, status, user1_completed_confirmed_by_user2)"
        " select user1_id, id, 'completed', true from public.wingman_matches where user1_id :is_me"
    ): (1, 0),
    "update public.wingman_sessions set status = 'no_show' where id :is_me": (0, 0),
    "update public.wingman_sessions set user1_completed_confirmed_by_user2 = null where id :is_me": (0, 1),
    "update public.wingman_sessions set notes = 'x' where id :is_me": (0, 1),
    (
        "update public.wingman_sessions set user2_completed_confirmed_by_user1 = true,"
        " match_id = (select id from public.wingman_matches where user2_id :is_me) where id :is_me"
    ): (0, 0),
    "delete from public.wingman_sessions where id :is_me": (0, 0),
    "delete from public.wingman_matches where user1_id :is_me": (0, 0),
}


@pytest.mark.parametrize("path", ["evil, public, pg_catalog", "pg_temp, evil, reputation, public, pg_catalog"])
async def test_a_writer_with_shadow_objects_runs_none_of_them_as_the_owner(database: Database, path: str) -> None:
    """The triggers use no operator, function, type or table that a writer has put in front of the real ones.

    Neither from a schema of the writer's nor from pg_temp, which is searched first where a path does not name it.
    """
    me, other = await database.add_user(ME), await database.add_user()
    for pair in ((me, other), (other, me)):
        await database.add_match(*pair)
    async with connect(database.superuser_url) as admin:
        await admin.execute("create schema evil")
        await admin.execute(EVIL)
        await admin.execute("grant all on schema evil to public")
        await admin.execute("grant all on all tables in schema evil to public")
    async with (
        connect(database.superuser_url) as writer,
        connect(database.service_url) as reader,
        database.owner() as owner,
    ):
        await writer.execute("set role service_role")
        await writer.execute(SHADOWS)
        await writer.fetch("select pg_catalog.set_config('search_path', $1, false)", path)
        for statement, expected in WRITES.items():
            await settled(owner)
            await writer.execute(statement.replace(":is_me", f"operator(pg_catalog.=) '{ME}'"))
            (row,) = await reader.fetch(QUERIES["counts"], [me], *STANDARD.meaning)
            assert expected == (row["completed"], row["no_shows"]), statement
        with pytest.raises(asyncpg.RaiseError, match="ran as service_role"):
            await writer.fetch("select from public.wingman_matches where user1_id = user2_id")


async def test_shadow_objects_change_nothing(database: Database) -> None:
    """A service login that plants its own tables, functions and operators in front is still answered correctly."""
    me, other = await database.add_user(), await database.add_user()
    session = await database.add_session(await database.add_match(me, other), "no_show", b=True)
    async with connect(database.superuser_url) as admin:
        await command(admin, "create schema evil authorization %I", SERVICE)
        await admin.execute("grant usage on schema evil to public")
    async with connect(database.service_url) as service:
        await service.execute("""
            create temporary table user_profiles (id uuid);
            create temporary table wingman_matches (id uuid, user1_id uuid, user2_id uuid);
            create temporary table wingman_sessions (id uuid, match_id uuid, status text);
            create temporary table attributions (session_id uuid, at_fault text);
            create function evil.same(text, text) returns boolean language plpgsql as
                $$ begin raise exception 'ran as %', current_user; end $$;
            create function evil.same(uuid, uuid) returns boolean language plpgsql as
                $$ begin raise exception 'ran as %', current_user; end $$;
            create operator evil.= (leftarg = text, rightarg = text, function = evil.same);
            create operator evil.= (leftarg = uuid, rightarg = uuid, function = evil.same);
            create function evil.count(anyelement) returns bigint language plpgsql as $$ begin return 999; end $$;
            create type evil.uuid as enum ('x');
            set search_path = evil, pg_temp, public, pg_catalog;
            set row_security = on;
            set standard_conforming_strings = off;
        """)
        rows = await service.fetch(
            "select * from reputation.counts($1::pg_catalog.uuid[], $2, $3, $4)", [me], *STANDARD.meaning
        )
        assert [SessionCounts(completed=0, no_shows=1)] == [
            SessionCounts(completed=row["completed"], no_shows=row["no_shows"]) for row in rows
        ]
        await service.execute("set search_path = evil, pg_temp, public, pg_catalog")
        verdict = "select user1_id from reputation.attribute($1::pg_catalog.uuid, $2, $3, $4)"
        assert me == str(await service.fetchval(verdict, session, AtFault.NOBODY.value, "seen", "support"))
    async with database.owner() as owner:
        assert await owner.fetchval("select count(*) from reputation.attributions") == 1


AS_TEXT = "select pg_catalog.to_jsonb(told)::pg_catalog.text as told from reputation.:call as told"
# In this order, since folding and judging change what the next ones give. As text: the driver has to look nothing up.
DEFINERS = {
    "reputation.pending()": "pending()",
    "reputation.counts(uuid[],text,text,text)": "counts(array[:me], 'any', 'unconfirmed', 'nobody')",
    "reputation.read_counts(uuid[],text,text,text)": "read_counts(array[:me], 'any', 'unconfirmed', 'nobody')",
    "reputation.most_active(integer)": "most_active(10)",
    "reputation.fold(integer)": "fold(1000)",
    "reputation.recount(integer)": "recount(1000)",
    "reputation.status(text,text,text)": "status('any', 'unconfirmed', 'nobody')",
    "reputation.attribute(uuid,text,text,text)": "attribute(:session, 'nobody', 'seen', 'support')",
}


@pytest.mark.parametrize("path", ["evil, pg_temp, public, pg_catalog", "pg_temp, evil, reputation, pg_catalog"])
async def test_no_function_of_ours_sees_a_shadow(database: Database, path: str) -> None:
    """Each function that runs as the owner gives the same, whatever its caller has put in front of the real names.

    Operators that raise, tables, types and functions, in a schema of the caller's and in pg_temp.
    """
    assert FUNCTIONS == DEFINERS.keys()
    me, other = await database.add_user(ME), await database.add_user()
    match = await database.add_match(me, other)
    session = await database.add_session(match, "no_show", b=True, scheduled_time=utc_now())
    async with connect(database.superuser_url) as admin:
        await admin.execute("create schema evil")
        await admin.execute(EVIL)
        await admin.execute("grant all on schema evil to public")
        await admin.execute("grant all on all tables in schema evil to public")

    async def results(*, shadowed: bool) -> dict[str, list[str]]:
        async with connect(database.service_url) as service:
            if shadowed:
                await service.execute(SHADOWS)
            transaction = service.transaction()
            # What is folded and judged in the first round is not in the second.
            await transaction.start()
            if shadowed:
                await service.execute("select pg_catalog.set_config('search_path', '" + path + "', true)")
            given = {}
            for name, call in DEFINERS.items():
                for word, value in {":me": me, ":session": session}.items():
                    call = call.replace(word, f"'{value}'::pg_catalog.uuid")  # noqa: PLW2901 - filled in
                rows = await service.fetch(AS_TEXT.replace(":call", call))
                given[name] = [row["told"] for row in rows]
            await transaction.rollback()
            return given

    plain = await results(shadowed=False)
    assert '"no_shows": 1' in plain["reputation.counts(uuid[],text,text,text)"][0]
    assert '"no_shows": 1' in plain["reputation.read_counts(uuid[],text,text,text)"][0]
    assert all(plain.values())
    assert plain == await results(shadowed=True)


@pytest.mark.parametrize("text", ["'; drop schema reputation cascade; --", "$$", "\\'", "%I", "x' or '1'='1"])
async def test_text_stays_text(database: Database, text: str) -> None:
    """A reason that looks like SQL is recorded as it is."""
    match = await database.add_match(await database.add_user(), await database.add_user())
    session = await database.add_session(match, "cancelled")
    async with connect(database.service_url) as service:
        await service.fetch(QUERIES["attribute"], session, "user1", text, text)
    async with database.owner() as owner:
        row = await owner.fetchrow("select reason, said_by from reputation.attributions")
    assert row is not None
    assert (text, text) == tuple(row)


@pytest.mark.parametrize(
    "change",
    [
        "update reputation.attributions set at_fault = 'nobody'",
        "delete from reputation.attributions",
        "truncate reputation.attributions",
        "update reputation.attributions set at_fault = 'nobody' where false",
        (
            "insert into reputation.attributions (session_id, at_fault, reason, said_by)"
            " select session_id, at_fault, reason, said_by from reputation.attributions"
            " on conflict (id) do update set at_fault = 'nobody'"
        ),
        (
            "insert into reputation.attributions (id, session_id, at_fault, reason, said_by)"
            " values (1, gen_random_uuid(), 'both', 'x', 'y')"
        ),
    ],
)
@pytest.mark.parametrize("superuser", [False, True])
async def test_verdicts_are_only_appended(database: Database, change: str, *, superuser: bool) -> None:
    """No verdict is changed, taken back or slipped in under an older number, by nobody: not by owner or superuser."""
    match = await database.add_match(await database.add_user(), await database.add_user())
    session = await database.add_session(match, "cancelled")
    async with connect(database.superuser_url if superuser else database.owner_url) as connection:
        await connection.fetch(QUERIES["attribute"], session, "user1", "seen", "support")
        if superuser:
            await connection.execute("set session_replication_role = replica")
        with pytest.raises((asyncpg.RestrictViolationError, asyncpg.GeneratedAlwaysError)):
            await connection.execute(change)
        assert await connection.fetchval("select at_fault from reputation.attributions") == "user1"
