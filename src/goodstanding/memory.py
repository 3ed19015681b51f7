"""What a process keeps in its own memory: a small tier in front of Redis, or the whole cache where there is none."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from struct import Struct
from typing import Final

from goodstanding.cache import Cache
from goodstanding.data import Clock, UserId
from goodstanding.entry import Entry, Fetched, Lives, is_recent

_EVICTIONS: Final = 10_000
"""So many evictions are remembered, for the reads that are under way."""
_MOMENT: Final = Struct("d")
_PORTION: Final = 64
"""Of a full shelf, one part in so many is cleared at once."""


async def _nobody(_users: Sequence[UserId] | None) -> None:
    """Tell nobody: there is no other process."""


class _Shelf:
    """The entries of at most `capacity` users, each with a moment in seconds; those put there first go first.

    Each is one value of bytes, which begins with its moment: nothing that the garbage collector goes through. With
    objects, a hundred thousand of them would stop the process for 0.1 s at every full collection.
    """

    __slots__ = ("_capacity", "_packed")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._packed: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def get(self, user_id: str) -> tuple[Entry, float] | None:
        """Give a user's entry and its moment; any text may be asked for."""
        found = self.peek(user_id)
        return None if found is None else (Entry.unpack(found[0]), found[1])

    def peek(self, user_id: str) -> tuple[bytes, float] | None:
        """Give the same as it was packed."""
        packed = self._packed.get(user_id)
        return None if packed is None else (packed[_MOMENT.size :], _MOMENT.unpack_from(packed)[0])

    def put(self, user_id: str, entry: Entry, moment: float) -> None:
        """Put an entry there, or in the place of the user's former one, as the last of all."""
        packed = self._packed
        packed.pop(user_id, None)
        packed[user_id] = _MOMENT.pack(moment) + entry.pack()
        if len(packed) > self._capacity:
            # Some at once: a dictionary looks for its first key among all that were there before it.
            for first in [*islice(packed, len(packed) - self._capacity + self._capacity // _PORTION)]:
                del packed[first]

    def touch(self, user_id: str) -> None:
        """Let a user who is there be the last one to go."""
        self._packed[user_id] = self._packed.pop(user_id)

    def pop(self, user_id: str) -> None:
        """Take a user's entry away, if there is one."""
        self._packed.pop(user_id, None)

    def clear(self) -> None:
        """Take everybody's away."""
        self._packed.clear()


class MemoryCache:
    """A bounded cache of at most `capacity` users, the least recently used going first.

    It belongs to one event loop. `monotonic` gives seconds that never go back. `announce` tells the other processes
    whom an invalidation concerns (None: everybody). Values that were computed before `oldest()` are misses.
    """

    def __init__(
        self,
        *,
        lives: Lives,
        capacity: int,
        announce: Callable[[Sequence[UserId] | None], Awaitable[None]] = _nobody,
        oldest: Callable[[], datetime | None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.announce = announce
        self._value, self._unknown = lives.value / 1000, lives.unknown / 1000
        self._last_good, self._lease = lives.last_good / 1000, lives.lease / 1000
        self._capacity = capacity
        self._oldest = oldest
        self._monotonic = monotonic
        self._filled = _Shelf(capacity)
        self._leases: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """Who may fill whose entry, and until when."""

    @property
    def available(self) -> bool:
        """Memory is always there."""
        return True

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read what is remembered about each user, and whether a lease is out, taking it under a token."""
        now = self._monotonic()
        oldest = self._oldest()
        found = []
        for user in user_ids:
            entry = self._served(user, now, oldest)
            if entry is not None:
                self._filled.touch(user)
            lease = self._leased(user, now)
            if entry is None and lease is None and token is not None:
                lease = self._lend(user, token, now)
            found.append(Fetched(entry, lease))
        return found

    def peek(self, user_id: str) -> bytes | None:
        """Give what is served of a user at this moment, if anything is; any text may be asked for."""
        entry = self._served(user_id, self._monotonic(), self._oldest())
        if entry is None:
            return None
        self._filled.touch(user_id)
        return entry.pack()

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read the last known good copies."""
        now = self._monotonic()
        return [
            found[0]
            if (found := self._filled.get(user)) is not None
            and found[0].body is not None
            and now < found[1] + self._last_good
            else None
            for user in user_ids
        ]

    async def lease(
        self, user_ids: Sequence[UserId], token: str, *, seize: bool = False, unless_cached: bool = False
    ) -> list[bool]:
        """Take leases that live as long as a load may; at most one holder each."""
        now = self._monotonic()
        oldest = self._oldest()
        got = []
        for user in user_ids:
            free = seize or self._leased(user, now) is None
            if unless_cached and self._served(user, now, oldest) is not None:
                free = False
            if free:
                self._lend(user, token, now)
            got.append(free)
        return got

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store entries whose leases still hold this token."""
        now = self._monotonic()
        stored = []
        for user, entry in entries.items():
            holds = self._leased(user, now) == token
            if holds:
                self._filled.put(user, entry, now)
                del self._leases[user]
            stored.append(holds)
        return stored

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back without a value, where they are still ours."""
        for user in user_ids:
            if self._leased(user, float("-inf")) == token:
                del self._leases[user]

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Forget value, lease and last known good copy together, and have every other process do so."""
        self.evict(user_ids)
        await self.announce(user_ids)

    async def invalidate_all(self) -> int:
        """Forget everybody, here and everywhere; gives the number of values that were still served here."""
        now = self._monotonic()
        dropped = sum(self._served(user, now, None) is not None for user in self._filled)
        self.evict(None)
        await self.announce(None)
        return dropped

    def evict(self, user_ids: Sequence[UserId] | None) -> None:
        """Forget these users, or (None) everybody, in this process alone."""
        if user_ids is None:
            self._filled.clear()
            self._leases.clear()
            return
        for user in user_ids:
            self._filled.pop(user)
            self._leases.pop(user, None)

    def _served(self, user_id: str, now: float, oldest: datetime | None) -> Entry | None:
        found = self._filled.get(user_id)
        if found is None:
            return None
        entry, filled_at = found
        life = self._value if entry.body is not None else self._unknown
        return entry if now < filled_at + life and is_recent(entry, oldest) else None

    def _leased(self, user_id: UserId, now: float) -> str | None:
        lease = self._leases.get(user_id)
        return lease[0] if lease is not None and now < lease[1] else None

    def _lend(self, user_id: UserId, token: str, now: float) -> str:
        self._leases[user_id] = token, now + self._lease
        if len(self._leases) > self._capacity:
            self._leases.popitem(last=False)
        return token


class MemoryTier:
    """A tier of at most `capacity` users, each for at most `seconds`, in front of the cache that processes share.

    It answers only while `trusted()`: while this process hears every change. `evict` is to be called with what it
    hears, and with None when it may have missed something. It belongs to one event loop.
    """

    def __init__(
        self,
        *,
        below: Cache,
        lives: Lives,
        capacity: int,
        seconds: float,
        trusted: Callable[[], bool],
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._below = below
        self._lives = lives
        self._seconds = seconds
        self._trusted = trusted
        self._clock = clock
        self._monotonic = monotonic
        self._kept = _Shelf(capacity)
        """Each until the moment that is beside it."""
        self._events = 0
        self._evicted: OrderedDict[UserId, int] = OrderedDict()
        self._forgotten = 0
        """The newest eviction that is no longer remembered by user."""

    @property
    def available(self) -> bool:
        """Whether the cache below is being asked."""
        return self._below.available

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read from memory, and from below in one round trip what is not there; leases are taken there."""
        if not self._trusted():
            return await self._below.fetch(user_ids, token=token)
        now = self._monotonic()
        kept = self._kept
        found = {
            user: Fetched(one[0], None) for user in user_ids if (one := kept.get(user)) is not None and now < one[1]
        }
        if len(found) == len(user_ids):
            return [*found.values()]
        missing = [user for user in user_ids if user not in found]
        if missing:
            asked = self._events
            for user, fetched in zip(missing, await self._below.fetch(missing, token=token), strict=True):
                found[user] = fetched
                if fetched.entry is not None:
                    self._keep(user, fetched.entry, asked)
        return [found[user] for user in user_ids]

    def peek(self, user_id: str) -> bytes | None:
        """Give what is served of a user at this moment, if anything is; any text may be asked for."""
        kept = self._kept.peek(user_id)
        return kept[0] if kept is not None and self._monotonic() < kept[1] and self._trusted() else None

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read from below."""
        return await self._below.fetch_last_good(user_ids)

    async def lease(
        self, user_ids: Sequence[UserId], token: str, *, seize: bool = False, unless_cached: bool = False
    ) -> list[bool]:
        """Take leases below."""
        return await self._below.lease(user_ids, token, seize=seize, unless_cached=unless_cached)

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store below, and here what was stored there."""
        hearing = self._trusted()
        asked = self._events
        stored = await self._below.fill(entries, token)
        if hearing:
            for (user, entry), is_stored in zip(entries.items(), stored, strict=True):
                if is_stored:
                    self._keep(user, entry, asked)
        return stored

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back below."""
        await self._below.release(user_ids, token)

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Drop below, and then here: a read in between may have brought the old value up again."""
        try:
            await self._below.invalidate(user_ids)
        finally:
            self.evict(user_ids)

    async def invalidate_all(self) -> int:
        """Drop everybody, below and then here."""
        try:
            return await self._below.invalidate_all()
        finally:
            self.evict(None)

    def evict(self, user_ids: Sequence[UserId] | None) -> None:
        """Forget these users, or (None) everybody, and keep nothing of them that was asked for before this."""
        self._events += 1
        if user_ids is None:
            self._kept.clear()
            self._evicted.clear()
            self._forgotten = self._events
            return
        for user in user_ids:
            self._kept.pop(user)
            self._evicted[user] = self._events
            self._evicted.move_to_end(user)
        while len(self._evicted) > _EVICTIONS:
            self._forgotten = self._evicted.popitem(last=False)[1]

    def _keep(self, user_id: UserId, entry: Entry, asked: int) -> None:
        """Keep what was read below, unless the user may have been evicted since it was `asked` for."""
        if self._evicted.get(user_id, self._forgotten) > asked:
            return
        life = self._lives.unknown if entry.body is None else self._lives.value
        left = life / 1000 - (self._clock() - entry.computed_at).total_seconds()
        self._kept.put(user_id, entry, self._monotonic() + min(self._seconds, left))
