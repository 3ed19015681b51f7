"""The tallies: folding changes into them, counting again, rebuilding, and comparing them with the sessions.

Every read is exact whatever is called here, and whatever is not: see migrations/0002_changes.sql.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg

from goodstanding.data import UserId
from goodstanding.errors import ConfigurationError, UserNotFoundError
from goodstanding.history import QUERIES as HISTORY_QUERIES
from goodstanding.history import TallyStatus, named_queries
from goodstanding.owner import Report, connected, silent
from goodstanding.policy import ReputationPolicy

if TYPE_CHECKING:
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

LEAD: Final = 7_239_817_264_501_103
"""The advisory lock whose holder leads: the relay that folds."""
MOST_NAMED: Final = 20
_COMPARED: Final = 500
_AT_ONCE: Final = 2_000_000
_FIRST_BATCH: Final = 500
_LEAST_BATCH: Final = 100
_MOST_BATCH: Final = 50_000
_BATCH_SECONDS: Final = 0.3
_PAUSE_SECONDS: Final = 0.005
_PROGRESS_SECONDS: Final = 1.0
QUERIES: Final = named_queries((files("goodstanding") / "tallies.sql").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Folded:
    """What one fold did: how many changes, whose counts they concern (`everybody`: all), when the oldest was made."""

    changes: int
    everybody: bool
    users: tuple[UserId, ...]
    oldest: datetime | None


@dataclass(frozen=True, slots=True)
class Recounted:
    """What one recount did: how many users (none: nobody is left); `counting`: more of everybody is left."""

    users: int
    counting: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """How many users were compared in one snapshot, how many differ, and the first of those."""

    users: int
    differing: int
    first: tuple[UserId, ...]


async def pending(connection: "_Connection") -> bool:
    """Tell whether a change waits to be folded; cheap enough to ask many times a second."""
    waits: bool = await connection.fetchval(QUERIES["pending"])
    return waits


async def fold(connection: "_Connection", batch: int) -> Folded:
    """Fold at most `batch` changes, in the caller's transaction: READ COMMITTED, and nothing else in it.

    Commit when the users' cached reputations are gone: until then every read sees the changes as pending. A caller
    that idles for a second before it commits is rolled back by the server.
    """
    ((changes, everybody, users, oldest),) = await connection.fetch(QUERIES["fold"], batch)
    return Folded(changes, everybody, tuple(UserId(str(user)) for user in users), oldest)


async def recount(connection: "_Connection", batch: int, *, timeout: float | None = None) -> Recounted:  # noqa: ASYNC109 - asyncpg's own
    """Count at most `batch` users again, and as many of everybody, in a transaction of its own.

    No count changes by it, so nothing needs to be invalidated. `timeout` in seconds; None: the connection's own.
    """
    (row,) = await connection.fetch(QUERIES["recount"], batch, timeout=timeout)
    return Recounted(*row)


async def status(connection: "_Connection", policy: ReputationPolicy) -> TallyStatus:
    """Tell how the tallies are, seen from this policy."""
    (row,) = await connection.fetch(HISTORY_QUERIES["status"], *policy.meaning)
    return TallyStatus(*row)


async def count_everybody(connection: "_Connection", say: Report) -> None:
    """Count until everybody is counted: beside every load, and after an interruption the rest.

    Several may do so at the same time, a relay among them. While a relay leads, its folds wait for the transaction
    that is going on: so each has as many users as take about 0.3 s, and leaves the lock for a moment to who waits.
    While none does nobody waits, and of two million at once each costs half as much.
    """
    total = await connection.fetchval(QUERIES["how_many"])
    if total > _FIRST_BATCH:
        say(f"counting {total} users")
    counted = 0
    batch = _FIRST_BATCH
    told = time.monotonic()
    while True:
        led = await connection.fetchval(QUERIES["led"], LEAD)
        began = time.monotonic()
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(QUERIES["unlimited"])
            done = await recount(connection, batch if led else _AT_ONCE)
        counted += done.users
        if not done.counting:
            break
        ended = time.monotonic()
        if ended - told >= _PROGRESS_SECONDS:
            told = ended
            say(f"counted {counted} of {total} users")
        if led:
            batch = next_batch(batch, ended - began)
        await asyncio.sleep(_PAUSE_SECONDS)
    if counted:
        say(f"counted {counted} users")


def next_batch(batch: int, seconds: float) -> int:
    """Give the batch that takes about 0.3 s where this one took so long: from a fourth of it to twice as many."""
    factor = min(max(_BATCH_SECONDS / max(seconds, 0.001), 0.25), 2.0)
    return min(max(round(batch * factor), _LEAST_BATCH), _MOST_BATCH)


async def rebuild(database_url: str, policy: ReputationPolicy, *, report: Report | None = None) -> None:
    """Let the tallies mean this policy, and count everybody; as the host tables' owner.

    Reads are exact meanwhile, writers wait for nothing, and after an interruption a relay does the rest.
    Raises ConfigurationError, TemporarilyUnavailableError.
    """
    say = report or silent
    async with connected(database_url, say) as connection:
        await _require_triggers(connection, policy)
        await connection.execute(QUERIES["rebuild"], *policy.meaning)
        say("the tallies mean this policy from now on; counting everybody")
        await count_everybody(connection, say)


async def rebuild_user(database_url: str, user: UserId, policy: ReputationPolicy) -> None:
    """Have one user counted again: at once by every read, and by the relay for good.

    Raises UserNotFoundError, ConfigurationError, TemporarilyUnavailableError.
    """
    async with connected(database_url, silent) as connection:
        await _require_triggers(connection, policy)
        if not await connection.fetch(QUERIES["mark"], user):
            raise UserNotFoundError


async def verify(database_url: str, *, report: Report | None = None) -> Verification:
    """Compare what reads answer with a recount of everybody, in one snapshot, under the policy that the tallies have.

    Raises ConfigurationError, TemporarilyUnavailableError.
    """
    say = report or silent
    users = 0
    differing = 0
    named: list[UserId] = []
    async with (
        connected(database_url, say) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        # Before the snapshot: a table that is emptied after it would look empty in it.
        await connection.execute(QUERIES["hold"])
        (meaning,) = await connection.fetch(QUERIES["policy"])
        total = await connection.fetchval(QUERIES["how_many"])
        rows: Sequence[asyncpg.Record] = ()
        told = time.monotonic()
        while True:
            last = rows[-1]["user_id"] if rows else None
            rows = await connection.fetch(QUERIES["compare"], last, _COMPARED, *meaning)
            if not rows:
                break
            users += len(rows)
            found = [row for row in rows if row["differs"]]
            differing += len(found)
            named += [UserId(str(row["user_id"])) for row in found[: MOST_NAMED - len(named)]]
            if time.monotonic() - told >= _PROGRESS_SECONDS:
                told = time.monotonic()
                say(f"compared {users} of {total} users")
    return Verification(users, differing, tuple(named))


async def _require_triggers(connection: "_Connection", policy: ReputationPolicy) -> None:
    if not (await status(connection, policy)).tracked:
        message = "there are no triggers here, so there are no tallies: run goodstanding migrate"
        raise ConfigurationError(message)
