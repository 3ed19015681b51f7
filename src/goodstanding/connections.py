"""Connections to PostgreSQL: whoever asks gets the first that comes free, and few are opened at once."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg

from goodstanding.tasks import Spawn, check_cancelled

if TYPE_CHECKING:
    Lent: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

# The last two are how asyncpg and uvloop tell of a connection that the server ended between two of their lines.
OUTAGES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    OSError,
    asyncpg.InternalClientError,
    RuntimeError,
)
AT_ONCE: Final = 2
_PATIENCE_SECONDS: Final = 0.05
_AGAIN_SECONDS: Final = 0.1
_UNUSED_SECONDS: Final = 60.0


class Connections:
    """At most `most` connections of a pool, kept here between their uses; nobody else may use the pool.

    To open a connection costs both sides as much as fifty queries. A pool opens one for each who asks while none is
    free: after an outage all of them, in every process, while everybody waits. Here whoever asks gets whichever is free
    first. Another one is opened only for somebody who has waited for a while, and at most AT_ONCE are being opened.
    Where no more can be had, those that are open serve everybody.
    """

    def __init__(self, pool: "Pool", spawn: Spawn, *, most: int, deadline: float) -> None:
        self._pool = pool
        self._spawn = spawn
        self._most = most
        self._deadline = deadline
        self._idle: list[Lent] = []
        self._open = 0
        """Those that are idle or lent."""
        self._opening = 0
        self._open_again = float("-inf")
        self._unused = 0
        """So many have been idle ever since somebody looked."""
        self._waiting: deque[tuple[float, asyncio.Future[Lent]]] = deque()
        """Since when, and for what."""
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self) -> "Lent":
        """Lend a connection, to be given back. Raises one of OUTAGES where there is none and none can be opened."""
        while self._idle:
            connection = self._idle.pop()
            self._unused = min(self._unused, len(self._idle))
            if not is_closed(connection):
                return connection
            self.discard(connection)
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[Lent] = loop.create_future()
        self._waiting.append((loop.time(), mine))
        self._grow()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self.give_back(mine.result())
            raise

    def give_back(self, connection: "Lent") -> None:
        """Take back a connection over which nothing is under way."""
        if is_closed(connection):
            self.discard(connection)
        elif (mine := self._next()) is not None:
            mine.set_result(connection)
        else:
            self._idle.append(connection)

    def discard(self, connection: "Lent") -> None:
        """Take back a connection that is closed, or over which a query was given up: the pool sees to it."""
        self._spawn(self._release(connection))

    async def close_unused(self) -> None:
        """Leave to the pool, which closes it in time, whatever nobody has needed for a minute; until cancelled."""
        while True:
            check_cancelled()
            self._unused = len(self._idle)
            await asyncio.sleep(_UNUSED_SECONDS)
            unused, self._idle = self._idle[: self._unused], self._idle[self._unused :]
            for connection in unused:
                self.discard(connection)

    async def close(self) -> None:
        """Leave all that is idle to the pool, and open nothing more."""
        self._most = 0
        if self._timer is not None:
            self._timer.cancel()
        while self._idle:
            await self._release(self._idle.pop())

    async def _release(self, connection: "Lent") -> None:
        try:
            # A query that was given up is ended by the server. A hung one never does that.
            with suppress(*OUTAGES):
                await self._pool.release(connection, timeout=self._deadline)
        finally:
            self._open -= 1
            self._grow()

    def _next(self) -> "asyncio.Future[Lent] | None":
        """Give the first who still waits."""
        while self._waiting:
            _, mine = self._waiting.popleft()
            if not mine.done():
                return mine
        return None

    def _grow(self) -> None:
        """Open one more for those who wait, if it is time and as many are not being opened as may."""
        waiting = self._waiting
        while waiting and waiting[0][1].done():
            waiting.popleft()
        if self._opening >= min(AT_ONCE, len(waiting)) or self._open + self._opening >= self._most:
            return
        loop = asyncio.get_running_loop()
        due = max(waiting[0][0] + _PATIENCE_SECONDS, self._open_again)
        if self._open and loop.time() < due:
            if self._timer is None:
                self._timer = loop.call_at(due, self._ring)
            return
        self._opening += 1
        self._spawn(self._open_one())

    def _ring(self) -> None:
        self._timer = None
        self._grow()

    async def _open_one(self) -> None:
        try:
            connection = await self._pool.acquire()
        except OUTAGES as error:
            self._opening -= 1
            self._open_again = asyncio.get_running_loop().time() + _AGAIN_SECONDS
            while not self._open and (mine := self._next()) is not None:
                mine.set_exception(error)
            # Whoever waits is not left to those who may keep theirs for long.
            self._grow()
        except BaseException:
            self._opening -= 1
            raise
        else:
            self._opening -= 1
            self._open += 1
            self.give_back(connection)
            self._grow()


def is_closed(connection: "Lent") -> bool:
    """Tell whether a connection has ended, as far as this end of it knows."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has it back already
        return True
