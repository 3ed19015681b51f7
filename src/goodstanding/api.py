"""The routes of the contract, and how an error becomes HTTP. It decides nothing about a reputation."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import getrandbits
from typing import Any, Final, TypeVar

import structlog
from fastapi import APIRouter, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import Histogram
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Lifespan, Receive, Scope, Send

from goodstanding.auth import NOBODY, Authenticator, Caller, KeySet, Role
from goodstanding.data import AtFault, parse_session_id, parse_user_id
from goodstanding.errors import (
    BadRequestError,
    ForbiddenError,
    GoodstandingError,
    InvalidInputError,
    PayloadTooLargeError,
    RateLimitedError,
    RequestTimeoutError,
    TemporarilyUnavailableError,
    UnauthorizedError,
    UnsupportedMediaTypeError,
)
from goodstanding.limits import LimitKind, RateLimiter
from goodstanding.metrics import REQUEST_SECONDS, render
from goodstanding.reputation_service import Answer, ReputationService, Source
from goodstanding.responses import (
    STREAM_EVENT,
    STREAM_EXAMPLE,
    AttributionRequest,
    BatchRequest,
    BatchResponse,
    DoneResponse,
    LiveResponse,
    ProblemResponse,
    ReadyResponse,
    ReputationResponse,
)
from goodstanding.stream import StreamResponse
from goodstanding.subscribers import MOST_WATCHED, Subscribers

_log = structlog.get_logger("goodstanding")
_BODY_LIMIT: Final = 64 * 1024
_BODY_SECONDS: Final = 8.0
_BROWSER_SECONDS: Final = 5
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_BOOLEANS: Final = {"true": True, "false": False}
READ_PATH: Final = "/api/user/reputation/{user_id}"
"""The single read's path."""

_TOLD_AS_HIT: Final = frozenset({Source.HIT, Source.STALE})
METRIC_SOURCES: Final[Mapping[Source, str]] = {Source.HIT: "cache", Source.STALE: "stale"}
_BEARER: Final = Security(
    HTTPBearer(auto_error=False, scheme_name="bearer", bearerFormat="JWT", description="A Supabase-style token.")
)
"""For the OpenAPI document alone, here and in a host's: what a token is worth, the Authenticator decides.

The rare calls define the scheme and the frequent ones only name it, since FastAPI works through a dependency at each
request, even through one that does nothing: that alone would cost a tenth of a cached read.
"""
_NAMES_BEARER: Final[dict[str, Any]] = {"security": [{"bearer": []}]}
Model = TypeVar("Model", bound=BaseModel)
Headers = list[tuple[bytes, bytes]]
"""Names in small letters."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the routes work with while the application runs."""

    service: ReputationService
    authenticator: Authenticator
    limiter: RateLimiter
    subscribers: Subscribers
    key_set: KeySet | None
    hears: Callable[[], bool]
    """Tells whether a relay was heard just now."""
    public_reads: bool
    metrics_public: bool


def problem(error: GoodstandingError) -> Response:
    """Write an error as application/problem+json (RFC 9457)."""
    # An error may be over at once: no cache, of whatever opinion on 404, keeps one.
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    content = json.dumps(
        {
            "type": "about:blank",
            "title": error.title,
            "status": error.status,
            "detail": error.detail,
            "code": error.code,
        }
    )
    return Response(content, error.status, headers, "application/problem+json")


def problem_of_http(error: HTTPException) -> Response:
    """Give an error of the framework (an unknown path, a wrong method) the form of ours, without its text."""
    known = {404: ("not_found", "Not found"), 405: ("method_not_allowed", "Method not allowed")}
    code, title = known.get(error.status_code, ("bad_request", "Bad request"))
    ours = GoodstandingError(f"{title}.")
    # One instance is not one of our classes: it has another's status.
    ours.status, ours.code, ours.title = error.status_code, code, title  # type: ignore[misc] # shadows the ClassVar
    response = problem(ours)
    allowed = (error.headers or {}).get("Allow")
    if allowed is not None:
        response.headers["Allow"] = "GET, HEAD" if allowed == "GET" else allowed
    return response


def request_id(claimed: str | None) -> str:
    """Give the request the id that its caller claims for it, or one of our own."""
    if claimed is not None and _REQUEST_ID.fullmatch(claimed):
        return claimed
    return new_request_id().decode()


def new_request_id() -> bytes:
    """Make a request's id: told apart from every other one, not kept secret."""
    return b"%032x" % getrandbits(128)


async def outcome(work: Awaitable[Response], route: str, called: str) -> Response:
    """Wait for a response; every error becomes one, and each carries the request's id."""
    outside = structlog.contextvars.bind_contextvars(request_id=called)
    try:
        response = await work
    except GoodstandingError as error:
        response = problem(error)
    except RequestValidationError:
        response = problem(InvalidInputError())
    except HTTPException:
        raise
    except Exception:  # noqa: BLE001 - the last net: logged whole, told to nobody
        _log.exception("request_failed", route=route)
        response = problem(GoodstandingError())
    finally:
        structlog.contextvars.reset_contextvars(**outside)
    response.raw_headers.append((b"x-request-id", called.encode()))
    return response


class ContractRoute(APIRoute):
    """A route whose every outcome has the contract's form: errors, request id, metrics; in any host app."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap what answers."""
        handle = self._answering()
        route = self.path
        # Looking a metric up by its labels costs more than observing it. Methods, statuses and sources are few.
        metrics: dict[tuple[str, int, str], Histogram] = {}

        async def handler(request: Request) -> Response:
            began = time.perf_counter()
            response = await outcome(handle(request), route, request_id(request.headers.get("x-request-id")))
            labels = (request.method, response.status_code, getattr(request.state, "source", "none"))
            if labels not in metrics:
                metrics[labels] = REQUEST_SECONDS.labels(route, *labels)
            metrics[labels].observe(time.perf_counter() - began)
            return response

        return handler

    def _answering(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give the framework's handler, which also works through whatever a host makes its routes depend on."""
        return super().get_route_handler()


class OwnRoute(ContractRoute):
    """A route of an application of our own, which depends on nothing: the endpoint itself answers.

    The endpoints of this module take the request and give the response, and handle every error of theirs: so there is
    nothing for FastAPI to work out, to clean up or to catch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the framework's route takes
        super().__init__(*args, **kwargs)
        handle = self.get_route_handler()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await handle(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = app

    def _answering(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


class _Endpoints:
    """What each call does. `runtime` is asked at each request, since it exists only while the lifespan runs."""

    def __init__(self, runtime: Callable[[], Runtime]) -> None:
        self._runtime = runtime

    def _authorize(self, request: Request, kind: LimitKind, *roles: Role) -> Caller:
        """Tell who is asking, count the request, and check the role, in this order."""
        now = self._runtime()
        headers = request.scope["headers"]
        peer = request.client.host if request.client is not None else None
        try:
            caller = now.authenticator.caller(headers)
        except UnauthorizedError:
            # Guessing tokens costs us work, so it is counted where it comes from.
            now.limiter.take(now.authenticator.rate_key(NOBODY, headers, peer), kind)
            raise
        now.limiter.take(now.authenticator.rate_key(caller, headers, peer), kind)
        if caller.role not in roles:
            raise UnauthorizedError if caller == NOBODY else ForbiddenError
        return caller

    async def read_reputation(self, request: Request) -> Response:
        """Answer with score, badge and counts; Cache-Status (RFC 9211) tells where they came from."""
        now = self._runtime()
        readers = (Role.AUTHENTICATED, Role.SERVICE_ROLE) + ((Role.ANONYMOUS,) if now.public_reads else ())
        self._authorize(request, LimitKind.READ, *readers)
        user_id = parse_user_id(request.path_params["user_id"])
        answer = await now.service.read(user_id, use_cache=_use_cache(request))
        request.state.source = METRIC_SOURCES.get(answer.source, "database")
        return respond(answer, [value for name, value in request.scope["headers"] if name == b"if-none-match"])

    async def read_batch(self, request: Request) -> Response:
        """Answer for many users at once; an unknown user is null."""
        self._authorize(request, LimitKind.READ, Role.AUTHENTICATED, Role.SERVICE_ROLE)
        texts = (await _body(request, BatchRequest)).user_ids
        service = self._runtime().service
        # What is in memory is under the ids of users alone, so a text that is found there is one.
        bodies = service.peek_many(texts)
        others: set[Source] = set()
        if bodies is None:
            asked = {text: parse_user_id(text) for text in texts}
            answers = await service.read_many(list(dict.fromkeys(asked.values())))
            bodies = {text: answers[user_id].entry.body or b"null" for text, user_id in asked.items()}
            others = {answer.source for answer in answers.values()} - {Source.HIT}
        request.state.source = "stale" if Source.STALE in others else "database" if others else "cache"
        return Response(_batch(bodies), media_type="application/json")

    async def not_to_be_read(self, _request: Request) -> Response:
        """Refuse a method, for a path that another route's pattern fits too."""
        raise HTTPException(405, headers={"Allow": "POST"})

    async def stream(self, request: Request) -> Response:
        """Send each user's reputation now and whenever it changes, for an hour, or until the token holds no longer."""
        now = self._runtime()
        caller = self._authorize(request, LimitKind.READ, Role.AUTHENTICATED, Role.SERVICE_ROLE)
        users = [*dict.fromkeys(map(parse_user_id, request.query_params.getlist("user_id")))]
        if not 0 < len(users) <= MOST_WATCHED:
            message = f"Name 1 to {MOST_WATCHED} users, each as user_id=..."
            raise InvalidInputError(message)
        peer = request.client.host if request.client is not None else None
        subscription = await now.subscribers.open(
            users,
            caller=now.authenticator.rate_key(caller, request.scope["headers"], peer),
            last_event_id=request.headers.get("last-event-id", ""),
            expires=caller.expires,
            holds=partial(now.authenticator.holds, caller),
        )
        return StreamResponse(subscription)

    async def invalidate(self, request: Request) -> Response:
        """Make the next read count anew; also for a user who does not exist."""
        self._authorize(request, LimitKind.ADMIN, Role.SERVICE_ROLE)
        user_id = parse_user_id(request.path_params["user_id"])
        await self._runtime().service.invalidate([user_id])
        return _done("The cached reputation is gone.")

    async def invalidate_all(self, request: Request) -> Response:
        """Make every next read count anew, without blocking Redis."""
        self._authorize(request, LimitKind.ADMIN, Role.SERVICE_ROLE)
        dropped = await self._runtime().service.invalidate_all()
        return _done(f"{dropped} cached reputations are gone.")

    async def attribute(self, request: Request) -> Response:
        """Append a verdict; the newest of a session stands. It counts once the session is no_show or cancelled."""
        caller = self._authorize(request, LimitKind.ADMIN, Role.SERVICE_ROLE)
        session_id = parse_session_id(request.path_params["session_id"])
        verdict = await _body(request, AttributionRequest)
        told = await self._runtime().service.attribute(
            session_id, AtFault(verdict.at_fault), reason=verdict.reason, said_by=caller.subject or caller.role.value
        )
        if told:
            return _done("The verdict is recorded.")
        return _done("The verdict is recorded; the cache is away, so badges may follow later.")

    async def live(self, _request: Request) -> Response:
        """Answer as long as the event loop turns."""
        return _json(LiveResponse(status="alive"))

    async def ready(self, _request: Request) -> Response:
        """Name the dependencies that are away: with database or cache left, and a key ever seen, reads are answered."""
        now = self._runtime()
        degraded: list[Any] = [*await now.service.check()]
        unavailable = len(degraded) > 1
        if not (degraded or now.hears()):
            # Where one of the two is away no relay can be heard, and that goes without saying.
            degraded.append("relay")
        if now.key_set is not None and now.key_set.degraded:
            degraded.append("jwks")
            unavailable |= not now.key_set.ready
        if unavailable:
            return _json(ReadyResponse(status="unavailable", degraded=degraded), 503)
        return _json(ReadyResponse(status="degraded" if degraded else "ready", degraded=degraded))

    async def metrics(self, request: Request) -> Response:
        """Give this process's metrics, or all worker processes' together."""
        if not self._runtime().metrics_public:
            self._authorize(request, LimitKind.ADMIN, Role.SERVICE_ROLE)
        return Response(render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def build_router(
    runtime: Callable[[], Runtime],
    lifespan: Lifespan[Any] | None = None,
    *,
    route_class: type[ContractRoute] = ContractRoute,
) -> APIRouter:
    """Build the routes of the contract."""
    router = APIRouter(route_class=route_class, lifespan=lifespan)
    endpoints = _Endpoints(runtime)
    user = {"user_id": "The user's UUID; either case."}

    def add(
        method: str,
        path: str,
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]],
        model: type[BaseModel] | type[Response],
        summary: str,
        responses: dict[int | str, dict[str, Any]],
        extra: dict[str, Any] | None = None,
        *,
        open_to_all: bool = False,
    ) -> None:
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            status_code=200,
            response_model=model if issubclass(model, BaseModel) else None,
            summary=summary,
            responses=responses,
            openapi_extra=(extra or {}) | (_NAMES_BEARER if method == "GET" and not open_to_all else {}),
            dependencies=[_BEARER] if method == "POST" else [],
            response_class=model if issubclass(model, Response) else JSONResponse,
            tags=["operation" if path.startswith(("/health", "/metrics")) else "reputation"],
        )
        if method == "GET":
            router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    # Before the single read, whose path fits this one too: the first route that fits a path tells what it allows.
    add(
        "POST",
        "/api/user/reputation/batch",
        endpoints.read_batch,
        BatchResponse,
        "Up to 100 users' reputations",
        _problems(400, 401, 403, 408, 413, 415, 422, 429, 503),
        _describe(request_body=BatchRequest),
    )
    # Or a GET of it would be a read of the user "batch".
    router.add_api_route(
        "/api/user/reputation/batch", endpoints.not_to_be_read, methods=["GET", "HEAD"], include_in_schema=False
    )
    add(
        "GET",
        "/api/user/reputation/stream",
        endpoints.stream,
        Response,  # not what it is: a stream has no schema as a whole
        "Users' reputations as they change",
        _problems(400, 401, 403, 422, 429, 503)
        | {
            200: {
                "description": "Server-sent events.",
                "content": {"text/event-stream": {"itemSchema": STREAM_EVENT, "example": STREAM_EXAMPLE}},
            }
        },
        {"parameters": _STREAM_PARAMETERS},
    )
    add(
        "GET",
        READ_PATH,
        endpoints.read_reputation,
        ReputationResponse,
        "One user's reputation",
        _problems(400, 401, 403, 404, 422, 429, 503)
        | {
            200: {"headers": _READ_HEADERS},
            304: {"description": "What the caller has (If-None-Match) still holds.", "headers": _READ_HEADERS},
        },
        _describe(path=user, query={"use_cache": "`false` skips reading the cache and still refreshes it."}),
    )
    add(
        "POST",
        "/api/user/reputation/cache/invalidate/{user_id}",
        endpoints.invalidate,
        DoneResponse,
        "Drop one user's cached reputation",
        _problems(400, 401, 403, 422, 429, 503),
        _describe(path=user),
    )
    add(
        "POST",
        "/api/user/reputation/cache/invalidate-all",
        endpoints.invalidate_all,
        DoneResponse,
        "Drop every cached reputation",
        _problems(400, 401, 403, 429, 503),
    )
    add(
        "POST",
        "/api/admin/sessions/{session_id}/attribution",
        endpoints.attribute,
        DoneResponse,
        "Record who caused a no-show or a cancellation",
        _problems(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
        _describe(path={"session_id": "The session's UUID."}, request_body=AttributionRequest),
    )
    add("GET", "/health/live", endpoints.live, LiveResponse, "Whether the process runs", _problems(), open_to_all=True)
    add(
        "GET",
        "/health/ready",
        endpoints.ready,
        ReadyResponse,
        "Whether the service can answer",
        _problems() | {503: {"model": ReadyResponse, "description": "Nobody can be answered now."}},
        open_to_all=True,
    )
    add(
        "GET",
        "/metrics",
        endpoints.metrics,
        PlainTextResponse,
        "Prometheus metrics",
        _problems(400, 401, 403, 429, 503),
    )
    return router


def represent(answer: Answer, conditions: Sequence[bytes]) -> tuple[int, Headers, bytes]:
    """Give status, headers and body of a known user's answer; `conditions` are the values of If-None-Match."""
    entry = answer.entry
    if answer.source in _TOLD_AS_HIT:
        status = b"goodstanding; hit; ttl=%d" % answer.ttl
    else:
        status = b"goodstanding; fwd=%s" % answer.source.value.encode()
    etag = b'W/"%s"' % entry.seen
    headers = [
        (b"cache-control", b"private, max-age=%d" % max(0, min(_BROWSER_SECONDS, answer.ttl))),
        (b"cache-status", status),
        (b"etag", etag),
    ]
    if conditions and _matches(conditions, etag):
        return 304, headers, b""
    body = entry.body or b""
    headers += [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
    return 200, headers, body


def respond(answer: Answer, conditions: Sequence[bytes]) -> Response:
    """Make the response of a known user's answer."""
    status, headers, body = represent(answer, conditions)
    response = Response(body, status)
    response.raw_headers = headers
    return response


def _matches(conditions: Sequence[bytes], etag: bytes) -> bool:
    """Compare weakly (RFC 9110, section 13.1.2)."""
    tags = [tag.strip() for condition in conditions for tag in condition.split(b",")]
    return b"*" in tags or etag in tags or etag.removeprefix(b"W/") in tags


def _batch(bodies: Mapping[str, bytes]) -> bytes:
    # Each text is a UUID: nothing in it needs escaping.
    return b'{"reputations":{%s}}' % b",".join([b'"%s":%s' % (text.encode(), body) for text, body in bodies.items()])


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def _done(message: str) -> Response:
    return _json(DoneResponse(success=True, message=message))


def _use_cache(request: Request) -> bool:
    if not request.scope["query_string"]:
        return True
    values = request.query_params.getlist("use_cache")
    if not values:
        return True
    if len(values) > 1 or values[0] not in _BOOLEANS:
        message = "use_cache must be true or false."
        raise InvalidInputError(message)
    return _BOOLEANS[values[0]]


async def _body(request: Request, model: type[Model]) -> Model:
    """Read a JSON body of at most 64 KiB, strictly."""
    declared = request.headers.getlist("content-type") or ["application/json"]
    if len(declared) > 1:
        raise BadRequestError
    if declared[0].partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaTypeError
    chunks = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                chunks += chunk
                if len(chunks) > _BODY_LIMIT:
                    raise PayloadTooLargeError
    except TimeoutError:
        raise RequestTimeoutError from None
    except ClientDisconnect:
        raise BadRequestError from None
    try:
        return model.model_validate_json(bytes(chunks))
    except ValidationError as error:
        kinds = {detail["type"] for detail in error.errors(include_url=False, include_input=False)}
        if "json_invalid" in kinds:
            message = "The request body is not valid JSON."
            raise BadRequestError(message) from None
        raise InvalidInputError from None


_PROBLEM_CLASSES: Final[tuple[type[GoodstandingError], ...]] = (
    GoodstandingError,
    BadRequestError,
    UnauthorizedError,
    ForbiddenError,
    RequestTimeoutError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    InvalidInputError,
    RateLimitedError,
    TemporarilyUnavailableError,
)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe for the OpenAPI document the errors that a call can give; any call can give 500."""
    described = {error.status: error.default_detail for error in _PROBLEM_CLASSES}
    described[404] = "There is no such user or session."
    retry = _header("Seconds to wait.", type="integer", minimum=1)
    headers = {401: {"WWW-Authenticate": _header("The scheme that is asked for.", const="Bearer")}}
    headers |= {status: {"Retry-After": retry} for status in (429, 503)}
    return {
        status: {
            "description": described[status],
            "content": {"application/problem+json": {"schema": ProblemResponse.model_json_schema()}},
        }
        | ({"headers": headers[status]} if status in headers else {})
        for status in (*statuses, 500)
    }


def _header(description: str, **schema: object) -> dict[str, Any]:
    return {"description": description, "schema": schema or {"type": "string"}}


_READ_HEADERS: Final = {
    "Cache-Status": _header("Where the answer came from (RFC 9211), such as `goodstanding; hit; ttl=212`."),
    "Cache-Control": _header("How long a browser may keep it: at most 5 seconds."),
    "ETag": _header("Weak; changes with what a person sees."),
}


_STREAM_PARAMETERS: Final = [
    {
        "name": "user_id",
        "in": "query",
        "required": True,
        "description": "Whom to watch: 1 to 50 users, each as a parameter of its own.",
        "schema": {
            "type": "array",
            "items": {"type": "string", "format": "uuid"},
            "minItems": 1,
            "maxItems": MOST_WATCHED,
        },
        "style": "form",
        "explode": True,
    },
    {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The last `id` of the stream before: what the client has is not sent again.",
        "schema": {"type": "string"},
    },
]


def _describe(
    *,
    path: dict[str, str] | None = None,
    query: dict[str, str] | None = None,
    request_body: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """Describe for the OpenAPI document what a route reads by itself."""
    uuid = {"type": "string", "format": "uuid"}
    parameters = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": uuid}
        for name, text in (path or {}).items()
    ] + [
        {"name": name, "in": "query", "description": text, "schema": {"type": "boolean", "default": True}}
        for name, text in (query or {}).items()
    ]
    described: dict[str, Any] = {}
    if parameters:
        described["parameters"] = parameters
    if request_body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": request_body.model_json_schema()}},
        }
    return described
