"""The fast lane: a single read by a caller who is known, answered without a framework.

It answers what the route of api.py answers, byte for byte, and leaves to that route whatever else is asked.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from http import HTTPStatus
from typing import Final

from prometheus_client import Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from goodstanding.api import (
    METRIC_SOURCES,
    READ_PATH,
    Headers,
    Runtime,
    new_request_id,
    outcome,
    problem,
    represent,
    request_id,
    respond,
)
from goodstanding.auth import Role
from goodstanding.data import UserId, parse_user_id
from goodstanding.entry import Entry
from goodstanding.errors import GoodstandingError, TemporarilyUnavailableError
from goodstanding.limits import LimitKind
from goodstanding.metrics import CACHE_READS, REQUEST_SECONDS
from goodstanding.reputation_service import Answer, Look, Source

START: Final = READ_PATH.removesuffix("{user_id}")
LENGTH: Final = len(START) + 36
"""How long a path of the single read is; its last 36 characters may be a user's id."""

LOOK: Final = "goodstanding.look"
"""Where a scope holds the look into the cache that was taken for it: its request is counted already."""

_METHODS: Final = frozenset({"GET", "HEAD"})
_READERS: Final = frozenset({Role.AUTHENTICATED, Role.SERVICE_ROLE})
_SAID: Final = frozenset({b"authorization", b"if-none-match", b"x-request-id"})
_HITS: Final = CACHE_READS.labels("hit")
_LINES: Final = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_MOST_HEADS: Final = 4096
_MOST_PREPARED: Final = 2048


@cache
def _request_seconds(method: str, status: int, source: str) -> Histogram:
    return REQUEST_SECONDS.labels(READ_PATH, method, status, source)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request's headers say: who asks, what the caller has already, and how the request is called.

    The caller is known until `expires`, in seconds since 1970, as long as the keys are those.
    """

    rate_key: str
    expires: float
    keys: object
    conditions: tuple[bytes, ...]
    called: str | None

    def request_id(self) -> bytes:
        """Give the request's id: another one each time, where the caller gave it none."""
        return new_request_id() if self.called is None else request_id(self.called).encode()


class Ready:
    """A response, but for the request's id, and where it comes from, as the metrics call it.

    `lines` is what is sent before the body, but for the server's own headers; `seconds` is where a GET's are counted.
    """

    __slots__ = ("body", "headers", "lines", "seconds", "source", "status")

    def __init__(self, source: str, status: int, headers: Headers, body: bytes) -> None:
        self.source = source
        self.status = status
        self.headers = headers
        self.body = body
        self.lines = _LINES[status] + b"".join([b"%s: %s\r\n" % header for header in headers])
        self.seconds = _request_seconds("GET", status, source)


class Prepared(Ready):
    """A hit's response, as it is until its `ttl` in whole seconds is another."""

    __slots__ = ("_since", "_until", "ttl")

    def __init__(self, entry: Entry, horizon: tuple[float, float, float], now: float, asked: Asked) -> None:
        computed, due, expires = horizon
        self.ttl = int(expires - now)
        self._since = max(computed, now)
        self._until = min(due, expires - self.ttl)
        super().__init__("cache", *represent(Answer(entry, Source.HIT, self.ttl), asked.conditions))

    def holds(self, now: float) -> bool:
        """Tell whether this is still the answer for its entry, and nothing else is to be done about that."""
        return self._since <= now < self._until


def _refused() -> Ready:
    response = problem(TemporarilyUnavailableError())
    return Ready("none", response.status_code, response.raw_headers, bytes(response.body))


_REFUSED: Final = _refused()


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
        self._untold: list[tuple[Histogram, float]] = []
        self._hits = 0
        self._heads: dict[bytes, Asked] = {}
        """By digest: a token is nowhere kept."""
        self._prepared: dict[str, Prepared] = {}

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
            user = scope["path"][-36:]
            asked = self.asked(scope["headers"])
            if asked is not None:
                look = scope.get(LOOK)
                prepared = self.hit(user, asked) if look is None else None
                if prepared is not None:
                    headers = [*prepared.headers, (b"x-request-id", asked.request_id())]
                    await send({"type": "http.response.start", "status": prepared.status, "headers": headers})
                    await send({"type": "http.response.body", "body": prepared.body})
                    metric = _request_seconds(scope["method"], prepared.status, prepared.source)
                    self.note(metric, time.perf_counter() - began)
                    return
                user_id = parse_user_id(user) if look is not None else self._admit(runtime, user, asked)
                if user_id is not None:
                    called = request_id(asked.called)
                    response, source = await _read(runtime, user_id, asked, called, look)
                    await response(scope, receive, send)
                    metric = _request_seconds(scope["method"], response.status_code, source)
                    metric.observe(time.perf_counter() - began)
                    return
        await self._app(scope, receive, send)

    def asked(self, headers: Iterable[tuple[bytes, bytes]], elsewhere: Collection[bytes] = ()) -> Asked | None:
        """Read the headers; None: who asks is not known yet, or the application must see to it."""
        runtime = self._runtime()
        said: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in _SAID:
                if name in said:
                    return None
                said[name] = value
            elif name in self._elsewhere or name in elsewhere:
                return None
        credentials = said.get(b"authorization")
        if runtime is None or credentials is None:
            return None
        caller = runtime.authenticator.known(credentials)
        if caller is None or caller.role not in _READERS or caller.subject is None or caller.expires is None:
            return None
        expires = caller.expires.timestamp()
        if self._now() >= expires:
            return None
        return Asked(
            runtime.authenticator.rate_key(caller, (), None),
            expires,
            runtime.authenticator.keys,
            (said[b"if-none-match"],) if b"if-none-match" in said else (),
            said[b"x-request-id"].decode("latin-1") if b"x-request-id" in said else None,
        )

    def learn(self, head: bytes, asked: Asked) -> None:
        """Remember what a parser made of a request's bytes, from its path on, so that they need not be parsed again."""
        digest = blake2b(head).digest()
        if asked.called is None and digest not in self._heads:
            if len(self._heads) >= _MOST_HEADS:
                del self._heads[next(iter(self._heads))]
            self._heads[digest] = asked

    def recognised(self, head: bytes) -> Asked | None:
        """Give what is known of a request's bytes, from its path on."""
        digest = blake2b(head).digest()
        asked = self._heads.get(digest)
        if asked is None:
            return None
        runtime = self._runtime()
        if runtime is None or self._now() >= asked.expires or asked.keys is not runtime.authenticator.keys:
            del self._heads[digest]
            return None
        return asked

    def hit(self, user: str, asked: Asked) -> Prepared | None:
        """Give the response from this process's memory, within the caller's limit; None: it takes more than that."""
        runtime = self._runtime()
        packed = runtime.service.peek(user) if runtime is not None else None
        if runtime is None or packed is None:
            return None
        now = self._now()
        prepared = self._kept(user, packed, asked, now)
        if prepared is None:
            entry = Entry.unpack(packed)
            if entry.body is None:
                return None
            computed, due, _ = horizon = runtime.service.horizon(entry)
            if not computed <= now < due:
                return None
            prepared = self._prepare(user, entry, horizon, asked, now)
        if runtime.limiter.admit(asked.rate_key, LimitKind.READ, now):
            return None
        self._hits += 1
        return prepared

    def look(self, user: str, asked: Asked, tell: Callable[[Ready | None, Look | None], None]) -> bool:
        """Look into the cache, within the caller's limit, and tell what was seen, and the response if there is one.

        There is for a hit, and for whomever the service can only refuse.

        False: nothing is told, the application sees to it.
        """
        runtime = self._runtime()
        user_id = self._admit(runtime, user, asked) if runtime is not None else None
        if runtime is None or user_id is None:
            return False

        def looked(look: Look | None) -> None:
            answer = look.answers.get(user_id) if look is not None else None
            ready: Ready | None = None
            if look is not None and answer is None and runtime.service.refuses(user_id, look):
                ready = _REFUSED
            elif answer is not None and answer.entry.body is not None:
                now = self._now()
                prepared = self._kept(user_id, answer.entry.body, asked, now) or self._prepare(
                    user_id, answer.entry, runtime.service.horizon(answer.entry), asked, now
                )
                if prepared.ttl == answer.ttl:
                    ready = prepared
            tell(ready, look)

        runtime.service.look(user_id, looked)
        return True

    def note(self, metric: Histogram, seconds: float) -> None:
        """Note a response of ours. The metrics learn of all of this moment together."""
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.append((metric, seconds))

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        _HITS.inc(self._hits)
        self._hits = 0
        for metric, seconds in untold:
            metric.observe(seconds)

    def _kept(self, user: str, body: bytes, asked: Asked, now: float) -> Prepared | None:
        prepared = self._prepared.get(user) if not asked.conditions else None
        return prepared if prepared is not None and prepared.body == body and prepared.holds(now) else None

    def _prepare(
        self, user: str, entry: Entry, horizon: tuple[float, float, float], asked: Asked, now: float
    ) -> Prepared:
        prepared = Prepared(entry, horizon, now, asked)
        if not asked.conditions:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[user] = prepared
        return prepared

    def _admit(self, runtime: Runtime, user: str, asked: Asked) -> UserId | None:
        """Count the request; None: it is refused, or not even a request that counts, and the route says so."""
        try:
            user_id = parse_user_id(user)
        except GoodstandingError:
            return None
        return None if runtime.limiter.admit(asked.rate_key, LimitKind.READ, self._now()) else user_id


async def _read(
    runtime: Runtime, user_id: UserId, asked: Asked, called: str, look: Look | None
) -> tuple[Response, str]:
    """Answer as the route does."""
    source = "none"

    async def work() -> Response:
        nonlocal source
        answer = await runtime.service.read(user_id, look=look)
        source = METRIC_SOURCES.get(answer.source, "database")
        return respond(answer, asked.conditions)

    return await outcome(work(), READ_PATH, called), source
