"""A storm of everything that a host app may do to its tables, and a recount of them that shares no code with ours."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

import asyncpg

from goodstanding import tallies
from goodstanding.history import QUERIES
from goodstanding.owner import silent
from goodstanding.policy import LEGACY, STANDARD, Blame, CompletedRule, ReputationPolicy

from .conftest import Database, connect

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

POLICIES: Final = (
    STANDARD,
    LEGACY,
    ReputationPolicy(completed_rule=CompletedRule.BOTH, unattributed_cancelled=Blame.UNCONFIRMED),
)
USERS: Final = [UUID(int=1000 + number) for number in range(8)]
MATCHES: Final = [UUID(int=2000 + number) for number in range(8)]
SESSIONS: Final = [UUID(int=3000 + number) for number in range(16)]
WEATHER_STEPS: Final = 100
STATUSES: Final = ("scheduled", "in_progress", "completed", "cancelled", "no_show")
FLAGS: Final = (True, False, None)
FAULTS: Final = ("user1", "user2", "both", "nobody")
# What a host app's transactions do to each other, and what ends a connection here.
TALLIED: Final = """
select count(*) from reputation.tallies
where policy_version = (select version from reputation.policy)
    and user_id not in (select user_id from reputation.recounts)
    and not exists (
        select from reputation.marks
        where coalesce(marks.user_id, tallies.user_id) = tallies.user_id and marks.recount
    )
"""
EXPECTED: Final = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.InFailedSQLTransactionError,
)
ENDED: Final = (
    asyncpg.AdminShutdownError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)


class DifferenceError(AssertionError):
    """Somebody's counts were not those of a recount in the same snapshot."""


def completes(rule: CompletedRule, *, own: bool | None, other: bool | None) -> bool:
    """Tell whether a session of status completed is completed for one user."""
    confirmed = (own is True, other is True)
    return {CompletedRule.ANY: any(confirmed), CompletedRule.OWN: own is True, CompletedRule.BOTH: all(confirmed)}[rule]


def at_fault(blame: Blame, *, own: bool | None) -> bool:
    """Tell whether one user is blamed for a session when nobody said whose fault it was."""
    return blame is Blame.BOTH or (blame is Blame.UNCONFIRMED and own is not True)


async def recounted(connection: "Connection", policy: ReputationPolicy) -> dict[UUID, tuple[int, int]]:
    """Count everybody in Python, from the host's rows and the verdicts."""
    users = [row["id"] for row in await connection.fetch("select id from public.user_profiles")]
    matches = {row["id"]: row for row in await connection.fetch("select id, user1_id, user2_id from wingman_matches")}
    verdicts = {
        row["session_id"]: row["at_fault"]
        for row in await connection.fetch("select session_id, at_fault from reputation.attributions order by id")
    }
    completed: Counter[UUID] = Counter()
    no_shows: Counter[UUID] = Counter()
    for row in await connection.fetch("select * from public.wingman_sessions"):
        flags = (row["user1_completed_confirmed_by_user2"], row["user2_completed_confirmed_by_user1"])
        for side, name in enumerate(("user1", "user2")):
            user, own, other = matches[row["match_id"]][f"{name}_id"], flags[side], flags[1 - side]
            if row["status"] == "completed":
                completed[user] += completes(policy.completed_rule, own=own, other=other)
            elif row["status"] in {"no_show", "cancelled"}:
                verdict = verdicts.get(row["id"])
                blame = policy.unattributed_no_show if row["status"] == "no_show" else policy.unattributed_cancelled
                no_shows[user] += at_fault(blame, own=own) if verdict is None else verdict in {"both", name}
    return {user: (completed[user], no_shows[user]) for user in users}


async def compare(connection: "Connection", policy: ReputationPolicy) -> None:
    """Compare everybody's counts with a recount in one snapshot; raises DifferenceError."""
    async with connection.transaction(isolation="repeatable_read"):
        # Before the snapshot: a table that is emptied after it looks empty in it (TRUNCATE works on old snapshots too).
        await connection.execute("lock table user_profiles, wingman_matches, wingman_sessions in access share mode")
        expected = await recounted(connection, policy)
        everybody = {*USERS, *expected}
        read = {
            row["user_id"]: (row["completed"], row["no_shows"])
            for row in await connection.fetch(QUERIES["counts"], [str(user) for user in everybody], *policy.meaning)
        }
    if expected != read:
        different = {
            str(user): (expected.get(user), read.get(user))
            for user in everybody
            if expected.get(user) != read.get(user)
        }
        message = f"expected and read: {different}"
        raise DifferenceError(message)


@dataclass(slots=True)
class Storm:
    """Writers, a relay that folds and recounts, a count of everybody, and readers that compare, at once on few rows.

    The seed decides what each of them does; which of them is first is up to the server.
    """

    database: Database
    seed: int
    writers: int = 5
    weathers: Sequence[Sequence[float]] = field(default_factory=lambda: WEATHERS)
    compared: int = 0
    tallied: int = 0
    done: Counter[str] = field(default_factory=Counter)
    _steps: int = 0
    _stepped: asyncio.Condition = field(default_factory=asyncio.Condition)
    _pids: set[int] = field(default_factory=set)

    async def fill(self) -> None:
        """Insert the rows that the storm is about."""
        async with connect(self.database.owner_url) as owner:
            await owner.executemany("insert into public.user_profiles (id) values ($1)", [(user,) for user in USERS])
            randomly = random.Random(self.seed)  # noqa: S311 - a seeded storm
            for match in MATCHES:
                await insert_match(owner, randomly, match)
            for session in SESSIONS:
                await insert_session(owner, randomly, session)

    async def rage(self, seconds: float) -> None:
        """Let everything loose for so long, then wait for quiet; raises DifferenceError."""
        try:
            async with asyncio.TaskGroup() as tasks:
                end = asyncio.get_running_loop().time() + seconds
                for number in range(self.writers):
                    tasks.create_task(self._write(number, end))
                tasks.create_task(self._relay(end))
                tasks.create_task(self._count(end))
                tasks.create_task(self._read(end))
        except* DifferenceError as group:
            raise group.exceptions[0] from None
        await self.settle()

    async def settle(self) -> None:
        """Fold and recount until nothing is left to do, and compare; then no tally may be left out."""
        async with connect(self.database.service_url) as relay, connect(self.database.owner_url) as owner:
            async with asyncio.timeout(30):
                while True:
                    await tallies.fold(relay, 1000)
                    done = await tallies.recount(relay, 1000)
                    if not done.users and not await tallies.pending(relay):
                        break
            for policy in POLICIES:
                await compare(owner, policy)
            (meaning,) = await owner.fetch(tallies.QUERIES["policy"])
            rows = await owner.fetch(
                "select user_id, completed, no_shows from reputation.tallies where policy_version ="
                " (select version from reputation.policy)"
            )
            policy = ReputationPolicy(**dict(meaning))
            assert await recounted(owner, policy) == {row[0]: (row[1], row[2]) for row in rows}

    async def _pause(self, randomly: random.Random, most: int) -> None:
        """Wait until the others have made some steps; never for long, for they may be waiting for this one's locks."""
        until = self._steps + randomly.randrange(most)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2), self._stepped:
                await self._stepped.wait_for(lambda: self._steps >= until)

    async def _step(self) -> None:
        async with self._stepped:
            self._steps += 1
            self._stepped.notify_all()

    async def _write(self, number: int, end: float) -> None:
        randomly = random.Random(f"{self.seed} writer {number}")  # noqa: S311 - a seeded storm
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            with suppress(*ENDED):
                async with connect(self.database.owner_url) as owner:
                    pid = owner.get_server_pid()
                    self._pids.add(pid)
                    try:
                        await owner.execute("set lock_timeout = '20ms'")
                        while loop.time() < end:
                            await self._transact(owner, randomly)
                    finally:
                        self._pids.discard(pid)

    async def _transact(self, owner: "Connection", randomly: random.Random) -> None:
        transaction = owner.transaction(isolation=randomly.choice(("read_committed", "repeatable_read")))
        await transaction.start()
        try:
            if randomly.random() < 0.3:
                await owner.fetchval("select count(*) from public.wingman_matches")  # an old snapshot, nothing written
                await self._pause(randomly, 20)
            for _ in range(randomly.choice((1, 1, 1, 2, 4))):
                weights = self.weathers[self._steps // WEATHER_STEPS % len(self.weathers)]
                operation = randomly.choices(OPERATIONS, weights)[0]
                savepoint = owner.transaction()
                await savepoint.start()
                try:
                    await operation(owner, randomly)
                    self.done[operation.__name__] += 1
                except EXPECTED:
                    await savepoint.rollback()
                else:
                    await (savepoint.rollback() if randomly.random() < 0.1 else savepoint.commit())
                await self._step()
                if randomly.random() < 0.5:
                    await self._pause(randomly, 20)
            await (transaction.rollback() if randomly.random() < 0.15 else transaction.commit())
        except EXPECTED:
            await transaction.rollback()

    async def _relay(self, end: float) -> None:
        """Do what the relay does, in batches of every size, sometimes dying before the commit."""
        randomly = random.Random(f"{self.seed} relay")  # noqa: S311 - a seeded storm
        loop = asyncio.get_running_loop()
        async with connect(self.database.service_url) as relay, connect(self.database.superuser_url) as admin:
            while loop.time() < end:
                transaction = relay.transaction()
                await transaction.start()
                await tallies.fold(relay, randomly.choice((1, 3, 1000)))
                if randomly.random() < 0.1:
                    await self._pause(randomly, 10)
                await (transaction.rollback() if randomly.random() < 0.1 else transaction.commit())
                await tallies.recount(relay, randomly.choice((1, 3, 1000)))
                await self._step()
                chance = randomly.random()
                if chance < 0.005 and self._pids:
                    await admin.fetchval("select pg_terminate_backend($1)", randomly.choice(sorted(self._pids)))
                    self.done["kill"] += 1
                elif chance < 0.02:
                    await admin.execute(tallies.QUERIES["rebuild"], *randomly.choice(POLICIES).meaning)
                    self.done["rebuild"] += 1

    async def _count(self, end: float) -> None:
        """Count everybody beside the relay, as `migrate` and `rebuild` do, sometimes dying on the way."""
        randomly = random.Random(f"{self.seed} counter")  # noqa: S311 - a seeded storm
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            with suppress(*ENDED):
                async with connect(self.database.owner_url) as owner:
                    pid = owner.get_server_pid()
                    self._pids.add(pid)
                    try:
                        while loop.time() < end:
                            await tallies.count_everybody(owner, silent)
                            await self._step()
                            await self._pause(randomly, 20)
                    finally:
                        self._pids.discard(pid)

    async def _read(self, end: float) -> None:
        randomly = random.Random(f"{self.seed} reader")  # noqa: S311 - a seeded storm
        loop = asyncio.get_running_loop()
        async with connect(self.database.superuser_url) as reader:
            while loop.time() < end:
                rules = await reader.fetchrow(tallies.QUERIES["policy"])
                policy = ReputationPolicy(**dict(rules)) if rules else STANDARD
                await compare(reader, policy if randomly.random() < 0.9 else randomly.choice(POLICIES))
                self.compared += 1
                self.tallied += await reader.fetchval(TALLIED)
                await self._step()


async def insert_match(owner: "Connection", randomly: random.Random, match: UUID | None = None) -> None:
    """Match two users."""
    await owner.execute(
        "insert into public.wingman_matches (id, user1_id, user2_id) values ($1, $2, $3) on conflict do nothing",
        match or randomly.choice(MATCHES),
        *randomly.sample(USERS, 2),
    )


async def insert_session(owner: "Connection", randomly: random.Random, session: UUID | None = None) -> None:
    """Book a session, or let one arrive from elsewhere in any state."""
    await owner.execute(
        "insert into public.wingman_sessions (id, match_id, status, user1_completed_confirmed_by_user2,"
        " user2_completed_confirmed_by_user1) values ($1, $2, $3, $4, $5) on conflict do nothing",
        session or randomly.choice(SESSIONS),
        randomly.choice(MATCHES),
        randomly.choice(STATUSES),
        randomly.choice(FLAGS),
        randomly.choice(FLAGS),
    )


async def copy_sessions(owner: "Connection", randomly: random.Random) -> None:
    """Let sessions arrive in bulk, in the place of others."""
    sessions = randomly.sample(SESSIONS, 3)
    await owner.execute("delete from public.wingman_sessions where id = any ($1)", sessions)
    await owner.copy_records_to_table(
        "wingman_sessions",
        schema_name="public",
        columns=("id", "match_id", "status", "user1_completed_confirmed_by_user2"),
        records=[
            (session, randomly.choice(MATCHES), randomly.choice(STATUSES), randomly.choice(FLAGS))
            for session in sessions
        ],
    )


async def change_status(owner: "Connection", randomly: random.Random) -> None:
    """Bring a session to its end, or correct it."""
    await owner.execute(
        "update public.wingman_sessions set status = $2 where id = $1",
        randomly.choice(SESSIONS),
        randomly.choice(STATUSES),
    )


async def change_flags(owner: "Connection", randomly: random.Random) -> None:
    """Confirm somebody, or take it back."""
    await owner.execute(
        "update public.wingman_sessions set user1_completed_confirmed_by_user2 = $2,"
        " user2_completed_confirmed_by_user1 = $3, notes = 'x' where id = $1",
        randomly.choice(SESSIONS),
        randomly.choice(FLAGS),
        randomly.choice(FLAGS),
    )


async def change_many(owner: "Connection", randomly: random.Random) -> None:
    """End many sessions at once, as a job does."""
    await owner.execute(
        "update public.wingman_sessions set status = $1 where status = $2",
        randomly.choice(STATUSES),
        randomly.choice(STATUSES),
    )


async def move_session(owner: "Connection", randomly: random.Random) -> None:
    """Move a session to another match."""
    await owner.execute(
        "update public.wingman_sessions set match_id = $2, status = coalesce($3, status) where id = $1",
        randomly.choice(SESSIONS),
        randomly.choice(MATCHES),
        randomly.choice((None, *STATUSES)),
    )


async def rename_session(owner: "Connection", randomly: random.Random) -> None:
    """Give a session another id, and with it another's verdicts."""
    await owner.execute("update public.wingman_sessions set id = $2 where id = $1", *randomly.sample(SESSIONS, 2))


async def delete_session(owner: "Connection", randomly: random.Random) -> None:
    """Delete a session."""
    await owner.execute("delete from public.wingman_sessions where id = $1", randomly.choice(SESSIONS))


async def rewrite_match(owner: "Connection", randomly: random.Random) -> None:
    """Rewrite a match's users."""
    user1, user2 = randomly.sample(USERS, 2)
    await owner.execute(
        "update public.wingman_matches set user1_id = $2, user2_id = $3 where id = $1",
        randomly.choice(MATCHES),
        user1,
        user2,
    )


async def delete_match(owner: "Connection", randomly: random.Random) -> None:
    """Delete a match, and its sessions with it."""
    await owner.execute("delete from public.wingman_matches where id = $1", randomly.choice(MATCHES))


async def insert_user(owner: "Connection", randomly: random.Random) -> None:
    """Sign a user up, perhaps again."""
    await owner.execute(
        "insert into public.user_profiles (id) values ($1) on conflict do nothing", randomly.choice(USERS)
    )


async def delete_user(owner: "Connection", randomly: random.Random) -> None:
    """Delete a user, with all matches and sessions."""
    await owner.execute("delete from public.user_profiles where id = $1", randomly.choice(USERS))


async def rename_user(owner: "Connection", randomly: random.Random) -> None:
    """Give a user without matches another id."""
    await owner.execute("update public.user_profiles set id = $2 where id = $1", *randomly.sample(USERS, 2))


async def attribute(owner: "Connection", randomly: random.Random) -> None:
    """Record a verdict."""
    await owner.execute(QUERIES["attribute"], randomly.choice(SESSIONS), randomly.choice(FAULTS), "seen", "support")


async def truncate(owner: "Connection", randomly: random.Random) -> None:
    """Empty a table."""
    await owner.execute("set local lock_timeout = '200ms'")
    await owner.execute(
        randomly.choice(("truncate public.wingman_sessions", "truncate public.wingman_matches cascade"))
    )


Operation = Callable[["Connection", random.Random], Awaitable[None]]
_FREQUENCIES: Final[Sequence[tuple[Any, int]]] = (
    (insert_match, 60),
    (insert_session, 100),
    (copy_sessions, 20),
    (change_status, 200),
    (change_flags, 80),
    (change_many, 20),
    (move_session, 60),
    (rename_session, 10),
    (delete_session, 20),
    (rewrite_match, 80),
    (delete_match, 10),
    (insert_user, 30),
    (delete_user, 8),
    (rename_user, 5),
    (attribute, 80),
    (truncate, 3),
)
OPERATIONS: Final = [operation for operation, _ in _FREQUENCIES]
WILD: Final = [weight for _, weight in _FREQUENCIES]
# For a while nobody is marked, so that the tallies answer; for a while few are, so that what should have marked
# somebody and did not is not mended by the next that does.
CALM: Final = [
    weight * (operation in {insert_session, change_status, change_flags, change_many})
    for operation, weight in _FREQUENCIES
]
MILD: Final = [max(calm, weight / 30) for calm, weight in zip(CALM, WILD, strict=True)]


def mostly(**weights: float) -> list[float]:
    """Let these happen, and everything else once in a while."""
    return [weights.get(operation.__name__, weight / 100) for operation, weight in _FREQUENCIES]


# For a while sessions end, move, go and come again while they are judged; matches are rewritten while their sessions
# end, or go and come again.
JUDGED: Final = mostly(change_status=60, attribute=60, move_session=60, copy_sessions=60)
REWRITTEN: Final = mostly(change_status=200, rewrite_match=100)
RETURNING: Final = mostly(change_status=100, insert_session=100, insert_match=80, delete_match=40)
WEATHERS: Final[Sequence[Sequence[float]]] = (WILD, MILD, JUDGED, RETURNING, REWRITTEN, CALM)
