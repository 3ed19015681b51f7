"""The queries that must stay cheap: which indexes they use, and how many rows they touch, whatever the statistics."""

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from goodstanding import tallies
from goodstanding.history import QUERIES
from goodstanding.migrate import upgrade
from goodstanding.policy import STANDARD

from .conftest import Database
from .test_changes_sql import settled

if TYPE_CHECKING:
    from .conftest import Connection

CROWD = """
insert into public.user_profiles (id) select md5('user' || n)::uuid from generate_series(1, 500) as n;
insert into public.wingman_matches (id, user1_id, user2_id)
select md5('match' || n)::uuid, md5('user' || 1 + n % 500)::uuid, md5('user' || 1 + (n + 1 + n / 500) % 500)::uuid
from generate_series(1, 5000) as n;
insert into public.wingman_sessions (match_id, status)
select md5('match' || n)::uuid, (array['completed', 'no_show', 'cancelled', 'scheduled'])[1 + n % 4]
from generate_series(1, 5000) as n;
alter table reputation.attributions set (autovacuum_enabled = false); -- so that a look at an index is one at the table
insert into reputation.attributions (session_id, at_fault, reason, said_by)
select id, 'nobody', 'seen', 'support' from public.wingman_sessions;
"""
SOMEONE = "select md5('user7')::uuid"
INDEXES = {
    "idx_wingman_matches_user1",
    "idx_wingman_matches_user2",
    "idx_wingman_sessions_match",
    "attributions_newest",
}
COVERING = {
    "goodstanding_matches_user1",
    "goodstanding_matches_user2",
    "goodstanding_sessions_match",
    "attributions_newest",
}


async def explain(owner: "Connection") -> list[dict[str, Any]]:
    """Run the body of reputation.counts for one user, under its own settings, and give the nodes of its plan."""
    body, settings = await owner.fetchrow(  # type: ignore[misc]  # there is such a function
        "select prosrc, proconfig from pg_proc where oid = 'reputation.counts'::regproc"
    )
    match = re.search(r"return query\s(.*);\s*end\s*$", body, re.DOTALL)
    assert match is not None
    query = match[1].replace("counts.user_ids", "$1")
    for number, option in enumerate(("completed_rule", "unattributed_no_show", "unattributed_cancelled"), 2):
        query = query.replace(f"counts.{option}", f"${number}")
    async with owner.transaction():
        for name, _, value in (setting.partition("=") for setting in settings):
            await owner.fetchval("select set_config($1, $2, true)", name, value)
        await owner.execute("prepare counted (uuid[], text, text, text) as " + query)
        someone = await owner.fetchval(SOMEONE)
        text = await owner.fetchval(
            await owner.fetchval(
                "select format('explain (analyze, buffers, format json) execute counted (%L, %L, %L, %L)',"
                " array[$1::uuid], $2::text, $3::text, $4::text)",
                someone,
                *STANDARD.meaning,
            )
        )
        await owner.execute("deallocate counted")
    return list(_nodes(json.loads(text)[0]["Plan"]))


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in _nodes(child))]


def _indexes(nodes: list[dict[str, Any]]) -> set[str]:
    return {node["Index Name"] for node in nodes if "Index Name" in node}


@pytest.mark.parametrize("statistics", ["fresh", "absent", "stale"])
async def test_counting_one_user_reads_that_users_rows_by_index(database: Database, statistics: str) -> None:
    """Neither absent nor wrong statistics make it scan a table, and it touches only the user's own sessions."""
    async with database.owner() as owner:
        await owner.execute("alter table public.wingman_sessions set (autovacuum_enabled = false)")
        await owner.execute("alter table public.wingman_matches set (autovacuum_enabled = false)")
        if statistics == "stale":
            await owner.execute("analyze")  # while everything is empty
        await owner.execute(CROWD)
        if statistics == "fresh":
            await owner.execute("analyze")
        nodes = await explain(owner)
        mine = await owner.fetchval(
            "select count(*) from public.wingman_matches where (select md5('user7')::uuid) in (user1_id, user2_id)"
        )
    assert mine == 20
    assert {"user_profiles_pkey", *INDEXES} == _indexes(nodes)
    assert not [node for node in nodes if node["Node Type"] == "Seq Scan"]
    touched = [
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in nodes
        if node.get("Relation Name") == "wingman_sessions"
    ]
    assert sum(touched) == mine


async def test_a_count_looks_for_verdicts_only_where_they_matter(database: Database) -> None:
    """The log of verdicts is asked about no-shows and cancellations, not about completed sessions."""
    async with database.owner() as owner:
        await owner.execute(CROWD)
        await owner.execute("update public.wingman_sessions set status = 'completed'")
        nodes = await explain(owner)
    assert [0] == [node["Actual Loops"] for node in nodes if node.get("Index Name") == "attributions_newest"]


async def test_covering_indexes_answer_without_the_tables(database: Database) -> None:
    """With the optional indexes a count reads indexes only."""
    await upgrade(database.owner_url, covering_indexes=True)
    async with database.owner() as owner:
        await owner.execute(CROWD)
        for table in ("wingman_matches", "wingman_sessions", "user_profiles"):
            await owner.execute(f"vacuum analyze public.{table}")
        await owner.execute("vacuum analyze reputation.attributions")
        nodes = await explain(owner)
    assert {"user_profiles_pkey", *COVERING} == _indexes(nodes)
    assert {"Index Only Scan"} == {node["Node Type"] for node in nodes if "Index Name" in node}
    assert {0} == {node["Heap Fetches"] for node in nodes if "Heap Fetches" in node}


TOUCHED = """
select relname::text, coalesce(seq_scan, 0), coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)
from pg_stat_xact_user_tables
"""
HAS_TWENTY_EACH = {"wingman_matches", "wingman_sessions", "attributions", "changes"}
BACKLOG = """
insert into reputation.changes (match_id, session_id, old_status, new_status)
select md5('match' || 1 + n % 400)::uuid, md5(n::text)::uuid, 'scheduled', 'completed'
from generate_series(1, 5000) as n;
"""


async def touched(owner: "Connection", query: str, *values: object) -> dict[str, tuple[int, int]]:
    """Run a query and give, for each table that it looked into, the number of scans of the whole, and of rows."""
    async with owner.transaction():
        before = {name: (scans, rows) for name, scans, rows in await owner.fetch(TOUCHED)}
        await owner.fetch(query, *values)
        after = {name: (scans, rows) for name, scans, rows in await owner.fetch(TOUCHED)}
    differences = {
        name: (after[name][0] - before.get(name, (0, 0))[0], after[name][1] - before.get(name, (0, 0))[1])
        for name in after
    }
    return {name: difference for name, difference in differences.items() if difference != (0, 0)}


@pytest.mark.parametrize("statistics", ["fresh", "absent"])
async def test_a_tallied_user_costs_the_same_however_long_the_history(database: Database, statistics: str) -> None:
    """A read looks up a tally, the user's matches, and what changed in these; no session, and nobody else's changes."""
    async with database.owner() as owner:
        await owner.execute(CROWD)
        await settled(owner)
        await owner.execute(BACKLOG)
        await owner.execute(
            "update public.wingman_sessions set status = 'completed' where match_id = md5('match498')::uuid"
        )
        if statistics == "fresh":
            await owner.execute("analyze")
        someone = await owner.fetchval("select md5('user499')::uuid::text")
        looked = await touched(owner, QUERIES["counts"], [someone], *STANDARD.meaning)
    assert {"attributions", "changes", "policy", "tallies", "user_profiles", "wingman_matches"} == set(looked)
    for table, (scanned, rows) in looked.items():
        assert (0, True) == (scanned, rows <= (42 if table == "wingman_matches" else 2)), table


async def test_asking_whether_a_change_waits_costs_the_same_however_many_do(database: Database) -> None:
    """One entry of the index answers it; the table is never scanned, neither while many wait nor when they are gone."""
    async with database.owner() as owner:
        await settled(owner)
        await owner.execute(BACKLOG)
        assert {"changes": (0, 1)} == await touched(owner, tallies.QUERIES["pending"])
        await owner.execute("delete from reputation.changes")
        assert {} == await touched(owner, tallies.QUERIES["pending"])


async def test_a_fold_reads_what_it_folds(database: Database) -> None:
    """A batch of ten touches ten changes and their users' tallies, however many wait."""
    async with database.owner() as owner:
        await owner.execute(CROWD)
        await settled(owner)
        await owner.execute(BACKLOG)
        looked = await touched(owner, tallies.QUERIES["fold"], 10)
    for table, (scanned, rows) in looked.items():
        assert (0, True) == (scanned, rows <= 30), table


@pytest.mark.parametrize("statistics", ["fresh", "absent", "stale"])
@pytest.mark.parametrize("before", [0, 450])
async def test_a_recount_reads_what_it_counts(database: Database, before: int, statistics: str) -> None:
    """Ten users in turn, and one who was marked, cost what their own sessions cost, however many came before."""
    async with database.owner() as owner:
        if statistics == "stale":
            await owner.execute("analyze")  # while everything is empty
        await owner.execute(CROWD)
        await settled(owner)
        if statistics == "fresh":
            await owner.execute("analyze")
        await owner.execute(BACKLOG)
        marked = await owner.fetchval("select max(id::text)::uuid from public.user_profiles")
        await owner.execute(tallies.QUERIES["rebuild"], *STANDARD.meaning)
        await owner.fetch(tallies.QUERIES["recount"], max(1, before))
        await owner.execute("insert into reputation.recounts (user_id) values ($1)", marked)
        looked = await touched(owner, tallies.QUERIES["recount"], 10)
    for table, (scanned, rows) in looked.items():
        assert (0, True) == (scanned, rows <= (450 if table in HAS_TWENTY_EACH else 40)), table


async def test_a_trigger_looks_up_nothing(database: Database) -> None:
    """A session's change costs the host's writer no look at any table, neither the host's nor ours."""
    async with database.owner() as owner:
        await owner.execute(CROWD)
        session = await owner.fetchval("select id from public.wingman_sessions where status = 'no_show' limit 1")
        looked = await touched(owner, "update public.wingman_sessions set status = 'cancelled' where id = $1", session)
    assert {"wingman_sessions": (0, 1)} == looked
