"""Where the processor's time of a hot read goes, by a sampling profiler that also sees what is no Python (py-spy)."""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.environment import Environment
from benchmarks.figures import CONNECTIONS, Effort, Figure, hot_requests, only
from benchmarks.load import Load

_SECONDS: Final = 10
_RATE: Final = 250
_SYSTEM_CALLS: Final = ("epoll_", "read", "recv", "send", "write", "libc_")
_PLACES: Final = {
    "goodstanding/": "our Python",
    "prometheus_client/": "prometheus-client",
    "uvicorn/": "uvicorn",
    "starlette/": "Starlette and FastAPI",
    "fastapi/": "Starlette and FastAPI",
    "uvloop": "event loop",
}


def processor(env: Environment, _effort: Effort) -> list[Figure]:
    """Sample a process under hot reads; no figure where a profiler may not look into another process."""
    requests = hot_requests(env)
    with env.goodstanding() as server, tempfile.TemporaryDirectory(prefix="goodstanding-processor-") as folder:
        env.load(Load("closed", [server.port], requests, CONNECTIONS, seconds=2.0))
        file = Path(folder) / "stacks.txt"
        command = ["record", "--native", "--format", "raw", "--rate", str(_RATE), "--duration", str(_SECONDS)]
        profiler = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("py-spy")),
                *command,
                "--output",
                str(file),
                "--pid",
                str(server.process.pid),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        env.cores.pin(profiler.pid, env.cores.rest)
        result = env.load(Load("closed", [server.port], requests, CONNECTIONS, seconds=_SECONDS + 2.0))
        _, told = profiler.communicate(timeout=60)
        only(result, "200")
        if profiler.returncode:
            # No number stands for what was not measured.
            print(f"processor time of a hot read: not sampled: {told.strip()[-200:]}", file=sys.stderr)
            return []
        shares = shares_of(file.read_text("utf-8").splitlines())
    return [Figure(f"processor time of a hot read: {place}", [share], "%") for place, share in shares]


def shares_of(stacks: Sequence[str]) -> list[tuple[str, float]]:
    """Give the percentage of the samples of each place, most first; a stack is `frame;...;frame count`."""
    counted: Counter[str] = Counter()
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        counted[_place(frames.split(";"))] += int(count)
    return [(place, 100 * count / counted.total()) for place, count in counted.most_common()]


def _place(frames: Sequence[str]) -> str:
    """Name whose time it is: the system's if a call of it is innermost, else that of the innermost known package."""
    if frames[-1].lstrip("_").startswith(_SYSTEM_CALLS) and ".py:" not in frames[-1]:
        return "system calls"
    for frame in reversed(frames):
        for part, place in _PLACES.items():
            if part in frame:
                return place
    return "other"
