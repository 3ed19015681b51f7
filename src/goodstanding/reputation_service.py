"""The service: cache -> history -> calculator -> cache. It alone decides where an answer comes from."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from itertools import count
from random import getrandbits
from typing import Final, NamedTuple, Self

import structlog

from goodstanding.breaker import Breaker, watch
from goodstanding.cache import Cache
from goodstanding.calculator import ReputationCalculator
from goodstanding.data import AtFault, Clock, ReputationData, SessionId, UserId
from goodstanding.entry import Entry, Fetched, Lives, peeked, timestamp
from goodstanding.errors import CacheAwayError, TemporarilyUnavailableError, UserNotFoundError
from goodstanding.history import SessionHistory
from goodstanding.metrics import CACHE_FILLS, CACHE_READS, INVALIDATIONS, LOADS, LOADS_REFUSED, STALE_SERVED
from goodstanding.policy import ReputationPolicy
from goodstanding.tasks import Spawn, background

_log = structlog.get_logger("goodstanding")
_REFRESH_AT: Final = 0.8
_REFRESH_JITTER: Final = 0.1
_POLL_SECONDS: Final = (0.002, 0.02)
_PROBE_SECONDS: Final = 0.5
_CHECK_SECONDS: Final = 1.0
_MOST_WAIT: Final = 0.5
"""Of the load deadline: how long a load may wait for another process, and expect to wait for its turn. The rest is for
its own query."""

_PACE_WEIGHT: Final = 0.1
_HITS: Final = CACHE_READS.labels("hit")
_MISSES: Final = CACHE_READS.labels("miss")
MOST_USERS: Final = 100
"""Most users that one call may ask for."""


class Source(StrEnum):
    """Where an answer came from."""

    HIT = "hit"
    MISS = "miss"
    REQUEST = "request"
    BYPASS = "bypass"
    STALE = "stale"


class LoadReason(StrEnum):
    """Why PostgreSQL is asked."""

    MISS = "miss"
    REFRESH = "refresh"
    REQUEST = "request"
    AWAY = "away"


_SOURCES: Final = {
    LoadReason.MISS: Source.MISS,
    LoadReason.REQUEST: Source.REQUEST,
    LoadReason.AWAY: Source.BYPASS,
}
"""What a read tells of a loaded answer: the reason is the read's own, whoever's load it shared."""

_UNCACHED: Final = frozenset({LoadReason.REQUEST, LoadReason.AWAY})
"""Loads that never end with a value from the cache."""


class Answer(NamedTuple):
    """One user's reputation and where it came from; an unknown user's entry has no data.

    `ttl` is the entry's remaining life in whole seconds, negative when it is stale.
    """

    entry: Entry
    source: Source
    ttl: int

    @property
    def data(self) -> ReputationData | None:
        """The reputation; None for an unknown user."""
        return self.entry.data


@dataclass(slots=True)
class Look:
    """What a look into the cache showed, which began at a moment of the service's own order of events."""

    begin: int
    leases: "dict[UserId, str | None]"
    """Whom it looked for, and whose lease was out."""
    answers: "dict[UserId, Answer]" = field(default_factory=dict)
    reason: LoadReason = LoadReason.REQUEST
    """Why whatever is missing is loaded."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a load ended with; where it is `stale`, the last known good copies of those users who have one."""

    entries: Mapping[UserId, Entry]
    stale: bool = False


@dataclass(slots=True, eq=False)
class _Flight:
    """One load under way, of one or more users, which any number of reads may share."""

    users: tuple[UserId, ...]
    reason: LoadReason
    token: str
    loaded: "asyncio.Future[_Loaded]"
    until: float
    """The moment, on the loop's clock, until which it may wait and ask."""
    before: "tuple[_Flight, ...]" = ()
    """Loads of the same users that were under way when this one was begun."""
    leased: set[UserId] = field(default_factory=set)
    started: int | None = None
    """The moment at which it began to read its outcome, in the service's own order of events; None: not yet."""
    newest: int = -1
    """The moment at which the newest of the reads that share it began."""
    _waiting: "list[asyncio.Future[None]]" = field(default_factory=list)

    async def landed(self) -> None:
        """Wait for the outcome, without a part in the load: whoever goes away takes it from nobody."""
        if not self.loaded.done():
            # Of one's own, and not asyncio.shield: that costs another turn of the loop.
            mine = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            await mine

    def land(self, outcome: _Loaded | Exception) -> None:
        """Hand the outcome, the first one alone, to everyone who shares the load."""
        if self.loaded.done():
            return
        if isinstance(outcome, Exception):
            self.loaded.set_exception(outcome)
            self.loaded.exception()  # retrieved, even if everyone who waited has gone
        else:
            self.loaded.set_result(outcome)
        for mine in self._waiting:
            if not mine.done():
                mine.set_result(None)

    def serves(self, user_id: UserId, *, begin: int, lease: str | None) -> bool:
        """Tell whether a read that began at `begin`, and then saw `lease`, may share this load.

        It may when the query began after the read did, or when the lease still holds: in both cases no invalidation
        that came before the read can be missing from what is loaded.
        """
        if self.started is None or self.started > begin:
            return True
        return lease is not None and user_id in self.leased and lease == self.token


class ReputationService:
    """Reputations, exact and fast, under one policy. Open it with `open`; it owns the loads that it starts.

    `load_deadline` and `cache_wait` are in seconds; at most `concurrent_loads` queries run at once. What is not cached
    while loads have to wait for longer than half of the deadline is refused at once: it would wait in vain.
    """

    def __init__(  # noqa: PLR0913 - one wiring, all by name
        self,
        *,
        cache: Cache,
        history: SessionHistory,
        policy: ReputationPolicy,
        lives: Lives,
        load_deadline: float,
        cache_wait: float,
        concurrent_loads: int,
        clock: Clock,
        random: Callable[[float, float], float],
        spawn: Spawn,
    ) -> None:
        self.policy = policy
        self._cache = cache
        self._history = history
        self._calculator = ReputationCalculator(policy)
        self._life, self._unknown_life = lives.value / 1000, lives.unknown / 1000
        self._refresh_from = self._life * _REFRESH_AT
        self._load_deadline = load_deadline
        self._cache_wait = cache_wait
        self._clock = clock
        self._random = random
        self._spawn = spawn
        # Bound now: a logger that is looked up costs more than a line that is not written.
        self._log = _log.bind()
        self._slots = asyncio.Semaphore(concurrent_loads)
        self._concurrent_loads = concurrent_loads
        self._pace = 0.0
        """About how many seconds pass from one query's end to the next one's while loads wait."""
        self._ended_at: float | None = None
        self._database = Breaker("database")
        self._flights: dict[UserId, _Flight] = {}
        self._loads: dict[asyncio.Task[None], _Flight] = {}
        self._refreshing: set[UserId] = set()
        self._events = count()
        self._looking: list[tuple[UserId, Callable[[Look | None], None]]] = []
        self._checked = float("-inf")
        self._answers = True
        """Whether the database answered when `check` asked it last."""

    @classmethod
    @asynccontextmanager
    async def open(  # noqa: PLR0913 - one wiring, all by name
        cls,
        *,
        cache: Cache,
        history: SessionHistory,
        policy: ReputationPolicy,
        lives: Lives,
        load_deadline: float,
        cache_wait: float,
        concurrent_loads: int,
        clock: Clock,
        random: Callable[[float, float], float],
    ) -> AsyncIterator[Self]:
        """Open the service over an open cache and an open history."""
        async with background() as spawn:
            service = cls(
                cache=cache,
                history=history,
                policy=policy,
                lives=lives,
                load_deadline=load_deadline,
                cache_wait=cache_wait,
                concurrent_loads=concurrent_loads,
                clock=clock,
                random=random,
                spawn=spawn,
            )
            spawn(watch(service._database, history.ping, every=_PROBE_SECONDS))
            try:
                yield service
            finally:
                await service._settle()

    async def check(self) -> tuple[str, ...]:
        """Name the dependencies that are away: of `database` and `cache`.

        It asks the database at most once a second, and not twice at a time; in between it tells what it saw last. What
        it sees is no more to the circuit than what one read sees: a single late answer takes nothing from anybody.
        """
        loop = asyncio.get_running_loop()
        if loop.time() - self._checked >= _CHECK_SECONDS:
            self._checked = float("inf")
            try:
                await self._history.ping()
            except TemporarilyUnavailableError:
                self._answers = False
                self._database.failed()
            else:
                self._answers = True
                self._database.close()
            finally:
                self._checked = loop.time()
        away = {"database": not (self._answers and self._database.closed), "cache": not self._cache.available}
        return tuple(name for name, is_away in away.items() if is_away)

    async def read(self, user_id: UserId, *, use_cache: bool = True, look: Look | None = None) -> Answer:
        """Answer for one user; raises UserNotFoundError and TemporarilyUnavailableError.

        A `look` at this user that was taken for this read is not taken again.
        """
        answer = await self._read(user_id, use_cache=use_cache, look=look)
        if answer.entry.body is None:
            raise UserNotFoundError
        return answer

    async def _read(self, user_id: UserId, *, use_cache: bool, look: Look | None = None) -> Answer:
        if look is None:
            packed = self._cache.peek(user_id) if use_cache else None
            look = Look(next(self._events), {user_id: None})
            if packed is not None:
                self._note(look, [Fetched(Entry.unpack(packed), None)])
            elif use_cache:
                look = await self._looked(user_id)
        return look.answers.get(user_id) or (await self._load([user_id], look))[user_id]

    async def read_many(self, user_ids: Sequence[UserId], *, use_cache: bool = True) -> Mapping[UserId, Answer]:
        """Answer for up to 100 distinct users with one cache round trip and at most one query.

        `Answer.data` is None for unknown users. Raises TemporarilyUnavailableError when any of them cannot be had.
        """
        look = Look(next(self._events), dict.fromkeys(user_ids))
        if use_cache:
            await self._fetch(look)
        missing = [user for user in look.leases if user not in look.answers]
        return look.answers | await self._load(missing, look) if missing else look.answers

    def peek(self, user_id: str) -> bytes | None:
        """Give what is served of a user without asking anybody, if anything is, packed; any text may be asked for."""
        return self._cache.peek(user_id)

    def peek_many(self, user_ids: Sequence[str]) -> Mapping[str, bytes] | None:
        """Give as JSON what is served of all these users without asking anybody, and count the hits.

        An unknown user is `null`. None: more is to be done about one of them, a look or a refresh. Any text may be
        asked for.
        """
        refreshed = timestamp(self._clock() - timedelta(seconds=self._refresh_from)).encode()
        bodies = {}
        for user in user_ids:
            packed = self._cache.peek(user)
            body = None if packed is None else peeked(packed, refreshed)
            if body is None:
                return None
            bodies[user] = body
        _HITS.inc(len(bodies))
        return bodies

    def look(self, user_id: UserId, tell: Callable[[Look | None], None]) -> None:
        """Look a user up in the cache, and tell what it showed, or None where it came to nothing.

        All looks of one turn of the loop are one, and begin the loads of those whom nobody knows. `tell` must not
        raise.
        """
        if not self._looking:
            asyncio.get_running_loop().call_soon(self._start_looking)
        self._looking.append((user_id, tell))

    def horizon(self, entry: Entry) -> tuple[float, float, float]:
        """Tell when a known user's entry was computed, may first be refreshed, and expires; in seconds since 1970."""
        computed = entry.computed_at.timestamp()
        return computed, computed + self._refresh_from, computed + self._life

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Drop what is cached about these users; raises CacheAwayError when that cannot be done now."""
        try:
            await self._cache.invalidate(user_ids)
        except CacheAwayError:
            INVALIDATIONS.labels("failed").inc(len(user_ids))
            raise
        INVALIDATIONS.labels("done").inc(len(user_ids))

    async def invalidate_all(self) -> int:
        """Drop what is cached about everybody; gives the number of values dropped. Raises CacheAwayError."""
        try:
            dropped = await self._cache.invalidate_all()
        except CacheAwayError:
            INVALIDATIONS.labels("failed").inc()
            raise
        INVALIDATIONS.labels("done").inc(dropped)
        return dropped

    async def attribute(self, session_id: SessionId, at_fault: AtFault, *, reason: str, said_by: str) -> bool:
        """Record a verdict and drop both users from the cache; tells whether the cache could be told.

        Raises SessionNotFoundError and TemporarilyUnavailableError; nothing is recorded then.
        """
        users = await self._history.attribute(session_id, at_fault, reason=reason, said_by=said_by)
        try:
            await self.invalidate(users)
        except CacheAwayError:
            return False
        return True

    async def _looked(self, user_id: UserId) -> Look:
        told: asyncio.Future[Look | None] = asyncio.get_running_loop().create_future()
        self.look(user_id, lambda look: None if told.done() else told.set_result(look))
        look = await told
        if look is None:
            raise TemporarilyUnavailableError
        return look

    def refuses(self, user_id: UserId, look: Look) -> bool:
        """Refuse, if need be, the read of a user whom this look did not find: nobody loads him, and none has room."""
        refused = look.leases[user_id] is None and user_id not in self._flights and not self._has_room(1)
        if refused:
            LOADS_REFUSED.inc()
        return refused

    def _start_looking(self) -> None:
        looking, self._looking = self._looking, []
        looked: list[Look] = []

        async def look() -> None:
            look = Look(next(self._events), dict.fromkeys(user for user, _ in looking))
            try:
                # A lease that nobody may use would hold up everybody else.
                await self._fetch(look, token=_token() if self._has_room(len(look.leases)) else None)
            except Exception:  # noqa: BLE001 - whoever looks is told that it came to nothing
                _log.exception("look_failed")
            else:
                looked.append(look)

        def told(_task: "asyncio.Task[None]") -> None:
            # Also where the task was cancelled before its first step.
            for _, tell in looking:
                tell(looked[0] if looked else None)

        self._spawn(look()).add_done_callback(told)

    async def _fetch(self, look: Look, *, token: str | None = None) -> None:
        """Look into the cache; with a token, load whom nobody knows and nobody is loading."""
        look.reason = LoadReason.MISS
        try:
            self._note(look, await self._cache.fetch([*look.leases], token=token))
        except CacheAwayError:
            CACHE_READS.labels("away").inc(len(look.leases))
            look.reason = LoadReason.AWAY
            return
        for user, lease in look.leases.items():
            if token is not None and lease == token:
                # At once, and not when whoever asked comes for it, who may have gone: a lease binds everybody.
                self._take_off((user,), look, token=token, leased={user})

    def _note(self, look: Look, fetched: Sequence[Fetched]) -> None:
        """Note what the cache knows, and whose lease is out, and refresh what is about to expire."""
        answers = look.answers
        due = []
        now = self._clock()
        for user, (entry, lease) in zip(look.leases, fetched, strict=True):
            look.leases[user] = lease
            if entry is not None:
                age = (now - entry.computed_at).total_seconds()
                life = self._life if entry.body is not None else self._unknown_life
                answers[user] = Answer(entry, Source.HIT, _ttl(life, age))
                if age >= self._refresh_from and lease is None and self._is_due(user, entry, age):
                    due.append(user)
        if due and self._database.closed and self._has_room(1):
            self._refreshing.update(due)
            self._spawn(self._refresh(tuple(due)))
        if answers:
            _HITS.inc(len(answers))
        if len(answers) < len(look.leases):
            _MISSES.inc(len(look.leases) - len(answers))

    def _has_room(self, loads: int) -> bool:
        """Tell whether so many more loads have their turn soon; without PostgreSQL none waits for one."""
        waiting = len(self._loads) + loads - self._concurrent_loads
        return not self._database.closed or waiting * self._pace <= self._load_deadline * _MOST_WAIT

    async def _load(self, user_ids: Sequence[UserId], look: Look) -> dict[UserId, Answer]:
        """Share the loads that may be shared, start one for everybody else, and wait for all of them."""
        begin, leases, reason = look.begin, look.leases, look.reason
        shared: dict[UserId, _Flight] = {}
        own = []
        for user in user_ids:
            flight = self._flights.get(user)
            if (
                flight is not None
                and (reason is not LoadReason.REQUEST or flight.reason is LoadReason.REQUEST)
                and flight.serves(user, begin=begin, lease=leases[user])
            ):
                flight.newest = max(flight.newest, begin)
                shared[user] = flight
            else:
                own.append(user)
        if own and not self._has_room(1):
            LOADS_REFUSED.inc(len(own))
            raise TemporarilyUnavailableError
        if own:
            flight = self._take_off(tuple(own), look, token=_token(), leased=set())
            shared.update(dict.fromkeys(own, flight))
        for flight in set(shared.values()):
            await flight.landed()
        answers = {}
        now = self._clock()
        for user, flight in shared.items():
            loaded = flight.loaded.result()
            if user not in loaded.entries:
                raise TemporarilyUnavailableError
            entry = loaded.entries[user]
            age = (now - entry.computed_at).total_seconds()
            life = self._life if entry.body is not None else self._unknown_life
            if loaded.stale:
                # Never told as fresh, whatever its age: nobody could be asked whether it still holds.
                answers[user] = Answer(entry, Source.STALE, min(-1, int(life - age)))
            else:
                answers[user] = Answer(entry, _SOURCES[reason], _ttl(life, age))
        stale = sum(answer.source is Source.STALE for answer in answers.values())
        if stale:
            STALE_SERVED.inc(stale)
        return answers

    def _take_off(self, user_ids: tuple[UserId, ...], look: Look, *, token: str, leased: set[UserId]) -> _Flight:
        future: asyncio.Future[_Loaded] = asyncio.get_running_loop().create_future()
        before = {self._flights[user] for user in user_ids if user in self._flights}
        flight = _Flight(
            user_ids, look.reason, token, future, self._deadline(), tuple(before), leased, newest=look.begin
        )
        self._flights.update(dict.fromkeys(user_ids, flight))
        foreign = {user for user in user_ids if look.leases[user] is not None}
        task = self._spawn(self._fly(flight, foreign=foreign))
        self._loads[task] = flight
        task.add_done_callback(self._ended)
        return flight

    def _ended(self, task: "asyncio.Task[None]") -> None:
        # A task that is cancelled before its first step runs nothing, not even its `finally`.
        self._loads.pop(task).land(TemporarilyUnavailableError())

    async def _settle(self) -> None:
        """Let the loads that were answered already store what they loaded."""
        filling = [task for task, flight in self._loads.items() if flight.loaded.done()]
        if filling:
            await asyncio.wait(filling, timeout=self._load_deadline)

    async def _fly(self, flight: _Flight, *, foreign: set[UserId]) -> None:
        """Carry out a load, from the lease to the fill, and hand its outcome to everyone who shares it."""
        try:
            flight.land(await self._outcome(flight, foreign))
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait for this load
            flight.land(error)
        finally:
            # Only the service's own end cancels a load; whoever still waits for it is told to come back.
            flight.land(TemporarilyUnavailableError())
            for user in flight.users:
                if self._flights.get(user) is flight:
                    del self._flights[user]

    async def _outcome(self, flight: _Flight, foreign: set[UserId]) -> _Loaded:
        if flight.reason in _UNCACHED:
            await self._turn(flight)
        if flight.reason is not LoadReason.AWAY and not flight.leased:
            with suppress(CacheAwayError):
                await self._lease(flight, foreign)
                if not flight.leased and len(flight.users) == 1:
                    entry = await self._wait_for_other(flight)
                    if entry is not None:
                        return _Loaded({flight.users[0]: entry})
            if not flight.leased:
                await self._turn(flight)
        try:
            entries = await self._query(flight)
        except TemporarilyUnavailableError:
            with suppress(CacheAwayError):
                await self._cache.release([*flight.leased], flight.token)
            # What follows is read from here on, and a read that begins later may come after an invalidation.
            flight.started = next(self._events)
            return await self._last_known_good(flight.users)
        loaded = _Loaded(entries)
        if flight.reason is LoadReason.MISS:
            # Whoever asks before it is filled finds no older value, and shares this load: nobody waits for the fill,
            # and whoever waited goes first.
            flight.land(loaded)
            await asyncio.sleep(0)
        if flight.leased:
            await self._fill({user: entries[user] for user in flight.leased}, flight.token)
        return loaded

    async def _fill(self, entries: Mapping[UserId, Entry], token: str) -> None:
        try:
            stored = await self._cache.fill(entries, token)
        except CacheAwayError:
            stored = [False] * len(entries)
        CACHE_FILLS.labels("stored").inc(sum(stored))
        CACHE_FILLS.labels("lost").inc(len(stored) - sum(stored))

    async def _turn(self, flight: _Flight) -> None:
        """Let earlier loads of the same users end: without a lease, one runs and one waits, however many ask."""
        before, flight.before = flight.before, ()
        if before:
            left = flight.until - asyncio.get_running_loop().time()
            await asyncio.wait([earlier.loaded for earlier in before], timeout=max(0.0, left))

    async def _lease(self, flight: _Flight, foreign: set[UserId]) -> None:
        seize = flight.reason is LoadReason.REQUEST
        wanted = [user for user in flight.users if seize or user not in foreign]
        # Between a miss and its lease another process may have filled: then there is nothing left to load.
        unless_cached = flight.reason is LoadReason.MISS and len(flight.users) == 1
        got = await self._cache.lease(wanted, flight.token, seize=seize, unless_cached=unless_cached)
        flight.leased.update(user for user, is_ours in zip(wanted, got, strict=True) if is_ours)

    async def _wait_for_other(self, flight: _Flight) -> Entry | None:
        """Wait for the value that another process is loading, or for its lease; None: load it ourselves."""
        loop = asyncio.get_running_loop()
        give_up = min(loop.time() + self._cache_wait, flight.until - self._load_deadline * (1 - _MOST_WAIT))
        while (left := give_up - loop.time()) > 0:
            await asyncio.sleep(min(left, self._random(*_POLL_SECONDS)))
            asked = next(self._events)
            [found] = await self._cache.fetch(flight.users)
            if found.entry is not None:
                if flight.newest < asked:
                    return found.entry
                # Somebody joined after this look at the cache began, perhaps after an invalidation: look again.
                continue
            if found.lease is None:
                await self._lease(flight, set())
                if flight.leased:
                    break
        return None

    async def _query(self, flight: _Flight) -> dict[UserId, Entry]:
        """Count in PostgreSQL, under the cap on concurrent loads."""
        if not self._database.closed:
            raise TemporarilyUnavailableError
        try:
            async with asyncio.timeout_at(flight.until) if self._slots.locked() else nullcontext():
                await self._slots.acquire()
        except TimeoutError:
            raise TemporarilyUnavailableError from None
        left = max(0.0, flight.until - asyncio.get_running_loop().time())
        try:
            flight.started = next(self._events)
            now = self._clock()
            LOADS.labels(flight.reason.value).inc(len(flight.users))
            counts = await self._history.counts(flight.users, self.policy, deadline=left)
        except TemporarilyUnavailableError:
            if left > self._load_deadline * _MOST_WAIT:
                # One that had waited for its turn for long says little about PostgreSQL.
                self._database.failed()
            raise
        finally:
            self._slots.release()
            self._keep_pace()
        self._database.succeeded()
        self._log.debug("reputation_computed", users=len(flight.users), reason=flight.reason.value)
        return {
            user: Entry.of(self._calculator.calculate(counts[user], now=now)) if user in counts else Entry(None, now)
            for user in flight.users
        }

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._load_deadline

    def _keep_pace(self) -> None:
        now, ended_at = asyncio.get_running_loop().time(), self._ended_at
        if ended_at is not None:
            self._pace += (now - ended_at - self._pace) * _PACE_WEIGHT
        self._ended_at = now if len(self._loads) > self._concurrent_loads else None

    async def _last_known_good(self, user_ids: Sequence[UserId]) -> _Loaded:
        try:
            copies = await self._cache.fetch_last_good(user_ids)
        except CacheAwayError:
            raise TemporarilyUnavailableError from None
        pairs = zip(user_ids, copies, strict=True)
        return _Loaded({user: copy for user, copy in pairs if copy is not None}, stale=True)

    async def _refresh(self, user_ids: tuple[UserId, ...]) -> None:
        """Load ahead of expiry those users whose lease is free; a failure leaves the entries as they are."""
        future: asyncio.Future[_Loaded] = asyncio.get_running_loop().create_future()
        flight = _Flight(user_ids, LoadReason.REFRESH, _token(), future, self._deadline())
        try:
            with suppress(CacheAwayError):
                await self._lease(flight, set())
            if flight.leased:
                flight.users = tuple(flight.leased)
                self._flights.update(dict.fromkeys(flight.users, flight))
                await self._fly(flight, foreign=set())
        finally:
            self._refreshing.difference_update(user_ids)

    def _is_due(self, user_id: UserId, entry: Entry, age: float) -> bool:
        """Tell whether an entry of this age, in seconds, should be refreshed ahead of its expiry."""
        if entry.body is None or user_id in self._refreshing:
            return False
        return age >= self._refresh_from + self._life * self._random(0.0, _REFRESH_JITTER)


def _token() -> str:
    """Make a lease's token: told apart from every other one, not kept secret."""
    return f"{getrandbits(64):016x}"


def _ttl(life: float, age: float) -> int:
    """Give the whole seconds that are left of a life. A clock that was set back makes nobody younger than new."""
    return int(life - age) if 0 <= age <= life else 0 if age > life else int(life)
