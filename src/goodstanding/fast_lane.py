"""The fast lane: a single read by a caller who is known, answered without a framework.

It answers what the route of api.py answers, byte for byte, and leaves to that route whatever else is asked.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from http import HTTPStatus
from typing import Final

from prometheus_client import Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from goodstanding.api import METRIC_SOURCES, READ_PATH, Runtime, outcome, represent, request_id
from goodstanding.auth import Role
from goodstanding.data import parse_user_id
from goodstanding.errors import GoodstandingError
from goodstanding.limits import LimitKind
from goodstanding.memory import Kept
from goodstanding.metrics import CACHE_READS, REQUEST_SECONDS
from goodstanding.reputation_service import Answer, Source

Headers = Iterable[tuple[bytes, bytes]]

START: Final = READ_PATH.removesuffix("{user_id}")
LENGTH: Final = len(START) + 36
"""How long a path of the single read is; its last 36 characters may be a user's id."""

_METHODS: Final = frozenset({"GET", "HEAD"})
_READERS: Final = frozenset({Role.AUTHENTICATED, Role.SERVICE_ROLE})
_SAID: Final = frozenset({b"authorization", b"if-none-match", b"x-request-id"})
_HITS: Final = CACHE_READS.labels("hit")
_PHRASES: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_MOST_HEADS: Final = 4096


@dataclass(frozen=True, slots=True)
class Visitor:
    """A caller who is known until `expires`, in seconds since 1970, as long as the keys are those."""

    rate_key: str
    expires: float
    keys: object


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request's headers say: who asks, how the request is called, and what the caller has already."""

    visitor: Visitor
    called: str | None
    conditions: tuple[bytes, ...]

    def request_id(self) -> bytes:
        """Give the request's id: another one each time, where the caller gave it none."""
        return request_id(self.called).encode()


class Prepared:
    """A hit's response, but for the request's id, that stays the same for a second.

    `lines` is what is sent before the body, but for the server's own headers. `horizon` is between which moments it
    holds, and when it expires, in seconds since 1970.
    """

    __slots__ = ("body", "headers", "horizon", "lines", "status", "ttl")

    def __init__(
        self, kept: Kept, horizon: tuple[float, float, float], now: float, conditions: Sequence[bytes]
    ) -> None:
        self.horizon = horizon
        self.ttl = int(horizon[2] - now)
        response = represent(Answer(kept.entry, Source.HIT, self.ttl), conditions)
        self.status = response.status_code
        self.headers = response.raw_headers
        self.lines = b"HTTP/1.1 %d %s\r\n" % (response.status_code, _PHRASES[response.status_code])
        self.lines += b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        self.body = bytes(response.body)


Hit = tuple[Prepared, Asked]


class FastLane:
    """An application in front of `app`. `runtime` gives what the routes work with, or None while nothing runs.

    A request with a header in `elsewhere` is left to the application.
    """

    def __init__(
        self,
        app: ASGIApp,
        runtime: Callable[[], Runtime | None],
        *,
        now: Callable[[], float],
        elsewhere: Collection[bytes],
    ) -> None:
        self._app = app
        self._runtime = runtime
        self._now = now
        self._elsewhere = elsewhere
        self._metrics: dict[tuple[str, int, str], Histogram] = {}
        self._untold: list[tuple[str, int, float]] = []
        self._heads: dict[bytes, Asked] = {}
        """By digest: a token is nowhere kept."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        runtime = self._runtime()
        if (
            runtime is not None
            and scope["type"] == "http"
            and len(scope["path"]) == LENGTH
            and scope["path"].startswith(START)
            and scope["method"] in _METHODS
            and not scope["query_string"]
            and not scope["root_path"]
        ):
            began = time.perf_counter()
            now = self._now()
            user = scope["path"][-36:]
            asked = self._asked(runtime, scope["headers"], now)
            if asked is not None:
                prepared = _remembered(runtime, user, asked, now)
                if prepared is not None:
                    headers = [*prepared.headers, (b"x-request-id", asked.request_id())]
                    await send({"type": "http.response.start", "status": prepared.status, "headers": headers})
                    await send({"type": "http.response.body", "body": prepared.body})
                    self.note_hit(scope["method"], prepared.status, time.perf_counter() - began)
                    return
                called = request_id(asked.called)
                response, source = await _read(runtime, user, asked, called, now)
                if response is not None:
                    await response(scope, receive, send)
                    self._observe(scope["method"], response.status_code, source, time.perf_counter() - began)
                    return
        await self._app(scope, receive, send)

    def hit(self, user: str, headers: Headers, elsewhere: Collection[bytes]) -> Hit | None:
        """Give the response from this process's memory, within the caller's limit; None: it takes more than that."""
        runtime = self._runtime()
        if runtime is None or runtime.memory is None or runtime.memory.peek(user) is None:
            return None
        now = self._now()
        asked = self._asked(runtime, headers, now, elsewhere)
        prepared = _remembered(runtime, user, asked, now) if asked is not None else None
        return (prepared, asked) if asked is not None and prepared is not None else None

    def learn(self, head: bytes, asked: Asked) -> None:
        """Remember what a parser made of a request's bytes, from its path on, so that they need not be parsed again."""
        digest = blake2b(head, digest_size=32).digest()
        if asked.called is None and digest not in self._heads:
            if len(self._heads) >= _MOST_HEADS:
                del self._heads[next(iter(self._heads))]
            self._heads[digest] = asked

    def repeated(self, user: str, head: bytes) -> Hit | None:
        """Give the response to a request whose bytes are known, as `hit` does."""
        digest = blake2b(head, digest_size=32).digest()
        asked = self._heads.get(digest)
        if asked is None:
            return None
        runtime = self._runtime()
        now = self._now()
        visitor = asked.visitor
        if runtime is None or now >= visitor.expires or visitor.keys is not runtime.authenticator.keys:
            del self._heads[digest]
            return None
        prepared = _remembered(runtime, user, asked, now)
        return (prepared, asked) if prepared is not None else None

    def note_hit(self, method: str, status: int, seconds: float) -> None:
        """Note a hit that `hit` or `repeated` gave. The metrics learn of all hits of this moment together."""
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.append((method, status, seconds))

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        _HITS.inc(len(untold))
        for method, status, seconds in untold:
            self._observe(method, status, "cache", seconds)

    def _observe(self, method: str, status: int, source: str, seconds: float) -> None:
        labels = (method, status, source)
        metric = self._metrics.get(labels)
        if metric is None:
            metric = self._metrics[labels] = REQUEST_SECONDS.labels(READ_PATH, *labels)
        metric.observe(seconds)

    def _asked(self, runtime: Runtime, headers: Headers, now: float, elsewhere: Collection[bytes] = ()) -> Asked | None:
        """Read the headers; None: who asks is not known yet, or the application must see to it."""
        said: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in _SAID:
                if name in said:
                    return None
                said[name] = value
            elif name in self._elsewhere or name in elsewhere:
                return None
        credentials = said.get(b"authorization")
        if credentials is None:
            return None
        caller = runtime.authenticator.known(credentials)
        if caller is None or caller.role not in _READERS or caller.subject is None or caller.expires is None:
            return None
        expires = caller.expires.timestamp()
        if now >= expires:
            return None
        rate_key = runtime.authenticator.rate_key(caller, (), None)
        visitor = Visitor(rate_key, expires, runtime.authenticator.keys)
        called = said[b"x-request-id"].decode("latin-1") if b"x-request-id" in said else None
        return Asked(visitor, called, (said[b"if-none-match"],) if b"if-none-match" in said else ())


def _remembered(runtime: Runtime, user: str, asked: Asked, now: float) -> Prepared | None:
    """Give the response from memory; None: the service answers, and sees to whatever else there is to do."""
    kept = runtime.memory.peek(user) if runtime.memory is not None else None
    if kept is None or kept.entry.body is None:
        return None
    prepared = kept.prepared
    horizon = prepared.horizon if isinstance(prepared, Prepared) else runtime.service.horizon(kept.entry)
    if not horizon[0] <= now < horizon[1]:
        return None
    try:
        runtime.limiter.take(asked.visitor.rate_key, LimitKind.READ, now)
    except GoodstandingError:
        return None
    if asked.conditions:
        return Prepared(kept, horizon, now, asked.conditions)
    if not isinstance(prepared, Prepared) or int(horizon[2] - now) != prepared.ttl:
        prepared = kept.prepared = Prepared(kept, horizon, now, ())
    return prepared


async def _read(runtime: Runtime, user: str, asked: Asked, called: str, now: float) -> tuple[Response | None, str]:
    """Answer as the route does; None: that is for the route, since it is not even a request that counts."""
    try:
        user_id = parse_user_id(user)
        runtime.limiter.take(asked.visitor.rate_key, LimitKind.READ, now)
    except GoodstandingError:
        return None, ""
    source = "none"

    async def work() -> Response:
        nonlocal source
        answer = await runtime.service.read(user_id)
        source = METRIC_SOURCES.get(answer.source, "database")
        return represent(answer, asked.conditions)

    return await outcome(work(), READ_PATH, called), source
