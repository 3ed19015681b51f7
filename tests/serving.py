"""A real server for the tests: an app under uvicorn on a loopback socket, its database, and its callers' tokens."""

import os
import random
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Final, Literal, TypeVar

import httpx2
import jwt
import uvicorn
from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from goodstanding.data import SessionId, UserId
from goodstanding.embedded import Postgres, Valkey
from goodstanding.main import utc_now
from goodstanding.settings import Settings, load_settings
from tests.conftest import Database, emptied, fresh_database

SECRET: Final = "the-shared-secret-of-these-tests-and-of-nothing-else"
NIL: Final = "00000000-0000-0000-0000-000000000000"
GONE: Final = "11111111-2222-4333-8444-555555555555"
SINGLE: Final = "/api/user/reputation/{}"
BATCH: Final = "/api/user/reputation/batch"
INVALIDATE: Final = "/api/user/reputation/cache/invalidate/{}"
INVALIDATE_ALL: Final = "/api/user/reputation/cache/invalidate-all"
ATTRIBUTION: Final = "/api/admin/sessions/{}/attribution"
NO_DATABASE: Final = "postgresql://app@127.0.0.1:1/app"
NO_REDIS: Final = "redis://127.0.0.1:1/0"
"""Nobody listens on port 1, ever. A port that was merely free may be taken, or connect to itself, a moment later."""
_DEADLINE: Final = 30.0
_TLS: Final = ssl.create_default_context()
"""Made once: it takes longer than most tests."""
_POLL: Final = 0.01
_SESSIONS: Final = """
insert into public.wingman_sessions
    (match_id, status, user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1, scheduled_time)
select $1, $2::text, $2::text = 'completed', true, now() from generate_series(1, $3)
"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backend:
    """A module's own database and an empty Valkey, usable from tests that are no coroutines."""

    database: Database
    redis_url: str
    _portal: BlockingPortal

    def settings(self, **overrides: object) -> Settings:
        """Give the settings of a service on these servers, which limits nobody."""
        plenty = {"read_limit_per_minute": 1_000_000, "admin_limit_per_minute": 1_000_000}
        urls = {"database_url": self.database.service_url, "redis_url": self.redis_url, "jwt_secret": SECRET}
        return load_settings(**{**plenty, **urls, **overrides})

    def call(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Run a coroutine function on the database's own event loop."""
        return self._portal.call(function, *arguments)

    def user(self, *, completed: int = 0, no_shows: int = 0) -> UserId:
        """Insert a user with so many completed and missed sessions."""
        user_id, _ = self.match(completed=completed, no_shows=no_shows)
        return user_id

    def match(self, *, completed: int = 0, no_shows: int = 0) -> tuple[UserId, str]:
        """Insert a user with a match, and in it so many sessions that the user completed and missed.

        What a relay would tell of them is told when this returns, so that whoever is cached from now on stays cached.
        """

        async def insert() -> tuple[UserId, str]:
            user_id = await self.database.add_user()
            match_id = await self.database.add_match(user_id, await self.database.add_user())
            async with self.database.owner() as connection:
                await connection.execute(_SESSIONS, match_id, "completed", completed)
                await connection.execute(_SESSIONS, match_id, "no_show", no_shows)
                # Beside a running relay this waits for what it is folding: it commits when the caches have been told.
                await connection.execute("select reputation.fold(1000000)")
            return user_id, match_id

        return self.call(insert)

    def session(self, match_id: str, status: str) -> SessionId:
        """Insert a session that nobody confirmed."""
        return self.call(self.database.add_session, match_id, status)

    def complete(self, match_id: str, *, unseen: bool = False) -> None:
        """Insert a session that the user completed; `unseen`: no relay learns of it, as where there are no triggers."""

        async def insert() -> None:
            async with self.database.owner() as connection, connection.transaction():
                await connection.execute(_SESSIONS, match_id, "completed", 1)
                if unseen:
                    await connection.execute("select reputation.fold(1000000)")

        self.call(insert)

    def execute(self, query: str, *values: object) -> None:
        """Run a statement as the owner of the host's tables."""

        async def run() -> None:
            async with self.database.owner() as connection:
                await connection.execute(query, *values)

        self.call(run)


@contextmanager
def open_backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Open a backend for as long as a module's tests run."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(fresh_database(postgres, template)) as database,
    ):
        yield Backend(database, emptied(valkey), portal)


@contextmanager
def serving(app: ASGIApp, *, http: type[HttpToolsProtocol] | Literal["auto"] = "auto") -> Iterator[str]:
    """Serve an app with uvicorn in a thread of its own, by a protocol of its or of ours; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="on",
                http=http,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_DEADLINE)
            assert not thread.is_alive()


@contextmanager
def client_of(app: ASGIApp, *, http: type[HttpToolsProtocol] | Literal["auto"] = "auto") -> Iterator[httpx2.Client]:
    """Serve an app, and give a client that has no token."""
    with serving(app, http=http) as url, httpx2.Client(base_url=url, timeout=_DEADLINE, verify=_TLS) as client:
        yield client


@contextmanager
def command(
    *words: str, environment: Mapping[str, str], folder: Path | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run a program of the environment with these variables, in a folder; it is gone when the block ends."""
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(words[0])), *words[1:]],
        env=clean_environment(environment),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextmanager
def client_of_command(*words: str, port: int, environment: Mapping[str, str]) -> Iterator[httpx2.Client]:
    """Run a program that serves on a port; gives a client once it answers."""
    with (
        command(*words, environment=environment) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=_DEADLINE, verify=_TLS) as client,
    ):
        wait_until(lambda: process.poll() is not None or _alive(client))
        assert process.poll() is None, process.communicate()[0]
        yield client


def _alive(client: httpx2.Client) -> bool:
    try:
        return client.get("/health/live").is_success
    except httpx2.TransportError:
        return False


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Give these variables and what Python and coverage need, but no setting of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "PYTHON", "COV", "HOME"))}
    return {**kept, "NO_COLOR": "1", "COLUMNS": "120", **variables}


def environment_of(settings: Settings) -> dict[str, str]:
    """Give the variables that make a process use a backend's servers."""
    return {
        "GOODSTANDING_DATABASE_URL": settings.database_url.get_secret_value(),
        "GOODSTANDING_REDIS_URL": settings.redis_url.get_secret_value(),
        "GOODSTANDING_JWT_SECRET": settings.jwt_secret.get_secret_value(),
    }


def token(role: str = "authenticated", *, secret: str = SECRET, **claims: object) -> str:
    """Sign a token that holds for an hour, for a subject nobody else has; a claim of None is left out."""
    default = {
        "sub": secrets.token_hex(8),
        "aud": "authenticated",
        "role": role,
        "exp": int(utc_now().timestamp()) + 3600,
    }
    payload = {name: value for name, value in {**default, **claims}.items() if value is not None}
    return jwt.encode(payload, secret, algorithm="HS256")


def bearer(role: str = "authenticated", **claims: object) -> dict[str, str]:
    """Give the header of a caller with this role."""
    return {"Authorization": f"Bearer {token(role, **claims)}"}  # type: ignore[arg-type] # `secret` is not a claim


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What came back over a socket, unread by any client library."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def raw_exchange(url: str, request: bytes, *, times: int = 1) -> RawAnswer:
    """Send bytes as they are, and read one answer; fails when there is none.

    So many `times` on one connection, as long as the server leaves it open; gives the last answer.
    """
    address = httpx2.URL(url)
    with socket.create_connection((address.host, address.port or 80), timeout=_DEADLINE) as connection:
        while True:
            # A server may answer, and close, before it has read everything.
            with suppress(ConnectionError):
                connection.sendall(request)
            answer = HTTPResponse(connection, method=request.partition(b" ")[0].decode("latin-1"))
            answer.begin()
            body = answer.read()
            times -= 1
            if times == 0 or answer.will_close:
                return RawAnswer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)


def free_port() -> int:
    """Give a port on which nobody listens now, below the ephemeral range, where nobody connects from either."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(condition: Callable[[], bool], *, seconds: float = _DEADLINE) -> None:
    """Wait until the condition holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(_POLL)


def check_problem(answer: httpx2.Response, status: int, code: str | None = None, *, never: str = "") -> None:
    """Check that an answer is an error in the contract's form, and that it does not hold the text `never`."""
    assert status == answer.status_code, answer.text
    assert "application/problem+json" == answer.headers["content-type"]
    told = answer.json()
    assert ["type", "title", "status", "detail", "code"] == list(told)
    assert status == told["status"]
    assert isinstance(told["detail"], str)
    assert "no-store" == answer.headers["cache-control"]
    if code is not None:
        assert code == told["code"]
    if status == httpx2.codes.UNAUTHORIZED:
        assert "Bearer" == answer.headers["www-authenticate"]
    if status in {429, 503}:
        assert int(answer.headers["retry-after"]) >= 1
    if never:
        assert never not in answer.text
    for leak in ("Traceback", "select ", "asyncpg", "pydantic", 'File "'):
        assert leak not in answer.text


def root() -> Path:
    """Give the repository's folder."""
    return Path(__file__).parent.parent
