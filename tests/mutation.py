"""How `make mutation` runs the tests, once for each of many small changes: quick ones first, and nothing is waited for.

As a command it prepares their PostgreSQL, runs mutmut with the arguments given, and fails where too little was noticed.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Final

import psutil
import pytest
from hypothesis import Phase, settings

from goodstanding.embedded import Postgres

PREPARED: Final = "PREPARED_POSTGRES"
"""The environment variable that names the folder of a stopped PostgreSQL which has both templates."""
# What a test's servers add to its place in the order, in seconds: its own duration does not count them.
_SERVERS: Final = {"valkey": 0.2, "postgres": 0.5, "nodes": 1.0}
_SUSPICIOUS: Final = 35
# A change that makes a test wait for what never comes is noticed after this, and four times what the test takes.
_PATIENCE: Final = 8.0
_NOTICED: Final = {"killed", "timeout", "segfault"}
_ENOUGH: Final = 0.9


def pytest_configure() -> None:
    """Let one failing example be enough, and each change be tried with the same ones."""
    settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)
    settings.load_profile("mutation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the quickest tests first, and end each one that takes much longer than it did."""
    stats = Path("mutmut-stats.json")
    durations = json.loads(stats.read_text())["duration_by_test"] if stats.exists() else {}
    seconds = {item: durations.get(item.nodeid, 0.0) for item in items}
    items.sort(key=lambda item: seconds[item] + _seconds_of_servers(item))
    for item in items:
        item.add_marker(pytest.mark.timeout(_PATIENCE + 4 * seconds[item], func_only=True))


def _seconds_of_servers(item: pytest.Item) -> float:
    fixtures: list[str] = getattr(item, "fixturenames", [])
    return sum(_SERVERS.get(name, 0.0) for name in fixtures)


def copy_of(prepared: Path) -> Path:
    """Copy a stopped server's folder for this process, and remove what processes that ended have left of theirs."""
    for old in prepared.parent.glob(f"{prepared.name}-*"):
        if not psutil.pid_exists(int(old.name.rpartition("-")[2])):
            shutil.rmtree(old, ignore_errors=True)
    folder = prepared.with_name(f"{prepared.name}-{os.getpid()}")
    try:
        subprocess.run(["cp", "-a", prepared, folder], check=True)  # noqa: S607 - the system's own
    except subprocess.CalledProcessError:
        pytest.exit("no PostgreSQL to test with", returncode=_SUSPICIOUS)  # not a change that was noticed
    return folder


async def _prepare(prepared: Path) -> None:
    os.environ[PREPARED] = str(prepared)
    from tests.conftest import make_bare_template, make_template  # noqa: PLC0415 - it reads the environment

    with Postgres(prepared, durable=False) as server:
        await make_bare_template(server)
        await make_template(server, "bare_template")


def judge(results: str) -> int:
    """Tell which of mutmut's changes were not noticed, count them by module, and give 1 where they are too many."""
    tried: dict[str, Counter[bool]] = defaultdict(Counter)
    for name, module, status in re.findall(r"^ *(goodstanding\.(\w+)\..*): (.+)$", results, re.MULTILINE):
        if status != "not checked":
            tried[module][status in _NOTICED] += 1
            if status not in _NOTICED:
                print(f"{name}: {status}")
    for module, counts in sorted(tried.items()):
        print(f"{module}: {counts[True]} of {counts.total()} changes were noticed, {counts[True] / counts.total():.1%}")
    enough = tried and all(counts[True] >= _ENOUGH * counts.total() for counts in tried.values())
    print(f"at least {_ENOUGH:.0%} of each module must be: {'so it is' if enough else 'MISSED'}")
    return 0 if enough else 1


def _main() -> int:
    folder = Path("mutants/postgres").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asyncio.run(_prepare(folder))
    mutmut = str(Path(sys.executable).with_name("mutmut"))
    code = subprocess.run([mutmut, "run", *sys.argv[1:]], check=False).returncode
    told = subprocess.run([mutmut, "results", "--all", "true"], check=True, capture_output=True, text=True).stdout
    return judge(told) or code


if __name__ == "__main__":
    sys.exit(_main())
