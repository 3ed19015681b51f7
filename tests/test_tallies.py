"""Tallies: exact beside open transactions, rebuilt under load, repaired, and verified."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import pytest

from goodstanding import tallies
from goodstanding.data import UserId
from goodstanding.errors import ConfigurationError
from goodstanding.history import QUERIES
from goodstanding.migrate import upgrade
from goodstanding.owner import silent
from goodstanding.policy import LEGACY, STANDARD, ReputationPolicy

from .conftest import Database, connect
from .parts import eventually
from .storm import compare
from .test_changes_sql import settled

if TYPE_CHECKING:
    from .conftest import Connection

PATIENCE = 20.0
COMPLETE = "update public.wingman_sessions set status = 'completed'"


async def counts(
    owner: "Connection | asyncpg.Connection[asyncpg.Record]",
    users: Sequence[str],
    policy: ReputationPolicy = STANDARD,
) -> list[tuple[int, int]]:
    """Read the counts of users, in their order."""
    rows = {row[0]: (row[1], row[2]) for row in await owner.fetch(QUERIES["counts"], users, *policy.meaning)}
    return [rows[UUID(user)] for user in users]


async def tally(owner: "Connection", user: str) -> tuple[int, int] | None:
    """Give what is tallied of one user."""
    row = await owner.fetchrow("select completed, no_shows from reputation.tallies where user_id = $1", user)
    return None if row is None else tuple(row)


async def test_a_fold_moves_a_change_from_pending_to_tally(database: Database) -> None:
    """Before the commit every read sees it pending, after it in the tally; the fold names the users concerned."""
    user1, user2 = await database.add_user(), await database.add_user()
    await database.add_session(await database.add_match(user1, user2), a=True)
    async with database.owner() as owner, connect(database.service_url) as relay:
        await settled(relay)
        assert (0, 0) == await tally(owner, user1)
        await owner.execute(COMPLETE)
        async with relay.transaction():
            folded = await tallies.fold(relay, 1000)
            assert (1, False, {user1, user2}) == (folded.changes, folded.everybody, set(folded.users))
            assert folded.oldest is not None
            assert [(1, 0)] == await counts(owner, [user1])
            assert (0, 0) == await tally(owner, user1)
        assert [(1, 0)] == await counts(owner, [user1])
        assert (1, 0) == await tally(owner, user1)
        assert tallies.Folded(0, everybody=False, users=(), oldest=None) == await tallies.fold(relay, 1000)


async def test_pending_is_what_a_fold_would_take(database: Database) -> None:
    """True from the writer's commit to the fold's, seen by the service's own login."""
    service = database.service_url
    async with database.owner() as owner, connect(service) as relay, connect(service) as other:
        await settled(relay)
        assert not await tallies.pending(relay)
        async with owner.transaction():
            await owner.execute("insert into public.user_profiles default values")
            assert not await tallies.pending(relay)
        assert await tallies.pending(relay)
        async with relay.transaction():
            await tallies.fold(relay, 1000)
            assert await tallies.pending(other)
        assert not await tallies.pending(other)


async def test_a_fold_goes_round_and_takes_no_more_than_it_is_told(database: Database) -> None:
    """A batch bounds it, what is left stays pending, and whoever comes in front of it waits for the next round."""
    user = await database.add_user()
    pairs = sorted(
        [(await database.add_match(user, other), other) for other in [await database.add_user() for _ in range(5)]]
    )
    async with database.owner() as owner:
        await settled(owner)
        for match, _ in pairs:
            await database.add_session(match, "completed", a=True)
        first = await tallies.fold(owner, 3)
        assert (3, {user, *(other for _, other in pairs[:3])}) == (first.changes, set(first.users))
        await database.add_session(pairs[0][0], "completed", a=True)
        await database.add_session(pairs[4][0], "completed", a=True)
        second = await tallies.fold(owner, 3)
        assert (3, {user, pairs[3][1], pairs[4][1]}) == (second.changes, set(second.users))
        third = await tallies.fold(owner, 3)
        assert (1, {user, pairs[0][1]}) == (third.changes, set(third.users))
        assert 0 == (await tallies.fold(owner, 3)).changes
        for _, other in pairs:
            await owner.execute(tallies.QUERIES["mark"], other)
        assert [3, 2, 0] == [(await tallies.fold(owner, 3)).changes for _ in range(3)]


async def test_a_transaction_may_still_see_a_matchs_old_users(database: Database) -> None:
    """It writes after those users and the new ones were counted again: the change is the new ones'."""
    user1, user2, user3 = [await database.add_user() for _ in range(3)]
    await database.add_session(await database.add_match(user1, user2), a=True)
    async with database.owner() as owner, database.owner() as relay, connect(database.owner_url) as old:
        await settled(relay)
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.fetchval("select count(*) from public.wingman_matches")
        await owner.execute("update public.wingman_matches set user1_id = $1", user3)
        await settled(relay)
        await old.execute(COMPLETE)
        await transaction.commit()
        assert [(0, 0), (1, 0), (1, 0)] == await counts(owner, [user1, user2, user3])
        await settled(relay)
        assert [(0, 0), (1, 0), (1, 0)] == await counts(owner, [user1, user2, user3])
        assert [(0, 0), (1, 0), (1, 0)] == [await tally(owner, user) for user in (user1, user2, user3)]


VERDICT = """
select from reputation.attribute((select id from public.wingman_sessions), 'user2', 'seen', 'support')
"""


@pytest.mark.parametrize(
    ("old_does", "expected"),
    [
        (COMPLETE, [(0, 0), (1, 0), (0, 0), (0, 0), (1, 0)]),
        (
            "update public.wingman_sessions set match_id = (select id from wingman_matches where status = 'second')",
            [(0, 0), (0, 0), (1, 0), (1, 0), (0, 0)],
        ),
        (VERDICT, [(0, 0), (0, 1), (0, 0), (0, 0), (0, 0)]),
    ],
)
async def test_who_joins_a_match_meanwhile_is_counted(
    database: Database, old_does: str, expected: list[tuple[int, int]]
) -> None:
    """A match's users are rewritten, and counted again, while a transaction that has seen the old ones goes on."""
    users = [await database.add_user() for _ in range(5)]
    first, second = await database.add_match(*users[:2]), await database.add_match(*users[2:4])
    status = "no_show" if old_does == VERDICT else "completed" if "match_id" in old_does else "scheduled"
    await database.add_session(first, status, a=True, b=True)
    async with database.owner() as owner, database.owner() as relay, connect(database.owner_url) as old:
        await owner.execute("update public.wingman_matches set status = 'second' where id = $1", second)
        await settled(relay)
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.fetchval("select count(*) from public.wingman_matches")
        await owner.execute("update public.wingman_matches set user1_id = $1 where id = $2", users[4], first)
        await settled(relay)
        await old.execute(old_does)
        await transaction.commit()
        for _ in range(2):
            assert expected == await counts(owner, users)
            await settled(relay)
        assert expected == [await tally(owner, user) for user in users]


async def test_a_verdict_that_a_fold_did_not_see_is_counted(database: Database) -> None:
    """A session ends, and its end is folded, while a verdict on it is being recorded: the verdict stands."""
    user1, user2 = await database.add_user(), await database.add_user()
    session = await database.add_session(await database.add_match(user1, user2), b=True)
    async with database.owner() as owner, database.owner() as relay, connect(database.service_url) as judge:
        await settled(relay)
        async with judge.transaction():
            await judge.execute(QUERIES["attribute"], session, "user2", "seen", "support")
            await owner.execute("update public.wingman_sessions set status = 'no_show'")
            await tallies.fold(relay, 1000)
            assert [(0, 1), (0, 0)] == await counts(owner, [user1, user2])
        assert [(0, 0), (0, 1)] == await counts(owner, [user1, user2])
        await settled(relay)
        assert [(0, 0), (0, 1)] == [await tally(owner, user) for user in (user1, user2)]


@pytest.mark.parametrize(
    "move",
    [
        ("update public.wingman_sessions set match_id = $1",),
        (
            "delete from public.wingman_sessions where $1::uuid is not null",
            (
                "insert into public.wingman_sessions (id, match_id, status, user2_completed_confirmed_by_user1)"
                " values (:session, $1, 'no_show', true)"
            ),
        ),
    ],
    ids=["moved", "gone and come again"],
)
async def test_a_session_that_moves_while_it_is_judged_counts_for_its_new_users(
    database: Database, move: tuple[str, ...]
) -> None:
    """Its verdict is open meanwhile: whose session it is, is found when that is told."""
    users = [await database.add_user() for _ in range(4)]
    first, second = await database.add_match(*users[:2]), await database.add_match(*users[2:])
    session = await database.add_session(first, "no_show", b=True)
    async with database.owner() as owner, database.owner() as relay, connect(database.service_url) as judge:
        await settled(relay)
        async with judge.transaction():
            await judge.execute(QUERIES["attribute"], session, "user2", "seen", "support")
            for step in move:
                await owner.execute(step.replace(":session", f"'{session}'"), second)
            await settled(relay)
            assert [(0, 0), (0, 0), (0, 1), (0, 0)] == await counts(owner, users)
        assert [(0, 0), (0, 0), (0, 0), (0, 1)] == await counts(owner, users)
        await settled(relay)
        assert [(0, 0), (0, 0), (0, 0), (0, 1)] == [await tally(owner, user) for user in users]


async def test_many_verdicts_are_folded_before_the_changes_that_they_judge(database: Database) -> None:
    """However many were recorded at once, a fold takes no more than it is told, and every read is exact."""
    user1, user2 = await database.add_user(), await database.add_user()
    match = await database.add_match(user1, user2)
    sessions = [await database.add_session(match, b=True) for _ in range(5)]
    async with database.owner() as owner:
        await settled(owner)
        await owner.execute("update public.wingman_sessions set status = 'no_show'")
        for session in sessions:
            await owner.execute(QUERIES["attribute"], session, "user2", "seen", "support")
        folded: list[int] = []
        while not folded or folded[-1]:
            assert [(0, 0), (0, 5)] == await counts(owner, [user1, user2])
            folded.append((await tallies.fold(owner, 2)).changes)
        # Two of five verdicts, two more, then the last one with two of five changes, and the rest of the changes.
        assert [2, 2, 3, 2, 1, 0] == folded
        await settled(owner)
        assert [(0, 0), (0, 5)] == [await tally(owner, user) for user in (user1, user2)]


@pytest.mark.parametrize("folded", [False, True])
async def test_a_match_that_comes_again_under_its_id_starts_anew(database: Database, *, folded: bool) -> None:
    """What is pending of the sessions that the deleted one had means nothing to the users of the new one."""
    users = [await database.add_user() for _ in range(4)]
    match = await database.add_match(*users[:2])
    await database.add_session(match, "completed", a=True)
    async with database.owner() as owner:
        await settled(owner)
        await owner.execute("delete from public.wingman_matches where id = $1", match)
        if folded:
            await settled(owner)
        await owner.execute(
            "insert into public.wingman_matches (id, user1_id, user2_id) values ($1, $2, $3)", match, *users[2:]
        )
        for _ in range(2):
            assert [(0, 0)] * 4 == await counts(owner, users)
            assert folded == (not await owner.fetchval("select exists (select from reputation.marks)"))
            await settled(owner)
            folded = True
        assert [(0, 0)] * 4 == [await tally(owner, user) for user in users]


async def test_a_difference_holds_under_every_policy(database: Database) -> None:
    """A transaction that wrote before a rebuild and commits after it is counted under the new policy."""
    user1, user2 = await database.add_user(), await database.add_user()
    await database.add_session(await database.add_match(user1, user2))
    async with database.owner() as owner, connect(database.owner_url) as old:
        await settled(owner)
        transaction = old.transaction()
        await transaction.start()
        await old.execute("update public.wingman_sessions set status = 'cancelled'")
        async with asyncio.timeout(PATIENCE):
            await tallies.rebuild(database.owner_url, LEGACY)
        await transaction.commit()
        for policy, expected in ((LEGACY, (0, 1)), (STANDARD, (0, 0))):
            assert [expected] == await counts(owner, [user1], policy)
        await settled(owner)
        assert (0, 1) == await tally(owner, user1)
        await compare(old, LEGACY)


async def test_a_transaction_may_be_older_than_the_triggers(database: Database) -> None:
    """One that sees the users that a match had before the triggers came writes after everybody was counted."""
    user1, user2, user3 = [await database.add_user() for _ in range(3)]
    await database.add_session(await database.add_match(user1, user2), a=True)
    await upgrade(database.owner_url, triggers=False)
    async with database.owner() as owner, connect(database.owner_url) as old:
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.fetchval("select 1")
        await owner.execute("update public.wingman_matches set user1_id = $1", user3)
        await upgrade(database.owner_url)
        assert (0, 0) == await tally(owner, user3)
        await old.execute(COMPLETE)
        await settled(owner)
        assert [(0, 0), (0, 0), (0, 0)] == await counts(owner, [user1, user2, user3])
        await transaction.commit()
        assert [(0, 0), (1, 0), (1, 0)] == await counts(owner, [user1, user2, user3])
        await settled(owner)
        assert [(0, 0), (1, 0), (1, 0)] == [await tally(owner, user) for user in (user1, user2, user3)]


async def test_without_triggers_every_read_recounts(bare_database: Database) -> None:
    """Nothing of ours is on the host's tables, the counts are right, and the tallies come when the triggers do."""
    told: list[str] = []
    await upgrade(bare_database.owner_url, triggers=False)
    user1, user2 = await bare_database.add_user(), await bare_database.add_user()
    await bare_database.add_session(await bare_database.add_match(user1, user2), "completed", a=True)
    async with bare_database.owner() as owner:
        assert 0 == await owner.fetchval("select count(*) from pg_trigger where tgname like 'goodstanding%'")
        assert [(1, 0)] == await counts(owner, [user1])
        assert 0 == await owner.fetchval("select count(*) from reputation.changes")
        with pytest.raises(ConfigurationError, match="no triggers"):
            await tallies.rebuild(bare_database.owner_url, STANDARD)
        await upgrade(bare_database.owner_url, report=told.append)
        assert ["the triggers are on the host's tables", "counted 2 users", "the database is up to date"] == told
        assert (1, 0) == await tally(owner, user1)
        assert [(1, 0)] == await counts(owner, [user1])


async def test_a_policy_of_another_meaning_recounts(database: Database) -> None:
    """The tallies mean one policy; another one is answered from the sessions until a rebuild."""
    user1, user2 = await database.add_user(), await database.add_user()
    await database.add_session(await database.add_match(user1, user2), "cancelled")
    async with database.owner() as owner:
        await settled(owner)
        assert [(0, 1)] == await counts(owner, [user1], LEGACY)
        assert not (await tallies.status(owner, LEGACY)).same_policy
        await tallies.rebuild(database.owner_url, LEGACY)
        assert (await tallies.status(owner, LEGACY)).same_policy
        assert (0, 1) == await tally(owner, user1)
        assert [(0, 0)] == await counts(owner, [user1], STANDARD)


async def test_migrate_writes_the_policy_of_the_settings(bare_database: Database) -> None:
    """New tallies mean what the settings say; later another policy is only told."""
    told: list[str] = []
    await upgrade(bare_database.owner_url, policy=LEGACY)
    await upgrade(bare_database.owner_url, policy=STANDARD, report=told.append)
    assert "the tallies mean another policy than this one: run goodstanding rebuild" in told
    async with bare_database.owner() as owner:
        (row,) = await owner.fetch(tallies.QUERIES["policy"])
    assert LEGACY.meaning == tuple(row)


async def test_verify_finds_what_rebuild_repairs(database: Database) -> None:
    """A tally that was tampered with is found, one user's by its id; `rebuild` of that user mends it at once."""
    users = [await database.add_user() for _ in range(3)]
    async with database.owner() as owner:
        await settled(owner)
        assert tallies.Verification(3, 0, ()) == await tallies.verify(database.owner_url)
        for user in users[:2]:
            await owner.execute("update reputation.tallies set completed = 7 where user_id = $1", user)
        assert tallies.Verification(3, 2, tuple(sorted(users[:2]))) == await tallies.verify(database.owner_url)
        await tallies.rebuild_user(database.owner_url, UserId(users[0]), STANDARD)
        assert [(0, 0), (7, 0)] == await counts(owner, users[:2])
        await settled(owner)
        assert (0, 0) == await tally(owner, users[0])
        await tallies.rebuild(database.owner_url, STANDARD)
        assert tallies.Verification(3, 0, ()) == await tallies.verify(database.owner_url)
        assert (0, 0) == await tally(owner, users[1])


async def test_an_interrupted_rebuild_is_continued(database: Database) -> None:
    """Whoever recounts next goes on where it stopped; every read is exact meanwhile."""
    users = [await database.add_user() for _ in range(7)]
    await database.add_session(await database.add_match(users[0], users[1]), "completed", a=True)
    async with database.owner() as owner:
        await settled(owner)
        await owner.execute(tallies.QUERIES["rebuild"], *STANDARD.meaning)
        assert tallies.Recounted(3, counting=True) == await tallies.recount(owner, 3)
        assert [(1, 0), (1, 0), (0, 0)] == await counts(owner, users[:3])
        assert 4 == await owner.fetchval(
            "select count(*) from reputation.tallies where policy_version <> (select version from reputation.policy)"
        )
        await settled(owner)
        assert tallies.Verification(7, 0, ()) == await tallies.verify(database.owner_url)


async def test_whoever_has_the_first_or_the_last_id_is_counted(database: Database) -> None:
    """Turns of one user each, from the lowest id that there can be to the highest."""
    users = [str(UUID(int=0)), str(UUID(int=2**127)), str(UUID(int=2**128 - 1))]
    async with database.owner() as owner:
        await owner.executemany("insert into public.user_profiles (id) values ($1)", [(user,) for user in users])
        for pair in (users[:2], users[1:]):
            await database.add_session(await database.add_match(*pair), "completed", a=True)
        await settled(owner)
        await owner.execute("truncate reputation.tallies")
        await owner.execute(tallies.QUERIES["rebuild"], *STANDARD.meaning)
        expected = [tallies.Recounted(1, counting=more) for more in (True, True, False)]
        assert expected == [await tallies.recount(owner, 1) for _ in users]
        assert [(1, 0), (2, 0), (1, 0)] == [await tally(owner, user) for user in users]


@pytest.mark.parametrize(
    ("batch", "seconds", "expected"),
    [
        (500, 0.0, 1000),
        (500, 0.3, 500),
        (500, 0.2, 750),
        (8000, 0.6, 4000),
        (8000, 60.0, 2000),
        (100, 60.0, 100),
        (50_000, 0.1, 50_000),
    ],
)
def test_a_batch_is_as_large_as_a_third_of_a_second_allows(batch: int, seconds: float, expected: int) -> None:
    """It follows what the one before took, by steps, between 100 and 50,000 users."""
    assert expected == tallies.next_batch(batch, seconds)


@pytest.mark.parametrize("led", [True, False])
async def test_a_count_of_everybody_makes_no_relay_wait(
    database: Database, monkeypatch: pytest.MonkeyPatch, *, led: bool
) -> None:
    """While one leads, turns begin small; while none does, everybody is counted at once."""
    batches: list[int] = []
    recount = tallies.recount

    async def noted(connection: "Connection", batch: int) -> tallies.Recounted:
        batches.append(batch)
        return await recount(connection, batch)

    monkeypatch.setattr(tallies, "recount", noted)
    told: list[str] = []
    async with database.owner() as owner, connect(database.service_url) as relay:
        await owner.execute("insert into public.user_profiles (created_at) select now() from generate_series(1, 600)")
        await owner.execute(tallies.QUERIES["rebuild"], *STANDARD.meaning)
        await relay.execute("select pg_advisory_lock($1::bigint)", tallies.LEAD + (not led))
        await tallies.count_everybody(owner, told.append)
        assert 600 == await owner.fetchval("select count(*) from reputation.tallies")
    assert ("counting 600 users", "counted 600 users") == (told[0], told[-1])
    assert (2 if led else 1) == len(batches)
    assert led == (batches[0] < 600)


async def test_a_limit_on_statements_does_not_end_a_count_of_everybody(database: Database) -> None:
    """A login's own statement_timeout is for the host's queries; a count takes as long as it takes."""
    user = await database.add_user()
    async with (
        database.owner() as owner,
        connect(database.superuser_url) as admin,
        connect(database.owner_url) as counter,
        asyncio.TaskGroup() as tasks,
    ):
        await owner.execute(tallies.QUERIES["rebuild"], *STANDARD.meaning)
        await counter.execute("set statement_timeout = '50ms'")
        async with owner.transaction():
            await owner.execute("select from reputation.upkeep for update")
            tasks.create_task(tallies.count_everybody(counter, silent))
            await eventually(lambda: _waits_longer_than_that(admin, counter.get_server_pid()))
    async with database.owner() as owner:
        assert (0, 0) == await tally(owner, user)


async def _waits_longer_than_that(admin: "asyncpg.Connection[asyncpg.Record]", pid: int) -> bool:
    waits: bool | None = await admin.fetchval(
        "select clock_timestamp() - query_start > '100ms' from pg_stat_activity"
        " where pid = $1 and wait_event_type = 'Lock'",
        pid,
    )
    return bool(waits)


async def test_fold_and_recount_refuse_an_old_snapshot(database: Database) -> None:
    """They look again after they waited, which a repeatable-read transaction cannot do."""
    async with database.owner() as owner:
        for call in (tallies.fold, tallies.recount):
            with pytest.raises(asyncpg.PostgresError, match="needs READ COMMITTED"):
                async with owner.transaction(isolation="repeatable_read"):
                    await call(owner, 1)


async def test_a_relay_that_freezes_before_its_commit_is_rolled_back(database: Database) -> None:
    """The server ends it within a second or two, and whoever is next folds the same changes."""
    user = await database.add_user()
    async with connect(database.service_url) as frozen, connect(database.service_url) as relay:
        await frozen.execute("begin")
        assert (user,) == (await tallies.fold(frozen, 10)).users
        async with asyncio.timeout(PATIENCE):
            assert (user,) == (await tallies.fold(relay, 10)).users
