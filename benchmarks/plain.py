"""What the service is compared with: the same cached read written the plain way, and no framework at all.

`plain:create_app` is what the documentation of its parts leads to, done well: one pooled Redis client for the whole
application, a pool that waits for nobody and never raises, the token decoded by a dependency, the answer through
`response_model`. `plain:raw` is the server (uvicorn, uvloop, httptools) with a constant answer: what nothing that runs
under it can beat.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Literal
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


class Reputation(BaseModel):
    """The five members of the contract."""

    score: int
    badge_color: Literal["gold", "green", "red"]
    completed_sessions: int
    no_shows: int
    cache_timestamp: datetime


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Redis.from_url(os.environ["GOODSTANDING_REDIS_URL"], max_connections=1000) as client:
        app.state.redis = client
        yield


# Dependencies are coroutines: plain functions would each go through a thread pool, which costs far more than they do.
async def _redis(request: Request) -> Redis:
    client: Redis = request.app.state.redis
    return client


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


async def _read(
    user_id: UUID, redis: Annotated[Redis, Depends(_redis)], _caller: Annotated[str, Depends(_subject)]
) -> Any:  # noqa: ANN401 - whatever the cache holds; the response model checks it
    cached = await redis.get(f"reputation:user:{user_id}")
    if cached is None:
        raise HTTPException(404, "This comparison only reads what is cached.")
    return json.loads(cached)


def create_app() -> FastAPI:
    """Build the plain application."""
    app = FastAPI(lifespan=_lifespan)
    app.get("/api/user/reputation/{user_id}", response_model=Reputation)(_read)
    return app


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
