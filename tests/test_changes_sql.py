"""What the triggers append, and what they do not: in the writer's own transaction, without a lock, for every writer."""

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import asyncpg
import pytest

from goodstanding import tallies
from goodstanding.history import QUERIES
from goodstanding.policy import STANDARD

from .conftest import Database, command, connect
from .storm import compare

if TYPE_CHECKING:
    from .conftest import Connection

PATIENCE = 20.0
PAIR = "select user1_id::text, user2_id::text from public.wingman_matches"


async def appended(owner: "Connection | asyncpg.Connection[asyncpg.Record]") -> list[tuple[str | None, int, int, bool]]:
    """Give what was appended since the last call: user, two differences, whether it is a mark."""
    rows = await owner.fetch(
        "with gone as (delete from reputation.changes), lifted as (delete from reputation.marks)"
        " select user_id::text, completed, no_shows, false as mark, changed_at from reputation.effects()"
        " union all select user_id::text, 0, 0, recount, changed_at from reputation.marks order by 1, changed_at"
    )
    return [tuple(row)[:4] for row in rows]


async def pair(database: Database) -> tuple[str, str, str]:
    """Insert two users, the lower id first, and their match; forget what that appended."""
    user1, user2 = sorted([await database.add_user(), await database.add_user()])
    match = await database.add_match(user1, user2)
    async with database.owner() as owner:
        await appended(owner)
    return user1, user2, match


async def test_a_session_that_ends_appends_the_difference_for_each_user(database: Database) -> None:
    """Completed, corrected to a no-show of one, deleted: each step appends what it changes, and for whom."""
    user1, user2, match = await pair(database)
    session = await database.add_session(match, a=True)
    async with database.owner() as owner:
        assert [] == await appended(owner)
        await owner.execute("update public.wingman_sessions set status = 'completed'")
        assert [(user1, 1, 0, False), (user2, 1, 0, False)] == await appended(owner)
        await owner.execute("update public.wingman_sessions set status = 'no_show'")
        assert [(user1, -1, 0, False), (user2, -1, 1, False)] == await appended(owner)
        await owner.execute("update public.wingman_sessions set user2_completed_confirmed_by_user1 = true")
        assert [(user1, 0, 0, False), (user2, 0, -1, False)] == await appended(owner)
        await owner.execute("update public.wingman_sessions set user1_completed_confirmed_by_user2 = null")
        assert [(user1, 0, 1, False), (user2, 0, 0, False)] == await appended(owner)
        await owner.execute("delete from public.wingman_sessions where id = $1", session)
        assert [(user1, 0, -1, False), (user2, 0, 0, False)] == await appended(owner)
        await database.add_session(match, "completed", b=True)
        assert [(user1, 1, 0, False), (user2, 1, 0, False)] == await appended(owner)


@pytest.mark.parametrize(
    "edit",
    [
        "update public.wingman_sessions set notes = 'x', venue_name = 'y', scheduled_time = now()",
        "update public.wingman_sessions set status = status, match_id = match_id",
        "update public.wingman_sessions set status = 'in_progress' where status = 'scheduled'",
        "update public.wingman_sessions set user1_completed_confirmed_by_user2 = true where status = 'scheduled'",
        "update public.wingman_sessions set user2_completed_confirmed_by_user1 = null",
        "update public.wingman_matches set status = 'x', user1_reputation = 7, user1_id = user1_id",
        "update public.user_profiles set display_name = 'x', id = id",
        "insert into public.wingman_sessions (match_id) select id from public.wingman_matches",
        "delete from public.wingman_sessions where status = 'scheduled'",
    ],
)
async def test_what_cannot_alter_a_count_appends_nothing(database: Database, edit: str) -> None:
    """Notes, venues, times, and sessions that are not over."""
    _, _, match = await pair(database)
    async with database.owner() as owner:
        for status in ("scheduled", "completed", "no_show"):
            await database.add_session(match, status, a=True)
        await appended(owner)
        await owner.execute(edit)
        assert [] == await appended(owner)


async def test_a_rollback_leaves_nothing(database: Database) -> None:
    """Neither a transaction nor a savepoint that is rolled back leaves a change."""
    user1, user2, match = await pair(database)
    await database.add_session(match, a=True)
    async with database.owner() as owner:
        async with owner.transaction():
            savepoint = owner.transaction()
            await savepoint.start()
            await owner.execute("update public.wingman_sessions set status = 'completed'")
            await savepoint.rollback()
            await owner.execute("update public.wingman_sessions set status = 'no_show'")
        assert [(user1, 0, 0, False), (user2, 0, 1, False)] == await appended(owner)


async def test_bulk_writes_append_for_every_row(database: Database) -> None:
    """COPY and one UPDATE of many rows count like as many single ones."""
    user1, _, match = await pair(database)
    async with database.owner() as owner:
        await owner.copy_records_to_table(
            "wingman_sessions",
            schema_name="public",
            columns=["match_id", "status", "user1_completed_confirmed_by_user2"],
            records=[(match, "completed", True)] * 50,
        )
        assert 50 == sum(change[1] for change in await appended(owner) if change[0] == user1)
        await owner.execute("update public.wingman_sessions set status = 'scheduled'")
        assert -50 == sum(change[1] for change in await appended(owner) if change[0] == user1)


@pytest.mark.parametrize(
    ("change", "marked"),
    [
        ("delete from public.user_profiles where id = (select user1_id from public.wingman_matches)", 2),
        ("delete from public.wingman_matches", 2),
        ("update public.wingman_matches set user1_id = user2_id, user2_id = user1_id", 2),
        ("insert into public.user_profiles default values", 1),
    ],
)
async def test_what_alters_the_meaning_of_changes_marks_the_users(database: Database, change: str, marked: int) -> None:
    """A cascade, a rewritten match: those concerned are to be counted again."""
    _, _, match = await pair(database)
    await database.add_session(match, "completed", a=True)
    async with database.owner() as owner:
        await appended(owner)
        await owner.execute(change)
        changes = await appended(owner)
    assert marked == len({user for user, _, _, mark in changes if mark})
    assert all(mark and user is not None for user, _, _, mark in changes)


async def test_a_verdict_marks_its_session(database: Database) -> None:
    """Who is concerned is found by the fold that takes the mark; until then it is everybody."""
    user1, user2, match = await pair(database)
    session = await database.add_session(match, "no_show", a=True)
    async with database.owner() as owner:
        await settled(owner)
        await owner.execute(
            "insert into reputation.attributions (session_id, at_fault, reason, said_by)"
            " select id, 'both', 'x', 'y' from public.wingman_sessions"
        )
        assert [(None, session)] == [
            tuple(row) for row in await owner.fetch("select user_id, session_id::text from reputation.marks")
        ]
        folded = await tallies.fold(owner, 1000)
        assert (1, False, {user1, user2}) == (folded.changes, folded.everybody, set(folded.users))
        assert {user1, user2} == {row[0] for row in await owner.fetch("select user_id::text from reputation.recounts")}


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        (
            "update public.wingman_sessions set match_id = (select id from wingman_matches where status = 'other')",
            [(-1, 0), (-1, 0), (1, 0), (1, 0)],
        ),
        ("update public.wingman_sessions set id = gen_random_uuid()", [(0, 0), (0, 0), (0, 0), (0, 0)]),
    ],
)
async def test_a_session_that_moves_is_gone_there_and_come_here(
    database: Database, to: str, expected: list[tuple[int, int]]
) -> None:
    """To another match, or to another id, under which it may be judged otherwise."""
    user1, user2, match = await pair(database)
    users = [user1, user2, await database.add_user(), await database.add_user()]
    other = await database.add_match(*users[2:])
    await database.add_session(match, "completed", a=True)
    async with database.owner() as owner:
        await owner.execute("update public.wingman_matches set status = 'other' where id = $1", other)
        await appended(owner)
        await owner.execute(to)
        assert 2 == await owner.fetchval("select count(*) from reputation.changes")
        changes = await appended(owner)
    assert expected == [
        (sum(row[1] for row in changes if row[0] == user), sum(row[2] for row in changes if row[0] == user))
        for user in users
    ]
    assert not any(mark for *_, mark in changes)


@pytest.mark.parametrize(
    ("circumstance", "marked"),
    [
        ("set session_replication_role = origin", False),
        ("set default_transaction_isolation = 'repeatable read'", True),
        ("set session_replication_role = replica", True),
    ],
)
async def test_a_new_match_marks_nobody_but_where_more_cannot_be_known(
    database: Database, circumstance: str, *, marked: bool
) -> None:
    """An ordinary new match is free; an old snapshot may not see what is pending, and a replica has no foreign keys."""
    users = [await database.add_user(), await database.add_user()]
    async with database.owner() as owner, connect(database.superuser_url) as writer:
        await appended(owner)
        await writer.execute(circumstance)
        await writer.execute("insert into public.wingman_matches (user1_id, user2_id) values ($1, $2)", *users)
        assert (set(users) if marked else set()) == {user for user, *_ in await appended(owner)}


@pytest.mark.parametrize("table", ["wingman_sessions", "wingman_matches cascade", "user_profiles cascade"])
async def test_truncate_marks_everybody(database: Database, table: str) -> None:
    """An emptied table concerns everybody, and the next read says so."""
    user1, _, match = await pair(database)
    await database.add_session(match, "completed", a=True)
    async with database.owner() as owner:
        await settled(owner)
        await command(owner, f"truncate public.{table}")
        assert None in {user for user, *_ in await owner.fetch("select user_id from reputation.marks")}
        rows = await owner.fetch(QUERIES["counts"], [user1], *STANDARD.meaning)
        assert [] == [row for row in rows if row["completed"]]
        assert (await tallies.fold(owner, 1000)).everybody
        await settled(owner)
        assert 0 == await owner.fetchval("select coalesce(sum(completed), 0) from reputation.tallies")


async def settled(owner: "Connection | asyncpg.Connection[asyncpg.Record]") -> None:
    """Fold and recount until nothing is left."""
    async with asyncio.timeout(PATIENCE):
        while True:
            folded = await tallies.fold(owner, 1000)
            done = await tallies.recount(owner, 1000)
            if not folded.changes and not done.users:
                return


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
async def test_the_hosts_own_roles_write_as_before(database: Database, role: str) -> None:
    """A participant under row-level security has no right on our schema, and its write is counted all the same."""
    user1, user2, match = await pair(database)
    await database.add_session(match, a=True)
    async with connect(database.superuser_url) as writer, writer.transaction():
        await writer.execute(f"set local role {role}")
        await writer.fetchval(
            "select set_config('request.jwt.claims', format('{\"sub\": \"%s\"}', $1::text), true)", user1
        )
        await writer.execute("set local search_path = pg_temp")
        await writer.execute("set local statement_timeout = '20s'")
        await writer.execute("update public.wingman_sessions set status = 'completed'")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with writer.transaction():
                await writer.fetch("select from reputation.changes")
    async with database.owner() as owner:
        assert [(user1, 1, 0, False), (user2, 1, 0, False)] == await appended(owner)


async def test_rows_that_arrive_by_replication_count(database: Database) -> None:
    """Under session_replication_role = replica, where ordinary triggers are silent, ours are not."""
    user1, user2, match = await pair(database)
    await database.add_session(match, a=True)
    async with connect(database.superuser_url) as replica:
        await replica.execute("set session_replication_role = replica")
        await replica.execute("update public.wingman_sessions set status = 'completed'")
    async with database.owner() as owner:
        assert [(user1, 1, 0, False), (user2, 1, 0, False)] == await appended(owner)


@pytest.mark.parametrize("row_security", ["on", "off"])
@pytest.mark.parametrize("table", ["wingman_matches", "wingman_sessions"])
async def test_a_write_never_fails_because_the_owner_is_under_policies(
    database: Database, table: str, row_security: str
) -> None:
    """With FORCE ROW LEVEL SECURITY a row may be hidden from us: no trigger looks for one, and every write succeeds."""
    user1, user2, match = await pair(database)
    other = await database.add_match(user2, user1)
    await database.add_session(match, a=True)
    async with database.owner() as owner, connect(database.superuser_url) as writer:
        await command(owner, "alter table public.%I force row level security", table)
        await command(writer, "set row_security = %I", row_security)
        await writer.execute("update public.wingman_sessions set status = 'completed'")
        await writer.execute("update public.wingman_sessions set match_id = $1", other)
        await writer.execute("update public.wingman_matches set user1_id = user2_id, user2_id = user1_id")
        assert 3 == await owner.fetchval("select count(*) from reputation.changes")
        marks = {row[0] for row in await owner.fetch("select user_id::text from reputation.marks")}
    assert {user1, user2} == marks


@pytest.mark.parametrize("kind", ["text", "varchar(60)", "public.session_status"])
async def test_the_host_may_alter_a_columns_type_under_a_session_that_wrote_before(
    database: Database, kind: str
) -> None:
    """A connection of the host's pool that has fired the triggers goes on writing, and its writes are counted."""
    user1, user2, match = await pair(database)
    session = await database.add_session(match, a=True)
    steps = ("completed", "no_show", "cancelled", "completed")
    async with database.owner() as owner, connect(database.owner_url) as writer:
        for status in steps:
            await command(writer, "update public.wingman_sessions set status = %L", status)
        await appended(owner)
        await owner.execute(
            "alter table public.wingman_sessions drop constraint wingman_sessions_status, alter status drop default;"
            " create type public.session_status as enum ('scheduled', 'completed', 'no_show', 'cancelled')"
        )
        await owner.execute(f"alter table public.wingman_sessions alter status type {kind} using status::{kind}")
        await writer.execute("update public.wingman_sessions set notes = 'x'")
        assert [] == await appended(owner)
        await writer.execute("update public.wingman_sessions set status = 'no_show'")
        assert [(user1, -1, 0, False), (user2, -1, 1, False)] == await appended(owner)
        await writer.execute("delete from public.wingman_sessions where id = $1", session)
        assert [(user1, 0, 0, False), (user2, 0, -1, False)] == await appended(owner)


async def test_a_disabled_trigger_is_noticed(database: Database) -> None:
    """A load with triggers off is counted from the sessions, also when the triggers are on again."""
    user1, _, match = await pair(database)
    async with database.owner() as owner:
        await settled(owner)
        for change in ("disable trigger user", "enable trigger user"):
            await owner.execute(f"alter table public.wingman_sessions {change}")
            await database.add_session(match, "completed", a=True)
            assert not (await tallies.status(owner, STANDARD)).tracked
        (row,) = await owner.fetch(QUERIES["counts"], [user1], *STANDARD.meaning)
    assert 2 == row["completed"]


@pytest.mark.parametrize("step", ["fold", "recount", "rebuild"])
async def test_no_writer_waits_and_none_is_a_victim(database: Database, step: str) -> None:
    """Two writers on the same users in opposite order are done while the upkeep holds every lock that it ever holds."""
    user1, user2, match = await pair(database)
    other = await database.add_match(user2, user1)
    sessions = [await database.add_session(each, a=True) for each in (match, other)]
    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
        one, two, relay = [await stack.enter_async_context(connect(database.owner_url)) for _ in range(3)]
        await settled(relay)
        for user in (user1, user2):
            await relay.execute(tallies.QUERIES["mark"], user)
        if step == "recount":
            await tallies.fold(relay, 1000)
        await stack.enter_async_context(relay.transaction())
        if step == "fold":
            assert 2 == (await tallies.fold(relay, 1000)).changes
        elif step == "recount":
            assert 2 == (await tallies.recount(relay, 1000)).users
        else:
            await relay.execute(tallies.QUERIES["rebuild"], *STANDARD.meaning)
        # The server ends a relay that idles in its transaction; this one is to hold its locks to the end of the test.
        await relay.execute("set local idle_in_transaction_session_timeout = 0")
        for writer in (one, two):
            await writer.execute("set lock_timeout = '100ms'")
            await stack.enter_async_context(writer.transaction())
        for status in ("completed", "no_show", "scheduled", "completed"):
            for writer, session in ((one, sessions[0]), (two, sessions[1])):
                await writer.execute("update public.wingman_sessions set status = $2 where id = $1", session, status)
                await writer.execute("insert into public.user_profiles default values")
                await writer.execute(QUERIES["attribute"], session, "both", "x", "y")
    async with connect(database.owner_url) as owner:
        await compare(owner, STANDARD)
