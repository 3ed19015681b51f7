"""The demo: everything, started and filled with sample data, and a page to try it with."""

import asyncio
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Never, TypeAlias, assert_never
from urllib.parse import urlsplit

import asyncpg
import jwt
import uvicorn
from fastapi import APIRouter, Header
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from goodstanding import logs
from goodstanding.api import ContractRoute
from goodstanding.data import AtFault, SessionId, UserId, parse_user_id
from goodstanding.embedded import Postgres, Valkey, cache_directory, kept_secret
from goodstanding.errors import ConfigurationError, ForbiddenError, UserNotFoundError
from goodstanding.history import named_queries
from goodstanding.main import create_app, open_service, utc_now
from goodstanding.migrate import upgrade
from goodstanding.reputation_service import ReputationService
from goodstanding.settings import Settings, load_settings

if TYPE_CHECKING:
    _Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_FOLDER: Final = files("goodstanding")
_SQL: Final = named_queries((_FOLDER / "demo.sql").read_text(encoding="utf-8"))
_DATABASE: Final = "wingman"
_OWNER: Final = "host_owner"
_SERVICE: Final = "demo_service"
_SECONDS: Final = 60.0
_TOKEN_LIFE: Final = timedelta(days=90)
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_console = Console(highlight=False, markup=False, soft_wrap=True)


class Event(StrEnum):
    """What the visitor lets happen to a user's session."""

    COMPLETE = "complete"
    MISS = "miss"
    CANCEL = "cancel"
    CANCEL_THEIR_FAULT = "cancel_their_fault"


class EventRequest(BaseModel):
    """One session of a user that ends like this."""

    model_config = ConfigDict(extra="forbid")

    user_id: str
    event: Event


class WrittenResponse(BaseModel):
    """The session that was written, and the verdict on it, if any."""

    session_id: str
    status: str
    user1_completed_confirmed_by_user2: bool
    user2_completed_confirmed_by_user1: bool
    user_is: str
    partner_id: str
    partner_name: str
    at_fault: str | None


class UserResponse(BaseModel):
    """A user on the page."""

    user_id: str
    display_name: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How an event leaves a session: its status, and whom the flags confirm."""

    status: str
    user_confirmed: bool
    partner_confirmed: bool


def ending(event: Event) -> Ending:
    """Tell how an event leaves a session."""
    match event:
        case Event.COMPLETE:
            return Ending("completed", user_confirmed=True, partner_confirmed=True)
        case Event.MISS:
            return Ending("no_show", user_confirmed=False, partner_confirmed=True)
        case Event.CANCEL | Event.CANCEL_THEIR_FAULT:
            return Ending("cancelled", user_confirmed=False, partner_confirmed=False)
        case _:
            assert_never(event)


def run(*, port: int, data_dir: Path | None = None, host: str = "127.0.0.1") -> None:
    """Run the demo until Ctrl-C (exit code 130) or SIGTERM (0); call it from the main thread.

    Raises ConfigurationError, in one line, when the port or the folder is in use or a server does not start.
    """
    folder = cache_directory() / "demo" if data_dir is None else data_dir
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        with _listen(host, port) as listener:
            _console.print("Starting PostgreSQL and Valkey ...")
            with Postgres(folder / "postgres") as postgres, Valkey(folder / "valkey") as valkey:
                asyncio.run(_serve(listener, folder, postgres, valkey))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminated(*_: object) -> Never:
    raise SystemExit(0)


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything is started, so that a port in use is told at once."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = (error.strerror or "").partition(" (")[0]  # the rest repeats the address
        message = f"port {port} of {host} cannot be used: {reason}; choose another with --port"
        raise ConfigurationError(message) from None


class _Server(uvicorn.Server):
    """A server that says when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


async def _serve(listener: socket.socket, folder: Path, postgres: Postgres, valkey: Valkey) -> None:
    owner_url, service_url = await _prepare(postgres)
    secret = kept_secret(folder / "jwt-secret")
    settings = load_settings(
        environment="development",
        database_url=service_url,
        database_transaction_pooler=False,
        redis_url=valkey.url(),
        jwt_secret=secret,
        jwks_url="",
        jwt_issuer="",
        jwt_audience="authenticated",
        log_level="warning",
    )
    logs.configure(settings)
    tokens = Tokens.signed_with(secret)
    app = create_app(settings)
    app.include_router(build_router(settings, owner_url=owner_url, token=tokens.visitor))
    listening_on, port = listener.getsockname()
    address = f"http://{listening_on}:{port}"
    users = await _fetch(owner_url, "cast")
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = _Server(config, lambda: _announce(address, folder, tokens, UserId(users[0]["user_id"])))
    await server.serve(sockets=[listener])


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ready tokens: a signed-in visitor's and the host app's own."""

    visitor: str
    service: str

    @classmethod
    def signed_with(cls, secret: str) -> "Tokens":
        """Sign tokens that hold for 90 days."""
        now = utc_now()
        life = {"iat": now, "exp": now + _TOKEN_LIFE}
        visitor = {"sub": secrets.token_hex(8), "role": "authenticated", "aud": "authenticated", **life}
        return cls(
            visitor=jwt.encode(visitor, secret, algorithm="HS256"),
            service=jwt.encode({"role": "service_role", **life}, secret, algorithm="HS256"),
        )


def _announce(address: str, folder: Path, tokens: Tokens, user_id: UserId) -> None:
    reading = f"{address}/api/user/reputation/{user_id}"
    dropping = f"{address}/api/user/reputation/cache/invalidate/{user_id}"
    lines = (
        "",
        f"The page   {address}/",
        f"The API    {address}/docs",
        f"Your token {tokens.visitor}",
        "",
        "Read a reputation:",
        f"  curl -i -H 'Authorization: Bearer {tokens.visitor}' {reading}",
        "Drop it from the cache, as the host app would:",
        f"  curl -X POST -H 'Authorization: Bearer {tokens.service}' {dropping}",
        "",
        f"Ctrl-C ends everything; the data stays in {folder}",
    )
    _console.print("\n".join(lines))


async def _prepare(postgres: Postgres) -> tuple[str, str]:
    """Make what is missing; give the URLs of the tables' owner, who is no superuser, and of the service's login."""
    # The passwords live as long as the run: nobody else has to know them.
    owner_password, service_password = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    async with _connect(postgres.url()) as admin:
        for role, password in ((_OWNER, owner_password), (_SERVICE, service_password)):
            if not await admin.fetchval("select exists (select from pg_roles where rolname = $1)", role):
                await _execute(admin, "create role %I", role)
            await _execute(admin, "alter role %I login password %L", role, password)
        await _execute(admin, "alter role %I createrole", _OWNER)
        if not await admin.fetchval("select exists (select from pg_database where datname = $1)", _DATABASE):
            await _execute(admin, "create database %I owner %I", _DATABASE, _OWNER)
    await _seed(postgres.url(_DATABASE))
    owner_url = postgres.url(_DATABASE, user=_OWNER, password=owner_password)
    await upgrade(owner_url)
    async with _connect(owner_url) as owner:
        await _execute(owner, "grant goodstanding_service to %I", _SERVICE)
        await owner.execute(_SQL["verdicts"])
        users, sessions = await owner.fetchrow(_SQL["numbers"]) or (0, 0)
    _console.print(f"{users:,} users and {sessions:,} sessions are there.")
    return owner_url, postgres.url(_DATABASE, user=_SERVICE, password=service_password)


async def _seed(superuser_url: str) -> None:
    """Make the host's tables and their rows: all of it or, when interrupted, none."""
    async with _connect(superuser_url) as admin:
        if await admin.fetchval("select to_regclass('public.user_profiles') is not null"):
            return
        _console.print("Making the host app's tables and their rows; this takes a few seconds, once ...")
        async with admin.transaction():
            await admin.execute((_FOLDER / "host.sql").read_text(encoding="utf-8"))
            await _execute(admin, "set local role %I", _OWNER)
            await admin.execute(_SQL["seed"])


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator["_Connection"]:
    connection = await asyncpg.connect(url, timeout=_SECONDS, command_timeout=_SECONDS)
    try:
        yield connection
    finally:
        connection.terminate()


async def _execute(connection: "_Connection", template: str, *words: str) -> None:
    """Run a statement that takes no parameters; PostgreSQL quotes the words (`%I` a name, `%L` a text)."""
    await connection.execute(await connection.fetchval("select format($1, variadic $2::text[])", template, words))


async def _fetch(url: str, query: str) -> list[asyncpg.Record]:
    async with _connect(url) as connection:
        return await connection.fetch(_SQL[query])


def build_router(settings: Settings, *, owner_url: str, token: str) -> APIRouter:
    """Build the page and what its buttons call; it stands for the host app, with connections of its own."""
    running: list[_HostApp] = []

    @asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        async with (
            asyncpg.create_pool(owner_url, min_size=1, max_size=4, timeout=_SECONDS, command_timeout=_SECONDS) as pool,
            open_service(settings) as opened,
        ):
            running[:] = [_HostApp(pool, opened.service)]
            yield

    router = APIRouter(route_class=ContractRoute, lifespan=lifespan, include_in_schema=False)
    page = (_FOLDER / "demo.html").read_text(encoding="utf-8").replace("{{token}}", token)

    @router.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    @router.get("/demo/users")
    async def list_users() -> list[UserResponse]:
        return await running[0].users()

    @router.post("/demo/sessions")
    async def end_session(
        happened: EventRequest,
        host: Annotated[str, Header()] = "",
        origin: Annotated[str | None, Header()] = None,
    ) -> WrittenResponse:
        # Every browser names the origin of a POST, so a page from elsewhere cannot write; other clients need not.
        if origin is not None and _netloc(origin) != host:
            message = "Only the demo's own page may write here."
            raise ForbiddenError(message)
        return await running[0].end_session(parse_user_id(happened.user_id), happened.event)

    return router


def _netloc(origin: str) -> str | None:
    with suppress(ValueError):
        return urlsplit(origin).netloc
    return None


@dataclass(frozen=True, slots=True)
class _HostApp:
    """What the host app does: it writes its rows, and has support's verdicts recorded."""

    pool: "_Pool"
    service: ReputationService

    async def users(self) -> list[UserResponse]:
        return [UserResponse(**row) for row in await self.pool.fetch(_SQL["cast"])]

    async def end_session(self, user_id: UserId, event: Event) -> WrittenResponse:
        after = ending(event)
        async with self.pool.acquire() as connection, connection.transaction():
            match = await connection.fetchrow(_SQL["match"], user_id)
            if match is None:
                if await connection.fetchval(_SQL["new_match"], user_id) is None:
                    raise UserNotFoundError
                match = await connection.fetchrow(_SQL["match"], user_id)
                assert match is not None  # noqa: S101 - it was made in this transaction
            flags = (after.user_confirmed, after.partner_confirmed)
            user1_confirmed, user2_confirmed = flags if match["is_user1"] else flags[::-1]
            session_id = SessionId(await connection.fetchval(_SQL["book"], match["match_id"]))
            await connection.execute(_SQL["finish"], session_id, after.status, user1_confirmed, user2_confirmed)
        user_is = AtFault.USER1 if match["is_user1"] else AtFault.USER2
        if event is Event.CANCEL_THEIR_FAULT:
            await self.service.attribute(session_id, user_is, reason="Cancelled at the last minute.", said_by="demo")
        return WrittenResponse(
            session_id=session_id,
            status=after.status,
            user1_completed_confirmed_by_user2=user1_confirmed,
            user2_completed_confirmed_by_user1=user2_confirmed,
            user_is=user_is.value,
            partner_id=match["partner_id"],
            partner_name=match["partner_name"],
            at_fault=user_is.value if event is Event.CANCEL_THEIR_FAULT else None,
        )
