"""What only the cache in memory must keep: its bound. The protocol is tested in test_cache, for both caches."""

import pytest

from goodstanding.data import UserId
from goodstanding.entry import Fetched
from goodstanding.memory import MemoryCache
from tests.parts import LIVES, entry, user


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
        await cache.lease([user(number)], "t1")
    assert 100 == len(cache._slots)  # noqa: SLF001 - the bound itself
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
