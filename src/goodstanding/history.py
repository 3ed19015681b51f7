"""SessionHistory: what PostgreSQL knows about users' sessions, by the named queries of queries.sql."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Final, Self, TypeAlias

import asyncpg

from goodstanding.connections import OUTAGES, Connections
from goodstanding.data import AtFault, SessionCounts, SessionId, UserId
from goodstanding.errors import InvalidInputError, SessionNotFoundError, TemporarilyUnavailableError
from goodstanding.metrics import QUERY_ERRORS, QUERY_SECONDS
from goodstanding.policy import ReputationPolicy
from goodstanding.tasks import background

if TYPE_CHECKING:
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    _Lent: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

MOST_IDS: Final = 100
_MOST_ACTIVE_SECONDS: Final = 60.0
_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def named_queries(text: str) -> dict[str, str]:
    """Read queries that each follow a line `-- name: ...`; what stands before the first name is a comment."""
    _, *parts = _NAME.split(text)
    return {name: query.strip() for name, query in zip(parts[::2], parts[1::2], strict=True)}


QUERIES: Final = named_queries((files("goodstanding") / "queries.sql").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class TallyStatus:
    """How the tallies are.

    `tracked`: every trigger is there; `same_policy`: they mean what the asker's policy means; when one of the two is
    false, every load recounts. `counting`: everybody is being counted; `waiting`: somebody is to be recounted;
    `pending`: changes wait to be folded.
    """

    tracked: bool
    same_policy: bool
    counting: bool
    waiting: bool
    pending: bool


class SessionHistory:
    """Counts of completed and missed sessions, and the verdicts that decide them.

    Every call is one statement and ends within the deadline, whatever state the server is in. Whatever goes wrong
    with the database is a TemporarilyUnavailableError whose `__cause__` is the failure itself.
    """

    def __init__(self, connections: Connections, *, deadline: float) -> None:
        self._connections = connections
        self._deadline = deadline

    @classmethod
    @asynccontextmanager
    async def open(
        cls, database_url: str, *, pool_size: int, transaction_pooler: bool, deadline: float
    ) -> AsyncIterator[Self]:
        """Open a history of at most `pool_size` connections, made when needed: the database may be down.

        `deadline` is the longest wait of one call, in seconds, from the wait for a connection to the last row.
        """
        async with background() as spawn:
            pool = await asyncpg.create_pool(
                database_url,
                min_size=0,
                max_size=pool_size,
                timeout=deadline,
                reset=_keep,
                # Without the cache asyncpg sends the whole statement (parse, bind, execute, sync) in one piece after
                # asking for its types, so a pooler may answer the two from different backends. It keeps no session.
                statement_cache_size=0 if transaction_pooler else 100,
                # Some poolers refuse start-up parameters that they do not know.
                server_settings={} if transaction_pooler else {"application_name": "goodstanding"},
            )
            connections = Connections(pool, spawn, most=pool_size, deadline=deadline)
            spawn(connections.close_unused())
            try:
                yield cls(connections, deadline=deadline)
            finally:
                with suppress(TimeoutError):
                    async with asyncio.timeout(deadline):
                        await connections.close()
                        await pool.close()
                pool.terminate()

    async def counts(
        self, user_ids: Sequence[UserId], policy: ReputationPolicy, *, deadline: float | None = None
    ) -> dict[UserId, SessionCounts]:
        """Give the counts of 1 to 100 users under a policy; an unknown user's id is absent.

        Within `deadline` seconds, where it is shorter than the history's. Raises TemporarilyUnavailableError.
        """
        if not 1 <= len(user_ids) <= MOST_IDS:
            message = f"counts takes 1 to {MOST_IDS} users"
            raise ValueError(message)
        rows = await self._fetch("counts", user_ids, *policy.meaning, deadline=deadline)
        return {
            UserId(str(row["user_id"])): SessionCounts(completed=row["completed"], no_shows=row["no_shows"])
            for row in rows
        }

    async def attribute(
        self, session_id: SessionId, at_fault: AtFault, *, reason: str, said_by: str
    ) -> tuple[UserId, UserId]:
        """Append a verdict on a session and give its two users; the newest verdict of a session stands.

        `reason` and `said_by` hold 1 to 1000 characters. Raises SessionNotFoundError, InvalidInputError for a text
        that PostgreSQL does not take, TemporarilyUnavailableError.
        """
        rows = await self._fetch("attribute", session_id, at_fault.value, reason, said_by)
        if not rows:
            raise SessionNotFoundError
        return UserId(str(rows[0]["user1_id"])), UserId(str(rows[0]["user2_id"]))

    async def most_active(self, how_many: int) -> list[UserId]:
        """Give at most `how_many` users (1 to 1,000,000) with the most sessions lately, most first; within a minute.

        Raises TemporarilyUnavailableError.
        """
        rows = await self._fetch("most_active", how_many, deadline=_MOST_ACTIVE_SECONDS)
        return [UserId(str(row["user_id"])) for row in rows]

    async def status(self, policy: ReputationPolicy) -> TallyStatus:
        """Tell how the tallies are, seen from a policy; raises TemporarilyUnavailableError."""
        (row,) = await self._fetch("status", *policy.meaning)
        return TallyStatus(*row)

    async def ping(self) -> None:
        """Raise TemporarilyUnavailableError unless counts could be answered now."""
        await self._fetch("ping")

    async def _fetch(self, name: str, *values: object, deadline: float | None = None) -> list[asyncpg.Record]:
        try:
            with QUERY_SECONDS.labels(name).time():
                async with (
                    asyncio.timeout(self._deadline if deadline is None else deadline),
                    self._lent() as connection,
                ):
                    return await connection.fetch(QUERIES[name], *values)
        except (asyncpg.DataError, asyncpg.CheckViolationError):
            raise InvalidInputError from None
        except OUTAGES as error:
            QUERY_ERRORS.labels(name).inc()
            raise TemporarilyUnavailableError from error

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator["_Lent"]:
        connection = await self._connections.acquire()
        try:
            yield connection
        except asyncio.CancelledError:
            # The server is asked to stop the query; nobody waits for that here.
            self._connections.discard(connection)
            raise
        except BaseException:
            self._connections.give_back(connection)
            raise
        self._connections.give_back(connection)


async def _keep(_: "_Connection") -> None:
    """Reset nothing when a connection comes back: no query of ours changes it, and a reset costs a round trip."""
