"""The figures: each one a function from the environment to a ratio (or a worst case) and its verdict."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Final

import redis

from benchmarks.environment import USERS, Environment, MissingError, Serving, finish, user_id
from benchmarks.load import Load, Result, get, post

CONNECTIONS: Final = 64
HOT_USERS: Final = 100
_SLICES: Final = 4


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often is measured."""

    rounds: int
    seconds: float
    reads: int
    keys: int


FULL: Final = Effort(rounds=7, seconds=4.0, reads=300, keys=20)
QUICK: Final = Effort(rounds=5, seconds=1.0, reads=60, keys=5)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; `values` holds one number per round. Without a target it is only for information."""

    name: str
    values: Sequence[float]
    unit: str = "x"
    target: str = ""
    met: bool | None = None
    note: str = ""
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Round:
    """What one server did in one round."""

    requests: int = 0
    hits: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    busy: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def add(self, result: Result, cpu: float) -> None:
        """Add a slice of it; raises RuntimeError where an answer was no 200."""
        only(result, "200")
        self.requests += len(result.latencies)
        self.hits += result.sources.get("hit", 0)
        self.seconds += result.seconds
        self.cpu += cpu
        self.busy = max(self.busy, result.busy)
        self.latencies += result.latencies


Measurement = Callable[[Environment, Effort], list[Figure]]


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure: how often the requests per second of one server are those of another."""

    name: str
    server: str
    other: str
    at_least: float | None = None


OURS: Final = "goodstanding"
ASGI_ONLY: Final = "goodstanding without its protocol"
REDIS_ONLY: Final = "goodstanding without its memory tier"
COMPARED: Final = (
    Compared("hot read / raw ASGI", OURS, "raw ASGI", 1.5),
    Compared("hot read / Go's net/http, a constant answer", OURS, "go", 1.0),
    Compared("hot read / plain FastAPI with redis.asyncio", OURS, "plain", 8.0),
    Compared("hot read / FastAPI with cashews", OURS, "cashews", 8.0),
    Compared("hot read / FastAPI with aiocache", OURS, "aiocache", 8.0),
    Compared("hot read / FastAPI with fastapi-cache2", OURS, "fastapi-cache2", 8.0),
    Compared("hot read / Fastify with ioredis", OURS, "fastify", 1.3),
    Compared("hot read by the ASGI path alone / raw ASGI", ASGI_ONLY, "raw ASGI", 0.85),
    Compared("read from Redis / raw ASGI", REDIS_ONLY, "raw ASGI", 0.7),
    Compared("raw ASGI on granian / on uvicorn", "raw ASGI on granian", "raw ASGI"),
)


def hot_read(env: Environment, effort: Effort) -> list[Figure]:
    """Compare hits over HTTP with what others do and with bare servers, one after the other in each round."""
    with ExitStack() as stack:
        servers = {}
        missing = []
        # One relay for all three, beside PostgreSQL and Valkey: in one of them it would be that one's alone.
        stack.enter_context(env.relay())
        alone = {"GOODSTANDING_RELAY": "false"}
        for name, serving in {
            OURS: env.goodstanding(settings=alone),
            ASGI_ONLY: env.application("goodstanding.main:create_app", settings=alone),
            REDIS_ONLY: env.goodstanding(settings=alone | {"GOODSTANDING_MEMORY_SECONDS": "0"}),
            "raw ASGI": env.application("raw", factory=False),
            "raw ASGI on granian": env.application("raw", factory=False, server="granian"),
            "plain": env.application("plain"),
            "cashews": env.application("with_cashews"),
            "aiocache": env.application("with_aiocache"),
            "fastapi-cache2": env.application("with_fastapi_cache"),
            "fastify": env.fastify(),
            "go": env.go(),
        }.items():
            try:
                servers[name] = stack.enter_context(serving)
            except MissingError as error:
                missing.append(f"{name}: no {error} here")
        requests = hot_requests(env)
        for server in servers.values():
            env.load(Load("closed", [server.port], requests, CONNECTIONS, seconds=1.0))
        measured = in_turns(env, effort, servers, requests)
    for name in (OURS, ASGI_ONLY, REDIS_ONLY):
        if any(one.hits < one.requests for one in measured[name]):
            message = f"a hot read of {name} that was no hit"
            raise RuntimeError(message)
    rates = {name: [one.requests / one.seconds for one in rounds] for name, rounds in measured.items()}
    raw = {
        "requests_per_second": rates,
        "server_microseconds_per_request": {
            name: [one.cpu / one.requests * 1_000_000 for one in rounds] for name, rounds in measured.items()
        },
        "p99_milliseconds": {name: [_p99(one.latencies) for one in rounds] for name, rounds in measured.items()},
        "generator_busy_at_most": {name: max(one.busy for one in rounds) for name, rounds in measured.items()},
        "missing": missing,
    }
    figures: list[Figure] = []
    for each in COMPARED:
        if each.server in rates and each.other in rates:
            ratio = _ratios(rates[each.server], rates[each.other])
            target = "" if each.at_least is None else f">= {each.at_least:g}"
            met = None if each.at_least is None else statistics.median(ratio) >= each.at_least
            figures.append(Figure(each.name, ratio, target=target, met=met, raw={} if figures else raw))
    return figures


def hot_requests(env: Environment) -> list[str]:
    """Write reads of the hot users, by many callers."""
    hot = [user_id(number) for number in range(HOT_USERS)]
    tokens = [env.token(user) for user in hot[:CONNECTIONS]]
    return [get(user, token) for user, token in islice(zip(cycle(hot), cycle(tokens)), HOT_USERS * CONNECTIONS)]


def in_turns(
    env: Environment, effort: Effort, servers: Mapping[str, Serving], requests: Sequence[str]
) -> dict[str, list[Round]]:
    """Load one server after the other in slices, so that whatever else the machine does meets all of them."""
    measured: dict[str, list[Round]] = {name: [] for name in servers}
    for _ in range(effort.rounds):
        rounds = {name: Round() for name in servers}
        for _ in range(_SLICES):
            for name, server in servers.items():
                cpu = server.cpu_seconds()
                result = env.load(
                    Load("closed", [server.port], requests, CONNECTIONS, seconds=effort.seconds / _SLICES)
                )
                rounds[name].add(result, server.cpu_seconds() - cpu)
        for name, one in rounds.items():
            measured[name].append(one)
    return measured


def cold_read(env: Environment, effort: Effort) -> list[Figure]:
    """Compare a read that no cache can answer with the one statement that it needs."""
    medians = env.in_process("cold", str(effort.rounds), str(effort.reads))
    over_http = []
    with env.goodstanding() as server:
        token = env.token(user_id(0))
        for number in range(-1, effort.rounds):
            flush(env)
            requests = [get(user_id(each), token) for each in range(effort.reads)]
            result = env.load(Load("closed", [server.port], requests, 1, seconds=60, once=True))
            only(result, "200")
            if number >= 0:
                if result.sources != {"fwd=miss": effort.reads}:
                    message = f"a cold read that is no miss: {result.sources}"
                    raise RuntimeError(message)
                over_http.append(statistics.median(result.latencies))
    raw = {"median_milliseconds": {**medians, "cold_over_http": over_http}}
    ratio = _ratios(medians["cold"], medians["statement"])
    return [
        Figure(
            "cold read / bare SQL round trip, in process",
            ratio,
            target="<= 3",
            met=statistics.median(ratio) <= 3,
            raw=raw,
        ),
        Figure("cold read over HTTP / bare SQL round trip", _ratios(over_http, medians["statement"])),
        Figure("bare SQL round trip / select 1", _ratios(medians["statement"], medians["select_1"])),
    ]


def hung_redis(env: Environment, effort: Effort) -> list[Figure]:
    """Hang Redis under a steady load and look at the worst answer."""
    rate = 200.0
    worst: list[float] = []
    before_opening: list[float] = []
    after_opening: list[float] = []
    opening: list[float] = []
    recovery: list[float] = []
    with env.goodstanding() as server:
        token = env.token(user_id(0))
        requests = [get(user_id(number), token) for number in range(HOT_USERS)]
        seconds = 6.0
        for _ in range(effort.rounds):
            with env.loading(Load("open", [server.port], requests, CONNECTIONS, seconds=seconds, rate=rate)) as process:
                time.sleep(1.5)
                hung = time.monotonic()
                env.valkey.pause()
                try:
                    _until_ready(server, '"degraded":["cache"]')
                    opened = time.monotonic()
                    time.sleep(max(0.0, hung + 2.0 - opened))
                finally:
                    env.valkey.resume()
                resumed = time.monotonic()
                _until_ready(server, '"degraded":[]')
                recovered = time.monotonic()
                result = finish(process)
            only(result, "200")
            asked = list(zip(result.due, result.latencies, strict=True))
            worst.append(max(latency for due, latency in asked if hung - 0.3 <= due))
            early = [latency for due, latency in asked if hung <= due < opened]
            before_opening.append(statistics.median(early) if early else 0.0)
            after_opening.append(statistics.median([latency for due, latency in asked if opened <= due < resumed]))
            opening.append((opened - hung) * 1000)
            recovery.append(recovered - resumed)
    raw = {
        "requests_per_second": rate,
        "worst_milliseconds": worst,
        "p50_milliseconds_before_the_breaker_opened": before_opening,
        "p50_milliseconds_after_the_breaker_opened": after_opening,
        "breaker_opened_after_milliseconds": opening,
        "recovered_after_seconds": recovery,
    }
    return [
        Figure("worst answer with Redis hung", worst, "ms", target="<= 300", met=max(worst) <= 300, raw=raw),
        Figure("p50 while the circuit was still closed", before_opening, "ms"),
        Figure("p50 once it was open", after_opening, "ms"),
        Figure("Redis in use again after", recovery, "s", target="<= 2", met=max(recovery) <= 2),
    ]


def one_load(env: Environment, effort: Effort) -> list[Figure]:
    """Ask four processes 400 times at once for one user whom no cache knows, and count the loads.

    The processes share all cores with everything else, as a small fleet would.
    """
    with ExitStack() as stack:
        fleet = [stack.enter_context(env.goodstanding(pinned=False)) for _ in range(4)]
        token = env.token(user_id(0))
        ports = [server.port for server in fleet]
        env.load(Load("burst", ports, [get(user_id(number), token) for number in range(400)], 400))
        loads = []
        slowest = []
        for number in range(effort.keys):
            flush(env)
            before = sum(users_loaded(server) for server in fleet)
            result = env.load(Load("burst", ports, [get(user_id(USERS - 1 - number), token)], 400))
            only(result, "200")
            loads.append(sum(users_loaded(server) for server in fleet) - before)
            slowest.append(max(result.latencies))
    raw = {"loads_per_key": dict(sorted(Counter(loads).items())), "slowest_answer_milliseconds": slowest}
    return [
        Figure(
            "loads per cold key, 4 processes, 400 requests at once",
            loads,
            "",
            target="1",
            met=statistics.median(loads) == 1,
            note=", ".join(f"{keys} keys: {number:g}" for number, keys in sorted(Counter(loads).items())),
            raw=raw,
        )
    ]


def batch(env: Environment, effort: Effort) -> list[Figure]:
    """Compare users per second of full batches with those of single reads, all cached."""
    hot = [user_id(number) for number in range(HOT_USERS)]
    token = env.token(hot[0])
    singles = [get(user, token) for user in hot]
    batches = [post("/api/user/reputation/batch", json.dumps({"user_ids": hot}), token)]
    users: dict[str, list[float]] = {"single": [], "batch": []}
    with env.goodstanding() as server:
        for number in range(-1, effort.rounds):
            for name, requests, each in (("single", singles, 1), ("batch", batches, HOT_USERS)):
                result = env.load(Load("closed", [server.port], requests, 8, seconds=effort.seconds / 2))
                only(result, "200")
                if number >= 0:
                    users[name].append(result.rate * each)
    ratio = _ratios(users["batch"], users["single"])
    return [
        Figure(
            "batch of 100 / 100 single reads, users per second",
            ratio,
            target=">= 5",
            met=statistics.median(ratio) >= 5,
            raw={"users_per_second": users},
        )
    ]


def token_check(env: Environment, effort: Effort) -> list[Figure]:
    """Compare a token that was seen before with a new one."""
    tokens = [env.token(user_id(number)) for number in range(effort.reads)]
    medians = env.in_process("token", str(effort.rounds), *tokens)
    return [
        Figure(
            "known token / new token, tokens per second",
            _ratios(medians["new"], medians["known"]),
            raw={"median_microseconds": medians},
        )
    ]


MEASUREMENTS: Final[dict[str, Measurement]] = {
    "hot": hot_read,
    "cold": cold_read,
    "hung": hung_redis,
    "fleet": one_load,
    "batch": batch,
    "token": token_check,
}


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


def _p99(latencies: Sequence[float]) -> float:
    return statistics.quantiles(latencies, n=100)[98]


def only(result: Result, status: str) -> None:
    """Fail where there was another answer."""
    if set(result.statuses) != {status}:
        message = f"answers other than {status}: {result.statuses}"
        raise RuntimeError(message)


def flush(env: Environment) -> None:
    """Empty Redis."""
    with redis.Redis.from_url(env.settings["GOODSTANDING_REDIS_URL"]) as client:
        client.flushall()


def _until_ready(server: Serving, expected: str) -> None:
    deadline = time.monotonic() + 10
    while expected.encode() not in server.get("/health/ready")[1]:
        if time.monotonic() > deadline:
            message = f"/health/ready never said {expected}"
            raise RuntimeError(message)
        time.sleep(0.005)


def users_loaded(server: Serving) -> float:
    """Tell how many users a server has loaded from PostgreSQL."""
    _, text = server.get("/metrics")
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.decode().splitlines()
        if line.startswith("goodstanding_loads_total")
    )
