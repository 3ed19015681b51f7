"""Races: whatever interleaves, a read that begins after an invalidation never sees what came before it.

The checker is itself checked: with each of the protocol's safeguards taken away, it must find a stale read.
"""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import asyncpg
import pytest

from goodstanding import cache as cache_module
from goodstanding import reputation_service as service_module
from goodstanding.cache import Cache
from goodstanding.data import SessionCounts, UserId
from goodstanding.entry import Lives
from goodstanding.history import SessionHistory
from goodstanding.memory import MemoryCache
from goodstanding.policy import ReputationPolicy
from goodstanding.reputation_service import ReputationService
from tests.conftest import Database
from tests.parts import SECONDS, Truth, admin, open_redis, open_service

_HASTY: Final = Lives(value=60, unknown=30, last_good=3_600_000, lease=10_000)
"""Lives so short that expiry and refresh-ahead take part in the race; in milliseconds."""

_COMPLETE: Final = (
    "insert into public.wingman_sessions (match_id, status, user1_completed_confirmed_by_user2)"
    " values ($1, 'completed', true)"
)
_PROCESS: Final = """
import asyncio, json, sys
import structlog
from goodstanding.data import UserId
from tests.parts import metric, open_redis, open_service

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def main():
    redis_url, database_url, reads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    async with open_redis(redis_url) as cache, open_service(cache, database_url) as service:
        await service.check()
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            before = metric("goodstanding_loads_total", reason="miss")
            user = UserId(line.strip())
            answers = await asyncio.gather(*(service.read(user) for _ in range(reads)))
            counts = sorted({answer.data.completed_sessions for answer in answers})
            loads = metric("goodstanding_loads_total", reason="miss") - before
            print(json.dumps([loads, counts, len(answers)]), flush=True)

asyncio.run(main())
"""


class _DawdlingHistory(SessionHistory):
    """The real history, whose answers take a random while to come back: time for everything else to happen."""

    rng = random.Random(0)  # noqa: S311 - reproducible, not secret

    async def counts(
        self, user_ids: Sequence[UserId], policy: ReputationPolicy, *, deadline: float | None = None
    ) -> dict[UserId, SessionCounts]:
        """Count, then dawdle for up to 8 ms."""
        found = await super().counts(user_ids, policy, deadline=deadline)
        if self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.random() * 0.008)
        return found


@dataclass(slots=True)
class _Race:
    """Writers who change the truth and then invalidate, readers in several services, and what readers must see."""

    database: Database
    services: Sequence[ReputationService]
    rng: random.Random
    truths: list[Truth]
    floors: dict[UserId, int] = field(default_factory=dict)
    """How many completed sessions a read that begins now must see at least."""
    rounds: int = 0
    reads: int = 0
    stale: list[str] = field(default_factory=list)

    async def run(self, *, rounds: int, until_stale: bool = False) -> None:
        """Let so many invalidations pass, or fewer when one stale read is enough."""
        self.floors = {truth.user_id: 0 for truth in self.truths}
        _DawdlingHistory.rng = self.rng

        def is_over() -> bool:
            return self.rounds >= rounds or (until_stale and bool(self.stale))

        async with asyncio.timeout(3 * SECONDS), asyncio.TaskGroup() as group:
            for truth in self.truths:
                group.create_task(self._write(truth, is_over))
            for _ in range(12):
                group.create_task(self._read(is_over))

    async def _write(self, truth: Truth, is_over: Callable[[], bool]) -> None:
        pool = await asyncpg.create_pool(self.database.owner_url, min_size=1, max_size=1, timeout=SECONDS)
        async with pool:
            for written in count(1):
                if is_over():
                    break
                await pool.execute(_COMPLETE, truth.match_id)
                service = self.rng.choice(self.services)
                if self.rng.random() < 0.05:
                    await service.invalidate_all()
                else:
                    await service.invalidate([truth.user_id])
                self.floors[truth.user_id] = written
                self.rounds += 1
                await asyncio.sleep(self.rng.random() * 0.01)

    async def _read(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            service = self.rng.choice(self.services)
            everybody = [truth.user_id for truth in self.truths]
            asked = everybody if self.rng.random() < 0.15 else [self.rng.choice(everybody)]
            floors = {user: self.floors[user] for user in asked}
            answers = await service.read_many(asked, use_cache=self.rng.random() > 0.1)
            for user, answer in answers.items():
                self.reads += 1
                seen = -1 if answer.data is None else answer.data.completed_sessions
                if seen < floors[user]:
                    self.stale.append(f"{answer.source}: {seen} instead of at least {floors[user]}")
            await asyncio.sleep(self.rng.random() * 0.003)


async def _race(
    database: Database, caches: Sequence[Cache], *, seed: int, rounds: int, until_stale: bool = False
) -> _Race:
    async with AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(
                open_service(cache, database.service_url, lives=_HASTY, pool_size=4, history_class=_DawdlingHistory)
            )
            for cache in caches
        ]
        rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        race = _Race(database, services, rng, [await Truth.of(database) for _ in range(3)])
        await race.run(rounds=rounds, until_stale=until_stale)
        return race


@pytest.fixture
def seed() -> int:
    """Give a new seed each time; a failure prints it."""
    return random.SystemRandom().randrange(1 << 32)


@pytest.fixture
async def caches(redis_url: str) -> AsyncIterator[list[Cache]]:
    """Give three processes' worth of Redis caches."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_redis(redis_url, lives=_HASTY)) for _ in range(3)]


@pytest.mark.slow
async def test_no_read_is_older_than_the_invalidation_before_it(
    database: Database, caches: list[Cache], seed: int
) -> None:
    """A thousand random interleavings of writers, invalidations and readers in three services: none is stale."""
    race = await _race(database, caches, seed=seed, rounds=1000)
    assert [] == race.stale[:5], f"seed {seed}"
    assert race.rounds >= 1000
    assert race.reads >= 1000


async def test_no_read_in_memory_is_older_either(database: Database, seed: int) -> None:
    """One service without Redis keeps the same promise."""
    race = await _race(database, [MemoryCache(lives=_HASTY, capacity=100)], seed=seed, rounds=300)
    assert [] == race.stale[:5], f"seed {seed}"
    assert race.reads >= 300


@pytest.mark.parametrize(
    "bug", ["fills without its token", "an invalidation spares the lease", "joins any load", "keeps an expired lease"]
)
async def test_the_checker_finds_planted_bugs(
    database: Database, caches: list[Cache], seed: int, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without each of its safeguards the protocol does serve stale values, and the checker sees it."""
    match bug:
        case "fills without its token":
            careless = cache_module._FILL.replace("~= ARGV[1]", "== 'never'")  # noqa: SLF001 - the planted bug
            monkeypatch.setattr(cache_module, "_FILL", careless)
        case "an invalidation spares the lease":
            monkeypatch.setattr(cache_module.RedisCache, "invalidate", _spare_the_lease)
        case "joins any load":
            monkeypatch.setattr(service_module._Flight, "serves", lambda *_, **__: True)  # noqa: SLF001 - the same
        case _:
            same = cache_module.RedisCache.lease

            async def one_token_for_all(
                self: cache_module.RedisCache, user_ids: Sequence[UserId], _token: str, **conditions: bool
            ) -> list[bool]:
                return await same(self, user_ids, "same", **conditions)

            fill = cache_module.RedisCache.fill
            monkeypatch.setattr(cache_module.RedisCache, "lease", one_token_for_all)
            monkeypatch.setattr(
                cache_module.RedisCache, "fill", lambda self, entries, _token: fill(self, entries, "same")
            )
    # In one service all readers meet the same loads, which finds a wrong sharing of them sooner.
    used = caches[:1] if bug == "joins any load" else caches
    race = await _race(database, used, seed=seed, rounds=3000, until_stale=True)
    assert race.stale, f"not one stale read in {race.rounds} rounds, seed {seed}"


async def _spare_the_lease(self: cache_module.RedisCache, user_ids: Sequence[UserId]) -> None:
    await self._send([("DEL", cache_module.value_key(user), cache_module.last_good_key(user)) for user in user_ids])


@pytest.mark.slow
async def test_a_fleet_loads_a_cold_user_about_once(database: Database, redis_url: str) -> None:
    """Four processes, a hundred reads each at the same moment: at most one load a process, and as a rule one in all."""
    truths = [await Truth.of(database, 2) for _ in range(5)]
    async with AsyncExitStack() as stack, asyncio.timeout(2 * SECONDS):
        fleet = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _PROCESS, redis_url, database.service_url, "100"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for _ in range(4)
        ]
        for process in fleet:
            stack.push_async_callback(_end, process)
        pipes = [(process.stdin, process.stdout) for process in fleet if process.stdin and process.stdout]
        assert [b"ready\n"] * 4 == [await answers.readline() for _, answers in pipes]
        loads = []
        for truth in truths:
            for orders, _ in pipes:
                orders.write(f"{truth.user_id}\n".encode())
            outcomes = [json.loads(await answers.readline()) for _, answers in pipes]
            assert [[2], [2], [2], [2]] == [counts for _, counts, _ in outcomes]
            assert 400 == sum(reads for *_, reads in outcomes)
            loads.append(sum(count for count, *_ in outcomes))
    assert all(1 <= count <= 4 for count in loads)
    # On a busy machine one load may take longer than the others wait for it; not each of five.
    assert 1 in loads
    async with admin(redis_url) as client:
        for truth in truths:
            assert await client.exists(cache_module.value_key(truth.user_id))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    async with asyncio.timeout(SECONDS):
        assert 0 == await process.wait()
