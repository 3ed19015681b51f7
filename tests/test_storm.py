"""A storm of all the writes of a host app: at every snapshot, not one user's counts differ from a recount."""

import os
import secrets

import pytest

from .conftest import Database, connect
from .storm import JUDGED, RETURNING, WEATHERS, DifferenceError, Storm

SECONDS = float(os.environ.get("GOODSTANDING_STORM_SECONDS", "5"))
SEED = int(os.environ.get("GOODSTANDING_STORM_SEED", secrets.randbelow(2**31)))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("few", [50, 2])
async def test_not_one_user_differs(database: Database, few: int) -> None:
    """Through rollbacks, killed backends, rebuilds and transactions held open, every read is a recount's equal.

    Both for users with few matches and for those with many: how many are few is set here.
    """
    await replaced(database, "reputation.read_counts(uuid[],text,text,text)", ":= 50; -- matches", f":= {few};")
    print(f"GOODSTANDING_STORM_SEED={SEED}")  # noqa: T201 - what a failure is repeated with
    storm = Storm(database, SEED)
    await storm.fill()
    await storm.rage(SECONDS)
    print(storm.compared, storm.tallied, dict(storm.done))  # noqa: T201 - how much was done
    assert storm.compared > 10
    assert storm.tallied > storm.compared, "too few reads were answered by tallies"


async def replaced(database: Database, function: str, right: str, wrong: str) -> None:
    """Give a function another body."""
    async with connect(database.owner_url) as owner:
        definition = await owner.fetchval("select pg_get_functiondef($1::text::regprocedure)", function)
        assert definition.count(right) == 1
        await owner.execute(definition.replace(right, wrong))


# What is planted: a function, and what is replaced by what in it.
PLANTED = {
    "a verdict marks whoever is in its session when it is written": (
        "reputation.attributed()",
        "insert into reputation.marks (session_id) values (new.session_id);",
        """
        insert into reputation.marks (user_id)
        select side.user_id
        from public.wingman_sessions as session
        join public.wingman_matches as match on match.id = session.match_id
        cross join lateral (values (match.user1_id), (match.user2_id)) as side (user_id)
        where session.id = new.session_id;""",
    ),
    "a verdict marks nobody who had its session": (
        "reputation.fold(integer)",
        "where exists (select from judged)",
        "where false and exists (select from judged)",
    ),
    "a match that comes again marks nobody": (
        "reputation.match_changed()",
        "and not exists (select from reputation.changes as pending where pending.match_id = new.id)",
        "",
    ),
    "a deleted match marks nobody": (
        "reputation.match_changed()",
        "if tg_op = 'INSERT'",
        "if tg_op = 'DELETE' then return null; end if; if tg_op = 'INSERT'",
    ),
    "a rewritten match marks its new users alone": (
        "reputation.match_changed()",
        "(values (old.user1_id), (old.user2_id), (new",
        "(values (new",
    ),
    "a recount of one user includes the other's differences": (
        "reputation.recount(integer)",
        "included2 = change.included2 or waiting.as_user2",
        "included2 = true",
    ),
    "a recount leaves the differences that it includes": (
        "reputation.recount(integer)",
        "where change.ctid = waiting.change",
        "where change.ctid = waiting.change and false",
    ),
    "a recount misses where the last one in turn is the second user": (
        "reputation.recount(integer)",
        "as_user2.user2_id <= due.last",
        "as_user2.user2_id < due.last",
    ),
}


# These need a fold between two transactions on one session, so they are looked for where that happens most.
RARE = {
    "a verdict marks whoever is in its session when it is written": (JUDGED,),
    "a verdict marks nobody who had its session": (JUDGED,),
    "a match that comes again marks nobody": (RETURNING,),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
async def test_the_storm_finds_a_planted_bug(database: Database, bug: str) -> None:
    """Each shortcut that looks right is found within seconds."""
    await replaced(database, *PLANTED[bug])
    storm = Storm(database, SEED, weathers=RARE.get(bug, WEATHERS))
    await storm.fill()
    with pytest.raises(DifferenceError):
        await storm.rage(60)
