"""The in-process tier: the cache's protocol in this process's memory, for when there is no Redis."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from goodstanding.data import UserId
from goodstanding.entry import Entry, Fetched, Lives


@dataclass(slots=True)
class _Slot:
    """What is remembered about one user; moments are in seconds of the monotonic clock."""

    entry: Entry | None = None
    entry_until: float = 0.0
    last_good: Entry | None = None
    last_good_until: float = 0.0
    lease: str | None = None
    lease_until: float = 0.0


@dataclass(slots=True)
class MemoryCache:
    """A bounded cache of at most `capacity` users, the least recently used going first.

    It belongs to one event loop. `monotonic` gives seconds that never go back.
    """

    lives: Lives
    capacity: int
    monotonic: Callable[[], float] = time.monotonic
    _slots: OrderedDict[UserId, _Slot] = field(default_factory=OrderedDict)

    @property
    def available(self) -> bool:
        """Memory is always there."""
        return True

    async def fetch(self, user_ids: Sequence[UserId]) -> list[Fetched]:
        """Read what is remembered about each user, and whether a lease is out."""
        now = self.monotonic()
        found = []
        for user in user_ids:
            slot = self._slots.get(user)
            if slot is None:
                found.append(Fetched(None, None))
                continue
            self._slots.move_to_end(user)
            found.append(
                Fetched(slot.entry if now < slot.entry_until else None, slot.lease if now < slot.lease_until else None)
            )
        return found

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
        got = []
        for user in user_ids:
            slot = self._slot(user)
            free = seize or slot.lease is None or now >= slot.lease_until
            if unless_cached and slot.entry is not None and now < slot.entry_until:
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
                known = entry.data is not None
                slot.entry = entry
                slot.entry_until = now + (self.lives.value if known else self.lives.unknown) / 1000
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
        """Forget value, lease and last known good copy together."""
        for user in user_ids:
            self._slots.pop(user, None)

    async def invalidate_all(self) -> int:
        """Forget everybody; gives the number of values that were still served."""
        now = self.monotonic()
        dropped = sum(slot.entry is not None and now < slot.entry_until for slot in self._slots.values())
        self._slots.clear()
        return dropped

    def _slot(self, user_id: UserId) -> _Slot:
        slot = self._slots.get(user_id)
        if slot is None:
            slot = self._slots[user_id] = _Slot()
            if len(self._slots) > self.capacity:
                self._slots.popitem(last=False)
        return slot
