"""What a process takes: memory, time to start, a core; and what a burst on one cold key costs it."""

import json
import os
import statistics
import time
from typing import Final

from benchmarks.environment import CROWD, Environment, Serving, user_id
from benchmarks.figures import CONNECTIONS, HOT_USERS, Effort, Figure, flush, hot_requests, only, users_loaded
from benchmarks.load import Load, get, post

MEMORY_MIB: Final = 120.0
START_SECONDS: Final = 1.5
WORKERS: Final = 1.8
BURST: Final = 200
_MIB: Final = 2**20
_STARTS: Final = 5
_BATCH: Final = 100
_CORES: Final = 3
_DEADLINE_SECONDS: Final = 30.0


def resources(env: Environment, effort: Effort) -> list[Figure]:
    """Measure all four."""
    return [*_memory(env), *_start(env, effort), *_workers(env, effort), *_burst(env, effort)]


def _memory(env: Environment) -> list[Figure]:
    """Read each of 100,000 users until the process answers them from its own memory, and weigh it.

    `rss` is what the system counts for the process, shared libraries included; `uss` what it alone has.
    """
    crowd = env.crowd()
    token = crowd.token(user_id(0))
    ids = [user_id(number) for number in range(CROWD)]
    batches = [
        post("/api/user/reputation/batch", json.dumps({"user_ids": ids[start : start + _BATCH]}), token)
        for start in range(0, CROWD, _BATCH)
    ]
    singles = [get(user, token) for user in ids]
    weights: dict[str, tuple[float, float]] = {}
    figures = []
    for name, settings in {
        "in front of Redis": {"GOODSTANDING_MEMORY_SECONDS": "300"},
        "without Redis": {"GOODSTANDING_REDIS_URL": ""},
    }.items():
        flush(env)
        with crowd.goodstanding(settings={"GOODSTANDING_MEMORY_ENTRIES": str(CROWD), **settings}) as server:
            only(crowd.load(Load("closed", [server.port], [get(ids[0], token)], 1, seconds=5, once=True)), "200")
            empty = _weight(server)
            only(crowd.load(Load("closed", [server.port], batches, 4, seconds=120, once=True)), "200")
            cached = _weight(server)
            result = crowd.load(Load("closed", [server.port], singles, CONNECTIONS, seconds=120, once=True))
            only(result, "200")
            if result.sources != {"hit": CROWD}:
                message = f"users who are not kept: {result.sources}"
                raise RuntimeError(message)
            hot = _weight(server)
        weights |= {f"{name}, empty": empty, f"{name}, cached": cached, f"{name}, hot": hot}
        figures.append(
            Figure(
                f"memory of a process with {CROWD:,} hot entries, {name}",
                [hot[0]],
                "MiB",
                target=f"<= {MEMORY_MIB:.0f}",
                met=hot[0] <= MEMORY_MIB,
                note=f"rss; before their first hit {cached[0]:.0f} MiB, empty {empty[0]:.0f} MiB",
                raw={"mib_rss_and_uss": weights},
            )
        )
    return figures


def _weight(server: Serving) -> tuple[float, float]:
    return server.resident_bytes() / _MIB, server.own_bytes() / _MIB


def _start(env: Environment, effort: Effort) -> list[Figure]:
    """Start the service, and ask for a reputation until there is one."""
    taken, cpu = [], []
    token = env.token(user_id(0))
    for _ in range(max(_STARTS, effort.rounds)):
        began = time.monotonic()
        with env.goodstanding() as server:
            while server.get(f"/api/user/reputation/{user_id(0)}", token)[0] != 200:
                if time.monotonic() > began + _DEADLINE_SECONDS:
                    message = "no answer"
                    raise RuntimeError(message)
                time.sleep(0.005)
            taken.append(time.monotonic() - began)
            cpu.append(server.cpu_seconds())
    middle = statistics.median(taken)
    return [
        Figure(
            "from start to first answer",
            taken,
            "s",
            target=f"<= {START_SECONDS}",
            met=middle <= START_SECONDS,
            note=f"of these {statistics.median(cpu):.2f} s of processor time",
            raw={"processor_seconds": cpu},
        )
    ]


def _workers(env: Environment, effort: Effort) -> list[Figure]:
    """Compare hot reads of two workers with those of one, on all cores; the generator has to share one of them."""
    requests = hot_requests(env)
    rates: dict[int, list[float]] = {1: [], 2: []}
    each: dict[int, list[float]] = {1: [], 2: []}
    busy = 0.0
    with env.goodstanding(pinned=False) as one, env.goodstanding(pinned=False, workers=2) as two:
        for number in range(-1, effort.rounds):
            for workers, server in ((1, one), (2, two)):
                cpu = server.cpu_seconds()
                result = env.load(Load("closed", [server.port], requests, CONNECTIONS, seconds=effort.seconds / 2))
                cpu = server.cpu_seconds() - cpu
                only(result, "200")
                if number >= 0:
                    rates[workers].append(result.rate)
                    each[workers].append(result.answers / cpu)
                    busy = max(busy, result.busy)
    ratio = [more / less for less, more in zip(rates[1], rates[2], strict=True)]
    allowed = (os.cpu_count() or 1) >= _CORES
    return [
        Figure(
            "hot reads of two workers / of one",
            ratio,
            target=f">= {WORKERS}" if allowed else "",
            met=statistics.median(ratio) >= WORKERS if allowed else None,
            note="" if allowed else f"{os.cpu_count()} cores, and the generator takes {100 * busy:.0f} % of one",
            raw={"requests_per_second": rates, "requests_per_second_of_processor": each, "generator_busy": busy},
        ),
        Figure(
            "the same per second of their processor time",
            [more / less for less, more in zip(each[1], each[2], strict=True)],
        ),
    ]


def _burst(env: Environment, effort: Effort) -> list[Figure]:
    """Ask one process 200 times at once for one user whom no cache knows, and count the loads."""
    token = env.token(user_id(0))
    loads, errors, slowest = [], 0, []
    with env.goodstanding() as server:
        some = [get(user_id(number), token) for number in range(BURST)]
        env.load(Load("burst", [server.port], some, BURST))
        for number in range(effort.keys):
            before = users_loaded(server)
            result = env.load(Load("burst", [server.port], [get(user_id(HOT_USERS + BURST + number), token)], BURST))
            loads.append(users_loaded(server) - before)
            errors += BURST - result.statuses.get("200", 0)
            slowest.append(max(result.latencies))
    return [
        Figure(
            f"loads per cold key, 1 process, {BURST} requests at once",
            loads,
            "",
            target="1",
            met=set(loads) == {1.0},
            raw={"slowest_answer_milliseconds": slowest},
        ),
        Figure("errors of these", [errors], "", target="0", met=errors == 0),
    ]
