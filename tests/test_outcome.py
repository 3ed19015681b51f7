"""reputation.outcome and reputation.counts against an oracle written from the rules' prose."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import pytest

from goodstanding.data import AtFault, SessionCounts
from goodstanding.history import QUERIES
from goodstanding.policy import LEGACY, STANDARD, Blame, CompletedRule, ReputationPolicy

from .conftest import Database


class Case(NamedTuple):
    """A session as one of its users sees it; `a` and `b` are the flags that confirm user1 and user2."""

    status: str
    a: bool | None
    b: bool | None
    side: int
    verdict: AtFault | None


STATUSES = ("scheduled", "in_progress", "completed", "cancelled", "no_show")
FLAGS = (True, False, None)
SIDES = (1, 2)
VERDICTS = (None, *AtFault)
TABLE = tuple(Case(*values) for values in product(STATUSES, FLAGS, FLAGS, SIDES, VERDICTS))
POLICIES = tuple(
    ReputationPolicy(completed_rule=completed, unattributed_no_show=no_show, unattributed_cancelled=cancelled)
    for completed, no_show, cancelled in product(CompletedRule, Blame, Blame)
)
OUTCOME = """
select reputation.outcome(
    case_.status,
    case case_.side when 1 then case_.a else case_.b end,
    case case_.side when 1 then case_.b else case_.a end,
    case_.side, case_.at_fault, $6, $7, $8
)
from unnest($1::text[], $2::boolean[], $3::boolean[], $4::integer[], $5::text[])
    with ordinality as case_ (status, a, b, side, at_fault, position)
order by case_.position
"""


def _blamed(rule: Blame, *, own: bool | None) -> bool:
    # Each of the three values by its own name, as the design's table has them.
    if rule is Blame.BOTH:
        return True
    if rule is Blame.UNCONFIRMED:
        return own is not True
    return False


def expected(policy: ReputationPolicy, case: Case) -> int:
    """Say what a session means for one of its users, straight from the rules."""
    status, a, b, side, verdict = case
    own, other = (a, b) if side == 1 else (b, a)
    if status == "completed":
        confirmations = {CompletedRule.ANY: bool(a or b), CompletedRule.OWN: bool(own)}
        return int(confirmations.get(policy.completed_rule, bool(own and other)))
    if status not in {"no_show", "cancelled"}:
        return 0
    if verdict is not None:
        return -int(verdict is AtFault.BOTH or verdict.value == f"user{side}")
    rule = policy.unattributed_no_show if status == "no_show" else policy.unattributed_cancelled
    return -int(_blamed(rule, own=own))


def _columns(rows: Iterable[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]


async def test_the_whole_truth_table_holds_under_every_policy(database: Database) -> None:
    """Every status, pair of flags, side and verdict means what the rules say, under all 27 settings of the options."""
    assert {STANDARD.meaning, LEGACY.meaning} <= {policy.meaning for policy in POLICIES}
    async with database.owner() as owner:
        for policy in POLICIES:
            rows = await owner.fetch(OUTCOME, *_columns(TABLE), *policy.meaning)
            wrong = [
                (case, row["outcome"])
                for case, row in zip(TABLE, rows, strict=True)
                if expected(policy, case) != row["outcome"]
            ]
            assert [] == wrong, policy.meaning


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (("completed", True, False, 2, None), 1),
        (("completed", False, None, 1, None), 0),
        (("completed", True, True, 1, AtFault.USER1), 1),
        (("no_show", True, None, 1, None), 0),
        (("no_show", True, None, 2, None), -1),
        (("no_show", True, False, 1, AtFault.USER1), -1),
        (("no_show", False, False, 1, AtFault.NOBODY), 0),
        (("cancelled", False, False, 1, None), 0),
        (("cancelled", False, False, 2, AtFault.USER2), -1),
        (("cancelled", False, False, 2, AtFault.USER1), 0),
        (("scheduled", True, True, 1, AtFault.BOTH), 0),
    ],
)
async def test_the_rules_people_ask_about(
    database: Database, case: tuple[str, bool | None, bool | None, int, AtFault | None], outcome: int
) -> None:
    """The standard policy, in examples written by hand rather than by the oracle."""
    async with database.owner() as owner:
        assert outcome == await owner.fetchval(OUTCOME, *_columns([case]), *STANDARD.meaning)


async def test_the_counts_of_real_rows_agree_with_the_rules(database: Database) -> None:
    """Two users who met once in every possible way have the counts that the rules add up to, each from their side."""
    user1, user2 = await database.add_user(), await database.add_user()
    match = await database.add_match(user1, user2)
    stories = tuple(product(STATUSES, FLAGS, FLAGS, VERDICTS))
    async with database.owner() as owner:
        ids = await owner.fetch(
            """
            insert into public.wingman_sessions
                (match_id, status, user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1)
            select $1, story.* from unnest($2::text[], $3::boolean[], $4::boolean[]) as story
            returning id
            """,
            match,
            *_columns((status, a, b) for status, a, b, _ in stories),
        )
        for row, (*_, verdict) in zip(ids, stories, strict=True):
            if verdict is not None:
                await owner.fetch(QUERIES["attribute"], row["id"], verdict.value, "seen", "a tester")
        for policy in (STANDARD, LEGACY, *POLICIES):
            for side, user in ((1, user1), (2, user2)):
                outcomes = [expected(policy, Case(status, a, b, side, verdict)) for status, a, b, verdict in stories]
                [row] = await owner.fetch(QUERIES["counts"], [user], *policy.meaning)
                counted = SessionCounts(completed=row["completed"], no_shows=row["no_shows"])
                assert SessionCounts(completed=outcomes.count(1), no_shows=outcomes.count(-1)) == counted


async def test_an_unknown_option_counts_nothing(database: Database) -> None:
    """A policy that the database does not know neither rewards nor blames anybody."""
    async with database.owner() as owner:
        rows = await owner.fetch(OUTCOME, *_columns(case for case in TABLE if case[-1] is None), "x", "y", "z")
    assert {0} == {row["outcome"] for row in rows}


async def test_the_outcome_is_inlined(database: Database) -> None:
    """The planner sees through the function, so that it costs no call per session."""
    async with database.owner() as owner:
        plan = await owner.fetch(
            "explain (verbose, costs off) select reputation.outcome("
            "status, user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1, 1, null,"
            " 'any', 'unconfirmed', 'nobody') from public.wingman_sessions"
        )
    text = "\n".join(row[0] for row in plan)
    assert "CASE" in text
    assert "reputation.outcome" not in text
