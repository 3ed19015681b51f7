"""The same cached read in FastAPI, the plain way and with each of three caching libraries, and no framework at all.

Each is what the documentation of its parts leads to, done well: one pooled Redis client for the whole application, a
pool that never raises, the token decoded by a dependency, the answer through `response_model`. `raw` is the server
(uvicorn, uvloop, httptools) with a constant answer: what no ASGI application can beat.
"""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

import jwt
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from redis.asyncio import Redis
from starlette.types import Receive, Scope, Send

_ANSWER = (
    b'{"score":7,"badge_color":"green","completed_sessions":8,"no_shows":1,'
    b'"cache_timestamp":"2026-11-22T16:39:00.123456Z"}'
)
_REDIS_URL = os.environ.get("GOODSTANDING_REDIS_URL", "")
_PATH = "/api/user/reputation/{user_id}"
_SECONDS = 300


class Reputation(BaseModel):
    """The five members of the contract."""

    score: int
    badge_color: Literal["gold", "green", "red"]
    completed_sessions: int
    no_shows: int
    cache_timestamp: datetime


# Dependencies are coroutines: plain functions would each go through a thread pool, which costs far more than they do.
async def _subject(credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    try:
        claims: dict[str, Any] = jwt.decode(
            credentials.credentials,
            os.environ["GOODSTANDING_JWT_SECRET"],
            algorithms=["HS256"],
            audience="authenticated",
        )
    except jwt.InvalidTokenError:
        raise HTTPException(401, "A valid bearer token is required.") from None
    return str(claims["sub"])


async def _load(_user_id: UUID) -> dict[str, Any]:
    """Stand in for the query: only hits are measured."""
    return {**json.loads(_ANSWER), "cache_timestamp": datetime.now(UTC).isoformat()}  # noqa: TID251 - the edge


def _application(
    read: Callable[[UUID], Awaitable[Any]], *, starting: Callable[[], Awaitable[None]] | None = None
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if starting is not None:
            await starting()
        yield

    async def route(user_id: UUID, _caller: Annotated[str, Depends(_subject)]) -> Any:  # noqa: ANN401 - the model checks it
        return await read(user_id)

    app = FastAPI(lifespan=lifespan)
    app.get(_PATH, response_model=Reputation)(route)
    return app


def plain() -> FastAPI:
    """Build it with redis.asyncio and nothing else; it reads what Goodstanding has cached."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Redis.from_url(_REDIS_URL, max_connections=1000) as client:
            app.state.redis = client
            yield

    async def redis(request: Request) -> Redis:
        client: Redis = request.app.state.redis
        return client

    async def read(
        user_id: UUID, client: Annotated[Redis, Depends(redis)], _caller: Annotated[str, Depends(_subject)]
    ) -> Any:  # noqa: ANN401 - whatever the cache holds; the response model checks it
        cached = await client.get(f"reputation:user:{user_id}")
        if cached is None:
            raise HTTPException(404, "This comparison only reads what is cached.")
        return json.loads(cached)

    app = FastAPI(lifespan=lifespan)
    app.get(_PATH, response_model=Reputation)(read)
    return app


def with_cashews() -> FastAPI:
    """Build it with cashews over Redis."""
    from cashews import cache  # noqa: PLC0415 - each comparison runs alone

    cache.setup(_REDIS_URL, max_connections=1000)
    return _application(cache(ttl=_SECONDS, key="cashews:{user_id}")(_named(_load)))


def with_aiocache() -> FastAPI:
    """Build it with aiocache over Redis."""
    from aiocache import RedisCache, cached  # noqa: PLC0415 - each comparison runs alone
    from aiocache.serializers import JsonSerializer  # noqa: PLC0415 - the same

    at = urlsplit(_REDIS_URL)
    decorate = cached(
        ttl=_SECONDS,
        cache=RedisCache,
        key_builder=lambda _function, user_id: f"aiocache:{user_id}",
        serializer=JsonSerializer(),
        endpoint=at.hostname,
        port=at.port,
        password=at.password,
        pool_max_size=1000,
    )
    return _application(decorate(_load))


def with_fastapi_cache() -> FastAPI:
    """Build it with fastapi-cache2 over Redis; what is kept is the route's result, as its decorator is meant."""
    from fastapi_cache import FastAPICache  # noqa: PLC0415 - each comparison runs alone
    from fastapi_cache.backends.redis import RedisBackend  # noqa: PLC0415 - the same
    from fastapi_cache.decorator import cache  # noqa: PLC0415 - the same

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with Redis.from_url(_REDIS_URL, max_connections=1000) as client:
            FastAPICache.init(RedisBackend(client), prefix="fastapi-cache")
            yield

    async def read(user_id: UUID, _caller: Annotated[str, Depends(_subject)]) -> Any:  # noqa: ANN401 - the model checks it
        return await _load(user_id)

    def key(_function: object, _namespace: str = "", **call: Any) -> str:  # noqa: ANN401 - the library's own signature
        return f"fastapi-cache:{call['kwargs']['user_id']}"

    app = FastAPI(lifespan=lifespan)
    app.get(_PATH, response_model=Reputation)(cache(expire=_SECONDS, key_builder=key)(read))
    return app


def _named(load: Callable[[UUID], Awaitable[Any]]) -> Callable[[UUID], Awaitable[Any]]:
    """Give the function the parameter's name that the key's template has."""

    async def named(user_id: UUID) -> Any:  # noqa: ANN401 - whatever is loaded
        return await load(user_id)

    return named


async def raw(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every request with the same bytes."""
    if scope["type"] != "http":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _ANSWER})
