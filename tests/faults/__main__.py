"""Run the matrix of faults, or a part of it: `python -m tests.faults --help`."""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import uvloop

from tests.faults.matrix import HEAD, Fault, Row, cells, run
from tests.faults.rows import FAULTS
from tests.faults.scene import scene

_PAGE: Final = """\
# Faults

What `make faults` found, the whole matrix of `tests/faults/rows.py`: real servers that are really broken, under
{rate:.0f} requests a second to two processes of `goodstanding serve`, every one of whose answers is compared with what
had been committed (seed {seed}). One process has no memory tier, so that its hits are Redis's. Every request is
accounted for: one that was read and not answered, or hangs, is wrong; it is sent again only where the server had closed
a kept connection before it read it. Where one process is itself broken, nothing excuses the other one.

- **answers**, and what they were: where a read came from (`Cache-Status`), `batch`, 404 (somebody unknown), 503.
- **hit**, **other**: the slowest answer from a cache, and the slowest of the others, in milliseconds. Hits take 300 ms
  at most; so do the others, unless they must wait for a PostgreSQL that says nothing, for the deadline of a load.
- **stalest**: by how much the oldest answer that was not marked as stale was behind, in milliseconds; 2000 at most.
- **back**: seconds from the mending, or from the strike where it heals by itself, until every process was ready and
  every answer an ordinary one; 2 at most.
- **said**: what was logged as a warning, once by each process.

A row of which only times were missed is run again, up to three times: a busy machine misses them, too.
"""


def _stage(fault: Fault) -> str:
    return fault.stage


async def _matrix(faults: Sequence[Fault], seed: int, rate: float) -> list[Row]:
    rows: list[Row] = []
    print(f"seed {seed}\n{HEAD}", flush=True)
    for stage, group in groupby(sorted(faults, key=_stage), _stage):
        left = [*group]
        while left:
            before = len(rows)
            try:
                with tempfile.TemporaryDirectory(prefix="goodstanding-faults-", ignore_cleanup_errors=True) as folder:
                    async with scene(Path(folder), seed=seed, stage=stage, rate=rate) as made:
                        while left and not (rows[before:] and rows[-1].broken):
                            rows.append(await run(left.pop(0), made))
                            _print(rows[-1])
            except Exception as error:  # noqa: BLE001 - the other faults are run all the same
                if len(rows) == before:
                    rows.append(Row(left.pop(0), wrong=[f"no scene: {error!r}"]))
                    _print(rows[-1])
    return rows


def _print(row: Row) -> None:
    print(cells(row), flush=True)
    for line in (*row.before, *row.wrong[:10], *row.unexplained[:10], *row.late[:10]):
        print(f"    {line}", flush=True)


def main() -> int:
    """Give 1 where something that is promised did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="those whose name has one of these")
    parser.add_argument("--rate", type=float, default=250.0, help="requests a second")
    parser.add_argument("--report", type=Path, help="write the page here")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(word.lower() in fault.name.lower() for word in arguments.only)]
    if arguments.list:
        print("\n".join(fault.name for fault in chosen))
        return 0
    rows = uvloop.run(_matrix(chosen, arguments.seed, arguments.rate))
    if arguments.report is not None:
        lines = [_PAGE.format(rate=arguments.rate, seed=arguments.seed), HEAD, *map(cells, rows)]
        arguments.report.write_text("\n".join(lines) + "\n", "utf-8")
    missed = [row.fault.name for row in rows if not row.kept]
    print(f"missed: {', '.join(missed)}" if missed else f"{len(rows)} faults, every promise was kept")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
