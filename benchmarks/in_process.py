"""Measurements without HTTP, in a process of their own; prints one JSON result.

`cold` compares a read of a user whom no cache knows with the bare statement that it needs; `token` compares a known
token with one that is seen for the first time. The settings come from the environment, as for the service.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import asyncpg
import uvloop
from redis.asyncio import Redis

from benchmarks.environment import USERS, user_id
from goodstanding import logs
from goodstanding.auth import Authenticator
from goodstanding.data import UserId
from goodstanding.history import QUERIES
from goodstanding.main import open_service, utc_now
from goodstanding.settings import Settings, load_settings

_WARM_UP: Final = 50
_SETTLE_SECONDS: Final = 0.002


async def cold(settings: Settings, rounds: int, reads: int) -> dict[str, list[float]]:
    """Give, per round, the median milliseconds of a cold read, the bare statement and `select 1`, taken in turn."""
    meaning = settings.reputation_policy().meaning
    medians: dict[str, list[float]] = {"cold": [], "statement": [], "select_1": []}
    async with (
        open_service(settings) as opened,
        Redis.from_url(settings.redis_url.get_secret_value()) as redis,
    ):
        connection = await asyncpg.connect(settings.require_database())

        async def read(user: str) -> None:
            await opened.service.read(UserId(user))

        async def statement(user: str) -> None:
            await connection.fetch(QUERIES["counts"], [user], *meaning)

        async def select_1(_user: str) -> None:
            await connection.fetch("select 1")

        kinds: dict[str, Callable[[str], Awaitable[None]]] = {
            "cold": read,
            "statement": statement,
            "select_1": select_1,
        }
        for number in range(-1, rounds):
            await redis.flushall()
            first = (number + 1) * reads * len(kinds)
            taken: dict[str, list[float]] = {name: [] for name in kinds}
            for step in range(reads if number >= 0 else _WARM_UP):
                for offset, (name, call) in enumerate(kinds.items()):
                    user = user_id((first + step * len(kinds) + offset) % USERS)
                    began = time.perf_counter()
                    await call(user)
                    taken[name].append((time.perf_counter() - began) * 1000)
                    await settle()
            if number >= 0:
                for name, values in taken.items():
                    medians[name].append(statistics.median(values))
        await connection.close()
    return medians


async def settle() -> None:
    """Let a read end what it leaves running (its fill), which is not the next one's; turning, so that nothing cools."""
    until = time.perf_counter() + _SETTLE_SECONDS
    while time.perf_counter() < until:  # noqa: ASYNC110 - it is the turning that is wanted
        await asyncio.sleep(0)


async def token(settings: Settings, rounds: int, tokens: Sequence[str]) -> dict[str, list[float]]:
    """Give, per round, the median microseconds of telling the caller from a known and from a new token."""
    medians: dict[str, list[float]] = {"new": [], "known": []}
    headers = [[(b"host", b"localhost"), (b"authorization", b"Bearer " + one.encode())] for one in tokens]
    for _ in range(rounds):
        authenticator = Authenticator.from_settings(settings, clock=utc_now, key_set=None)
        for name in ("new", "known"):
            taken = []
            for one in headers:
                began = time.perf_counter()
                authenticator.caller(one)
                taken.append((time.perf_counter() - began) * 1_000_000)
            medians[name].append(statistics.median(taken))
        await asyncio.sleep(0)
    return medians


def main() -> None:
    """Run the measurement that the first word names."""
    name, rounds, *words = sys.argv[1:]
    settings = load_settings()
    logs.configure(settings)
    result: dict[str, Any]
    if name == "cold":
        result = uvloop.run(cold(settings, int(rounds), int(words[0])))
    else:
        result = uvloop.run(token(settings, int(rounds), words))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
