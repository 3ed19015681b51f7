"""The OpenAPI document says what the service does, and the service does what the document says."""

import re
import time
from collections.abc import Iterator
from typing import Any, Final

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped] # it ships no types
from referencing import Registry
from referencing.jsonschema import DRAFT202012

import goodstanding
from goodstanding import api, create_app
from goodstanding.auth import Authenticator
from goodstanding.embedded import Postgres, Valkey
from goodstanding.reputation_service import ReputationService
from tests.serving import (
    ATTRIBUTION,
    BATCH,
    GONE,
    INVALIDATE,
    INVALIDATE_ALL,
    NO_DATABASE,
    NO_REDIS,
    SINGLE,
    Backend,
    bearer,
    client_of,
    open_backend,
)

_READ: Final = f"GET {SINGLE.format('{user_id}')}"
_BATCH: Final = f"POST {BATCH}"
_STREAM: Final = "GET /api/user/reputation/stream"
_INVALIDATE: Final = f"POST {INVALIDATE.format('{user_id}')}"
_INVALIDATE_ALL: Final = f"POST {INVALIDATE_ALL}"
_ATTRIBUTE: Final = f"POST {ATTRIBUTION.format('{session_id}')}"
_LIVE: Final = "GET /health/live"
_READY: Final = "GET /health/ready"
_METRICS: Final = "GET /metrics"
_DOCUMENTED: Final = {
    _READ: {200, 304, 400, 401, 403, 404, 422, 429, 500, 503},
    _BATCH: {200, 400, 401, 403, 408, 413, 415, 422, 429, 500, 503},
    _STREAM: {200, 400, 401, 403, 422, 429, 500, 503},
    _INVALIDATE: {200, 400, 401, 403, 422, 429, 500, 503},
    _INVALIDATE_ALL: {200, 400, 401, 403, 429, 500, 503},
    _ATTRIBUTE: {200, 400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503},
    _LIVE: {200, 500},
    _READY: {200, 500, 503},
    _METRICS: {200, 400, 401, 403, 429, 500, 503},
}
_OPEN: Final = {_LIVE, _READY}
_CASES: Final = [(operation, status) for operation, statuses in _DOCUMENTED.items() for status in sorted(statuses)]
_VERDICT: Final = {"at_fault": "user1", "reason": "user2 waited until 19:40"}


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def clients(backend: Backend) -> Iterator[dict[str, httpx2.Client]]:
    """Give clients of the service as it is, one call a minute, without servers, and without published keys."""
    nowhere = {
        "database_url": NO_DATABASE,
        "redis_url": NO_REDIS,
    }
    once = {"redis_url": "", "read_limit_per_minute": 1, "admin_limit_per_minute": 1}
    keys = {"jwks_url": "http://127.0.0.1:1/jwks.json"}
    with (
        client_of(create_app(backend.settings())) as usual,
        client_of(create_app(backend.settings(**once))) as limited,
        client_of(create_app(backend.settings(**nowhere))) as away,
        client_of(create_app(backend.settings(**keys))) as keyless,
    ):
        yield {"usual": usual, "limited": limited, "away": away, "keyless": keyless}


@pytest.fixture(scope="module")
def document(clients: dict[str, httpx2.Client]) -> dict[str, Any]:
    """Give the document as the service publishes it."""
    answer = clients["usual"].get("/openapi.json")
    answer.raise_for_status()
    return dict(answer.json())


def _operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def _schemas(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "schema":
                yield value
            elif key == "schemas":
                yield from value.values()
            else:
                yield from _schemas(value)
    elif isinstance(node, list):
        for value in node:
            yield from _schemas(value)


def _validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    registry: Registry[Any] = Registry().with_resource("urn:d", DRAFT202012.create_resource(document))
    absolute = _absolute(schema)
    return Draft202012Validator(absolute, registry=registry, format_checker=FormatChecker())


def _absolute(node: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Let the references of a part of the document lead into the whole of it."""
    if isinstance(node, dict):
        return {key: f"urn:d{value}" if key == "$ref" else _absolute(value) for key, value in node.items()}
    return [_absolute(value) for value in node] if isinstance(node, list) else node


def test_the_document_is_openapi_3_1(document: dict[str, Any]) -> None:
    """It is OpenAPI 3.1, tells the product, its version and its licence, and names each operation once."""
    assert document["openapi"].startswith("3.1")
    assert "Goodstanding" == document["info"]["title"]
    assert goodstanding.__version__ == document["info"]["version"]
    assert "Apache-2.0" == document["info"]["license"]["identifier"]
    names = [operation["operationId"] for operation in _operations(document).values()]
    assert len(names) == len(set(names))


def test_every_operation_and_status_is_documented(document: dict[str, Any]) -> None:
    """The document holds exactly the calls of the contract, each with exactly the statuses it can give."""
    documented = {
        name: {int(status) for status in operation["responses"]} for name, operation in _operations(document).items()
    }
    assert _DOCUMENTED == documented


def test_every_route_is_in_the_document(backend: Backend, document: dict[str, Any]) -> None:
    """No route is hidden from the document, HEAD twins of GET aside."""
    served = set()
    router = goodstanding.router(backend.settings())
    for route in router.routes:
        assert isinstance(route, api.ContractRoute)
        served |= {f"{method} {route.path}" for method in route.methods or ()}
    served -= {f"GET {BATCH}", f"HEAD {BATCH}"}  # answered with 405, or they would be reads of a user "batch"
    twins = {f"HEAD {name.removeprefix('GET ')}" for name in served if name.startswith("GET ")}
    assert set(_operations(document)) | twins == served


def test_every_operation_explains_itself(document: dict[str, Any]) -> None:
    """Each operation has a summary, a description, its path's parameters, and the token where one is asked for."""
    assert {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}.items() <= document["components"][
        "securitySchemes"
    ]["bearer"].items()
    for name, operation in _operations(document).items():
        assert operation["summary"]
        assert operation["description"].endswith(".")
        assert "self" not in operation["description"]
        in_path = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"}
        assert set(re.findall(r"\{(\w+)\}", name)) == in_path
        assert ([] if name in _OPEN else [{"bearer": []}]) == operation.get("security", [])
        for response in operation["responses"].values():
            assert response["description"]


def test_every_schema_is_valid_and_its_examples_fit(document: dict[str, Any]) -> None:
    """Every schema is JSON Schema 2020-12, every reference leads somewhere, and every example fits its own schema."""
    examples = 0
    for schema in _schemas(document):
        Draft202012Validator.check_schema(schema)
        validator = _validator(document, schema)
        for example in schema.get("examples", []):
            validator.validate(example)
            examples += 1
    assert examples >= 8


def test_a_host_gets_the_same_document(backend: Backend, document: dict[str, Any]) -> None:
    """In a host's app the paths are the same, and so is the security scheme."""
    host = FastAPI(title="WingmanMatch")
    host.include_router(goodstanding.router(backend.settings()))
    mounted = host.openapi()
    assert document["paths"] == mounted["paths"]
    assert document["components"] == mounted["components"]


def _request(operation: str, status: int, user: str, session: str) -> dict[str, Any]:
    """Describe the request that provokes a status."""
    method, path = operation.split(" ")
    role = "authenticated" if operation in {_READ, _BATCH, _STREAM} else "service_role"
    wrong_role = {"authenticated": "anon", "service_role": "authenticated"}[role]
    who: dict[str, str] = bearer(wrong_role if status == 403 else role)
    ids = {404: GONE, 422: "42"}
    request: dict[str, Any] = {
        "method": method,
        "url": path.format(user_id=ids.get(status, user), session_id=ids.get(status, session)),
        "headers": {} if status == 401 else who,
    }
    if operation == _BATCH:
        request["json"] = {"user_ids": [user, GONE] if status != 422 else []}
    if operation == _STREAM:
        request["params"] = {"user_id": [user, GONE] if status != 422 else []}
    if operation == _ATTRIBUTE:
        request["json"] = _VERDICT if status != 422 else {}
    if status == 304:
        request["headers"] |= {"If-None-Match": "*"}
    if status == 400:
        request["headers"] = [*who.items(), *who.items()]
    if status == 413:
        request["json"] = {"user_ids": ["x" * 70_000]}
    if status == 415:
        request["headers"] |= {"Content-Type": "text/plain"}
    if status == 408:
        request.pop("json")
        request["headers"] |= {"Content-Type": "application/json"}
    return request


@pytest.mark.parametrize(("operation", "status"), _CASES)
def test_the_service_keeps_the_contract(
    backend: Backend,
    clients: dict[str, httpx2.Client],
    document: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    status: int,
) -> None:
    """Every documented status of every call happens, and body and headers are as documented."""
    user, match = backend.match(completed=1)
    request = _request(operation, status, user, backend.session(match, "no_show"))
    client = clients["usual"]
    match (operation, status):
        case (_, 429):
            client = clients["limited"]
            _answer(client, request)
        case (op, 503) if op == _METRICS:
            client = clients["keyless"]
            request["headers"] = {"Authorization": f"Bearer {_signed_by_an_unknown_key()}"}
        case (_, 503):
            client = clients["away"]
        case (_, 408):
            monkeypatch.setattr(api, "_BODY_SECONDS", 0.05)
            request["content"] = _hesitant()
        case (_, 500):
            for owner, name in ((Authenticator, "caller"), (ReputationService, "check"), (api, "_json")):
                monkeypatch.setattr(owner, name, _broken)
    answer = _answer(client, request)
    assert status == answer.status_code
    documented = _operations(document)[operation]["responses"][str(status)]
    for header in documented.get("headers", {}):
        _validator(document, _text_form(documented["headers"][header]["schema"])).validate(answer.headers[header])
    if "content" not in documented:
        assert b"" == answer.content
        return
    media_type = answer.headers["content-type"]
    schema = documented["content"].get(media_type) or documented["content"][media_type.partition(";")[0]]
    if "json" in media_type:
        _validator(document, schema["schema"]).validate(answer.json())


def _answer(client: httpx2.Client, request: dict[str, Any]) -> httpx2.Response:
    """Read an answer whole, unless it is a stream, which would never end."""
    with client.stream(**request) as answer:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.read()
        return answer


def _hesitant() -> Iterator[bytes]:
    """Give a body that pauses for longer than the service waits."""
    yield b"{"
    time.sleep(0.2)
    yield b"}"


def _broken(*_: object, **__: object) -> None:
    message = "broken on purpose"
    raise RuntimeError(message)


def _signed_by_an_unknown_key() -> str:
    return jwt.encode({"sub": "x"}, ec.generate_private_key(ec.SECP256R1()), "ES256", headers={"kid": "new"})


def _text_form(schema: dict[str, Any]) -> dict[str, Any]:
    """Give the schema of a number's text, for a header is text."""
    return {"type": "string", "pattern": r"^[1-9]\d*$"} if schema.get("type") == "integer" else schema
