"""Where the measurements take place: real servers, sample data, and a core for each side.

The first core belongs to whatever is measured, the second to everything else: PostgreSQL, Valkey, the load generator.
"""

import asyncio
import hashlib
import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from platform import machine, python_implementation, python_version, system
from typing import Any, Final, TypeAlias
from uuid import UUID

import asyncpg
import jwt
import psutil
from pydantic import TypeAdapter

from benchmarks.load import Load, Result
from goodstanding.embedded import Postgres, Server, Valkey
from goodstanding.migrate import upgrade

USERS: Final = 10_000
CROWD: Final = 100_000
HOST: Final = "127.0.0.1"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Fill: TypeAlias = Callable[[Connection], Awaitable[None]]
_HERE: Final = Path(__file__).parent
_HOST_SQL: Final = _HERE.parent / "src" / "goodstanding" / "host.sql"
_PASSWORD: Final = secrets.token_urlsafe(16)
_LOGINS: Final = (
    "create role host_owner login createrole password %L",
    "create role app_login login password %L",
)
_START_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 15.0
_VERSIONS: Final = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "redis", "hiredis", "asyncpg", "pyjwt")


@dataclass(frozen=True, slots=True)
class Sample:
    """A database of the host's: so many users, each in `matches` matches from each side, of two sessions."""

    name: str
    users: int
    matches: int


_APP: Final = Sample("app", USERS, 5)
_CROWD: Final = Sample("crowd", CROWD, 2)


class MissingError(Exception):
    """A program that a comparison needs is not on this machine."""


def user_id(number: int) -> str:
    """Name a sample user."""
    return str(UUID(hashlib.md5(f"user-{number}".encode(), usedforsecurity=False).hexdigest()))


def match_id(number: int, step: int = 1) -> str:
    """Name a sample match: that of a user with the one whose number is greater by 37 steps."""
    return str(UUID(hashlib.md5(f"match-{number}-{step}".encode(), usedforsecurity=False).hexdigest()))


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core measures and which does the rest; the same one where there is only one."""

    measured: int
    rest: int

    @classmethod
    def choose(cls) -> "Cores":
        """Choose two of the cores that this process may use."""
        if not hasattr(os, "sched_setaffinity"):
            return cls(-1, -1)
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[-1])

    @property
    def both(self) -> tuple[int, int]:
        """Give the two."""
        return (self.measured, self.rest)

    @staticmethod
    def pin(pid: int, *cores: int) -> None:
        """Keep a process on these cores; a child that is started later stays there too."""
        if min(cores) >= 0:
            os.sched_setaffinity(pid, cores)


@dataclass(frozen=True, slots=True)
class Serving:
    """A server process under measurement."""

    port: int
    process: "subprocess.Popen[bytes]"

    def cpu_seconds(self) -> float:
        """Tell how much processor time it has used, its workers included."""
        return sum(times.user + times.system for times in (one.cpu_times() for one in self._processes()))

    def resident_bytes(self) -> int:
        """Tell how much memory its largest process has."""
        return max(int(one.memory_info().rss) for one in self._processes())

    def own_bytes(self) -> int:
        """Tell how much of it no other process shares."""
        return max(int(one.memory_full_info().uss) for one in self._processes())

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def get(self, path: str, token: str | None = None) -> tuple[int, bytes]:
        """Ask it once, on a connection of its own."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Environment:
    """Running servers, and the settings of everything that is started against them."""

    postgres: Postgres
    valkey: Valkey
    cores: Cores
    settings: Mapping[str, str]
    database: str = _APP.name

    def crowd(self) -> "Environment":
        """Make an environment of its own for 100,000 users, on the same servers."""
        database_url = asyncio.run(_sample(self.postgres, _CROWD))
        settings = {**self.settings, "GOODSTANDING_DATABASE_URL": database_url}
        return replace(self, settings=settings, database=_CROWD.name)

    def host_url(self) -> str:
        """Give the URL of the host app's own login, which owns its tables."""
        return self.postgres.url(self.database, user="host_owner", password=_PASSWORD)

    @contextmanager
    def goodstanding(
        self,
        *,
        pinned: bool = True,
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
        under: Sequence[str] = (),
    ) -> Iterator[Serving]:
        """Run `goodstanding serve` as a user does, by default in one process on the measured core alone.

        `under` is the command of a profiler that runs it.
        """
        port = _free_port()
        command = [
            *under,
            *(str(Path(sys.executable).with_name("goodstanding")), "serve", "--host", HOST, "--port", str(port)),
            *(("--workers", str(workers)) if workers > 1 else ()),
        ]
        with self._serving(command, port, pinned=pinned, settings=settings) as serving:
            yield serving

    @contextmanager
    def relay(self) -> Iterator[None]:
        """Run `goodstanding relay` on the other core."""
        command = [str(Path(sys.executable).with_name("goodstanding")), "relay"]
        process = subprocess.Popen(command, env={**_inherited(), **self.settings}, cwd=_HERE.parent)
        self.cores.pin(process.pid, self.cores.rest)
        try:
            yield
        finally:
            _end(process)

    @contextmanager
    def application(
        self,
        name: str,
        *,
        factory: bool = True,
        server: str = "uvicorn",
        settings: Mapping[str, str] | None = None,
    ) -> Iterator[Serving]:
        """Run an application of compared/plain.py, or `module:name`, with uvicorn as ours runs, or with granian."""
        port = _free_port()
        target = name if ":" in name else f"benchmarks.compared.plain:{name}"
        options = {
            "uvicorn": "--no-access-log --no-server-header --no-proxy-headers --log-level warning",
            "granian": "--interface asgi --workers 1 --loop uvloop --no-access-log --log-level warning",
        }[server].split()
        command = [
            *(sys.executable, "-m", server, target, "--host", HOST, "--port", str(port)),
            *(*options, *(("--factory",) if factory else ())),
        ]
        with self._serving(command, port, settings=settings) as serving:
            yield serving

    @contextmanager
    def fastify(self) -> Iterator[Serving]:
        """Run the comparison in Fastify; raises MissingError where there is no Node.js."""
        folder = _HERE / "compared" / "fastify"
        node, npm = _program("node"), _program("npm")
        if not (folder / "node_modules").exists():
            subprocess.run([npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=folder, check=True)
        port = _free_port()
        with self._serving([node, str(folder / "server.mjs"), str(port)], port) as serving:
            yield serving

    @contextmanager
    def go(self) -> Iterator[Serving]:
        """Run Go's net/http with a constant answer on one core; raises MissingError where there is no Go."""
        go = _program("go")
        with tempfile.TemporaryDirectory(prefix="goodstanding-go-") as folder:
            program = Path(folder) / "server"
            source = _HERE / "compared" / "go" / "main.go"
            subprocess.run([go, "build", "-o", str(program), str(source)], check=True)
            port = _free_port()
            with self._serving([str(program), str(port)], port, settings={"GOMAXPROCS": "1"}) as serving:
                yield serving

    @contextmanager
    def _serving(
        self, command: Sequence[str], port: int, *, pinned: bool = True, settings: Mapping[str, str] | None = None
    ) -> Iterator[Serving]:
        environment = {**_inherited(), **self.settings, **(settings or {})}
        process = subprocess.Popen(command, env=environment, cwd=_HERE.parent)
        self.cores.pin(process.pid, *((self.cores.measured,) if pinned else self.cores.both))
        serving = Serving(port, process)
        try:
            _wait_for(serving)
            yield serving
        finally:
            _end(process)

    def load(self, load: Load) -> Result:
        """Run a load in a process of its own and wait for its result."""
        with self.loading(load) as process:
            return finish(process)

    @contextmanager
    def loading(self, load: Load) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a load beside the caller; `finish` waits for its result."""
        command = [sys.executable, "-m", "benchmarks.load"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_inherited(), cwd=_HERE.parent
        ) as process:
            if process.stdin is None:
                raise RuntimeError
            process.stdin.write(TypeAdapter(Load).dump_json(load))
            process.stdin.close()
            process.stdin = None
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def in_process(self, *words: str) -> dict[str, Any]:
        """Run a measurement of in_process.py on the measured core."""
        command = [sys.executable, "-m", "benchmarks.in_process", *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**_inherited(), **self.settings}, cwd=_HERE.parent
        )
        self.cores.pin(process.pid, self.cores.measured)
        output, _ = process.communicate(timeout=300)
        if process.returncode != 0:
            message = f"{' '.join(words)} failed"
            raise RuntimeError(message)
        result: dict[str, Any] = json.loads(output)
        return result

    def token(self, subject: str) -> str:
        """Sign a token as Supabase does."""
        expires = datetime.now(UTC) + timedelta(hours=2)  # noqa: TID251 - the edge of a script
        claims = {
            "sub": subject,
            "aud": "authenticated",
            "role": "authenticated",
            "email": "someone@example.com",
            "exp": int(expires.timestamp()),
        }
        return jwt.encode(claims, self.settings["GOODSTANDING_JWT_SECRET"], algorithm="HS256")


def finish(process: "subprocess.Popen[bytes]") -> Result:
    """Wait for a load that was started with `loading`."""
    output, _ = process.communicate(timeout=120)
    if process.returncode != 0:
        message = "the load generator failed"
        raise RuntimeError(message)
    return TypeAdapter(Result).validate_json(output)


@contextmanager
def opened() -> Iterator[Environment]:
    """Start everything, and end it."""
    cores = Cores.choose()
    Cores.pin(0, cores.rest)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="goodstanding-benchmarks-")))
        postgres = Postgres(folder / "postgres", durable=False)
        valkey = Valkey(folder / "valkey")
        for server in (postgres, valkey):
            _started(stack, server)
        settings = {
            "GOODSTANDING_DATABASE_URL": asyncio.run(_sample(postgres, _APP)),
            "GOODSTANDING_REDIS_URL": valkey.url(),
            "GOODSTANDING_JWT_SECRET": secrets.token_urlsafe(32),
            "GOODSTANDING_METRICS_PUBLIC": "true",
            # The same work as at any other limit; the benchmark's few callers just ask more than people do.
            "GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000000",
            "GOODSTANDING_LOG_FORMAT": "json",
            "GOODSTANDING_LOG_LEVEL": "error",
        }
        yield Environment(postgres, valkey, cores, settings)


def describe(cores: Cores) -> dict[str, Any]:
    """Tell what a reader must know of the machine to compare; no names, no paths."""
    return {
        "system": system(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "pinned": cores.measured >= 0 and cores.measured != cores.rest,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": f"{python_implementation()} {python_version()}",
        # A machine that does other work measures that, too.
        "busy_percent_before": psutil.cpu_percent(interval=2),
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _started(stack: ExitStack, server: Server) -> None:
    stack.enter_context(server)


async def filled(postgres: Postgres, name: str, fill: Fill) -> str:
    """Make a database of the host's tables with what `fill` puts into them, and our schema; gives the service's URL."""
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(await admin.fetchval("select format('create database %I owner host_owner', $1::text)", name))
    await admin.close()
    admin = await asyncpg.connect(postgres.url(name))
    await admin.execute(_HOST_SQL.read_text("utf-8"))
    await fill(admin)
    # After the data: everybody is counted, and no change waits.
    await upgrade(postgres.url(name, user="host_owner", password=_PASSWORD))
    await admin.execute("vacuum analyze reputation.tallies")
    await admin.execute("grant goodstanding_service to app_login")
    await admin.close()
    return postgres.url(name, user="app_login", password=_PASSWORD)


async def _sample(postgres: Postgres, sample: Sample) -> str:
    """Make a database of sample data, once, and the two logins; gives the URL of the service's."""
    admin = await asyncpg.connect(postgres.url())
    known = await admin.fetchval("select true from pg_database where datname = $1", sample.name)
    if not await admin.fetchval("select true from pg_roles where rolname = 'host_owner'"):
        for login in _LOGINS:
            await admin.execute(await admin.fetchval("select format($1, $2::text)", login, _PASSWORD))
    await admin.close()

    async def fill(connection: Connection) -> None:
        for name, number in (("sample.users", sample.users), ("sample.matches", sample.matches)):
            await connection.execute("select set_config($1, $2, false)", name, str(number))
        # One at a time: VACUUM runs in no transaction, and several statements in one text are one.
        for statement in (_HERE / "sample.sql").read_text("utf-8").split(";\n\n"):
            await connection.execute(statement)

    if known:
        return postgres.url(sample.name, user="app_login", password=_PASSWORD)
    return await filled(postgres, sample.name, fill)


def _inherited() -> dict[str, str]:
    """Give the environment without what the caller may have set for the service, or for how Python starts."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GOODSTANDING_", "PYTHON"))
        and name not in {"DATABASE_URL", "REDIS_URL", "SUPABASE_JWT_SECRET"}
    }


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_SECONDS)


def _program(name: str) -> str:
    """Find a program, first of all in this environment; raises MissingError."""
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise MissingError(name)
    return found


def _free_port() -> int:
    import socket  # noqa: PLC0415 - for this alone

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(serving: Serving) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            serving.get("/")
        except OSError:
            if serving.process.poll() is not None or time.monotonic() > deadline:
                message = "a server under measurement did not start"
                raise RuntimeError(message) from None
            time.sleep(0.005)
        else:
            return
