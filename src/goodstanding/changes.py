"""The relay: change -> fold -> invalidate -> publish. One process of the fleet does it, and any other takes over.

Reads are exact without it (see migrations/0002_changes.sql): it makes caches follow within milliseconds, and keeps
reads cheap. It commits a fold only when nobody can be served any more what was known before, so nothing is lost while
Redis or this process is away, and a fold that is done twice is harmless.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import asyncpg
import structlog

from goodstanding import tallies
from goodstanding.broadcast import beat, lead, messages, notify
from goodstanding.cache import RedisCache
from goodstanding.connections import OUTAGES
from goodstanding.data import Clock, UserId
from goodstanding.errors import CacheAwayError, TemporarilyUnavailableError
from goodstanding.metrics import CHANGE_SECONDS, CHANGES_FOLDED, RELAY_FAILURES, RELAY_LEADING, USERS_RECOUNTED
from goodstanding.tallies import LEAD, Folded, Recounted
from goodstanding.tasks import background, check_cancelled

if TYPE_CHECKING:
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

BEAT_SECONDS: Final = 0.25
_LATE_SECONDS: Final = 0.4

_log = structlog.get_logger("goodstanding")
_BATCH: Final = 2000
_USERS_A_RECOUNT: Final = 100
_RECOUNT_TAKES: Final = 0.25
"""About how long one recount shall take, in seconds: folds and beats wait for it."""

_RECOUNT_SECONDS: Final = (0.05, 1.0)
_FOLLOW_SECONDS: Final = (0.2, 0.4)
_AWAKE_SECONDS: Final = 0.3
_DEADLINE_SECONDS: Final = 5.0
_RECOUNT_DEADLINE_SECONDS: Final = 300.0
_CONNECT_SECONDS: Final = 1.0
_IDLE: Final = "select set_config('idle_session_timeout', '1000', false)"
_LEAD: Final = "select (extract(epoch from clock_timestamp()) * 1000000)::bigint where pg_try_advisory_lock($1::bigint)"


class Ledger(Protocol):
    """What the relay does in the database, over one session; a failure of any kind is a TemporarilyUnavailableError."""

    async def lead(self) -> int | None:
        """Become the one that leads, until the session ends; gives the term, later ones being greater, or None."""
        ...

    async def pending(self) -> bool:
        """Tell whether any change waits."""
        ...

    def folding(self, batch: int) -> AbstractAsyncContextManager[Folded]:
        """Fold at most `batch` changes, and commit that when the block ends without an error."""
        ...

    async def recount(self, batch: int) -> Recounted:
        """Count again at most `batch` users who are due."""
        ...

    async def notify(self, *said: str) -> None:
        """Say something to whoever listens in this database: in `folding`, when that is committed."""
        ...


class Publisher(Protocol):
    """Whom the relay tells. Every method raises CacheAwayError while they cannot be told."""

    @property
    def available(self) -> bool:
        """Whether anybody can be told at all."""
        ...

    async def lead(self, ledger: Ledger, term: int) -> None:
        """Say that a relay begins its term."""
        ...

    async def changed(self, ledger: Ledger, users: Sequence[UserId] | None) -> None:
        """Drop what is cached about these users, or (None) about everybody, and say so."""
        ...

    async def beat(self, ledger: Ledger, term: int, looked: float) -> None:
        """Say that everything is told that was committed when the relay looked, in seconds of its own clock."""
        ...


class RedisPublisher:
    """Tells Redis, and through it every process."""

    def __init__(self, cache: RedisCache) -> None:
        self._cache = cache

    @property
    def available(self) -> bool:
        """Whether Redis takes writes."""
        return self._cache.available

    async def lead(self, _ledger: Ledger, term: int) -> None:
        """Say that a relay begins its term."""
        await self._cache.say(lead(term))

    async def changed(self, ledger: Ledger, users: Sequence[UserId] | None) -> None:
        """Drop what Redis holds, then say so."""
        if users is None:
            async with _awake(ledger):
                await self._cache.invalidate_all()
        else:
            await self._cache.invalidate(users)

    async def beat(self, ledger: Ledger, term: int, looked: float) -> None:
        """Say that everything is told; a Redis that may have lost an invalidation is emptied first."""
        async with _awake(ledger):
            await self._cache.say_vouched(beat(term, looked))


@asynccontextmanager
async def _awake(ledger: Ledger) -> AsyncIterator[None]:
    """Keep the session from looking frozen while something else may take long."""
    done = asyncio.Event()

    async def show() -> None:
        while not done.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_AWAKE_SECONDS):
                    await done.wait()
                    return
            try:
                await ledger.pending()
            except Exception:  # noqa: BLE001 - whoever needs the session next finds out by himself
                return

    async with background() as spawn:
        showing = spawn(show())
        try:
            yield
        finally:
            done.set()
            await asyncio.wait([showing])


class NotifyPublisher:
    """Tells every process by PostgreSQL itself, one NOTIFY for many users: there is no Redis."""

    available = True

    async def lead(self, ledger: Ledger, term: int) -> None:
        """Say that a relay begins its term."""
        await ledger.notify(lead(term))

    async def changed(self, ledger: Ledger, users: Sequence[UserId] | None) -> None:
        """Say whose counts changed, when the fold is committed."""
        await ledger.notify(*messages(users))

    async def beat(self, ledger: Ledger, term: int, looked: float) -> None:
        """Say that everything is told."""
        await ledger.notify(beat(term, looked))


class SessionLedger:
    """The tallies over one connection of our own, which must keep its session: the lead is an advisory lock.

    The server ends a session that is silent for a second, so a relay that freezes holds nobody up.
    """

    def __init__(self, connection: "_Connection") -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, database_url: str) -> AsyncIterator["SessionLedger"]:
        """Open a session; whatever fails in it raises TemporarilyUnavailableError."""
        try:
            connection = await asyncpg.connect(
                database_url, timeout=_CONNECT_SECONDS, command_timeout=_DEADLINE_SECONDS, statement_cache_size=100
            )
        except OUTAGES as error:
            raise TemporarilyUnavailableError from error
        try:
            await connection.execute(_IDLE)
            yield cls(connection)
        except OUTAGES as error:
            raise TemporarilyUnavailableError from error
        finally:
            # Not in order: a server that hangs is not waited for, and the lead ends with the connection all the same.
            connection.terminate()

    async def lead(self) -> int | None:
        """Take the advisory lock, if nobody has it; the term is the database's time in microseconds."""
        term: int | None = await self._connection.fetchval(_LEAD, LEAD)
        return term

    async def pending(self) -> bool:
        """Tell whether any change waits."""
        return await tallies.pending(self._connection)

    @asynccontextmanager
    async def folding(self, batch: int) -> AsyncIterator[Folded]:
        """Fold in a transaction of its own."""
        async with self._connection.transaction(isolation="read_committed"):
            yield await tallies.fold(self._connection, batch)

    async def recount(self, batch: int) -> Recounted:
        """Count again, in a transaction of its own."""
        return await tallies.recount(self._connection, batch, timeout=_RECOUNT_DEADLINE_SECONDS)

    async def notify(self, *said: str) -> None:
        """Say something when the transaction commits, or at once."""
        await notify(self._connection, *said)


class Relay:
    """Carries what the triggers appended to the tallies and to the caches, while it leads; else waits to lead.

    `open_ledger` opens a session with the database; `poll_seconds` is how often an idle relay looks for changes.
    """

    def __init__(
        self,
        open_ledger: Callable[[], AbstractAsyncContextManager[Ledger]],
        publisher: Publisher,
        *,
        poll_seconds: float,
        clock: Clock,
        random: Callable[[float, float], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_ledger = open_ledger
        self._publisher = publisher
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._random = random
        self._monotonic = monotonic
        self._causes: set[str] = set()
        """By which it failed since it last worked."""

    async def run(self) -> None:
        """Lead or wait to lead, until cancelled; an outage ends the session, and the next one goes on."""
        while True:
            check_cancelled()
            if self._publisher.available:
                try:
                    async with self._open_ledger() as ledger:
                        await self._serve(ledger)
                except Exception as error:  # noqa: BLE001 - see below
                    # Whatever it was, reads are exact without a relay: the process that serves them must outlive it.
                    self._failed(error)
            await asyncio.sleep(self._random(*_FOLLOW_SECONDS))

    def _failed(self, error: Exception) -> None:
        """Count a failure, and tell of it, once for each cause until the relay has worked again."""
        outage = isinstance(error, TemporarilyUnavailableError)
        # What ails the database comes as the cause of an outage. Its text may quote anything.
        origin = error.__cause__ if outage and not isinstance(error, CacheAwayError) else None
        cause = type(origin or error).__name__
        RELAY_FAILURES.labels(cause).inc()
        if cause in self._causes:
            return
        self._causes.add(cause)
        if outage:
            _log.warning("relay_interrupted", cause=cause)
        else:
            _log.exception("relay_failed")

    async def _serve(self, ledger: Ledger) -> None:
        while (term := await ledger.lead()) is None:
            check_cancelled()
            await asyncio.sleep(self._random(*_FOLLOW_SECONDS))
        _log.info("relay_leads")
        with RELAY_LEADING.track_inprogress():
            await self._publisher.lead(ledger, term)
            try:
                await self._lead(ledger, term)
            finally:
                _log.info("relay_stopped")

    async def _lead(self, ledger: Ledger, term: int) -> None:
        beat_due = recount_due = self._monotonic()
        users = _USERS_A_RECOUNT
        while True:
            check_cancelled()
            looked = self._monotonic()
            if await ledger.pending() and not await self._fold(ledger):
                continue
            # A look that is long past, because a fold took long or this process was frozen, is not spoken of.
            if looked >= beat_due and self._monotonic() - looked < _LATE_SECONDS:
                beat_due = looked + BEAT_SECONDS
                await self._publisher.beat(ledger, term, looked)
            if looked >= recount_due:
                began = self._monotonic()
                recounted = await ledger.recount(users)
                USERS_RECOUNTED.inc(recounted.users)
                ended = self._monotonic()
                recount_due = ended + _RECOUNT_SECONDS[0 if recounted.users else 1]
                fitting = int(users * _RECOUNT_TAKES / max(ended - began, 0.001))
                users = max(1, min(fitting, 2 * users, _USERS_A_RECOUNT))
                # It has done everything that it is for.
                self._causes.clear()
            await asyncio.sleep(self._poll_seconds)

    async def _fold(self, ledger: Ledger) -> bool:
        """Fold a batch, and tell of it before that is committed; gives whether it was the last."""
        async with ledger.folding(_BATCH) as folded:
            if folded.everybody:
                await self._publisher.changed(ledger, None)
            elif folded.users:
                await self._publisher.changed(ledger, folded.users)
            if folded.oldest is not None:
                CHANGE_SECONDS.observe(max(0.0, (self._clock() - folded.oldest).total_seconds()))
        CHANGES_FOLDED.inc(folded.changes)
        return folded.changes < _BATCH
