"""What only memory must keep: its bounds, and that nothing is in it that a change made wrong.

The protocol of the cache in memory is tested in test_cache, as that of Redis.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest

from goodstanding.cache import Cache
from goodstanding.data import UserId
from goodstanding.entry import Entry, Fetched
from goodstanding.errors import CacheAwayError
from goodstanding.memory import MemoryCache, MemoryTier
from tests.parts import LIVES, NOON, entry, user


async def _remember(cache: MemoryCache, *users: UserId) -> None:
    await cache.lease(users, "t1")
    await cache.fill(dict.fromkeys(users, entry()), "t1")


async def _knows(cache: MemoryCache, number: int) -> bool:
    return [Fetched(entry(), None)] == await cache.fetch([user(number)])


async def test_the_least_recently_used_goes_first() -> None:
    """Beyond its capacity it forgets those who were asked for longest ago."""
    cache = MemoryCache(lives=LIVES, capacity=3)
    await _remember(cache, user(1), user(2), user(3))
    assert await _knows(cache, 1)
    await _remember(cache, user(4))
    assert [True, False, True, True] == [await _knows(cache, number) for number in (1, 2, 3, 4)]


async def test_it_never_holds_more_than_its_capacity() -> None:
    """Any number of users asked for, known or not, cost a bounded amount of memory."""
    cache = MemoryCache(lives=LIVES, capacity=100)
    for number in range(1000):
        await _remember(cache, user(number))
        await cache.lease([user(1000 + number)], "t1")
    assert (100, 100) == (len(cache._filled), len(cache._leases))  # noqa: SLF001 - the bound itself
    assert 100 == await cache.invalidate_all()
    assert 0 == await cache.invalidate_all()


async def test_a_load_whose_slot_was_evicted_is_not_stored() -> None:
    """A lease that had to go cannot be filled: nobody can tell any more what happened since."""
    cache = MemoryCache(lives=LIVES, capacity=1)
    await cache.lease([user(1)], "t1")
    await cache.lease([user(2)], "t2")
    assert [False] == await cache.fill({user(1): entry()}, "t1")
    await cache.release([user(1)], "t1")
    assert [True] == await cache.fill({user(2): entry()}, "t2")


@pytest.mark.parametrize("passed", [0.0, 299.9, 300.0, 1e6])
async def test_dropping_everybody_counts_what_was_still_served(passed: float) -> None:
    """An expired value is not counted, as in Redis, where it would be gone."""
    now = [0.0]
    cache = MemoryCache(lives=LIVES, capacity=10, monotonic=lambda: now[0])
    await _remember(cache, user(1))
    now[0] = passed
    assert (1 if passed < 300 else 0) == await cache.invalidate_all()


# The tier in front of Redis.


class _Below(MemoryCache):
    """The cache below a tier, which can be stopped between reading (or storing) and answering; it counts reads."""

    def __init__(self) -> None:
        super().__init__(lives=LIVES, capacity=1000)
        self.asked: list[UserId] = []
        self.has_answer = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read, and then wait."""
        self.asked += user_ids
        found = await super().fetch(user_ids, token=token)
        self.has_answer.set()
        await self.may_answer.wait()
        return found

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store, and then wait."""
        stored = await super().fill(entries, token)
        self.has_answer.set()
        await self.may_answer.wait()
        return stored

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold what is asked in the block: it has its answer, and has not given it, when the block begins."""
        await self.has_answer.wait()
        try:
            yield
        finally:
            self.may_answer.set()

    def hold(self) -> None:
        """Hold the next answer."""
        self.has_answer.clear()
        self.may_answer.clear()


@dataclass(slots=True)
class _Tiered:
    """A tier, what is below it, and what it is told of the world."""

    below: _Below
    tier: MemoryTier
    world: "_World"


@dataclass(slots=True)
class _World:
    """Whether changes are heard, and the seconds that have passed."""

    trusted: bool = True
    passed: float = 0.0


@pytest.fixture
def tiered() -> _Tiered:
    """Give a tier of at most 3 users for at most 10 s each."""
    below, world = _Below(), _World()
    tier = MemoryTier(
        below=below,
        lives=LIVES,
        capacity=3,
        seconds=10.0,
        trusted=lambda: world.trusted,
        clock=lambda: NOON + timedelta(seconds=world.passed),
        monotonic=lambda: world.passed,
    )
    return _Tiered(below, tier, world)


async def _put(cache: Cache, user_id: UserId, value: Entry) -> None:
    await cache.lease([user_id], "t1")
    assert [True] == await cache.fill({user_id: value}, "t1")


async def _kept(tiered: _Tiered, user_id: UserId) -> bool:
    """Tell whether the tier answers for a user without asking below."""
    tiered.below.asked.clear()
    await tiered.tier.fetch([user_id])
    return not tiered.below.asked


class TestMemoryTier:
    """A small memory in front of the cache that processes share."""

    async def test_what_was_read_is_kept(self, tiered: _Tiered) -> None:
        """A value is asked for once; of many users only those who are not in memory are, in order."""
        for number in (1, 2):
            await _put(tiered.below, user(number), entry(number))
        assert [Fetched(entry(1), None)] == await tiered.tier.fetch([user(1)])
        tiered.below.asked.clear()
        found = await tiered.tier.fetch([user(3), user(1), user(2)])
        assert [Fetched(None, None), Fetched(entry(1), None), Fetched(entry(2), None)] == found
        assert [user(3), user(2)] == tiered.below.asked
        assert await _kept(tiered, user(2))
        assert [] == await tiered.tier.fetch([])

    async def test_what_was_filled_is_kept(self, tiered: _Tiered) -> None:
        """A value that was stored below need not be read; one that was refused there is not kept."""
        await _put(tiered.tier, user(1), entry(1))
        assert await _kept(tiered, user(1))
        assert [False] == await tiered.tier.fill({user(2): entry(2)}, "t1")
        assert not await _kept(tiered, user(2))

    async def test_absence_is_not_kept(self, tiered: _Tiered) -> None:
        """A miss is asked for again: another process may have filled meanwhile, and the lease is told below alone."""
        assert not await _kept(tiered, user(1))
        await tiered.tier.lease([user(1)], "t1")
        assert [Fetched(None, "t1")] == await tiered.tier.fetch([user(1)])
        await tiered.tier.release([user(1)], "t1")
        assert [True] == await tiered.tier.lease([user(1)], "t2", unless_cached=True)

    async def test_it_is_bounded_in_users(self, tiered: _Tiered) -> None:
        """Beyond its capacity the one who came first goes."""
        for number in (1, 2, 3, 4):
            await _put(tiered.tier, user(number), entry(number))
        assert [False, True, True] == [await _kept(tiered, user(number)) for number in (1, 3, 4)]
        assert 3 >= len(tiered.tier._kept)  # noqa: SLF001 - the bound itself

    @pytest.mark.parametrize(
        ("computed", "known", "life"),
        [(0, True, 10), (295, True, 5), (0, False, 10), (25, False, 5), (400, True, 0), (-400, True, 10)],
    )
    async def test_it_is_bounded_in_seconds(self, tiered: _Tiered, computed: int, known: bool, life: int) -> None:  # noqa: FBT001 - a parameter of the test
        """Ten seconds, and never beyond what is left of the entry's own life, wherever its clock goes."""
        at = NOON - timedelta(seconds=computed)
        await _put(tiered.tier, user(1), entry(at=at) if known else Entry(None, at))
        for passed, kept in ((life - 0.1, life > 0), (life + 0.1, False)):
            tiered.world.passed = passed
            assert kept is await _kept(tiered, user(1))

    async def test_it_answers_only_while_changes_are_heard(self, tiered: _Tiered) -> None:
        """Unheard, it asks below whatever it holds, and keeps nothing; what it held is good when it hears again."""
        await _put(tiered.tier, user(1), entry(1))
        tiered.world.trusted = False
        assert not await _kept(tiered, user(1))
        await _put(tiered.tier, user(2), entry(2))
        await tiered.tier.fetch([user(2)])
        tiered.world.trusted = True
        assert [True, False] == [await _kept(tiered, user(number)) for number in (1, 2)]

    @pytest.mark.parametrize("everybody", [True, False])
    async def test_an_eviction_is_at_once(self, tiered: _Tiered, *, everybody: bool) -> None:
        """What is told to have changed is asked for again, and nobody else's is."""
        for number in (1, 2):
            await _put(tiered.tier, user(number), entry(number))
        tiered.tier.evict(None if everybody else [user(1), user(9)])
        assert [False, not everybody] == [await _kept(tiered, user(number)) for number in (1, 2)]

    @pytest.mark.parametrize("how", ["fetch", "fill"])
    @pytest.mark.parametrize("whom", [[user(1)], [user(9), user(1)], None])
    async def test_what_was_asked_before_an_eviction_is_not_kept(
        self, tiered: _Tiered, how: str, whom: Sequence[UserId] | None
    ) -> None:
        """Read below, evicted, and only then answered: the old value reaches its reader, and nobody after that."""
        await _ask_and_hold(tiered, how, lambda: tiered.tier.evict(whom))
        assert not await _kept(tiered, user(1))

    @pytest.mark.parametrize("how", ["fetch", "fill"])
    async def test_another_users_eviction_is_no_reason(self, tiered: _Tiered, how: str) -> None:
        """What was read while others were evicted is kept."""
        await _ask_and_hold(tiered, how, lambda: tiered.tier.evict([user(8), user(9)]))
        assert await _kept(tiered, user(1))

    async def test_what_is_asked_after_an_eviction_is_kept(self, tiered: _Tiered) -> None:
        """An eviction is about what was before it."""
        await _put(tiered.below, user(1), entry(1))
        for whom in ([user(1)], None):
            tiered.tier.evict(whom)
            assert not await _kept(tiered, user(1))
            assert await _kept(tiered, user(1))

    @pytest.mark.parametrize("how", ["fetch", "fill"])
    async def test_evictions_that_are_remembered_no_longer_count_for_everybody(self, tiered: _Tiered, how: str) -> None:
        """However many are evicted while a value is under way, it is not kept if its user may be among them."""

        def evict_many() -> None:
            tiered.tier.evict([user(1)])
            for number in range(100, 10_200, 100):
                tiered.tier.evict([user(each) for each in range(number, number + 100)])

        await _ask_and_hold(tiered, how, evict_many)
        assert user(1) not in tiered.tier._evicted  # noqa: SLF001 - so the test is about what it says
        assert 10_000 == len(tiered.tier._evicted)  # noqa: SLF001 - the bound itself
        assert not await _kept(tiered, user(1))
        assert await _kept(tiered, user(1))

    @pytest.mark.parametrize("how", ["fetch", "fill"])
    async def test_what_ends_unheard_may_have_missed_something(self, tiered: _Tiered, how: str) -> None:
        """A connection that was lost, and made again, while a value was under way: it is not kept."""

        def lose() -> None:
            tiered.world.trusted = False
            tiered.tier.evict(None)
            tiered.world.trusted = True

        await _ask_and_hold(tiered, how, lose)
        assert not await _kept(tiered, user(1))

    @pytest.mark.parametrize("everybody", [True, False])
    async def test_an_invalidation_reaches_both(self, tiered: _Tiered, *, everybody: bool) -> None:
        """Whoever invalidates reads nothing old afterwards, not even what was read while it was under way."""
        await _put(tiered.tier, user(1), entry(1))
        tiered.below.hold()
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(tiered.below.fetch([user(1)]))
            async with tiered.below.held():
                if everybody:
                    assert 1 == await tiered.tier.invalidate_all()
                else:
                    await tiered.tier.invalidate([user(1)])
        assert [Fetched(entry(1), None)] == reading.result()
        assert [Fetched(None, None)] == await tiered.tier.fetch([user(1)])
        assert [None] == await tiered.tier.fetch_last_good([user(1)])

    @pytest.mark.parametrize("everybody", [True, False])
    async def test_an_invalidation_that_fails_below_still_evicts(
        self, tiered: _Tiered, monkeypatch: pytest.MonkeyPatch, *, everybody: bool
    ) -> None:
        """What could not be dropped below is not served from here either."""

        async def fail(*_: object) -> None:
            raise CacheAwayError

        await _put(tiered.tier, user(1), entry(1))
        monkeypatch.setattr(_Below, "invalidate_all" if everybody else "invalidate", fail)
        with pytest.raises(CacheAwayError):
            await (tiered.tier.invalidate_all() if everybody else tiered.tier.invalidate([user(1)]))
        assert not await _kept(tiered, user(1))

    async def test_what_is_not_about_values_goes_below(self, tiered: _Tiered) -> None:
        """Last known good copies and availability are those of the cache below."""
        await _put(tiered.tier, user(1), entry(1))
        assert [entry(1), None] == await tiered.tier.fetch_last_good([user(1), user(2)])
        assert tiered.tier.available


async def _ask_and_hold(tiered: _Tiered, how: str, meanwhile: Callable[[], None]) -> None:
    """Read or fill user 1, and have something happen between the answer below and its arrival here."""
    tier, below = tiered.tier, tiered.below
    await below.lease([user(1)], "t1")
    if how == "fetch":
        await below.fill({user(1): entry(1)}, "t1")
    below.hold()
    async with asyncio.TaskGroup() as group:
        group.create_task(tier.fetch([user(1)]) if how == "fetch" else tier.fill({user(1): entry(1)}, "t1"))
        async with below.held():
            meanwhile()


async def test_memory_alone_serves_only_what_is_new_enough_while_nobody_tells_of_changes() -> None:
    """Values computed before `oldest()` are misses, whose leases may be taken; nothing else changes."""
    oldest: list[datetime | None] = [None]
    cache = MemoryCache(lives=LIVES, capacity=10, oldest=lambda: oldest[0])
    await _put(cache, user(1), entry(at=NOON))
    for floor, served in ((None, True), (NOON, True), (NOON + timedelta(milliseconds=1), False)):
        oldest[0] = floor
        assert [Fetched(entry() if served else None, None)] == await cache.fetch([user(1)])
        assert [not served] == await cache.lease([user(1)], "t2", unless_cached=True)
        await cache.release([user(1)], "t2")
    assert [entry()] == await cache.fetch_last_good([user(1)])


async def test_memory_alone_tells_the_other_processes() -> None:
    """An invalidation is announced once what is here is gone; hearing one announces nothing."""
    said: list[tuple[Sequence[UserId] | None, bool]] = []
    cache = MemoryCache(lives=LIVES, capacity=10)

    async def announce(users: Sequence[UserId] | None) -> None:
        said.append((users, await _knows(cache, 1)))

    cache.announce = announce
    await _remember(cache, user(1))
    await cache.invalidate([user(1)])
    await _remember(cache, user(1))
    assert 1 == await cache.invalidate_all()
    await _remember(cache, user(1))
    cache.evict([user(1)])
    assert [([user(1)], False), (None, False)] == said
    assert not await _knows(cache, 1)
    await _remember(cache, user(1))
    cache.evict(None)
    assert not await _knows(cache, 1)


async def test_a_load_begun_before_an_eviction_is_not_stored() -> None:
    """Whoever is evicted by what another process says loses the lease, too."""
    cache = MemoryCache(lives=LIVES, capacity=10)
    for whom in ([user(1)], None):
        await cache.lease([user(1)], "t1")
        cache.evict(whom)
        assert [False] == await cache.fill({user(1): entry()}, "t1")
