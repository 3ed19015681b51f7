"""Badges in real time, from end to end: nothing is stale for longer than 2 s, whatever breaks.

`make live` runs the whole, with outages as long as promised and 100,000 changes; else it is a slice of about a minute.
"""

import asyncio
import os
import random
import secrets
import signal
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
import redis

from goodstanding import tallies
from goodstanding.embedded import Postgres, Valkey
from goodstanding.reputation_service import Source
from tests.conftest import Database
from tests.live import Fault, Fleet, fleet, under_load
from tests.parts import Truth, eventually, open_redis, open_service
from tests.serving import command

pytestmark = pytest.mark.slow

WHOLE: Final = os.environ.get("GOODSTANDING_LIVE") == "whole"
SEED: Final = int(os.environ.get("GOODSTANDING_LIVE_SEED", secrets.randbelow(2**31)))
_CUT_SECONDS: Final = 30.0 if WHOLE else 3.0
_FROZEN_SECONDS: Final = 5.0 if WHOLE else 3.0
_KILLS: Final = 50 if WHOLE else 2
_CHANGES: Final = 100_000 if WHOLE else 0
_SLOWEST: Final = 0.5, 2.0
"""Seconds of the median and of the slowest: a busy machine is tested here. benchmarks/live.py measures the promise."""


async def _kill_the_leader(lot: Fleet) -> None:
    leader = await lot.leader()
    await leader.kill()
    await asyncio.sleep(1.0)
    await leader.start()


async def _freeze_the_leader(lot: Fleet) -> None:
    leader = await lot.leader()
    # Its reads that were under way are over their deadline when it wakes up.
    lot.unavailable = True
    leader.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(_FROZEN_SECONDS)
    finally:
        leader.signal(signal.SIGCONT)
    await eventually(leader.hears)
    lot.unavailable = False


async def _kill_redis(lot: Fleet, seconds: float) -> None:
    """Kill it; it comes back with what it had before the last changes."""
    assert lot.valkey is not None
    with redis.Redis.from_url(lot.valkey.url()) as client:
        assert client.save()
    await asyncio.sleep(1.0)
    lot.valkey.kill()
    await asyncio.sleep(seconds)
    lot.valkey.start()


async def _kill_redis_for_a_second(lot: Fleet) -> None:
    await _kill_redis(lot, 1.0)


async def _kill_redis_for_five_seconds(lot: Fleet) -> None:
    await _kill_redis(lot, 5.0)


async def _hang_redis(lot: Fleet) -> None:
    assert lot.valkey is not None
    lot.valkey.pause()
    await asyncio.sleep(_FROZEN_SECONDS)
    lot.valkey.resume()


async def _end_all_sessions(lot: Fleet) -> None:
    lot.unavailable = True
    assert await lot.end_sessions() > 3
    await asyncio.sleep(2.0)
    lot.unavailable = False


async def _crash_a_backend(lot: Fleet) -> None:
    lot.unavailable = True
    await lot.crash_a_backend()
    await asyncio.sleep(5.0)
    lot.unavailable = False


async def _cut(lot: Fleet, which: Sequence[int], *, leading: bool) -> None:
    first = lot.served[0]
    if leading:
        await lot.make_lead(first)
    lot.unavailable = 0 in which
    for number in which:
        lot.cables[number].cut()
    try:
        await asyncio.sleep(_CUT_SECONDS)
    finally:
        for number in which:
            lot.cables[number].mend()
    await eventually(first.hears)
    lot.unavailable = False


async def _cut_one_off_redis(lot: Fleet) -> None:
    await _cut(lot, [1], leading=False)


async def _cut_the_leader_off_redis(lot: Fleet) -> None:
    await _cut(lot, [1], leading=True)


async def _cut_the_leader_off_postgresql(lot: Fleet) -> None:
    await _cut(lot, [0], leading=True)


async def _cut_the_leader_off_everything(lot: Fleet) -> None:
    await _cut(lot, range(len(lot.cables)), leading=True)


async def _flood(lot: Fleet) -> None:
    print(f"{await lot.flood(a_second=10_000, seconds=10.0):.0f} changes a second")  # noqa: T201 - what was possible


_FAULTS: Final[Sequence[Fault]] = (
    _kill_the_leader,
    _kill_redis_for_a_second,
    _freeze_the_leader,
)
_MORE_FAULTS: Final[Sequence[Fault]] = (
    _end_all_sessions,
    _cut_the_leader_off_everything,
    _flood,
    _cut_one_off_redis,
    _crash_a_backend,
    _hang_redis,
    _kill_redis_for_five_seconds,
    _cut_the_leader_off_redis,
    _cut_the_leader_off_postgresql,
)
_FAULTS_WITHOUT_REDIS: Final[Sequence[Fault]] = (
    _kill_the_leader,
    _end_all_sessions,
    _freeze_the_leader,
    _flood,
    _cut_the_leader_off_everything,
    _crash_a_backend,
)


@pytest.fixture
def store(tmp_path: Path) -> Valkey:
    """Give a Valkey of one's own: what it saves, it has again after it was killed."""
    return Valkey(tmp_path / "valkey")


@pytest.mark.timeout(1800)
async def test_nothing_is_stale_for_longer_than_promised(database: Database, postgres: Postgres, store: Valkey) -> None:
    """Three processes with Redis, through all faults: not one answer is older than 2 s, and in the end all agree."""
    with store:
        async with fleet(database, store, processes=3, users=200, seed=SEED) as lot:
            await _storm(lot, (*_FAULTS, *(_MORE_FAULTS if WHOLE else ())))
    assert postgres.running


@pytest.mark.timeout(1800)
async def test_nor_without_redis(database: Database, postgres: Postgres) -> None:
    """Two processes that hear of changes from PostgreSQL keep the same promise."""
    async with fleet(database, None, processes=2, users=200, seed=SEED) as lot:
        await _storm(lot, _FAULTS_WITHOUT_REDIS if WHOLE else _FAULTS_WITHOUT_REDIS[:2])
    assert postgres.running


async def test_a_relay_may_be_killed_at_any_moment(database: Database, redis_url: str) -> None:
    """Between any two of its steps: whatever it had not finished the next one does, and no old value stays cached."""
    rng = random.Random(SEED)  # noqa: S311 - repeatable
    print(f"GOODSTANDING_LIVE_SEED={SEED}")  # noqa: T201 - what a failure is repeated with
    truths = [await Truth.of(database, 1) for _ in range(30)]
    completed = dict.fromkeys((truth.user_id for truth in truths), 1)
    environment = {"GOODSTANDING_DATABASE_URL": database.service_url, "GOODSTANDING_REDIS_URL": redis_url}
    async with open_redis(redis_url) as cache, open_service(cache, database.service_url) as service:
        for number in range(_KILLS + 1):
            with command("goodstanding", "relay", environment=environment) as process:
                await eventually(lambda: _leads(database))
                for _ in range(rng.randrange(1, 40) if number < _KILLS else 0):
                    truth = rng.choice(truths)
                    await truth.complete()
                    completed[truth.user_id] += 1
                    await service.read_many([one.user_id for one in truths])
                if number < _KILLS:
                    process.kill()
                else:
                    await eventually(lambda: _is_told(database))
        answers = await service.read_many([truth.user_id for truth in truths])
        assert completed == {user: answer.data and answer.data.completed_sessions for user, answer in answers.items()}
        assert Source.HIT in {answer.source for answer in answers.values()}
    assert 0 == (await tallies.verify(database.owner_url)).differing


async def _leads(database: Database) -> bool:
    async with database.owner() as owner:
        held: bool = await owner.fetchval(
            "select exists (select from pg_locks where locktype = 'advisory' and granted"
            " and database = (select oid from pg_database where datname = current_database()))"
        )
        return held


async def _is_told(database: Database) -> bool:
    async with database.owner() as owner:
        return not await owner.fetchval("select reputation.pending()")


async def _storm(lot: Fleet, faults: Sequence[Fault]) -> None:
    print(f"GOODSTANDING_LIVE_SEED={SEED}")  # noqa: T201 - what a failure is repeated with
    async with under_load(lot):
        await lot.calm(2.0)
        _tell(lot, "calm")
        assert (statistics.median(lot.delays), max(lot.delays)) < _SLOWEST
        assert lot.outcomes["cached"] > 0
        for fault in faults:
            lot.delays.clear()
            lot.stalest = 0.0
            await fault(lot)
            await lot.calm(2.5)
            _tell(lot, fault.__name__.strip("_").replace("_", " "))
        while lot.changes < _CHANGES:
            await lot.calm(1.0)
    await lot.agree()
    found = await tallies.verify(lot.database.owner_url)
    assert 0 == found.differing
    print(lot.changes, lot.reads, dict(lot.outcomes))  # noqa: T201 - how much was done


def _tell(lot: Fleet, what: str) -> None:
    hundredths = statistics.quantiles(lot.delays, n=100) if len(lot.delays) > 1 else [0.0] * 99
    print(  # noqa: T201 - shown with -rP
        f"{what}: {len(lot.delays)} changes timed, p50 {hundredths[49] * 1000:.0f} ms,"
        f" p99 {hundredths[98] * 1000:.0f} ms, stalest answer {lot.stalest:.2f} s, {dict(lot.outcomes)}"
    )
