"""The matrix: every fault, and what must hold while it lasts. To add one: how it strikes, and a row here."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from tests.faults import redis
from tests.faults.matrix import Fault
from tests.faults.scene import Scene


@asynccontextmanager
async def nothing(_scene: Scene) -> AsyncIterator[None]:
    """Break nothing: an ordinary day."""
    yield


_REDIS: Final = Fault(
    "Redis",
    nothing,
    away=("redis",),
    sources=frozenset({"bypass"}),
    shows=frozenset({"bypass"}),
    meters=('goodstanding_cache_reads_total{result="away"}', 'goodstanding_loads_total{reason="away"}'),
)

FAULTS: Final[Sequence[Fault]] = (
    Fault("nothing", nothing),
    replace(_REDIS, name="Redis: kill -9", strike=redis.killed),
    replace(_REDIS, name="Redis: SIGSTOP", strike=redis.frozen),
    replace(_REDIS, name="Redis: 2 s slow", strike=redis.slow),
    replace(_REDIS, name="Redis: refused", strike=redis.refused),
    replace(_REDIS, name="Redis: out of memory", strike=redis.full),
    replace(_REDIS, name="Redis: READONLY", strike=redis.read_only),
    replace(_REDIS, name="Redis: MISCONF", strike=redis.cannot_save),
    replace(_REDIS, name="Redis: LOADING", strike=redis.loading),
    replace(_REDIS, name="Redis: password changed", strike=redis.password_changed),
    Fault("Redis: FLUSHALL", redis.flushed_once),
    Fault("Redis: FLUSHALL storm", redis.flushed),
    Fault("Redis: CLIENT KILL storm", redis.connections_killed, sources=frozenset({"bypass"}), flaps=4),
    replace(_REDIS, name="Redis: failover to a replica", strike=redis.failed_over, stage="sentinel", heals=True),
    Fault("Redis: a Cluster reshards", redis.resharded, sources=frozenset({"bypass"}), stage="cluster"),
)
