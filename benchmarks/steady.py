"""Ten minutes as a busy app would have them: many people, few of them popular, and sessions that change meanwhile."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Final

import asyncpg
import uvloop

from benchmarks.environment import CROWD, Environment, Serving, finish, match_id, user_id
from benchmarks.figures import CONNECTIONS, Effort, Figure, only
from benchmarks.load import Crowd, Load, Result, post, zipf

RATE: Final = 2000.0
WRITES: Final = 0.01
EXPONENT: Final = 1.0
CALLERS: Final = 1000
SECONDS: Final = 600.0
QUICK_SECONDS: Final = 20.0
P50_MS: Final = 2.0
P99_MS: Final = 10.0
P999_MS: Final = 25.0
HITS: Final = 99.0
PATIENCE: Final = 5.0
_WARM_UP_SECONDS: Final = 5.0
_BATCH: Final = 100
_CHANGE: Final = (
    "update public.wingman_sessions"
    " set status = case status when 'completed' then 'no_show' else 'completed' end where id ="
    " (select id from public.wingman_sessions where match_id = $1::text::uuid order by id limit 1)"
)


def load(env: Environment, effort: Effort) -> list[Figure]:
    """Read at a constant rate, due whether or not anything is answered, while the host app writes.

    One operation in a hundred is a write: a session of one of the same people, drawn by the same law, changes its
    status, and with it the counts of that user and of whoever was to be met. Before, all users are cached and the
    callers are known.
    """
    crowd = env.crowd()
    ranked = by_popularity()
    people = Crowd([user_id(number) for number in ranked], callers(crowd), EXPONENT)
    seconds = SECONDS if effort.seconds > 1 else QUICK_SECONDS
    with crowd.goodstanding() as server:
        warm_up(crowd, server, people)
        cpu = server.cpu_seconds()
        rate = RATE * (1 - WRITES)
        asked = Load("open", [server.port], (), CONNECTIONS, seconds, rate, crowd=people, patience=PATIENCE)
        with crowd.loading(asked) as process:
            writes = uvloop.run(_write(crowd, ranked, seconds))
            result = finish(process)
        cpu = server.cpu_seconds() - cpu
    return _figures(result, writes, cpu)


def by_popularity() -> list[int]:
    """Give the crowd's numbers, the most popular first: who meets whom has nothing to do with it."""
    return random.Random(0).sample(range(CROWD), CROWD)  # noqa: S311 - repeatable


def callers(env: Environment) -> list[str]:
    """Sign the tokens of some of the crowd."""
    return [env.token(user_id(number)) for number in range(CALLERS)]


def warm_up(env: Environment, server: Serving, people: Crowd) -> None:
    """Have all users cached, and the callers' tokens known."""
    token = people.tokens[0]
    batches = [
        post("/api/user/reputation/batch", json.dumps({"user_ids": people.users[start : start + _BATCH]}), token)
        for start in range(0, len(people.users), _BATCH)
    ]
    only(env.load(Load("closed", [server.port], batches, 4, seconds=120, once=True)), "200")
    some = Crowd(people.users, people.tokens, people.exponent, seed=1)
    env.load(Load("open", [server.port], (), CONNECTIONS, seconds=_WARM_UP_SECONDS, rate=RATE / 2, crowd=some))


async def _write(env: Environment, ranked: Sequence[int], seconds: float) -> list[float]:
    """Change sessions as the host app does, one transaction each; gives the milliseconds of each."""
    connection = await asyncpg.connect(env.host_url())
    rate = RATE * WRITES
    users = zipf(ranked, EXPONENT, random.Random(2))  # noqa: S311 - repeatable
    taken = []
    began = time.monotonic()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        start = time.monotonic()
        if await connection.execute(_CHANGE, match_id(next(users))) != "UPDATE 1":
            message = "a write that changed nothing"
            raise RuntimeError(message)
        taken.append(1000 * (time.monotonic() - start))
    await connection.close()
    return taken


def _figures(result: Result, writes: Sequence[float], cpu: float) -> list[Figure]:
    answers = result.since_due["200"]
    errors = sum(result.statuses.values()) - answers.number
    hits = 100 * result.sources.get("hit", 0) / result.answers
    late = result.late
    raw = {
        "requests": result.answers,
        "requests_per_second": RATE * (1 - WRITES),
        "milliseconds_since_due": answers.summary(),
        "milliseconds_since_sent": result.since_sent["200"].summary(),
        "milliseconds_sent_late": late.summary(),
        "statuses": result.statuses,
        "sources": result.sources,
        "answers_and_hits_of_each_ten_seconds": result.hits,
        "generator_busy": result.busy,
        "server_busy": cpu / result.seconds,
        "writes": len(writes),
        "writes_milliseconds_p50_worst": (statistics.median(writes), max(writes)),
    }
    name = f"{RATE:,.0f} operations/s for {result.seconds:.0f} s"
    figures = [
        Figure(
            f"{name}, {label}",
            [answers.quantile(share)],
            "ms",
            target=f"<= {target:g}",
            met=answers.quantile(share) <= target,
        )
        for label, share, target in (("p50", 0.5, P50_MS), ("p99", 0.99, P99_MS), ("p99.9", 0.999, P999_MS))
    ]
    return [
        *figures,
        Figure(f"{name}, the worst", [answers.worst], "ms", raw=raw),
        Figure(
            f"{name}, answered from a cache",
            [hits],
            "%",
            target=f">= {HITS:g}",
            met=hits >= HITS,
            note=f"{len(writes)} writes drop two users each; entries live 300 s, half of the users are read less often",
        ),
        Figure(f"{name}, errors", [errors], "", target="0", met=errors == 0),
        Figure(
            f"{name}, the generator's own lateness, p99",
            [late.quantile(0.99)],
            "ms",
            note=f"p50 {late.quantile(0.5):.2f} ms, worst {late.worst:.1f} ms; {100 * result.busy:.0f} % busy",
        ),
    ]
