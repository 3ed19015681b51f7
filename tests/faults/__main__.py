"""Run the matrix of faults, or a part of it: `python -m tests.faults --help`."""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import uvloop

from tests.faults.matrix import HEAD, Fault, Row, cells, run
from tests.faults.rows import FAULTS
from tests.faults.scene import scene


def _stage(fault: Fault) -> str:
    return fault.stage


async def _matrix(faults: Sequence[Fault], seed: int, rate: float) -> list[Row]:
    rows = []
    print(f"seed {seed}\n{HEAD}", flush=True)
    for stage, group in groupby(sorted(faults, key=_stage), _stage):
        with tempfile.TemporaryDirectory(prefix="goodstanding-faults-", ignore_cleanup_errors=True) as folder:
            async with scene(Path(folder), seed=seed, stage=stage, rate=rate) as made:
                for fault in group:
                    row = await run(fault, made)
                    rows.append(row)
                    print(cells(row), flush=True)
                    for line in (*row.wrong[:10], *row.late[:10]):
                        print(f"    {line}", flush=True)
    return rows


def main() -> int:
    """Give 1 where something that is promised did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="those whose name has one of these")
    parser.add_argument("--rate", type=float, default=250.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(word.lower() in fault.name.lower() for word in arguments.only)]
    if arguments.list:
        print("\n".join(fault.name for fault in chosen))
        return 0
    rows = uvloop.run(_matrix(chosen, arguments.seed, arguments.rate))
    missed = [row.fault.name for row in rows if not row.kept]
    print(f"missed: {', '.join(missed)}" if missed else f"{len(rows)} faults, every promise was kept")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
