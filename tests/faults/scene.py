"""The servers that are broken, and the two processes that must not mind."""

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil
import redis.asyncio

from goodstanding import embedded
from goodstanding.embedded import Postgres, Valkey
from tests.cable import Cable
from tests.conftest import Database, connect, fresh_database, make_bare_template, make_template
from tests.faults.load import Load
from tests.faults.oracle import MOST, populate
from tests.live import Line, Served
from tests.parts import SECONDS, admin, eventually
from tests.serving import SECRET
from tests.topologies import cluster_url, running_cluster, watched_pair

PROCESSES: Final = 2
_UP: Final = "goodstanding_dependency_up"
_SAMPLE: Final = re.compile(r"^(goodstanding_\w+(?:\{[^}]*\})?) ([0-9.e+-]+|\+Inf)$", re.MULTILINE)


@dataclass(slots=True)
class Scene:
    """Two served processes, PostgreSQL and Redis, each behind a cable, under load.

    One process has no memory tier, so that its hits are Redis's. Cached values live for 6 s, so that the cold are
    read from PostgreSQL again and again.
    """

    database: Database
    postgres: Postgres
    redis_servers: Sequence[Valkey]
    cables: Mapping[str, Cable]
    """By `postgres` and, where there is one Redis, `redis`."""
    served: Sequence[Served]
    load: Load
    rng: random.Random
    _thread: ThreadPoolExecutor
    standby: Postgres | None = None

    @property
    def valkey(self) -> Valkey:
        """The one Redis."""
        (server,) = self.redis_servers
        return server

    async def do(self, work: Callable[[], object]) -> None:
        """Do something to a server, in the thread in which servers are started: they end with it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @asynccontextmanager
    async def redis(self) -> AsyncIterator["redis.asyncio.Redis"]:
        """Lend an administrator's connection to Redis, not by the cable."""
        async with admin(self.valkey.url()) as client:
            yield client

    async def ready(self, within: float = SECONDS) -> float:
        """Wait until every process says that nothing is away; gives the seconds that it took."""

        async def are() -> bool:
            for one in self.served:
                try:
                    if not await one.hears():
                        return False
                except OSError:
                    return False
            return True

        async def look() -> bool:
            if await are():
                return True
            # Whoever asks without a pause takes the processor from those who recover.
            await asyncio.sleep(0.02)
            return False

        return await eventually(look, within=within)

    async def calm(self) -> None:
        """Wait until every process is ready and has said so, in log and metrics."""

        async def is_said() -> bool:
            await asyncio.sleep(0.02)
            return all(
                value == 1.0
                for one in await self.metrics()
                for name, value in (one or {_UP: 0.0}).items()
                if name.startswith(_UP)
            )

        await self.ready()
        await eventually(is_said)

    async def metrics(self) -> Sequence[dict[str, float]]:
        """Read the metrics of each process; none of one that does not answer."""
        return [await _metrics(one) for one in self.served]

    def descriptors(self, process: int) -> int:
        """Count a process's file descriptors but those for PostgreSQL, of which a pool has now more and now fewer."""
        served = self.served[process].process
        assert served is not None
        port = urlsplit(self.cables["postgres"].url).port
        found = psutil.Process(served.pid)
        theirs = [one for one in found.net_connections("tcp") if getattr(one.raddr, "port", None) == port]
        return found.num_fds() - len(theirs)

    def said(self, since: Sequence[int]) -> Sequence[Counter[str]]:
        """Count what each process has logged since its log was that long, by `level event dependency cause`."""
        counts = []
        for one, start in zip(self.served, since, strict=True):
            lines = one.log.read_bytes()[start:].decode().splitlines()
            counts.append(Counter(_entry(line) for line in lines))
        return counts

    def logged(self) -> Sequence[int]:
        """Tell how long each log is."""
        return [one.log.stat().st_size for one in self.served]


async def _metrics(served: Served) -> dict[str, float]:
    try:
        async with asyncio.timeout(5.0), Line.to(served.port) as line:
            _, _, text = await line.get("/metrics")
    except (OSError, TimeoutError):
        return {}
    return {name: float(value) for name, value in _SAMPLE.findall(text.decode())}


def _entry(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return f"unstructured {line[:100]}"
    return " ".join(str(entry[key]) for key in ("level", "event", "dependency", "cause") if key in entry)


Do = Callable[[Callable[[], object]], Awaitable[None]]


@asynccontextmanager
async def scene(
    folder: Path,
    *,
    seed: int,
    stage: str = "plain",
    people: int = MOST,
    rate: float = 250.0,
    changed: str = "",
) -> AsyncIterator[Scene]:
    """Start everything and the load, on a stage of `STAGES`, with a change of served.py if one is named."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    async with AsyncExitStack() as stack:
        thread = stack.enter_context(ThreadPoolExecutor(1))

        async def do(work: Callable[[], object]) -> None:
            await asyncio.get_running_loop().run_in_executor(thread, work)

        redis_servers, redis_url = await stack.enter_async_context(STAGES[stage](folder, do))
        postgres = Postgres(folder / "postgres", durable=False, settings={"max_connections": "40"})
        stack.push_async_callback(do, postgres.stop)
        await do(postgres.start)
        await make_bare_template(postgres)
        await make_template(postgres, "bare_template")
        database = await stack.enter_async_context(fresh_database(postgres, "template"))
        oracle = await populate(database, people, rng)
        cables = {"postgres": await Cable.to(database.service_url)}
        stack.callback(cables["postgres"].end)
        if len(redis_servers) == 1:
            cables["redis"] = await Cable.to(redis_url)
            stack.callback(cables["redis"].end)
            redis_url = cables["redis"].url
        served = [
            Served(
                environment(cables["postgres"].url, redis_url) | {"GOODSTANDING_MEMORY_SECONDS": memory},
                log=folder / f"log{number}",
            )
            for number, memory in zip(range(PROCESSES), ("10", "0"), strict=True)
        ]
        for one in served:
            if changed or stage == "clock":
                one.program = changed_program(changed or stage)
            stack.callback(one.end)
        await asyncio.gather(*(one.start() for one in served))
        standby = None
        if stage == "standby":
            standby = Standby(folder / "standby", postgres)
            stack.push_async_callback(do, standby.stop)
            await do(standby.start)
            await standby.follow()
        load = Load(oracle, served, rng, rate=rate)
        made = Scene(database, postgres, redis_servers, cables, served, load, rng, thread, standby)
        async with load.running(lambda: made.database.owner_url):
            await made.ready()
            yield made


def changed_program(name: str) -> Sequence[str]:
    """Give the program that serves with a change of served.py."""
    return (sys.executable, "-P", str(Path(__file__).with_name("served.py")), name)


@asynccontextmanager
async def _plain(folder: Path, do: Do) -> AsyncIterator[tuple[Sequence[Valkey], str]]:
    options = ("--enable-debug-command", "yes", "--enable-protected-configs", "yes")
    valkey = Valkey(folder / "valkey", options=options)
    await do(valkey.start)
    try:
        yield [valkey], valkey.url()
    finally:
        await do(valkey.stop)


@asynccontextmanager
async def _sentinel(folder: Path, _do: Do) -> AsyncIterator[tuple[Sequence[Valkey], str]]:
    async with watched_pair(folder) as (master, replica, url):
        yield [master, replica], url


@asynccontextmanager
async def _cluster(folder: Path, do: Do) -> AsyncIterator[tuple[Sequence[Valkey], str]]:
    running = running_cluster(folder)
    nodes: list[Valkey] = []
    await do(lambda: nodes.extend(running.__enter__()))
    try:
        yield nodes, cluster_url(nodes)
    finally:
        await do(lambda: running.__exit__(None, None, None))


STAGES: Final = {"plain": _plain, "sentinel": _sentinel, "cluster": _cluster, "standby": _plain, "clock": _plain}


class Standby(Postgres):
    """A streaming copy of another server."""

    def __init__(self, data_dir: Path, primary: Postgres) -> None:
        super().__init__(data_dir, durable=False)
        self._primary = primary

    def _initialise(self) -> None:
        shutil.copy(self._primary.data_dir / "password", self.data_dir / "password")
        cluster = self.data_dir / "cluster"
        cluster.mkdir(mode=0o700)
        owner = (self._primary.data_dir / "cluster").stat()
        os.chown(cluster, owner.st_uid, owner.st_gid)
        program = embedded._postgres_program("pg_basebackup")  # noqa: SLF001 - the wheel's
        where = ("--dbname", self._primary.url(), "--pgdata", str(cluster))
        prefix = self._as_ordinary_user(cluster)
        subprocess.run(
            [*prefix, program, *where, "--write-recovery-conf", "--checkpoint=fast"],
            check=True,
            timeout=SECONDS,
            cwd=self.data_dir,
        )

    async def follow(self) -> None:
        """Let the primary confirm no commit before this copy has it: what was told to a writer is not lost."""
        async with connect(self._primary.url()) as superuser:

            async def is_told() -> bool:
                return bool(await superuser.fetchval("select exists (select from pg_stat_replication)"))

            await eventually(is_told)
            await superuser.execute("alter system set synchronous_standby_names = '*'")
            await superuser.execute("select pg_reload_conf()")


def environment(database_url: str, redis_url: str) -> dict[str, str]:
    """Give the settings of a served process."""
    return {
        "GOODSTANDING_DATABASE_URL": database_url,
        "GOODSTANDING_REDIS_URL": redis_url,
        "GOODSTANDING_JWT_SECRET": SECRET,
        "GOODSTANDING_METRICS_PUBLIC": "true",
        "GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000000",
        "GOODSTANDING_ADMIN_LIMIT_PER_MINUTE": "1000000",
        "GOODSTANDING_CACHE_TTL_SECONDS": "6",
        "GOODSTANDING_LOG_FORMAT": "json",
    }
