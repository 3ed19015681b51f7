"""`goodstanding serve`, with a wall clock that signals move, or with a bug that the load must find.

A program of its own, `python -P served.py NAME serve --port N`: it imports nothing from the tests.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any, Final

from uvicorn import Server

from goodstanding import cache, cli, main, stream
from goodstanding.cache import RedisCache
from goodstanding.connections import Connections
from goodstanding.http_protocol import HotProtocol
from goodstanding.reputation_service import ReputationService

_SELDOM: Final = 0.08
_OFTEN: Final = 0.5


def _move_the_clock() -> None:
    """Move the wall clock a day ahead at SIGUSR1, and a day back at SIGUSR2."""
    ahead = timedelta()

    def move(number: int, _frame: object) -> None:
        nonlocal ahead
        ahead += timedelta(days=1 if number == signal.SIGUSR1 else -1)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, move)
    main.utc_now = lambda: datetime.now(UTC) + ahead  # noqa: TID251 - the edge where time comes in, moved
    main.unix_now = lambda: time.time() + ahead.total_seconds()  # noqa: TID251 - the same


def _mix_people_up() -> None:
    decode: Any = vars(cache)["decode"]
    before: list[Any] = []

    def mixed(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - the product's
        before.append(decode(*words, **options))
        return before[-2] if len(before) > 1 and random.random() < _SELDOM else before[-1]  # noqa: S311 - a bug

    vars(cache)["decode"] = mixed


def _drop_nothing() -> None:
    async def invalidate(self: RedisCache, user_ids: Any) -> None:  # noqa: ANN401 - the product's
        await self.say(" ".join(("changed", *user_ids)))

    RedisCache.invalidate = invalidate  # type: ignore[method-assign] # a bug


def _fail_seldom() -> None:
    read = ReputationService.read

    async def fail(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - the product's
        if random.random() < _SELDOM:  # noqa: S311 - a bug
            raise KeyError
        return await read(*words, **options)

    ReputationService.read = fail  # type: ignore[method-assign] # a bug


def _wait_seldom() -> None:
    read = ReputationService.read

    async def wait(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - the product's
        if random.random() < _SELDOM:  # noqa: S311 - a bug
            await asyncio.sleep(1.0)
        return await read(*words, **options)

    ReputationService.read = wait  # type: ignore[method-assign] # a bug


def _hang_seldom() -> None:
    read = ReputationService.read

    async def hang(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - the product's
        if random.random() < _SELDOM:  # noqa: S311 - a bug
            await asyncio.Event().wait()
        return await read(*words, **options)

    ReputationService.read = hang  # type: ignore[method-assign] # a bug


def _drop_seldom() -> None:
    received = HotProtocol.data_received

    def drop(self: HotProtocol, data: bytes) -> None:
        if b"reputation" in data and random.random() < _SELDOM:  # noqa: S311 - a bug
            self.transport.close()
        else:
            received(self, data)

    HotProtocol.data_received = drop  # type: ignore[method-assign] # a bug


def _end_at_once() -> None:
    def end(_self: Server, _number: int, _frame: FrameType | None) -> None:
        os._exit(0)

    Server.handle_exit = end  # type: ignore[assignment, method-assign] # a bug


def _keep_leases() -> None:
    fill = RedisCache.fill

    async def keep(self: RedisCache, entries: Any, token: str) -> Any:  # noqa: ANN401 - the product's
        if random.random() < _OFTEN:  # noqa: S311 - a bug
            return [False] * len(entries)
        return await fill(self, entries, token)

    RedisCache.fill = keep  # type: ignore[method-assign] # a bug


def _keep_a_connection_once() -> None:
    give_back = Connections.give_back
    kept: list[Any] = []

    def keep(self: Connections, connection: Any) -> None:  # noqa: ANN401 - the product's
        if kept:
            give_back(self, connection)
        else:
            kept.append(connection)

    Connections.give_back = keep  # type: ignore[method-assign] # a bug


def _keep_streams() -> None:
    watch: Any = vars(stream)["_watch"]

    async def look_away(*words: Any) -> None:  # noqa: ANN401 - the product's
        if random.random() < _OFTEN:  # noqa: S311 - a bug
            await asyncio.Event().wait()
        await watch(*words)

    vars(stream)["_watch"] = look_away


def _plant_bugs() -> None:
    for plant in (_mix_people_up, _drop_nothing, _fail_seldom, _wait_seldom, _hang_seldom, _drop_seldom):
        plant()


CHANGED: Final[dict[str, Callable[[], None]]] = {
    "clock": _move_the_clock,
    "bugs": _plant_bugs,
    "abrupt": _end_at_once,
    "mixed": _mix_people_up,
    "lease kept": _keep_leases,
    "connection kept": _keep_a_connection_once,
    "stream kept": _keep_streams,
}

if __name__ == "__main__":
    CHANGED[sys.argv.pop(1)]()
    cli.app()
