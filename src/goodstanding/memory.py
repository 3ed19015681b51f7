"""What a process keeps in its own memory: a small tier in front of Redis, or the whole cache where there is none."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from goodstanding.cache import Cache
from goodstanding.data import Clock, UserId
from goodstanding.entry import Entry, Fetched, Lives, is_recent

_EVICTIONS: Final = 10_000
"""So many evictions are remembered, for the reads that are under way."""


async def _nobody(_users: Sequence[UserId] | None) -> None:
    """Tell nobody: there is no other process."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is served of a user `until` a moment of the monotonic clock."""

    entry: Entry
    until: float


@dataclass(slots=True)
class _Slot:
    """What is remembered about one user; moments are in seconds of the monotonic clock."""

    kept: _Kept | None = None
    last_good: Entry | None = None
    last_good_until: float = 0.0
    lease: str | None = None
    lease_until: float = 0.0


@dataclass(slots=True)
class MemoryCache:
    """A bounded cache of at most `capacity` users, the least recently used going first.

    It belongs to one event loop. `monotonic` gives seconds that never go back. `announce` tells the other processes
    whom an invalidation concerns (None: everybody). Values that were computed before `oldest()` are misses.
    """

    lives: Lives
    capacity: int
    announce: Callable[[Sequence[UserId] | None], Awaitable[None]] = _nobody
    oldest: Callable[[], datetime | None] = lambda: None
    monotonic: Callable[[], float] = time.monotonic
    _slots: OrderedDict[str, _Slot] = field(default_factory=OrderedDict)

    @property
    def available(self) -> bool:
        """Memory is always there."""
        return True

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read what is remembered about each user, and whether a lease is out, taking it under a token."""
        now = self.monotonic()
        oldest = self.oldest()
        found = []
        for user in user_ids:
            slot = self._slots.get(user) if token is None else self._slot(user)
            if slot is None:
                found.append(Fetched(None, None))
                continue
            self._slots.move_to_end(user)
            entry = _served(slot, now, oldest)
            lease = slot.lease if now < slot.lease_until else None
            if entry is None and lease is None and token is not None:
                lease = slot.lease = token
                slot.lease_until = now + self.lives.lease / 1000
            found.append(Fetched(entry, lease))
        return found

    def peek(self, user_id: str) -> Entry | None:
        """Give what is served of a user at this moment, if anything is; any text may be asked for."""
        slot = self._slots.get(user_id)
        if slot is None:
            return None
        self._slots.move_to_end(user_id)
        return _served(slot, self.monotonic(), self.oldest())

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read the last known good copies."""
        now = self.monotonic()
        slots = (self._slots.get(user) for user in user_ids)
        return [slot.last_good if slot is not None and now < slot.last_good_until else None for slot in slots]

    async def lease(
        self, user_ids: Sequence[UserId], token: str, *, seize: bool = False, unless_cached: bool = False
    ) -> list[bool]:
        """Take leases that live as long as a load may; at most one holder each."""
        now = self.monotonic()
        oldest = self.oldest()
        got = []
        for user in user_ids:
            slot = self._slot(user)
            free = seize or slot.lease is None or now >= slot.lease_until
            if unless_cached and _served(slot, now, oldest) is not None:
                free = False
            if free:
                slot.lease, slot.lease_until = token, now + self.lives.lease / 1000
            got.append(free)
        return got

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store entries whose leases still hold this token."""
        now = self.monotonic()
        stored = []
        for user, entry in entries.items():
            slot = self._slots.get(user)
            holds = slot is not None and slot.lease == token and now < slot.lease_until
            if slot is not None and holds:
                known = entry.body is not None
                slot.kept = _Kept(entry, now + (self.lives.value if known else self.lives.unknown) / 1000)
                slot.last_good = entry if known else None
                slot.last_good_until = now + self.lives.last_good / 1000
                slot.lease = None
            stored.append(holds)
        return stored

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back without a value, where they are still ours."""
        for user in user_ids:
            slot = self._slots.get(user)
            if slot is not None and slot.lease == token:
                slot.lease = None

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Forget value, lease and last known good copy together, and have every other process do so."""
        self.evict(user_ids)
        await self.announce(user_ids)

    async def invalidate_all(self) -> int:
        """Forget everybody, here and everywhere; gives the number of values that were still served here."""
        now = self.monotonic()
        dropped = sum(slot.kept is not None and now < slot.kept.until for slot in self._slots.values())
        self.evict(None)
        await self.announce(None)
        return dropped

    def evict(self, user_ids: Sequence[UserId] | None) -> None:
        """Forget these users, or (None) everybody, in this process alone."""
        if user_ids is None:
            self._slots.clear()
            return
        for user in user_ids:
            self._slots.pop(user, None)

    def _slot(self, user_id: UserId) -> _Slot:
        slot = self._slots.get(user_id)
        if slot is None:
            slot = self._slots[user_id] = _Slot()
            if len(self._slots) > self.capacity:
                self._slots.popitem(last=False)
        return slot


def _served(slot: _Slot, now: float, oldest: datetime | None) -> Entry | None:
    kept = slot.kept
    return kept.entry if kept is not None and now < kept.until and is_recent(kept.entry, oldest) else None


@dataclass(slots=True)
class MemoryTier:
    """A tier of at most `capacity` users, each for at most `seconds`, in front of the cache that processes share.

    It answers only while `trusted()`: while this process hears every change. `evict` is to be called with what it
    hears, and with None when it may have missed something. It belongs to one event loop.
    """

    below: Cache
    lives: Lives
    capacity: int
    seconds: float
    trusted: Callable[[], bool]
    clock: Clock
    monotonic: Callable[[], float] = time.monotonic
    _kept: OrderedDict[str, tuple[bytes | None, datetime, float]] = field(default_factory=OrderedDict)
    """Body, when it was computed, and until when it is served. A bare tuple of such is nothing that the garbage
    collector goes through: with objects of ours, a hundred thousand of them would stop the process for 0.1 s each time.
    """
    _events: int = 0
    _evicted: OrderedDict[UserId, int] = field(default_factory=OrderedDict)
    _forgotten: int = 0
    """The newest eviction that is no longer remembered by user."""

    @property
    def available(self) -> bool:
        """Whether the cache below is being asked."""
        return self.below.available

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read from memory, and from below in one round trip what is not there; leases are taken there."""
        if not self.trusted():
            return await self.below.fetch(user_ids, token=token)
        now = self.monotonic()
        kept = self._kept
        found = {
            user: Fetched(Entry(one[0], one[1]), None)
            for user in user_ids
            if (one := kept.get(user)) is not None and now < one[2]
        }
        if len(found) == len(user_ids):
            return [*found.values()]
        missing = [user for user in user_ids if user not in found]
        if missing:
            asked = self._events
            for user, fetched in zip(missing, await self.below.fetch(missing, token=token), strict=True):
                found[user] = fetched
                if fetched.entry is not None:
                    self._keep(user, fetched.entry, asked)
        return [found[user] for user in user_ids]

    def peek(self, user_id: str) -> Entry | None:
        """Give what is served of a user at this moment, if anything is; any text may be asked for."""
        kept = self._kept.get(user_id)
        return Entry(kept[0], kept[1]) if kept is not None and self.monotonic() < kept[2] and self.trusted() else None

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read from below."""
        return await self.below.fetch_last_good(user_ids)

    async def lease(
        self, user_ids: Sequence[UserId], token: str, *, seize: bool = False, unless_cached: bool = False
    ) -> list[bool]:
        """Take leases below."""
        return await self.below.lease(user_ids, token, seize=seize, unless_cached=unless_cached)

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store below, and here what was stored there."""
        hearing = self.trusted()
        asked = self._events
        stored = await self.below.fill(entries, token)
        if hearing:
            for (user, entry), is_stored in zip(entries.items(), stored, strict=True):
                if is_stored:
                    self._keep(user, entry, asked)
        return stored

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back below."""
        await self.below.release(user_ids, token)

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Drop below, and then here: a read in between may have brought the old value up again."""
        try:
            await self.below.invalidate(user_ids)
        finally:
            self.evict(user_ids)

    async def invalidate_all(self) -> int:
        """Drop everybody, below and then here."""
        try:
            return await self.below.invalidate_all()
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
            self._kept.pop(user, None)
            self._evicted[user] = self._events
            self._evicted.move_to_end(user)
        while len(self._evicted) > _EVICTIONS:
            self._forgotten = self._evicted.popitem(last=False)[1]

    def _keep(self, user_id: UserId, entry: Entry, asked: int) -> None:
        """Keep what was read below, unless the user may have been evicted since it was `asked` for."""
        if self._evicted.get(user_id, self._forgotten) > asked:
            return
        life = self.lives.unknown if entry.body is None else self.lives.value
        left = life / 1000 - (self.clock() - entry.computed_at).total_seconds()
        self._kept[user_id] = (entry.body, entry.computed_at, self.monotonic() + min(self.seconds, left))
        self._kept.move_to_end(user_id)
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
