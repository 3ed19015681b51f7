"""What a hot read allocates, and where: both ways through the service, by memray."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.environment import Environment, Serving
from benchmarks.figures import Effort, Figure, hot_requests, only
from benchmarks.load import Load

_REQUESTS: Final = 1000
_ROUNDS: Final = (1, 11)
"""The loads of two processes, of which the difference is told: what the start allocates is in both."""
_CONNECTIONS: Final = 8
_PLACES: Final = 20


@dataclass(frozen=True, slots=True)
class _Counted:
    """All allocations of a process, and those of each place."""

    requests: int
    allocations: int
    places: Counter[str]


def allocations(env: Environment, _effort: Effort) -> list[Figure]:
    """Count the allocations of a hot read, reused memory included."""
    requests = hot_requests(env)[:_REQUESTS]
    with tempfile.TemporaryDirectory(prefix="goodstanding-allocations-") as folder:
        few, many = (_counted(env, requests, times, Path(folder) / f"{times}.bin") for times in _ROUNDS)
    number = many.requests - few.requests
    places = {
        place: round((count - few.places[place]) / number, 2)
        for place, count in (many.places - few.places).most_common(_PLACES)
    }
    return [
        Figure(
            "allocations of a hot read",
            [(many.allocations - few.allocations) / number],
            "",
            note=f"of {number:,} requests; most at " + ", ".join([*places][:3]),
            raw={"places": places},
        )
    ]


def _counted(env: Environment, requests: Sequence[str], times: int, file: Path) -> _Counted:
    def ask(server: Serving) -> int:
        result = env.load(Load("closed", [server.port], requests, _CONNECTIONS, seconds=60, once=True))
        only(result, "200")
        return sum(result.statuses.values())

    memray = [sys.executable, "-m", "memray"]
    recorder = [*memray, "run", "--quiet", "--trace-python-allocators", "--output", str(file)]
    with env.goodstanding(under=recorder) as server:
        ask(server)
        number = sum(ask(server) for _ in range(times))
    told = file.with_suffix(".json")
    subprocess.run(
        [*memray, "stats", "--json", "--num-largest", "10000", "--output", str(told), str(file)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    said: dict[str, Any] = json.loads(told.read_text("utf-8"))
    places = Counter({_place(one["location"]): one["count"] for one in said["top_allocations_by_count"]})
    return _Counted(number, said["total_num_allocations"], places)


def _place(location: str) -> str:
    """Name a place by its function, file and line, whatever folder it is installed in."""
    function, path, line = location.rsplit(":", 2)
    return f"{function} ({'/'.join(Path(path).parts[-2:])}:{line})"
