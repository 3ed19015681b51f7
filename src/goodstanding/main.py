"""The wiring: settings -> cache, history, service, routes -> an application. Nothing else builds these together."""

import asyncio
import gc
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from goodstanding import logs
from goodstanding.api import ContractRoute, OwnRoute, Runtime, build_router, problem, problem_of_http
from goodstanding.auth import Authenticator, KeySet
from goodstanding.breaker import Breaker
from goodstanding.broadcast import Announcer, Broadcast, Freshness, Heard, hear_redis
from goodstanding.cache import Cache, RedisCache
from goodstanding.changes import NotifyPublisher, RedisPublisher, Relay, SessionLedger
from goodstanding.entry import Lives
from goodstanding.errors import ConfigurationError, InvalidInputError, TemporarilyUnavailableError
from goodstanding.fast_lane import FastLane
from goodstanding.history import SessionHistory
from goodstanding.limits import RateLimiter, SharedCounters
from goodstanding.memory import MemoryCache, MemoryTier
from goodstanding.metrics import forget_ended_processes
from goodstanding.policy import ReputationPolicy
from goodstanding.reputation_service import ReputationService
from goodstanding.settings import Settings, load_settings
from goodstanding.stream import before_stopping
from goodstanding.subscribers import Subscribers
from goodstanding.tasks import background, check_cancelled

_log = structlog.get_logger("goodstanding")
_ASK_AGAIN_SECONDS: Final = 1.0
_GARBAGE: Final = 10_000
"""So many more objects made than freed let the collector look at the young ones, where Python 3.11 says 700: hundreds
of reads under way are as many, and no garbage."""


def utc_now() -> datetime:
    """Give the present moment; the one place that reads the wall clock."""
    return datetime.now(UTC)  # noqa: TID251 - the edge where time comes in


def unix_now() -> float:
    """Give the same in seconds since 1970."""
    return time.time()  # noqa: TID251 - the one place where this comes from


@dataclass(frozen=True, slots=True)
class Opened:
    """The service, and what a command or an application may need beside it."""

    service: ReputationService
    history: SessionHistory
    counters: SharedCounters | None
    freshness: Freshness
    heard: list[Heard]
    """Called with whose counts changed, as long as the service is open; more may be added."""


@asynccontextmanager
async def open_service(settings: Settings, *, live: bool = False) -> AsyncIterator[Opened]:
    """Open the service that the settings describe; a dependency that is away now may come later.

    With `live` its caches follow every change. Without, as for a command that ends at once, they hold what they hold.
    """
    policy = settings.reputation_policy()
    lives = _lives(settings)
    freshness = Freshness(clock=utc_now)
    oldest = freshness.oldest if live else lambda: None
    heard: list[Heard] = []
    announcer = Announcer()
    async with AsyncExitStack() as stack:
        cache: Cache
        redis: RedisCache | None = None
        if settings.redis_url.get_secret_value():
            cache = redis = await stack.enter_async_context(_open_redis(settings, oldest=oldest))
            if live and settings.memory_seconds:
                cache = tier = MemoryTier(
                    below=redis,
                    lives=lives,
                    capacity=settings.memory_entries,
                    seconds=settings.memory_seconds,
                    trusted=freshness.trusted,
                    clock=utc_now,
                )
                heard.append(tier.evict)
        else:
            cache = alone = MemoryCache(lives=lives, capacity=settings.memory_entries, oldest=oldest)
            if live and settings.session_database() is not None:
                alone.announce = announcer.say
                heard.append(alone.evict)
        history = await stack.enter_async_context(
            SessionHistory.open(
                settings.require_database(),
                pool_size=settings.database_pool_size,
                transaction_pooler=settings.uses_transaction_pooler(),
                deadline=settings.load_deadline_ms / 1000,
            )
        )
        service = await stack.enter_async_context(
            ReputationService.open(
                cache=cache,
                history=history,
                policy=policy,
                lives=lives,
                load_deadline=settings.load_deadline_ms / 1000,
                cache_wait=settings.cache_wait_ms / 1000,
                concurrent_loads=settings.database_pool_size,
                clock=utc_now,
                random=random.uniform,
            )
        )
        if live:
            spawn = await stack.enter_async_context(background())
            for work in _follow(settings, history, redis, announcer, Broadcast(freshness, heard)):
                spawn(work)
            spawn(_tell_freshness(freshness))
        yield Opened(service, history, redis, freshness, heard)


def _lives(settings: Settings) -> Lives:
    return Lives(
        value=settings.cache_ttl_seconds * 1000,
        unknown=settings.unknown_ttl_seconds * 1000,
        last_good=settings.stale_ttl_seconds * 1000,
        lease=settings.load_deadline_ms,
    )


def _open_redis(
    settings: Settings, *, oldest: Callable[[], datetime | None]
) -> AbstractAsyncContextManager[RedisCache]:
    return RedisCache.open(
        settings.redis_url.get_secret_value(),
        deadline=settings.redis_deadline_ms / 1000,
        policy=settings.reputation_policy().version,
        lives=_lives(settings),
        oldest=oldest,
    )


def _follow(
    settings: Settings, history: SessionHistory, redis: RedisCache | None, announcer: Announcer, broadcast: Broadcast
) -> Iterator[Coroutine[object, object, None]]:
    """Give the work that lets a process follow every change: to hear, to carry changes, and to say what is amiss."""
    yield _tell_tallies(history, settings.reputation_policy())
    database = settings.session_database()
    if redis is not None:
        yield hear_redis(broadcast, redis)
    elif database is not None:
        yield announcer.hear(broadcast, database)
    if database is None:
        _log.warning("relay_needs_sessions", setting="GOODSTANDING_RELAY_DATABASE_URL")
    elif settings.relay:
        yield _relay(settings, database, redis).run()


def _relay(settings: Settings, database_url: str, redis: RedisCache | None) -> Relay:
    return Relay(
        partial(SessionLedger.open, database_url),
        RedisPublisher(redis) if redis is not None else NotifyPublisher(),
        poll_seconds=settings.relay_poll_ms / 1000,
        clock=utc_now,
        random=random.uniform,
    )


@asynccontextmanager
async def open_relay(settings: Settings) -> AsyncIterator[Relay]:
    """Open a relay alone; raises ConfigurationError where no session can be kept."""
    database = settings.session_database()
    if database is None:
        message = (
            "GOODSTANDING_RELAY_DATABASE_URL: the relay needs a connection that keeps its session, not this pooler"
        )
        raise ConfigurationError(message)
    async with AsyncExitStack() as stack:
        redis = None
        if settings.redis_url.get_secret_value():
            redis = await stack.enter_async_context(_open_redis(settings, oldest=lambda: None))
        yield _relay(settings, database, redis)


async def _tell_tallies(history: SessionHistory, policy: ReputationPolicy) -> None:
    """Say once, as soon as the database answers, why every load recounts, if it does."""
    while True:
        check_cancelled()
        try:
            status = await history.status(policy)
        except TemporarilyUnavailableError:
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
            continue
        if not status.tracked:
            _log.warning("tallies_unused", reason="not every trigger is installed", mend="goodstanding migrate")
        elif not status.same_policy:
            _log.warning("tallies_unused", reason="they mean another policy", mend="goodstanding rebuild")
        return


async def _tell_freshness(freshness: Freshness) -> None:
    """Say, in metrics and log, whenever a relay is no longer heard, and when one is again."""
    relay = Breaker("relay")
    while True:
        check_cancelled()
        await asyncio.sleep(_ASK_AGAIN_SECONDS)
        if freshness.trusted():
            relay.close()
        else:
            relay.open()


@asynccontextmanager
async def open_runtime(
    settings: Settings, authenticator: Authenticator, key_set: KeySet | None
) -> AsyncIterator[Runtime]:
    """Open everything that the routes work with."""
    async with AsyncExitStack() as stack:
        if key_set is not None:
            await stack.enter_async_context(key_set)
        opened = await stack.enter_async_context(open_service(settings, live=True))
        limiter = RateLimiter.from_settings(settings, clock=utc_now, counters=opened.counters)
        spawn = await stack.enter_async_context(background())
        spawn(limiter.run())
        subscribers = Subscribers(
            opened.service.read_many,
            clock=utc_now,
            fresh=opened.freshness.trusted,
            keys=lambda: authenticator.keys,
            per_caller=settings.streams_per_caller,
            per_process=settings.streams_per_process,
        )
        opened.heard.append(subscribers.changed)
        spawn(subscribers.run())
        stack.callback(subscribers.stop)
        stack.enter_context(before_stopping(subscribers.stop))
        yield Runtime(
            service=opened.service,
            authenticator=authenticator,
            limiter=limiter,
            subscribers=subscribers,
            key_set=key_set,
            hears=opened.freshness.trusted,
            public_reads=settings.public_reads,
            metrics_public=settings.metrics_public,
        )


def router(settings: Settings | None = None) -> APIRouter:
    """Give the routes for a host's own FastAPI app, with the lifespan that serves them.

    `app.include_router(goodstanding.router())` is all it takes. Raises ConfigurationError.
    """
    return _router(load_settings() if settings is None else settings, ContractRoute)


def _router(settings: Settings, route_class: type[ContractRoute], running: list[Runtime] | None = None) -> APIRouter:
    settings.require_database()
    settings.require_tokens()
    key_set = KeySet.from_settings(settings)
    authenticator = Authenticator.from_settings(settings, clock=utc_now, key_set=key_set)
    running = [] if running is None else running

    @asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        async with open_runtime(settings, authenticator, key_set) as runtime:
            running.append(runtime)
            try:
                yield
            finally:
                running.remove(runtime)

    def runtime() -> Runtime:
        if not running:
            message = "goodstanding: the application's lifespan has not been started"
            raise RuntimeError(message)
        return running[-1]

    return build_router(runtime, lifespan, route_class=route_class)


class Application(FastAPI):
    """A FastAPI application with a fast lane in front of it."""

    lane: FastLane

    def setup(self) -> None:
        """Add the framework's routes; before them one for the OpenAPI document, which they would write at each call."""
        self.add_route("/openapi.json", self._document, include_in_schema=False)
        self._documents: dict[str, bytes] = {}
        super().setup()

    async def _document(self, request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        if root not in self._documents:
            servers = {"servers": [{"url": root}]} if root else {}
            self._documents[root] = bytes(JSONResponse(self.openapi() | servers).body)
        return Response(self._documents[root], media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the fast lane, which asks the rest of the application."""
        await self.lane(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application that serves Goodstanding alone; raises ConfigurationError."""
    settings = load_settings() if settings is None else settings
    running: list[Runtime] = []
    own = _router(settings, OwnRoute, running)
    app = Application(
        title="Goodstanding",
        summary="Does the other one turn up?",
        version=version("goodstanding"),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        redirect_slashes=False,
        # Not included as a host would: FastAPI looks for the route of an included router twice, at every request.
        routes=own.routes,
        lifespan=own.lifespan_context,
    )
    app.lane = FastLane(
        super(Application, app).__call__,
        lambda: running[-1] if running else None,
        now=unix_now,
        # What another origin may see, the middleware tells.
        elsewhere=frozenset({b"origin"} if settings.cors_origins else ()),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=[
                *("Authorization", "Content-Type", "If-None-Match", "Last-Event-ID", "X-Request-ID"),
                *(("X-Test-User-ID",) if settings.dev_auth else ()),
            ],
            expose_headers=["Cache-Status", "ETag", "Retry-After", "X-Request-ID"],
        )

    @app.exception_handler(HTTPException)
    async def on_http_exception(_request: Request, error: HTTPException) -> Response:
        return problem_of_http(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_request: Request, _error: RequestValidationError) -> Response:
        return problem(InvalidInputError())

    return app


def create_served_app(settings: Settings | None = None) -> FastAPI:
    """Build the application as `goodstanding serve` runs it in each worker process: with its log lines set up."""
    settings = load_settings() if settings is None else settings
    logs.configure(settings)
    forget_ended_processes()
    app = create_app(settings)
    # What the start made lives as long as the process: the collector need not go through it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE)
    return app


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute may be anything
    """Build `app` when a server asks for it (`uvicorn goodstanding.main:app`), never at import."""
    if name == "app":
        try:
            return create_app()
        except ConfigurationError as error:
            # The server that asks knows nothing of our errors; it shall end in one line all the same.
            sys.stderr.write(f"goodstanding: {error.detail}\n")
            raise SystemExit(2) from None
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
