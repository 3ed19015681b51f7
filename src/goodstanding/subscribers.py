"""Who is watching whom: one reader for everybody, and for each stream no more than the latest of what it has not sent.

Events carry what a person sees, as it is when they are sent: whatever happened in between is one event. So a stream's
memory is bounded by the users it watches, a user who changes five times is read once, and no order can be mistaken.
"""

import asyncio
import hashlib
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Final, Protocol, Self

import structlog

from goodstanding.data import Clock, ReputationData, UserId
from goodstanding.entry import body
from goodstanding.errors import RateLimitedError, TemporarilyUnavailableError
from goodstanding.metrics import RATE_LIMITED, STREAM_EVENTS, STREAMS, STREAMS_ENDED
from goodstanding.tasks import check_cancelled

_log = structlog.get_logger("goodstanding")
MOST_WATCHED: Final = 50
"""Most users that one stream may watch."""

_USERS_A_READ: Final = 100
_WAKES_A_TURN: Final = 64
_RETRY_AFTER_SECONDS: Final = 5
_GREETING: Final = b"retry: 2000\n\n"
_HEARTBEAT: Final = b":\n\n"
_UNCHANGED: Final = b": nothing has changed\n\n"
_COME_BACK_MS: Final = (500.0, 3000.0)


class Answer(Protocol):
    """What a read gives: None for an unknown user; a negative `ttl` where nobody could be asked whether it holds."""

    @property
    def data(self) -> ReputationData | None:
        """The reputation."""
        ...

    @property
    def ttl(self) -> int:
        """Its remaining life in seconds."""
        ...


class ReadMany(Protocol):
    """Reads up to 100 users; raises TemporarilyUnavailableError when any of them cannot be had."""

    async def __call__(self, user_ids: Sequence[UserId], *, use_cache: bool = True) -> Mapping[UserId, Answer]:
        """Read."""
        ...


class Ending(StrEnum):
    """Why a stream ended."""

    GONE = "gone"
    SLOW = "slow"
    EXPIRED = "expired"
    REVOKED = "revoked"
    AGED = "aged"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things take, in seconds."""

    heartbeat: float = 15.0
    """Silence after which a comment is sent."""
    send: float = 10.0
    """Longest time that a client may take to read what is sent."""
    stop: float = 0.5
    """The same, once the server stops."""
    life: float = 3600.0
    """Longest life of a stream, however long its token holds; up to a tenth less, so that not all end at once."""
    first: float = 10.0
    """Longest wait for the first values."""
    look: float = 0.25
    """How often all these are looked at."""
    mistrust: float = 0.5
    """How often everybody is read again while the broadcast cannot be trusted."""
    renewal: float = 60.0
    """How often everybody is read again in any case: without triggers nothing tells that a value has changed."""
    retry: float = 1.0
    """Longest pause before what could not be read is read again."""
    doubt: float = 1.0
    """How long a value that seems to be older than the one before is read again before it is believed."""
    doubt_pause: float = 0.05
    """Pause between two such reads."""


@dataclass(slots=True, eq=False)
class _Watched:
    """A user somebody is watching, and the one event that all streams share; empty before the first read."""

    user: UserId
    streams: "set[Subscription]" = field(default_factory=set)
    data: ReputationData | None = None
    event: bytes = b""
    mark: int = 0
    doubted: float | None = None
    """Since when values have been coming that seem older than this one."""

    def show(self, data: ReputationData | None, mark: int) -> None:
        """Write the event, up to the `id:` that is each stream's own."""
        self.data, self.mark, self.doubted = data, mark, None
        kind, members = (b"user_not_found", b"}") if data is None else (b"reputation", b"," + body(data)[1:])
        self.event = b'event: %s\ndata: {"user_id":"%s"%s\n' % (kind, self.user.encode(), members)


def _mark(user: UserId, data: ReputationData | None) -> int:
    """Digest what a person sees of a user: 64 bits, the same in every process."""
    seen = "" if data is None else f"{data.score} {data.badge_color} {data.completed_sessions} {data.no_shows}"
    return int.from_bytes(hashlib.blake2b(f"{user} {seen}".encode(), digest_size=8).digest())


class Subscription:
    """One stream: a context manager that gives its place back. Belongs to the Subscribers that opened it.

    Its events' ids are the exclusive or of the marks of all that the client has been shown, so in any process the same
    state of the same users has the same id.
    """

    __slots__ = (
        "_ended",
        "_id",
        "_owner",
        "_pending",
        "_shown",
        "_text",
        "_waiter",
        "caller",
        "drop",
        "ends",
        "holds",
        "ready",
        "sending_since",
        "silent_since",
        "watched",
    )

    def __init__(
        self,
        owner: "Subscribers",
        watched: Sequence[_Watched],
        *,
        caller: str,
        holds: Callable[[], bool],
        ends: tuple[float, Ending],
        now: float,
    ) -> None:
        self.watched = watched
        self.caller = caller
        self.holds = holds
        self.ends = ends
        """When it ends if nothing ends it before, in the loop's time, and why."""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.drop: Callable[[], None] | None = None
        """Ends the connection of a client that does not read; set by whoever writes the stream."""
        # Until the first byte is sent the client counts as one that does not read: nothing is left open for good.
        self.sending_since: float | None = now
        self.silent_since = now
        self._owner = owner
        self._text = _GREETING
        self._pending: dict[_Watched, None] = dict.fromkeys(watched)
        self._shown: dict[_Watched, int] = {}
        self._id = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended: Ending | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.close(self, self._ended or Ending.GONE)

    async def written(self) -> bytes | None:
        """Wait for what is to be sent next; None once the stream has ended."""
        while self._ended is None:
            text, self._text = self._text, b""
            if self._pending:
                text += self._events()
            if text:
                return text
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return None

    def farewell(self) -> bytes:
        """Write when the client shall come back."""
        return b"retry: %d\n\n" % self._owner.come_back_ms()

    def sending(self) -> None:
        """Note that the client is to read something now."""
        self.sending_since = self._owner.now

    def sent(self) -> None:
        """Note that it has."""
        self.sending_since = None
        self.silent_since = self._owner.now

    def resume(self, last_event_id: str) -> None:
        """Pass over the present values where the client has been shown just these."""
        shown = {watched: watched.mark for watched in self.watched}
        state = 0
        for mark in shown.values():
            state ^= mark
        if last_event_id == f"{state:016x}":
            self._shown, self._id, self._text = shown, state, _GREETING + _UNCHANGED
            self._pending.clear()

    def notify(self, watched: _Watched) -> None:
        """Note that a user's event is another one."""
        self._pending[watched] = None
        self._wake()

    def beat(self) -> None:
        """Show that the connection lives."""
        self._text = self._text or _HEARTBEAT
        self._wake()

    def end(self, ending: Ending) -> None:
        """End the stream; the first reason counts."""
        if self._ended is None:
            self._ended = ending
            self._wake()
            if not self.ready.done():
                self.ready.set_exception(TemporarilyUnavailableError())

    def _events(self) -> bytes:
        parts = []
        for watched in self._pending:
            before = self._shown.get(watched, 0)
            if watched.mark != before:
                self._shown[watched] = watched.mark
                self._id ^= before ^ watched.mark
                parts.append(b"%sid: %016x\n\n" % (watched.event, self._id))
        self._pending.clear()
        self._owner.events += len(parts)
        return b"".join(parts)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Subscribers:
    """Everybody's streams, at most `per_process`, and `per_caller` of one caller. Belongs to one event loop.

    `read_many` is called by `run()` alone, one call at a time, so the reads of one user follow one another. `fresh`
    tells whether all changes are heard of; while they are not, everybody is read again twice a second. `keys` gives
    what tokens are checked with; when it is another object, each stream is asked whether its caller's still holds.
    """

    def __init__(
        self,
        read_many: ReadMany,
        *,
        clock: Clock,
        fresh: Callable[[], bool] = lambda: True,
        keys: Callable[[], object] = lambda: None,
        per_caller: int = 20,
        per_process: int = 5000,
        timing: Timing | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.now = 0.0
        """The loop's time, as of the last look at the streams."""
        self.events = 0
        """Events that were sent, and not counted yet."""
        self._read_many = read_many
        self._clock = clock
        self._fresh = fresh
        self._keys = keys
        self._per_caller = per_caller
        self._per_process = per_process
        self._timing = Timing() if timing is None else timing
        self._uniform = uniform
        self._watched: dict[UserId, _Watched] = {}
        self._open: set[Subscription] = set()
        self._callers: Counter[str] = Counter()
        self._stopped = False
        self._work = asyncio.Event()
        self._joining: deque[Subscription] = deque()
        self._urgent: OrderedDict[UserId, None] = OrderedDict()
        self._routine: OrderedDict[UserId, None] = OrderedDict()
        self._doubtful: OrderedDict[UserId, None] = OrderedDict()
        self._failures = 0
        self._retry_at = 0.0
        self._doubts_at = 0.0

    def changed(self, users: Collection[UserId] | None) -> None:
        """Note whose counts may have changed; None: everybody's."""
        if users is None:
            self._routine.update(dict.fromkeys(self._watched))
        else:
            self._urgent.update((user, None) for user in users if user in self._watched)
        self._work.set()

    async def open(
        self,
        users: Iterable[UserId],
        *,
        caller: str,
        last_event_id: str = "",
        expires: datetime | None = None,
        holds: Callable[[], bool] = lambda: True,
    ) -> Subscription:
        """Open a stream of these users, whose present values are known when this returns.

        It ends when `expires` is over, when it `holds` no longer after the keys have changed, and when it is an hour
        old. Raises RateLimitedError when the caller has too many of them, and TemporarilyUnavailableError when the
        process has, when it stops, or when the values cannot be had.
        """
        subscription = self._admit(users, caller, expires, holds)
        try:
            async with asyncio.timeout(self._timing.first):
                await subscription.ready
        except BaseException as error:
            self.close(subscription, Ending.GONE)
            if isinstance(error, TimeoutError):
                raise TemporarilyUnavailableError from None
            raise
        subscription.resume(last_event_id)
        return subscription

    def _admit(
        self, users: Iterable[UserId], caller: str, expires: datetime | None, holds: Callable[[], bool]
    ) -> Subscription:
        if self._callers[caller] >= self._per_caller:
            RATE_LIMITED.labels("stream").inc()
            message = "Too many open streams. Close one first."
            raise RateLimitedError(message, retry_after=_RETRY_AFTER_SECONDS)
        if self._stopped or len(self._open) >= self._per_process:
            raise TemporarilyUnavailableError(retry_after=_RETRY_AFTER_SECONDS)
        self.now = now = asyncio.get_running_loop().time()
        life = self._timing.life * self._uniform(0.9, 1.0)
        left = life if expires is None else (expires - self._clock()).total_seconds()
        ends = (now + left, Ending.EXPIRED) if left < life else (now + life, Ending.AGED)
        watched = [self._watched.setdefault(user, _Watched(user)) for user in dict.fromkeys(users)]
        subscription = Subscription(self, watched, caller=caller, holds=holds, ends=ends, now=now)
        for one in watched:
            one.streams.add(subscription)
        self._open.add(subscription)
        self._callers[caller] += 1
        STREAMS.inc()
        self._joining.append(subscription)
        self._work.set()
        return subscription

    def close(self, subscription: Subscription, ending: Ending) -> None:
        """Forget a stream; its place is free at once."""
        if subscription not in self._open:
            return
        self._open.remove(subscription)
        self._callers[subscription.caller] -= 1
        if not self._callers[subscription.caller]:
            del self._callers[subscription.caller]
        for watched in subscription.watched:
            watched.streams.discard(subscription)
            if not watched.streams:
                del self._watched[watched.user]
        STREAMS.dec()
        STREAMS_ENDED.labels(ending.value).inc()

    def stop(self) -> None:
        """Tell every client to come back, and take no more: the server is about to stop."""
        self._stopped = True
        for subscription in self._open:
            subscription.end(Ending.STOPPED)

    def come_back_ms(self) -> float:
        """Give the milliseconds after which a client shall come back, so that not all of them come at once."""
        return self._uniform(*_COME_BACK_MS)

    async def run(self) -> None:
        """Read whoever changed, for ever, and look after every stream."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_after())
            while True:
                await self._wait_for_work()
                await self._read_next()
                check_cancelled()

    async def _look_after(self) -> None:
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        fresh, keys = True, self._keys()
        while True:
            await asyncio.sleep(self._timing.look)
            self.now = now = loop.time()
            known, keys = keys, self._keys()
            for subscription in tuple(self._open):
                if keys is not known and not subscription.holds():
                    subscription.end(Ending.REVOKED)
                self._attend(subscription, now)
            STREAM_EVENTS.inc(self.events)
            self.events = 0
            was_fresh, fresh = fresh, self._fresh()
            mistrusts = not fresh and (was_fresh or now - renewed >= self._timing.mistrust)
            if mistrusts or (fresh and not was_fresh) or now - renewed >= self._timing.renewal:
                renewed = now
                self.changed(None)
            check_cancelled()

    def _attend(self, subscription: Subscription, now: float) -> None:
        since = subscription.sending_since
        if since is not None:
            if now - since >= (self._timing.stop if self._stopped else self._timing.send):
                subscription.end(Ending.SLOW)
                subscription.sending_since = None
                if subscription.drop is None:
                    self.close(subscription, Ending.SLOW)
                else:
                    subscription.drop()
        elif now >= subscription.ends[0]:
            subscription.end(subscription.ends[1])
        elif now - subscription.silent_since >= self._timing.heartbeat:
            subscription.beat()

    def _due(self) -> float:
        """Tell when there is something to read; in the loop's time."""
        if self._joining:
            return float("-inf")
        changed = self._retry_at if self._urgent or self._routine else float("inf")
        return min(changed, self._doubts_at if self._doubtful else float("inf"))

    async def _wait_for_work(self) -> None:
        loop = asyncio.get_running_loop()
        while (due := self._due()) > loop.time():
            self._work.clear()
            try:
                async with asyncio.timeout_at(None if due == float("inf") else due):
                    await self._work.wait()
            except TimeoutError:
                return

    async def _read_next(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._doubtful and now >= self._doubts_at:
            self._doubts_at = now + self._timing.doubt_pause * self._uniform(0.5, 1.0)
            users: dict[UserId, None] = {}
            self._take(self._doubtful, users)
            await self._renew(users, use_cache=False)
        users = {}
        joining = self._take_joining(users)
        if now >= self._retry_at:
            self._take(self._urgent, users)
            self._take(self._routine, users)
        if not await self._renew(users):
            await self._admit_each(joining, users)
        for subscription in joining:
            if not subscription.ready.done():
                subscription.ready.set_result(None)

    def _take(self, queue: OrderedDict[UserId, None], users: dict[UserId, None]) -> None:
        while queue and len(users) < _USERS_A_READ:
            user, _ = queue.popitem(last=False)
            if user in self._watched:
                users[user] = None

    def _take_joining(self, users: dict[UserId, None]) -> list[Subscription]:
        """Take as many new streams as can be read for at once; each of them whole."""
        taken = []
        while self._joining:
            subscription = self._joining[0]
            if subscription in self._open:
                more = [watched.user for watched in subscription.watched if watched.user not in users]
                if len(users) + len(more) > _USERS_A_READ:
                    break
                users.update(dict.fromkeys(more))
                taken.append(subscription)
            self._joining.popleft()
        for user in users:
            self._urgent.pop(user, None)
            self._routine.pop(user, None)
        return taken

    async def _admit_each(self, joining: Iterable[Subscription], failed: Mapping[UserId, None]) -> None:
        """Read for each new stream alone, once for those of the same users: one's failure is not another's."""
        groups: dict[tuple[UserId, ...], list[Subscription]] = {}
        for subscription in joining:
            groups.setdefault(tuple(watched.user for watched in subscription.watched), []).append(subscription)
        for users, subscriptions in groups.items():
            if failed.keys() != set(users) and await self._renew(dict.fromkeys(users)):
                continue
            for subscription in subscriptions:
                if not subscription.ready.done():
                    subscription.ready.set_exception(TemporarilyUnavailableError())

    async def _renew(self, users: Mapping[UserId, None], *, use_cache: bool = True) -> bool:
        """Read these users and hand what is new to their streams; tells whether they could be read.

        Whoever could not be read is read again after a pause.
        """
        if not users:
            return True
        try:
            answers = await self._read_many([*users], use_cache=use_cache)
        except TemporarilyUnavailableError:
            self._again(users)
            return False
        except Exception:  # noqa: BLE001 - the streams outlive whatever ails a read
            _log.exception("stream_read_failed")
            self._again(users)
            return False
        # A copy of last resort is shown to whoever has nothing, and asked about again.
        stale = [user for user, answer in answers.items() if answer.ttl < 0]
        if stale:
            self._again(stale)
        else:
            self._failures = 0
        await self._show(answers, certain=not use_cache)
        return True

    def _again(self, users: Iterable[UserId]) -> None:
        self._urgent.update((user, None) for user in users if user in self._watched)
        # A fleet that lost its database does not come back to it all at once.
        pause = min(self._timing.retry, 0.05 * 2.0 ** min(self._failures, 10)) * self._uniform(0.5, 1.0)
        self._failures += 1
        self._retry_at = asyncio.get_running_loop().time() + pause

    async def _show(self, answers: Mapping[UserId, Answer], *, certain: bool) -> None:
        woken = 0
        for user, answer in answers.items():
            watched = self._watched.get(user)
            if watched is None or (answer.ttl < 0 and watched.event):
                continue
            mark = _mark(user, answer.data)
            if watched.event and self._doubts(watched, answer.data, mark, certain=certain):
                continue
            changes = mark != watched.mark
            watched.show(answer.data, mark)
            for subscription in tuple(watched.streams) if changes else ():
                subscription.notify(watched)
                woken += 1
                if woken % _WAKES_A_TURN == 0:
                    # Thousands of streams are written to in turns with whatever else the process does.
                    await asyncio.sleep(0)

    def _doubts(self, watched: _Watched, data: ReputationData | None, mark: int, *, certain: bool) -> bool:
        """Tell whether a value may be older than the one that was shown, and have it read past the cache then.

        Only a person who is known has the moment at which the value was computed, and the hosts' clocks may differ: a
        value that the database gave after the other one is newer, whatever its moment, and is believed after a while.
        """
        watched_data, now = watched.data, asyncio.get_running_loop().time()
        since = now if watched.doubted is None else watched.doubted
        if data is not None and watched_data is not None:
            newer = data.cache_timestamp >= watched_data.cache_timestamp
            if mark == watched.mark:
                watched.doubted = None
                return not newer
            believed = newer or (certain and now - since >= self._timing.doubt)
        else:
            believed = certain or mark == watched.mark
        if not believed:
            watched.doubted = since
            self._doubtful[watched.user] = None
        return not believed
