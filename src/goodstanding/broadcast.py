"""Who says what changed, and who hears it: by Redis pub/sub or, without a Redis, by PostgreSQL's NOTIFY.

Four messages. `changed` and `all`: whose counts changed, and that nothing cached about them is left. `lead`: a relay
begins a term. `beat`: that relay has told everything that was committed when it looked, which was at that moment of
its own clock. A beat that is missing or late is how a process learns that it may be the one who does not hear.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg

from goodstanding.cache import RedisCache
from goodstanding.connections import OUTAGES
from goodstanding.data import Clock, UserId
from goodstanding.errors import CacheAwayError
from goodstanding.metrics import BROADCAST_LISTENERS
from goodstanding.tasks import check_cancelled

if TYPE_CHECKING:
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

Heard = Callable[[Sequence[UserId] | None], None]
"""Is told whose counts changed; None: everybody's may have."""

BELIEF_SECONDS: Final = 1.5
"""So long after a beat a process believes what is cached; with what a beat takes, nothing is stale for 2 s."""

_NEVER: Final = float("inf")
_DRIFT: Final = 0.001
"""So much faster one clock may go than another; those that are disciplined stay within half of it."""
_CHANNEL: Final = "goodstanding"
_AGAIN_SECONDS: Final = 0.2
_CHECK_SECONDS: Final = 0.5
_UNHEARD_CHECKS: Final = 10
_CONNECT_SECONDS: Final = 1.0
_USERS_A_MESSAGE: Final = 200
_BEAT: Final = re.compile(r"([0-9]{1,19}) ([0-9]{1,19})", re.ASCII)
_NOTIFY: Final = "select pg_notify($1::text, message) from unnest($2::text[]) as message"


class Freshness:
    """How much of what is cached may be believed: all of it while beats come, else only what was computed just now.

    `monotonic` gives seconds that never go back; `clock` is compared with the moments at which others computed.
    """

    __slots__ = ("_ahead", "_answered", "_at", "_clock", "_term", "_until", "monotonic")

    def __init__(self, *, clock: Clock, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.monotonic = monotonic
        self._term = 0
        self._answered = -_NEVER
        self._ahead = _NEVER
        self._at = 0.0
        self._until = -_NEVER

    def trusted(self) -> bool:
        """Whether a relay said just now that it has told everything."""
        return self.monotonic() < self._until

    def oldest(self) -> datetime | None:
        """Give the moment before which nothing that is served may have been computed; None: whatever is cached."""
        return None if self.trusted() else self._clock() - timedelta(seconds=BELIEF_SECONDS)

    def lead(self, term: int) -> None:
        """Note a new relay: what the one before said counts no longer."""
        if term > self._term:
            self._term = term
            self._ahead = _NEVER
            self._until = -_NEVER

    def answer(self, asked: float) -> None:
        """Note the answer to a question that was asked then, on the way on which beats come: what follows is younger.

        Without one no beat is believed. Whatever lay in the socket of a process that was frozen, or was held up on
        the way, comes before the answer, or after one to a question that is as old.
        """
        self._answered = asked

    def beat(self, term: int, looked: float) -> None:
        """Note that the relay of this term has told everything that was committed when it `looked`, by its own clock.

        One that another relay has replaced is not believed, and one that comes late not for long: how late is seen
        from the quickest one, so that clocks need not agree, nor go equally fast, and from the last answer. The first
        of a term may be late itself, so it is only measured by. A process that was frozen finds many of these.
        """
        self.lead(term)
        if term == self._term:
            now = self.monotonic()
            measured = self._ahead < _NEVER
            self._ahead = min(self._ahead + _DRIFT * (now - self._at), now - looked)
            self._at = now
            if measured:
                self._until = min(looked + self._ahead, self._answered) + BELIEF_SECONDS

    def lose(self) -> None:
        """Note that something may have been missed."""
        self._until = self._answered = -_NEVER


class Broadcast:
    """What this process hears: each of `heard` is called, in the order in which things were said."""

    def __init__(self, freshness: Freshness, heard: Iterable[Heard]) -> None:
        self.freshness = freshness
        self._heard = heard

    def receive(self, message: bytes) -> None:
        """Take one message; one that nobody of ours wrote is passed over."""
        word, _, rest = message.decode("ascii", "replace").partition(" ")
        if word == "changed":
            self._tell([UserId(user) for user in rest.split(" ")])
        elif word == "all":
            self._tell(None)
        elif (beat := _BEAT.fullmatch(rest)) is not None:
            if word == "lead":
                self.freshness.lead(int(beat[1]))
            elif word == "beat":
                self.freshness.beat(int(beat[1]), int(beat[2]) / 1000)

    def lose(self) -> None:
        """Forget what was known by hearing: something may have been missed."""
        self.freshness.lose()
        self._tell(None)

    def _tell(self, users: Sequence[UserId] | None) -> None:
        for hear in self._heard:
            hear(users)


async def hear_redis(broadcast: Broadcast, cache: RedisCache) -> None:
    """Listen until cancelled, over a connection made anew whenever it, or that of the commands, was lost.

    Also where no beat has come for a while: the server may be there and belong to the Cluster no longer.
    """
    while True:
        check_cancelled()
        questions = _Questions(broadcast.freshness)
        try:
            async with cache.subscription(broadcast.receive, broadcast.lose, questions.answered) as subscription:
                with BROADCAST_LISTENERS.track_inprogress():
                    await subscription.wait_until_lost(_CHECK_SECONDS, wanted=questions.ask)
        except CacheAwayError:
            pass
        await asyncio.sleep(_AGAIN_SECONDS)


class _Questions:
    """When a connection was asked whether it is still there, as long as it has not answered."""

    def __init__(self, freshness: Freshness) -> None:
        self._freshness = freshness
        self._asked: deque[float] = deque()
        self._unheard = 0

    def ask(self) -> bool:
        """Note a question; tells whether the connection is still wanted: beats come over it, or may still come."""
        self._unheard = 0 if self._freshness.trusted() else self._unheard + 1
        self._asked.append(self._freshness.monotonic())
        return self._unheard <= _UNHEARD_CHECKS

    def answered(self) -> None:
        """Note the answer to the oldest one."""
        self._freshness.answer(self._asked.popleft())


class Announcer:
    """Says what changed to the other processes where there is no Redis, and hears what they say.

    It lives on one connection, and raises CacheAwayError while there is none.
    """

    def __init__(self) -> None:
        self._connection: _Connection | None = None
        self._turn = asyncio.Lock()

    async def say(self, users: Sequence[UserId] | None) -> None:
        """Say that these users' counts may have changed, or (None) everybody's; raises CacheAwayError."""
        async with self._turn:
            if self._connection is None:
                raise CacheAwayError
            try:
                await notify(self._connection, *messages(users))
            except OUTAGES as error:
                raise CacheAwayError from error

    async def hear(self, broadcast: Broadcast, database_url: str) -> None:
        """Listen until cancelled, over a connection made anew whenever it was lost."""
        while True:
            check_cancelled()
            with suppress(*OUTAGES):
                await self._hear(broadcast, database_url)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _hear(self, broadcast: Broadcast, database_url: str) -> None:
        connection = await asyncpg.connect(
            database_url, timeout=_CONNECT_SECONDS, command_timeout=_CONNECT_SECONDS, statement_cache_size=0
        )
        try:
            await connection.add_listener(_CHANNEL, lambda *said: broadcast.receive(str(said[3]).encode()))
            # What was loaded while nobody listened may have changed since, and nobody was told.
            broadcast.lose()
            self._connection = connection
            with BROADCAST_LISTENERS.track_inprogress():
                while True:
                    async with self._turn:
                        asked = broadcast.freshness.monotonic()
                        await connection.execute("select")
                        broadcast.freshness.answer(asked)
                    await asyncio.sleep(_CHECK_SECONDS)
        finally:
            self._connection = None
            broadcast.lose()
            connection.terminate()


def lead(term: int) -> str:
    """Write that a relay begins its term."""
    return f"lead {term} 0"


def beat(term: int, looked: float) -> str:
    """Write that the relay of this term has told all that was committed when it looked; in seconds of its own clock."""
    return f"beat {term} {int(looked * 1000)}"


def messages(users: Sequence[UserId] | None) -> Iterator[str]:
    """Write who changed, in messages that PostgreSQL takes (at most 8000 bytes each)."""
    if users is None:
        yield "all"
        return
    for start in range(0, len(users), _USERS_A_MESSAGE):
        yield " ".join(("changed", *users[start : start + _USERS_A_MESSAGE]))


async def notify(connection: "_Connection", *said: str) -> None:
    """Say it to whoever listens in this database, when the connection's transaction commits."""
    await connection.execute(_NOTIFY, _CHANNEL, said)
