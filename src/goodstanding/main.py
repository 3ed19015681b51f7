"""The wiring: settings -> cache, history, service, routes -> an application. Nothing else builds these together."""

import gc
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from goodstanding import logs
from goodstanding.api import ContractRoute, OwnRoute, Runtime, build_router, problem, problem_of_http
from goodstanding.auth import Authenticator, KeySet
from goodstanding.cache import Cache, RedisCache
from goodstanding.entry import Lives
from goodstanding.errors import ConfigurationError, InvalidInputError
from goodstanding.history import SessionHistory
from goodstanding.limits import RateLimiter, SharedCounters
from goodstanding.memory import MemoryCache
from goodstanding.metrics import forget_ended_processes
from goodstanding.reputation_service import ReputationService
from goodstanding.settings import Settings, load_settings
from goodstanding.tasks import background


def utc_now() -> datetime:
    """Give the present moment; the one place that reads the wall clock."""
    return datetime.now(UTC)  # noqa: TID251 - the edge where time comes in


@dataclass(frozen=True, slots=True)
class Opened:
    """The service, and what a command or an application may need beside it."""

    service: ReputationService
    history: SessionHistory
    counters: SharedCounters | None


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncIterator[Opened]:
    """Open the service that the settings describe; a dependency that is away now may come later."""
    policy = settings.reputation_policy()
    lives = Lives(
        value=settings.cache_ttl_seconds * 1000,
        unknown=settings.unknown_ttl_seconds * 1000,
        last_good=settings.stale_ttl_seconds * 1000,
        lease=settings.load_deadline_ms,
    )
    async with AsyncExitStack() as stack:
        cache: Cache
        counters: SharedCounters | None = None
        redis_url = settings.redis_url.get_secret_value()
        if redis_url:
            cache = counters = await stack.enter_async_context(
                RedisCache.open(
                    redis_url, deadline=settings.redis_deadline_ms / 1000, policy=policy.version, lives=lives
                )
            )
        else:
            cache = MemoryCache(lives=lives, capacity=settings.memory_entries)
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
        yield Opened(service, history, counters)


@asynccontextmanager
async def open_runtime(
    settings: Settings, authenticator: Authenticator, key_set: KeySet | None
) -> AsyncIterator[Runtime]:
    """Open everything that the routes work with."""
    async with AsyncExitStack() as stack:
        if key_set is not None:
            await stack.enter_async_context(key_set)
        opened = await stack.enter_async_context(open_service(settings))
        limiter = RateLimiter.from_settings(settings, clock=utc_now, counters=opened.counters)
        spawn = await stack.enter_async_context(background())
        spawn(limiter.run())
        yield Runtime(
            service=opened.service,
            authenticator=authenticator,
            limiter=limiter,
            key_set=key_set,
            public_reads=settings.public_reads,
            metrics_public=settings.metrics_public,
        )


def router(settings: Settings | None = None) -> APIRouter:
    """Give the routes for a host's own FastAPI app, with the lifespan that serves them.

    `app.include_router(goodstanding.router())` is all it takes. Raises ConfigurationError.
    """
    return _router(load_settings() if settings is None else settings, ContractRoute)


def _router(settings: Settings, route_class: type[ContractRoute]) -> APIRouter:
    settings.require_database()
    settings.require_tokens()
    key_set = KeySet.from_settings(settings)
    authenticator = Authenticator.from_settings(settings, clock=utc_now, key_set=key_set)
    running: list[Runtime] = []

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


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application that serves Goodstanding alone; raises ConfigurationError."""
    settings = load_settings() if settings is None else settings
    own = _router(settings, OwnRoute)
    app = FastAPI(
        title="Goodstanding",
        summary="Does the other one turn up?",
        version=version("goodstanding"),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        redirect_slashes=False,
        # Not included as a host would: FastAPI looks for the route of an included router twice, at every request.
        routes=own.routes,
        lifespan=own.lifespan_context,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=[
                *("Authorization", "Content-Type", "If-None-Match", "X-Request-ID"),
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


def create_served_app() -> FastAPI:
    """Build the application as `goodstanding serve` runs it in each worker process: with its log lines set up."""
    settings = load_settings()
    logs.configure(settings)
    forget_ended_processes()
    app = create_app(settings)
    # What the start made lives as long as the process: the collector need not go through it again and again.
    gc.collect()
    gc.freeze()
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
