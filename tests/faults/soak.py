"""Moderate load for an hour, and a fault every minute: flat memory, flat descriptors, not one wrong answer.

`python -m tests.faults.soak --minutes 60 --report docs/reference/soak.md`
"""

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from typing import Final

import psutil
import uvloop

from tests.faults.matrix import HANGS, HEAD, Fault, Row, cells, run
from tests.faults.rows import FAULTS
from tests.faults.scene import Scene, scene

_MINUTE: Final = 60.0
_GROWTH: Final = 1.05
_GROWTH_MB: Final = 3.0
"""Memory may have grown by so much, whichever is more; what every path allocates once is there in the second quarter.
"""
_MORE_DESCRIPTORS: Final = 5
_LOOKS: Final = 10
_LOOK_SECONDS: Final = 0.5
_RESTARTED: Final = {"ours: SIGTERM", "ours: kill -9"}
"""What a process had before is not to be compared with what another has."""
Sample = Sequence[tuple[float, int]]
_INTRODUCTION: Final = """\
# A soak

`make soak MINUTES={minutes}` (seed {seed}): {rate:.0f} requests a second to two processes, of which one has no memory
tier, and a fault of [the matrix](faults.md) each minute. Memory and file descriptors of each process are read in the
calm at the end of each minute, ten times in five seconds, of which the median counts; descriptors without the
connections that the load itself keeps, and without those of the pool for PostgreSQL, which has at most ten. The median
of the last quarter of all minutes must not exceed that of the second quarter by more than 5 % and 3 MB of memory, nor
that of the first one by more than 5 descriptors.
"""


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    """At the end of each minute, for each process: resident MB, and file descriptors, but not those of the load."""
    answers: int = 0

    def findings(self) -> list[str]:
        """Tell what is not as it must be."""
        told = Counter(
            f"{row.fault.name}: {line}" for row in self.rows for line in (*row.wrong, *row.unexplained, *row.late)
        )
        found = [line if times == 1 else f"{line} ({times} times)" for line, times in told.items()]
        quarter = max(1, len(self.samples) // 4)
        for process in range(len(self.samples[0])):
            memory, descriptors = zip(*(sample[process] for sample in self.samples), strict=True)
            was, now = median(memory[quarter : 2 * quarter] or memory), median(memory[-quarter:])
            if now > max(was * _GROWTH, was + _GROWTH_MB):
                found.append(f"process {process} grew from {was:.1f} to {now:.1f} MB")
            had, has = median(descriptors[:quarter]), median(descriptors[-quarter:])
            if has > had + _MORE_DESCRIPTORS:
                found.append(f"process {process} had {had:.0f} file descriptors, and has {has:.0f}")
        return found


def drawn(minutes: int, rng: random.Random) -> Sequence[Fault]:
    """Give a fault for each minute: every one once, in any order, before any comes again."""
    faults = [fault for fault in FAULTS if fault.stage == "plain" and fault.name not in _RESTARTED]
    rounds = (rng.sample(faults, len(faults)) for _ in count())
    return list(islice(chain.from_iterable(rounds), minutes))


async def soak(made: Scene, minutes: int) -> Outcome:
    """Break something each minute."""
    outcome = Outcome()
    for fault in drawn(minutes, made.rng):
        end = made.load.now + _MINUTE
        row = await run(fault, made)
        outcome.rows.append(row)
        outcome.answers += row.answers
        print(cells(row), flush=True)
        calm = Row(FAULTS[0])
        began = made.load.now
        made.load.seen.clear()
        await asyncio.sleep(max(0.0, end - _LOOKS * _LOOK_SECONDS - made.load.now))
        outcome.samples.append(await _sample(made))
        answers = await made.load.account(began, made.load.now, within=HANGS)
        unusual = [seen for seen in answers if seen.finding.wrong or not seen.whole]
        for seen in unusual:
            # One that is right and came another way is what a busy machine does.
            told = calm.late if seen.status == 200 and not seen.finding.wrong else calm.wrong
            told.append(f"{seen.kind}: {seen.status} {seen.source} {seen.finding.wrong}".rstrip())
        calm.answers = len(answers)
        outcome.answers += calm.answers
        if unusual:
            outcome.rows.append(calm)
        print(f"    {outcome.samples[-1]}", flush=True)
    return outcome


async def _sample(made: Scene) -> Sample:
    """Look at each process several times, and give the medians: what a request takes for a moment is no growth."""
    processes = [psutil.Process(one.process.pid) for one in made.served if one.process is not None]
    looks = []
    for _ in range(_LOOKS):
        await asyncio.sleep(_LOOK_SECONDS)
        looks.append(
            [
                (process.memory_info().rss / 1e6, made.descriptors(number) - made.load.connections(number))
                for number, process in enumerate(processes)
            ]
        )
    return [
        (round(median(memory for memory, _ in each), 1), int(median(descriptors for _, descriptors in each)))
        for each in zip(*looks, strict=True)
    ]


def _report(outcome: Outcome, *, minutes: int, seed: int, rate: float) -> str:
    lines = [_INTRODUCTION.format(minutes=minutes, seed=seed, rate=rate)]
    lines.append(f"{outcome.answers} answers. " + ("; ".join(outcome.findings()) or "Every promise was kept.") + "\n")
    lines.append("| minute | resident MB | file descriptors |\n|---|---|---|")
    for minute, sample in enumerate(outcome.samples, 1):
        memory, descriptors = zip(*sample, strict=True)
        lines.append(f"| {minute} | {', '.join(map(str, memory))} | {', '.join(map(str, descriptors))} |")
    lines.append(f"\n{HEAD}")
    lines += [cells(row) for row in outcome.rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Give 1 where something was not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--report", type=Path, help="write the page here")
    arguments = parser.parse_args()

    async def work() -> Outcome:
        with tempfile.TemporaryDirectory(prefix="goodstanding-faults-", ignore_cleanup_errors=True) as folder:
            async with scene(Path(folder), seed=arguments.seed, rate=arguments.rate) as made:
                return await soak(made, arguments.minutes)

    print(f"seed {arguments.seed}\n{HEAD}", flush=True)
    outcome = uvloop.run(work())
    if arguments.report is not None:
        page = _report(outcome, minutes=arguments.minutes, seed=arguments.seed, rate=arguments.rate)
        arguments.report.write_text(page, "utf-8")
    found = outcome.findings()
    print("\n".join(found) or f"{outcome.answers} answers, every promise was kept")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
