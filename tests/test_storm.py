"""A storm of all the writes of a host app: at every snapshot, not one user's counts differ from a recount."""

import os
import secrets

import pytest

from .conftest import Database, connect
from .storm import DifferenceError, Storm

SECONDS = float(os.environ.get("GOODSTANDING_STORM_SECONDS", "8"))
SEED = int(os.environ.get("GOODSTANDING_STORM_SEED", secrets.randbelow(2**31)))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
async def test_not_one_user_differs(database: Database) -> None:
    """Through rollbacks, killed backends, rebuilds and transactions held open, every read is a recount's equal."""
    print(f"GOODSTANDING_STORM_SEED={SEED}")  # noqa: T201 - what a failure is repeated with
    storm = Storm(database, SEED)
    await storm.fill()
    await storm.rage(SECONDS)
    print(storm.compared, storm.tallied, dict(storm.done))  # noqa: T201 - how much was done
    assert storm.compared > 10
    assert storm.tallied > storm.compared, "too few reads were answered by tallies"


# What is planted: a function, and what is replaced by what in it.
PLANTED = {
    "a mark waits for no transaction": ("reputation.running()", "and held.granted", "and false"),
    "a verdict is a difference": (
        "reputation.attributed()",
        "perform reputation.mark_matches",
        """
        insert into reputation.changes (user_id, no_show_delta, policy_version)
        select
            side.user_id,
            (new.at_fault in ('both', side.name))::integer + reputation.outcome(
                session.status::text, side.own, side.own, side.number, (
                    select before.at_fault from reputation.attributions as before
                    where before.session_id = session.id and before.id < new.id order by before.id desc limit 1
                ), policy.completed_rule, policy.unattributed_no_show, policy.unattributed_cancelled
            ),
            policy.version
        from public.wingman_sessions as session
        join public.wingman_matches as match on match.id = session.match_id
        cross join lateral (values
            (1, 'user1', match.user1_id, session.user1_completed_confirmed_by_user2),
            (2, 'user2', match.user2_id, session.user2_completed_confirmed_by_user1)
        ) as side (number, name, user_id, own)
        cross join reputation.policy
        where session.id = new.session_id and session.status::text in ('no_show', 'cancelled');
        return null;
        perform reputation.mark_matches""",
    ),
    "a moved session is a difference": (
        "reputation.session_changed()",
        "perform reputation.mark_matches(array[old.match_id, new.match_id]);",
        """
        insert into reputation.changes (user_id, completed_delta, no_show_delta, policy_version)
        select
            side.user_id,
            (side.outcome = 1)::integer * side.sign,
            (side.outcome = -1)::integer * side.sign,
            side.version
        from (
            select
                version.sign,
                policy.version,
                case one.number when 1 then match.user1_id else match.user2_id end as user_id,
                reputation.outcome(
                    version.status,
                    case one.number when 1 then version.a else version.b end,
                    case one.number when 1 then version.b else version.a end,
                    one.number,
                    (
                        select newest.at_fault from reputation.attributions as newest
                        where newest.session_id = version.id order by newest.id desc limit 1
                    ),
                    policy.completed_rule, policy.unattributed_no_show, policy.unattributed_cancelled
                ) as outcome
            from (values
                (
                    -1, old.id, old.match_id, old.status::text,
                    old.user1_completed_confirmed_by_user2, old.user2_completed_confirmed_by_user1
                ),
                (
                    1, new.id, new.match_id, new.status::text,
                    new.user1_completed_confirmed_by_user2, new.user2_completed_confirmed_by_user1
                )
            ) as version (sign, id, match_id, status, a, b)
            join public.wingman_matches as match on match.id = version.match_id
            cross join reputation.policy
            cross join (values (1), (2)) as one (number)
        ) as side;""",
    ),
    "a deleted match marks nobody": (
        "reputation.match_changed()",
        "if tg_op = 'DELETE'",
        "if tg_op = 'DELETE' then return null; end if; if false",
    ),
    "a rewritten match marks its new users alone": (
        "reputation.match_changed()",
        "(values (old.user1_id), (old.user2_id), (new",
        "(values (new",
    ),
    "a recount leaves the differences that it includes": (
        "reputation.recount(integer)",
        "where change.user_id = due.user_id and change.policy_version is not null",
        "where false",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
async def test_the_storm_finds_a_planted_bug(database: Database, bug: str) -> None:
    """Each shortcut that looks right is found within seconds."""
    name, right, wrong = PLANTED[bug]
    async with connect(database.owner_url) as owner:
        definition = await owner.fetchval("select pg_get_functiondef($1::text::regprocedure)", name)
        assert definition.count(right) == 1
        await owner.execute(definition.replace(right, wrong))
    storm = Storm(database, SEED)
    await storm.fill()
    with pytest.raises(DifferenceError):
        await storm.rage(60)
