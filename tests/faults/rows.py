"""The matrix: every fault, and what must hold while it lasts. To add one: how it strikes, and a row here."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from tests.faults import ours, postgres, redis
from tests.faults.matrix import ANSWERABLE, ORDINARY, RECOVERY, Fault, nothing
from tests.faults.scene import Scene


@asynccontextmanager
async def both_killed(scene: Scene) -> AsyncIterator[None]:
    """Kill Redis and PostgreSQL; they come back one after the other."""
    async with redis.killed(scene), postgres.killed(scene):
        yield


@asynccontextmanager
async def both_frozen(scene: Scene) -> AsyncIterator[None]:
    """Stop Redis and PostgreSQL."""
    async with redis.frozen(scene), postgres.frozen(scene):
        yield


@asynccontextmanager
async def clock_back_and_nobody_leads(scene: Scene) -> AsyncIterator[None]:
    """Move the clocks a day back, so that what is cached seems to be of tomorrow, and take the relay away."""
    async with ours.clock_back(scene), postgres.nobody_leads(scene):
        yield


_REDIS: Final = Fault(
    "Redis",
    nothing,
    away=("redis",),
    sources=frozenset({"bypass"}),
    shows=frozenset({"bypass"}),
    meters=('goodstanding_cache_reads_total{result="away"}', 'goodstanding_loads_total{reason="away"}'),
)

_LOAD: Final = 1.0
"""The deadline of a load, by the settings' default, in seconds: whoever must wait for PostgreSQL waits so long."""

_FAILED: Final = ('goodstanding_query_errors_total{query="counts"}',)

_POSTGRES: Final = Fault(
    "PostgreSQL",
    nothing,
    away=("database",),
    statuses=frozenset({503}),
    sources=frozenset({"stale"}),
    shows=frozenset({"stale"}),
    meters=("goodstanding_stale_served_total", *_FAILED),
    # Of the cold there is no last known good copy yet; of those who changed none is left.
    refuses=0.5,
)
_HICCUP: Final = Fault(
    "PostgreSQL",
    nothing,
    statuses=frozenset({503}),
    sources=frozenset({"stale"}),
    refuses=0.25,
    seconds=0.5,
    heals=True,
)
_BOTH: Final = replace(
    _POSTGRES,
    away=("redis", "database"),
    sources=frozenset({"stale", "bypass"}),
    shows=frozenset({"503"}),
    refuses=0.8,
    meters=(*_REDIS.meters, *_FAILED),
)

_FROZEN: Final = Fault(
    "ours",
    nothing,
    statuses=frozenset({503}),
    sources=frozenset({"stale", "bypass"}),
    refuses=0.1,
    waits=4.0 + RECOVERY,
    alone=0,
)

FAULTS: Final[Sequence[Fault]] = (
    ORDINARY,
    replace(_REDIS, name="Redis: kill -9", strike=redis.killed),
    replace(_REDIS, name="Redis: an old snapshot", strike=redis.rewound, seconds=1.0),
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
    replace(_HICCUP, name="PostgreSQL: sessions ended", strike=postgres.sessions_ended),
    replace(_HICCUP, name="PostgreSQL: a backend killed", strike=postgres.backend_killed, meters=_FAILED),
    replace(_POSTGRES, name="PostgreSQL: postmaster killed", strike=postgres.killed),
    replace(_POSTGRES, name="PostgreSQL: SIGSTOP", strike=postgres.frozen, waits=_LOAD + ANSWERABLE),
    Fault("PostgreSQL: 50 ms slow", postgres.slow, waits=2 * ANSWERABLE, slows=postgres.SLOW_SECONDS),
    replace(_POSTGRES, name="PostgreSQL: 2 s slow", strike=postgres.too_slow, waits=_LOAD + ANSWERABLE),
    replace(
        _POSTGRES,
        name="PostgreSQL: pool exhausted",
        strike=postgres.pool_exhausted,
        away=(),
        meters=("goodstanding_stale_served_total",),
        waits=_LOAD + ANSWERABLE,
        flaps=3,
    ),
    replace(_POSTGRES, name="PostgreSQL: users locked", strike=postgres.users_locked, waits=_LOAD + ANSWERABLE),
    Fault("PostgreSQL: sessions locked", postgres.sessions_locked),
    Fault("PostgreSQL: a migration", postgres.migrated, seconds=0.5),
    replace(_POSTGRES, name="PostgreSQL: max_connections", strike=postgres.connections_used_up),
    Fault("PostgreSQL: nobody leads", postgres.nobody_leads, away=("relay",)),
    Fault(
        "PostgreSQL: disk full for the relay",
        postgres.disk_full,
        meters=('goodstanding_relay_failures_total{cause="DiskFullError"}',),
    ),
    replace(_HICCUP, name="PostgreSQL: a standby promoted", strike=postgres.promoted, stage="standby", once=True),
    replace(_BOTH, name="both: kill -9", strike=both_killed),
    replace(_BOTH, name="both: SIGSTOP", strike=both_frozen, waits=_LOAD + ANSWERABLE),
    Fault("ours: SIGTERM", ours.terminated, seconds=1.0, waits=2 * ANSWERABLE, flaps=2),
    Fault("ours: kill -9", ours.killed, seconds=1.0, alone=0, silent=True, flaps=2),
    replace(_FROZEN, name="ours: SIGSTOP for 10 s", strike=ours.frozen, seconds=10.0, waits=10.0 + RECOVERY),
    Fault("ours: clients vanish", ours.clients_vanish),
    replace(_FROZEN, name="ours: descriptors used up", strike=ours.descriptors_used_up),
    Fault("ours: the clock a day ahead", ours.clock_ahead, stage="clock"),
    Fault("ours: the clock a day back", ours.clock_back, stage="clock"),
    Fault("ours: clocks two days apart", ours.clocks_apart, stage="clock"),
    Fault("ours: the clock a day back, nobody leads", clock_back_and_nobody_leads, away=("relay",), stage="clock"),
)
