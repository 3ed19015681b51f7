"""Run seeds, or one seed with everything that happened in it: `python -m tests.simulation --help`."""

import argparse
import os
import secrets
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Final

from tests.simulation.bugs import BUGS
from tests.simulation.story import SCENARIOS, Outcome, run, run_some, simulated

_CHUNK: Final = 20
_AT_ONCE: Final = 2000


def _search(arguments: argparse.Namespace) -> Outcome | None:
    """Run seeds until one fails; gives that one."""
    last = arguments.first + arguments.seeds
    began, done, reads = time.perf_counter(), 0, 0
    work = partial(run_some, scenario=arguments.scenario, bug=arguments.bug)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        for begin in range(arguments.first, last, _AT_ONCE):
            end = min(begin + _AT_ONCE, last)
            chunks = [range(start, min(start + _CHUNK, end)) for start in range(begin, end, _CHUNK)]
            for outcomes in pool.map(work, chunks):
                for outcome in outcomes:
                    if outcome.violations:
                        pool.shutdown(wait=False, cancel_futures=True)
                        return outcome
                    done += 1
                    reads += outcome.reads
            print(f"{done} seeds, {reads} reads, {time.perf_counter() - began:.0f} s", flush=True)
    return None


def main() -> int:
    """Give 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="replay this one, and print what happened")
    parser.add_argument("--seeds", type=int, default=1000, help="how many to run")
    parser.add_argument("--first", type=int, default=secrets.randbelow(10**9), help="the first of them")
    parser.add_argument("--scenario", choices=SCENARIOS, help="what may break; else the seed decides")
    parser.add_argument("--bug", choices=BUGS, help="a bug to plant, which is to be found")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.bug is not None and arguments.scenario is None:
        arguments.scenario = BUGS[arguments.bug].scenario
    if arguments.seed is not None:
        with simulated(arguments.bug, traced=True):
            found: Outcome | None = run(arguments.seed, arguments.scenario, traced=True)
    else:
        print(f"seeds {arguments.first} to {arguments.first + arguments.seeds - 1}", flush=True)
        found = _search(arguments)
    if found is None:
        print("every promise was kept")
        return 0
    if found.trace:
        print(found.trace)
    for violation in found.violations:
        print(f"seed {found.seed}, {found.scenario}: {violation}")
    if found.violations:
        bug = f' --bug "{arguments.bug}"' if arguments.bug else ""
        print(f'replay: python -m tests.simulation {found.seed} --scenario "{found.scenario}"{bug}')
    return bool(found.violations)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets takes part in what happens, so it has to be the same in every run.
        os.execve(  # noqa: S606 - ourselves again
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    sys.exit(main())
