"""Moderate load for an hour, and a fault every minute: flat memory, flat descriptors, not one wrong answer.

`python -m tests.faults.soak --minutes 60 --report docs/reference/soak.md`
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import uvloop

from tests.faults.matrix import HEAD, Fault, Row, cells, run
from tests.faults.rows import FAULTS
from tests.faults.scene import Scene, scene

_MINUTE: Final = 60.0
_GROWTH: Final = 1.1
_SLACK_MB: Final = 8.0
_MOST_DESCRIPTORS: Final = 150
"""The sockets of clients come and go with the load; more than these are a leak."""
_RESTARTED: Final = {"ours: SIGTERM", "ours: kill -9"}
"""What a process had before is not to be compared with what another has."""
_INTRODUCTION: Final = """\
# A soak

`make soak MINUTES={minutes}` (seed {seed}): {rate:.0f} requests a second to two processes, of which one has no memory
tier, and a fault of [the matrix](faults.md) each minute. Memory and file descriptors of each process are read in the
calm at the end of each minute.
"""


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    rows: list[Row] = field(default_factory=list)
    samples: list[Sequence[tuple[float, int]]] = field(default_factory=list)
    """At the end of each minute, for each process: resident MB, file descriptors."""
    answers: int = 0

    def findings(self) -> list[str]:
        """Tell what is not as it must be."""
        found = [f"{row.fault.name}: {line}" for row in self.rows for line in (*row.wrong[:5], *row.late[:5])]
        quarter = max(1, len(self.samples) // 4)
        for process in range(len(self.samples[0])):
            memory = [sample[process][0] for sample in self.samples]
            # What every path allocates once is there after the first quarter.
            first, last = max(memory[: quarter + 1]), min(memory[-quarter:])
            if last > first * _GROWTH + _SLACK_MB:
                found.append(f"process {process} grew from {first:.0f} to {last:.0f} MB")
            descriptors = self.samples[-1][process][1]
            if descriptors > _MOST_DESCRIPTORS:
                found.append(f"process {process} has {descriptors} file descriptors")
        return found


async def soak(made: Scene, minutes: int) -> Outcome:
    """Break something each minute."""
    faults = [fault for fault in FAULTS if fault.stage == "plain" and fault.name not in _RESTARTED]
    outcome = Outcome()
    for _ in range(minutes):
        end = made.load.now + _MINUTE
        fault: Fault = made.rng.choice(faults)
        row = await run(fault, made)
        outcome.rows.append(row)
        outcome.answers += row.answers
        print(cells(row), flush=True)
        calm = Row(FAULTS[0])
        made.load.seen.clear()
        await asyncio.sleep(max(0.0, end - made.load.now))
        calm.wrong = [
            f"{seen.kind}: {seen.status} {seen.source}: {seen.finding.wrong}"
            for seen in made.load.seen
            if seen.finding.wrong or seen.status not in {200, 404}
        ]
        outcome.answers += len(made.load.seen)
        if calm.wrong:
            outcome.rows.append(calm)
        outcome.samples.append([_sample(one.process.pid) for one in made.served if one.process is not None])
        print(f"    {outcome.samples[-1]}", flush=True)
    return outcome


def _sample(pid: int) -> tuple[float, int]:
    process = psutil.Process(pid)
    return round(process.memory_info().rss / 1e6, 1), process.num_fds()


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
