"""How often one may ask: a sliding window counter per caller, counted here and shared with the fleet afterwards."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Final, Protocol, Self

import structlog

from goodstanding.data import Clock
from goodstanding.errors import RateLimitedError
from goodstanding.metrics import RATE_LIMITED
from goodstanding.settings import Settings
from goodstanding.tasks import check_cancelled

WINDOW_SECONDS: Final = 60
COUNTER_TTL_SECONDS: Final = 3 * WINDOW_SECONDS

_SECOND: Final = 1_000_000
_WINDOW: Final = WINDOW_SECONDS * _SECOND
# Few, because an exchange shares its round trip, and its deadline, with the cached reads of that moment.
_CALLERS_PER_CALL: Final = 50
_EVICTION_SAMPLE: Final = 8

_log = structlog.get_logger("goodstanding")


class LimitKind(StrEnum):
    """What is being limited; each kind counts for itself."""

    READ = "read"
    ADMIN = "admin"


class SharedCounters(Protocol):
    """Counters that the whole fleet adds to."""

    async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
        """Add to each counter (0 only reads it), let it live `ttl_seconds` from now, and give the totals.

        Raises TemporarilyUnavailableError when the counters are away; what was added then is unknown.
        """
        ...


@dataclass(slots=True)
class _Count:
    """The requests admitted in one window: what the fleet is known to have counted, and what it was not yet told."""

    known: int = 0
    untold: int = 0

    @property
    def total(self) -> int:
        return self.known + self.untold


@dataclass(slots=True)
class _Caller:
    """One caller's counts in the window `number` and in the one before it."""

    number: int
    current: _Count
    previous: _Count
    previous_is_settled: bool = False

    def roll(self, number: int) -> None:
        """Move on to a later window."""
        self.previous = self.current if number == self.number + 1 else _Count()
        self.current = _Count()
        self.number = number
        self.previous_is_settled = False


class RateLimiter:
    """Admits or refuses without waiting for anybody; `run()` compares notes with the fleet.

    With L the limit, p the requests admitted in the previous clock minute, c those in this one and f the part of
    this one that has passed, a request is admitted while p * (1 - f) + c stays within L. So in one process, or as far
    as the fleet's counts are known: at most L in a clock minute, and less than 2 L in any 60 seconds, which only a
    burst on each side of a minute's turn approaches. A refused request does not count.

    Processes tell each other every `sync_seconds`; until then each admits on what it knows, so a fleet exceeds L by
    what the other processes admit between two syncs. Without counters, or while they are away, each limits alone.

    Remembers `max_callers` callers per kind, and forgets the least active of the longest unseen ones first.
    Belongs to one event loop.
    """

    def __init__(
        self,
        limits: Mapping[LimitKind, int],
        *,
        clock: Clock,
        counters: SharedCounters | None = None,
        max_callers: int = 100_000,
    ) -> None:
        self._limits = dict(limits)
        self._clock = clock
        self._counters = counters
        self._max_callers = max_callers
        self._callers: dict[LimitKind, OrderedDict[str, _Caller]] = {kind: OrderedDict() for kind in limits}
        self._untold: dict[tuple[LimitKind, str], _Caller] = {}
        self._shared: bool | None = None

    @classmethod
    def from_settings(cls, settings: Settings, *, clock: Clock, counters: SharedCounters | None) -> Self:
        """Build the limiter that the settings describe."""
        limits = {
            LimitKind.READ: settings.read_limit_per_minute,
            LimitKind.ADMIN: settings.admin_limit_per_minute,
        }
        return cls(limits, clock=clock, counters=counters)

    def take(self, caller_key: str, kind: LimitKind, now: float | None = None) -> None:
        """Count one request; raises RateLimitedError, which says after how many seconds the next one is admitted.

        `now` is the clock's moment in seconds since 1970, where the caller has it.
        """
        seconds = self.admit(caller_key, kind, now)
        if seconds:
            RATE_LIMITED.labels(kind.value).inc()
            raise RateLimitedError(retry_after=seconds)

    def admit(self, caller_key: str, kind: LimitKind, now: float | None = None) -> int:
        """Count one request as `take` does, or give the seconds to wait: for whoever leaves a refusal to another."""
        limit, callers = self._limits[kind], self._callers[kind]
        if now is None:
            now = self._clock().timestamp()
        number = int(now // WINDOW_SECONDS)
        caller = callers.get(caller_key)
        if caller is None:
            if len(callers) >= self._max_callers:
                self._evict(kind)
            caller = callers[caller_key] = _Caller(number, _Count(), _Count())
        else:
            callers.move_to_end(caller_key)
            if number > caller.number:
                caller.roll(number)
        count = caller.current
        previous, current = caller.previous.total, count.total
        if previous + current >= limit:
            # Only now does it matter how much of the window has passed. Where the clock was set back, none of the one
            # that had been reached.
            elapsed = round((now - number * WINDOW_SECONDS) * _SECOND) if number == caller.number else 0
            if previous * (_WINDOW - elapsed) + (current + 1) * _WINDOW > limit * _WINDOW:
                return _wait(previous, current, elapsed, limit)
        count.untold += 1
        if count.untold == 1 and self._counters is not None:
            self._untold[kind, caller_key] = caller
        return 0

    async def run(self, *, sync_seconds: float = 0.5) -> None:
        """Compare notes with the fleet, for ever; returns at once when there are no counters to share."""
        while self._counters is not None:
            await asyncio.sleep(sync_seconds)
            await self.sync()
            check_cancelled()

    async def sync(self) -> None:
        """Tell the fleet what was admitted here since the last time and learn what it admitted; never raises.

        What could not be told is not told again, because it may have arrived: counting it twice would refuse
        callers who did nothing. It still counts here.
        """
        if self._counters is None:
            return
        waiting = list(self._untold.items())
        for start in range(0, len(waiting), _CALLERS_PER_CALL):
            batch = waiting[start : start + _CALLERS_PER_CALL]
            for name, _ in batch:
                self._untold.pop(name, None)
            if not await self._exchange(self._counters, batch):
                return

    async def _exchange(self, counters: SharedCounters, batch: list[tuple[tuple[LimitKind, str], _Caller]]) -> bool:
        now = self._window()
        told: dict[str, tuple[_Count, int]] = {}
        for (kind, caller_key), caller in batch:
            digest = hashlib.blake2b(caller_key.encode(errors="backslashreplace"), digest_size=12).hexdigest()
            if caller.number < now:
                caller.roll(now)
            windows = {caller.number: caller.current}
            if not caller.previous_is_settled:
                caller.previous_is_settled = True
                windows[caller.number - 1] = caller.previous
            for number, count in windows.items():
                told[f"goodstanding:limit:{kind}:{digest}:{number}"] = (count, count.untold)
                count.known, count.untold = count.total, 0
        try:
            totals = await counters.add({key: added for key, (_, added) in told.items()}, COUNTER_TTL_SECONDS)
            for key, (count, _) in told.items():
                # A counter that was lost (a flush, an eviction) does not give anybody a second helping.
                count.known = max(count.known, totals.get(key, 0))
        except Exception as error:  # noqa: BLE001 - counting must never end the service, whatever ails the counters
            self._note(shared=False, reason=type(error).__name__)
            return False
        self._note(shared=True)
        return True

    def _note(self, *, shared: bool, **fields: object) -> None:
        if shared is not self._shared:
            self._shared = shared
            if shared:
                _log.info("rate_limits_shared", **fields)
            else:
                _log.warning("rate_limits_local", **fields)

    def _window(self) -> int:
        """Give the number of the present window."""
        return int(self._clock().timestamp() // WINDOW_SECONDS)

    def _evict(self, kind: LimitKind) -> None:
        """Forget the least active of the longest unseen callers, so that a flood of new ones pushes out itself."""
        callers = self._callers[kind]
        number = self._window()
        oldest = list(islice(callers, _EVICTION_SAMPLE))
        victim = min(oldest, key=lambda name: _activity(callers[name], number))
        del callers[victim]
        self._untold.pop((kind, victim), None)
        for name in oldest:
            if name != victim:
                callers.move_to_end(name)


def _activity(caller: _Caller, number: int) -> int:
    match number - caller.number:
        case 0:
            return caller.previous.total + caller.current.total
        case 1:
            return caller.current.total
        case _:
            return 0


def _wait(previous: int, current: int, elapsed: int, limit: int) -> int:
    """Give the whole seconds, at least 1, after which a caller who keeps still until then is admitted.

    `elapsed` is in microseconds of the present window.
    """
    if current < limit:
        # p * (1 - f) + c + 1 <= L, solved for f; p is not 0, or the request would have been admitted.
        at = _WINDOW - (limit - current - 1) * _WINDOW // previous
    else:
        # First in the next window, where what counts now will be the previous count.
        at = 2 * _WINDOW - (limit - 1) * _WINDOW // current
    return max(1, -((elapsed - at) // _SECOND))
