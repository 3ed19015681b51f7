"""What becomes of a process that is asked three times as much as it can answer."""

import http.client
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.environment import CROWD, Environment, Serving, finish, user_id
from benchmarks.figures import Effort, Figure, flush
from benchmarks.load import Crowd, Load, Result
from benchmarks.steady import EXPONENT, by_popularity, callers, warm_up

TIMES: Final = 3
GOODPUT: Final = 0.9
PATIENCE: Final = 1.0
CONNECTIONS: Final = 1000
MIXES: Final = {"one in ten uncached": 0.1, "all uncached": 1.0}
_CACHED: Final = 10_000
_CLOSED: Final = {64: CROWD // 5, 256: CROWD // 5}
"""Connections that look for the peak, and how many there are for them whom nobody asked for."""
_SPARE: Final = 0.9
_ASK_EVERY: Final = 0.5
_ASKED: Final = ("/health/live", "/metrics")


@dataclass(slots=True)
class _Asked:
    """Milliseconds of each answer to what an operator asks, and how many were none."""

    taken: list[float] = field(default_factory=list)
    failed: int = 0


def overload(env: Environment, effort: Effort) -> list[Figure]:
    """Find the most that a process answers in time, then ask three times that, whether or not anything is answered.

    In time is within a second of when it was due. That is also a caller's patience: what finds none of the 1,000
    connections free until then is given up.
    """
    crowd = env.crowd()
    return [figure for mix, share in MIXES.items() for figure in _mix(crowd, effort, mix, share)]


def _mix(env: Environment, effort: Effort, mix: str, share: float) -> list[Figure]:
    flush(env)
    people = [user_id(number) for number in by_popularity()]
    cached, fresh = people[:_CACHED], people[_CACHED:]
    tokens = callers(env)
    seconds = 10.0 if effort.seconds > 1 else 4.0
    with env.goodstanding() as server:
        warm_up(env, server, Crowd(cached, tokens, EXPONENT))
        peaks = {}
        for connections, number in _CLOSED.items():
            some, fresh = fresh[:number], fresh[number:]
            asking = Crowd(cached, tokens, EXPONENT, fresh=some, share=share)
            closed = env.load(
                Load("closed", [server.port], (), connections, seconds / 4, crowd=asking, patience=PATIENCE)
            )
            peaks[connections] = closed.good / (seconds / 4)
        rate = TIMES * max(peaks.values())
        # Nobody is asked for twice who is to be uncached.
        seconds = min(seconds, _SPARE * len(fresh) / (rate * share))
        asking = Crowd(cached, tokens, EXPONENT, fresh=fresh, share=share)
        cpu = server.cpu_seconds()
        pressing = Load("open", [server.port], (), CONNECTIONS, seconds, rate, crowd=asking, patience=PATIENCE)
        with env.loading(pressing) as process:
            operator = _operate(server, seconds)
            result = finish(process)
        cpu = server.cpu_seconds() - cpu
    raw = {
        "peak_per_second": peaks,
        "asked_per_second": rate,
        "seconds": seconds,
        "good_per_second": result.good / seconds,
        "statuses": result.statuses,
        "sources": result.sources,
        "milliseconds_since_due": {status: spread.summary() for status, spread in result.since_due.items()},
        "milliseconds_since_sent": {status: spread.summary() for status, spread in result.since_sent.items()},
        "milliseconds_sent_late": result.late.summary(),
        "generator_busy": result.busy,
        "server_busy": cpu / result.seconds,
        "operator": {path: {"milliseconds": asked.taken, "failed": asked.failed} for path, asked in operator.items()},
    }
    return _figures(f"{TIMES}x the peak, {mix}", result, result.good / seconds / max(peaks.values()), operator, raw)


def _operate(server: Serving, seconds: float) -> dict[str, _Asked]:
    """Ask what an operator asks, again and again, each time on a connection of its own."""
    asked = {path: _Asked() for path in _ASKED}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for path, one in asked.items():
            began, status = time.monotonic(), 0
            with suppress(OSError, http.client.HTTPException):
                status, _ = server.get(path)
            one.taken.append(1000 * (time.monotonic() - began))
            one.failed += status != 200
        time.sleep(_ASK_EVERY)
    return asked


def _figures(
    name: str, result: Result, goodput: float, operator: dict[str, _Asked], raw: dict[str, Any]
) -> list[Figure]:
    number = sum(result.statuses.values())
    answered = result.statuses.get("200", 0)
    rejected = result.since_sent.get("503")
    other = number - answered - result.statuses.get("503", 0)
    figures = [
        Figure(
            f"{name}, goodput / peak",
            [goodput],
            target=f">= {GOODPUT}",
            met=goodput >= GOODPUT,
            note=", ".join(f"{status}: {100 * count / number:.1f} %" for status, count in result.statuses.items())
            + f"; of {raw['asked_per_second']:.0f}/s",
            raw=raw,
        ),
        Figure(f"{name}, neither 200 nor 503", [100 * other / number], "%"),
    ]
    if rejected is not None:
        figures.append(Figure(f"{name}, a 503, p99 since it was sent", [rejected.quantile(0.99)], "ms"))
    figures += [
        Figure(
            f"{name}, the worst answer of {path}",
            [max(asked.taken)],
            "ms",
            note=f"{asked.failed} of {len(asked.taken)} failed" if asked.failed else "",
        )
        for path, asked in operator.items()
    ]
    return figures
