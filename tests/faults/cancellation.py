"""Requests of which a third vanish at random points: nothing leaks, nothing is crossed, nothing stays locked.

`python -m tests.faults.cancellation --requests 1000000`
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import uvloop

from goodstanding.tasks import background
from tests.conftest import connect
from tests.faults.ours import vanish
from tests.faults.scene import PROCESSES, Scene, scene
from tests.live import Served
from tests.parts import eventually

_AT_ONCE: Final = 50
_WARM: Final = 2000
_VANISH: Final = 1 / 3
_POOL: Final = 10
_LEASE_SECONDS: Final = 1.0
_SLACK: Final = 1.0
_STEADY: Final = 30
"""Looks, five a second, that see the same number: longer than the server keeps an idle connection."""
_KEPT_ALIVE_SECONDS: Final = 5.0
_BUSY: Final = (
    "select count(*) filter (where state <> 'idle'), count(*) from pg_stat_activity"
    " where datname = current_database() and application_name = 'goodstanding'"
)


@dataclass(slots=True)
class Outcome:
    """What came of it; nothing in `wrong` is as it must be."""

    answered: int = 0
    vanished: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    descriptors: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)


async def run(made: Scene, requests: int) -> Outcome:
    """Send so many requests, fifty at once, and see what is left behind; nobody else asks meanwhile."""
    rate, made.load.rate = made.load.rate, 0.0
    await _send(made, _WARM, Outcome())
    before = await _settled(made)
    outcome = Outcome()
    await _send(made, requests, outcome)
    await _check_leases(made, outcome)
    await _check_connections(made, outcome)
    after = await _settled(made, at_most=before)
    outcome.descriptors = before, after
    if after > before:
        outcome.wrong.append(f"{before} file descriptors before, {after} after")
    await made.ready()
    made.load.rate = rate
    return outcome


async def _send(made: Scene, requests: int, outcome: Outcome) -> None:
    load = made.load
    left = requests

    async def go_on() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if load.rng.random() < _VANISH:
                outcome.vanished += 1
                with suppress(OSError):
                    await vanish(load.rng.choice(made.served).port, load.request()[2], load.rng)
                continue
            await load.one()
            seen = load.seen.pop()
            outcome.answered += 1
            outcome.statuses[seen.status] += 1
            if seen.finding.wrong or seen.status not in {200, 404}:
                outcome.wrong.append(f"{seen.kind}: {seen.status}: {seen.finding.wrong}")

    async with background() as spawn:
        await asyncio.wait([spawn(go_on()) for _ in range(_AT_ONCE)])


async def _check_leases(made: Scene, outcome: Outcome) -> None:
    await asyncio.sleep(_LEASE_SECONDS)
    async with made.redis() as client:
        for key in await client.keys("*:lease"):
            left = await client.pttl(key)
            if left == -1 or left > _LEASE_SECONDS * 1000:
                outcome.wrong.append(f"a lease that lives for {left} ms more: {key!r}")


async def _check_connections(made: Scene, outcome: Outcome) -> None:
    found: Any = None

    async def idle() -> bool:
        nonlocal found
        async with connect(made.database.superuser_url) as superuser:
            found = await superuser.fetchrow(_BUSY)
        return bool(found[0] == 0)

    try:
        await eventually(idle, within=_LEASE_SECONDS + _SLACK)
    except AssertionError:
        outcome.wrong.append(f"{found[0]} connections to PostgreSQL are still busy")
    if found[1] > PROCESSES * _POOL:
        outcome.wrong.append(f"{found[1]} connections to PostgreSQL, of {PROCESSES * _POOL} at most")


async def _settled(made: Scene, *, at_most: int = 0) -> int:
    """Count the file descriptors that both processes have for anything but PostgreSQL, when clients' have ended."""
    port = urlsplit(made.cables["postgres"].url).port
    await made.load.close_idle()
    count: int = -1
    steady: int = 0

    async def is_steady() -> bool:
        nonlocal count, steady
        before, count = count, sum(_descriptors(one, port) for one in made.served)
        steady = steady + 1 if count == before else 0
        await asyncio.sleep(0.2)
        return steady >= _STEADY or count <= at_most

    await eventually(is_steady, within=4 * _KEPT_ALIVE_SECONDS)
    return count


def _descriptors(served: Served, postgres: int | None) -> int:
    assert served.process is not None
    process = psutil.Process(served.process.pid)
    theirs = [one for one in process.net_connections("tcp") if getattr(one.raddr, "port", None) == postgres]
    return process.num_fds() - len(theirs)


def main() -> int:
    """Give 1 where something was left behind, or an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cancellation", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    arguments = parser.parse_args()

    async def work() -> Outcome:
        with tempfile.TemporaryDirectory(prefix="goodstanding-faults-", ignore_cleanup_errors=True) as folder:
            async with scene(Path(folder), seed=arguments.seed, rate=0.0) as made:
                return await run(made, arguments.requests)

    print(f"seed {arguments.seed}", flush=True)
    outcome = uvloop.run(work())
    print(f"{outcome.answered} answered {dict(outcome.statuses)}, {outcome.vanished} vanished,", end=" ")
    print(f"file descriptors {outcome.descriptors[0]} before and {outcome.descriptors[1]} after")
    print("\n".join(outcome.wrong[:20]) or "nothing was left behind, and no answer was wrong")
    return bool(outcome.wrong)


if __name__ == "__main__":
    sys.exit(main())
