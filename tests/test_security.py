"""What docs/explanation/security.md promises: who may do what to whom, what nobody learns, and that it is tested."""

import ast
import json
import re
import signal
from collections.abc import Iterator, Mapping
from typing import Final

import httpx2
import jwt
import pytest

from goodstanding import create_app
from goodstanding.embedded import Postgres, Valkey
from goodstanding.http_protocol import HotProtocol
from goodstanding.metrics import CACHE_READS
from goodstanding.reputation_service import ReputationService
from tests.parts import metric, queries
from tests.serving import (
    ATTRIBUTION,
    BATCH,
    GONE,
    INVALIDATE,
    INVALIDATE_ALL,
    SINGLE,
    Backend,
    bearer,
    client_of,
    command,
    environment_of,
    free_port,
    open_backend,
    raw_exchange,
    root,
    token,
    wait_until,
)
from tests.streaming import STREAM
from tests.test_logs import configured, logging_as_before

_PAGE: Final = root() / "docs" / "explanation" / "security.md"


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of the service as it runs in production, by the protocol of `goodstanding serve`."""
    with client_of(create_app(backend.settings()), http=HotProtocol) as opened:
        yield opened


@pytest.fixture(scope="module")
def targets(backend: Backend) -> dict[str, tuple[str, str]]:
    """Give a user and a session, by what is known of them."""
    user, match = backend.match(completed=1)
    session = backend.session(match, "no_show")
    return {"known": (user, session), "unknown": (GONE, GONE), "malformed": ("evil", "evil")}


_UNSIGNED: Final = jwt.encode({"sub": "x", "aud": "authenticated", "role": "service_role", "exp": 4e9}, "", "none")
_NOBODY: Final = {
    "no token": {},
    "garbage": {"Authorization": "Bearer garbage"},
    "expired": bearer("service_role", exp=1),
    "another secret": {"Authorization": f"Bearer {token('service_role', secret='x' * 40)}"},
    "unsigned": {"Authorization": f"Bearer {_UNSIGNED}"},
    "another audience": bearer("service_role", aud="elsewhere"),
    "a test user": {"X-Test-User-ID": "alice"},
}
_CALLERS: Final[Mapping[str, tuple[str, dict[str, str]]]] = {
    **{name: ("nobody", headers) for name, headers in _NOBODY.items()},
    "anon": ("anon", bearer("anon")),
    "an unknown role": ("anon", bearer("supabase_admin")),
    "a user": ("authenticated", bearer()),
    "the user": ("authenticated", {}),  # the target itself: filled in where it is known
    "the service": ("service_role", bearer("service_role")),
    "Supabase's service key": ("service_role", bearer("service_role", sub=None, aud=None)),
}
_READERS: Final = {"authenticated", "service_role"}
_SERVICE: Final = {"service_role"}
# Who may, and the status for a target that is known, unknown, malformed.
_MATRIX: Final[Mapping[str, tuple[set[str], tuple[int, int, int]]]] = {
    f"GET {SINGLE}": (_READERS, (200, 404, 422)),
    f"HEAD {SINGLE}": (_READERS, (200, 404, 422)),
    f"POST {BATCH}": (_READERS, (200, 200, 422)),
    f"GET {STREAM}": (_READERS, (200, 200, 422)),
    f"HEAD {STREAM}": (_READERS, (200, 200, 422)),
    f"POST {INVALIDATE}": (_SERVICE, (200, 200, 422)),
    f"POST {INVALIDATE_ALL}": (_SERVICE, (200, 200, 200)),
    f"POST {ATTRIBUTION}": (_SERVICE, (200, 404, 422)),
    "GET /metrics": (_SERVICE, (200, 200, 200)),
    "HEAD /metrics": (_SERVICE, (200, 200, 200)),
    "GET /health/live": ({"nobody", "anon", *_READERS}, (200, 200, 200)),
    "HEAD /health/live": ({"nobody", "anon", *_READERS}, (200, 200, 200)),
    "GET /health/ready": ({"nobody", "anon", *_READERS}, (200, 200, 200)),
    "HEAD /health/ready": ({"nobody", "anon", *_READERS}, (200, 200, 200)),
}


def _ask(client: httpx2.Client, call: str, target: tuple[str, str], headers: Mapping[str, str]) -> httpx2.Response:
    """Make a call about a target; of a stream only the headers are read."""
    method, path = call.split(" ")
    user, session = target
    body: object = None
    if path == BATCH:
        body = {"user_ids": [user]}
    if path == ATTRIBUTION:
        body = {"at_fault": "nobody", "reason": "seen"}
    request = client.build_request(
        method,
        path.format(session if path == ATTRIBUTION else user),
        params={"user_id": user} if path == STREAM else None,
        json=body,
        headers=headers,
    )
    answer = client.send(request, stream=True)
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        answer.read()
    answer.close()
    return answer


def test_the_matrix_is_whole(client: httpx2.Client) -> None:
    """Every call of the OpenAPI document is in it, and HEAD wherever there is GET."""
    served = {
        f"{method.upper()} {re.sub(r'{[a-z_]+}', '{}', path)}"
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    served |= {f"HEAD {call.removeprefix('GET ')}" for call in served if call.startswith("GET ")}
    assert served == _MATRIX.keys()


@pytest.mark.parametrize("call", _MATRIX)
@pytest.mark.parametrize("caller", _CALLERS)
def test_role_by_caller_by_target(
    client: httpx2.Client, targets: dict[str, tuple[str, str]], call: str, caller: str
) -> None:
    """Who may not, gets 401 or 403, the same whatever the target is, and nothing is looked up; who may, the answer."""
    role, headers = _CALLERS[caller]
    allowed, expected = _MATRIX[call]
    # What an open stream watches may be read again at any time.
    wait_until(lambda: 0 == metric("goodstanding_streams"))
    before = (queries(), _looks())
    answers = [
        _ask(client, call, target, headers or (bearer(sub=target[0]) if role == "authenticated" else {}))
        for target in targets.values()
    ]
    statuses = tuple(answer.status_code for answer in answers)
    if role in allowed:
        assert expected == statuses
        return
    assert (401 if role == "nobody" else 403,) * 3 == statuses
    told = [
        ([(name, value) for name, value in answer.headers.items() if name not in {"date", "x-request-id"}], answer)
        for answer in answers
    ]
    assert told[0][0] == told[1][0] == told[2][0]
    if not call.startswith("HEAD"):
        assert 1 == len({answer.content for answer in answers})
    assert before == (queries(), _looks())


def _looks() -> dict[str, float]:
    """Count the looks into the cache, by all that can come of one."""
    [family] = CACHE_READS.collect()
    return {sample.labels["result"]: sample.value for sample in family.samples if sample.name == f"{family.name}_total"}


def test_a_look_is_seen_whatever_comes_of_it(client: httpx2.Client, backend: Backend) -> None:
    """What must not happen for a stranger is seen where it happens: of a user who is cached, who is not, of nobody."""
    user, caller = backend.user(completed=1), bearer()
    for target, status in ((user, 200), (user, 200), (GONE, 404)):
        before = _looks()
        assert status == client.get(SINGLE.format(target), headers=caller).status_code
        wait_until(lambda: before != _looks())  # noqa: B023 - awaited here
    assert {"hit", "miss", "away"} >= _looks().keys() >= {"hit", "miss"}


def test_the_log_holds_nobody(backend: Backend) -> None:
    """No token, id, note, reason or address is in the log of `serve`, and no request writes a line of its own."""
    user, match = backend.match(completed=1)
    session = backend.session(match, "no_show")
    backend.execute("update public.wingman_sessions set notes = 'canary-note', venue_name = 'canary-venue'")
    good, bad = token(sub="canary-subject"), token(sub="canary-subject", secret="x" * 40)
    service = {"Authorization": f"Bearer {token('service_role', sub='canary-support')}"}
    port = free_port()
    environment = environment_of(backend.settings()) | {
        "GOODSTANDING_LOG_LEVEL": "debug",
        "GOODSTANDING_LOG_FORMAT": "json",
    }
    read = "reputation.read_counts(uuid[], text, text, text)"
    with (
        command("goodstanding", "serve", "--port", str(port), environment=environment) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        wait_until(lambda: process.poll() is not None or _answers(client), seconds=60)
        for credentials in (good, bad, good[:-2], "canary-token"):
            headers = {"Authorization": f"Bearer {credentials}", "X-Forwarded-For": "203.0.113.77"}
            for path in (user, "canary-id", f"{user}%0Acanary", f"{user}?use_cache=canary"):
                client.get(SINGLE.format(path), headers=headers)
            client.post(BATCH, json={"user_ids": [user, "canary-id"]}, headers=headers)
        assert (
            200
            == client.post(
                ATTRIBUTION.format(session), json={"at_fault": "user1", "reason": "canary-reason"}, headers=service
            ).status_code
        )
        raw_exchange(str(client.base_url), b'GET /canary"}\n{"event":"forged HTTP/1.1\r\n\r\n')
        # A database that refuses says so with the query and its values.
        backend.execute(f"revoke execute on function {read} from goodstanding_service")
        try:
            answer = client.get(SINGLE.format(user) + "?use_cache=false", headers={"Authorization": f"Bearer {good}"})
        finally:
            backend.execute(f"grant execute on function {read} to goodstanding_service")
        assert 503 == answer.status_code
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[0]
    lines = [json.loads(line) for line in told.splitlines()]
    assert {"event", "level", "timestamp"} <= set.intersection(*(set(line) for line in lines))
    assert "forged" not in {line["event"] for line in lines}
    for secret in ("canary", "203.0.113", user, session, good, bad, good.split(".")[1], "Bearer", "select "):
        assert secret not in told


# With the status: what ends a line, or controls a terminal, does not come past the server's parser.
_HOSTILE: Final = {
    "quotes": (500, b'a"}{"event":"forged","level":"info"}'),
    "an escaped newline": (500, rb"a\n{\"event\":\"forged\"}\u000aforged%0Aforged"),
    "a separator of lines": (500, "a\u2028forged\u0085forged".encode()),
    "bytes above ASCII": (500, b"a\x85forged\x9b31mforged"),
    "a terminal's escape": (400, b"a\x1b[2J\x1b[31mforged\x1b]0;forged\x07"),
    "a carriage return": (400, b"a\rforged"),
    "a newline": (400, b"a\nforged"),
    "a folded line": (400, b"a\r\n forged"),
}


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize(("status", "said"), _HOSTILE.values(), ids=_HOSTILE)
def test_what_a_request_makes_fail_is_one_line_of_ours(
    client: httpx2.Client, backend: Backend, monkeypatch: pytest.MonkeyPatch, status: int, said: bytes, log_format: str
) -> None:
    """Nothing that a request holds, nor what the failure says, is in the line that tells of it, or looks like one."""
    user, credentials = backend.user(completed=1), token(sub="canary-subject")
    head = (
        f"GET {SINGLE.format(user)}?use_cache=false HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        f"Authorization: Bearer {credentials}\r\nX-Forwarded-For: 203.0.113.77\r\n"
    ).encode()
    request = b"".join([head, *(name + b": " + said + b"\r\n" for name in (b"X-Request-ID", b"User-Agent")), b"\r\n"])

    async def broken(*_: object, **__: object) -> None:
        message = f'canary-note {user} {credentials}\n{{"event":"forged"}}\r\x1b[31m'
        raise LookupError(message)

    monkeypatch.setattr(ReputationService, "read", broken)
    with logging_as_before():
        stream = configured(log_format=log_format)
        answer = raw_exchange(str(client.base_url), request)
        told = stream.getvalue()
    assert status == answer.status
    if status == 400:
        assert [] == _of_requests(told)
        return
    first, *more = _of_requests(told)
    if log_format == "json":
        assert [] == more
        line = json.loads(first)
        assert {"event", "exception", "level", "request_id", "route", "timestamp"} == line.keys()
        assert "request_failed" == line["event"]
        assert re.fullmatch("[0-9a-f]{32}", line["request_id"])
    else:
        assert re.fullmatch(r"\S+Z \[error +\] request_failed +request_id=[0-9a-f]{32} route=\S+user_id}", first)
        assert "builtins.LookupError" == more[-1]
        assert all(line.startswith("  ") for line in more[:-1])
    private = ("canary", "203.0.113", user, credentials, credentials.split(".")[1])
    for secret in (*private, "Bearer", "forged", "\x1b", "\r"):
        assert secret not in told


def test_a_request_that_is_answered_writes_no_line(client: httpx2.Client, backend: Backend) -> None:
    """A hundred of them, well-formed or not, allowed or not, write no more than one."""
    user, good = backend.user(completed=1), bearer()
    with logging_as_before():
        stream = configured(log_format="json")
        counts = []
        for times in (1, 100):
            for _ in range(times):
                for path, headers in ((user, good), (GONE, good), ("evil", good), (user, {}), (user, bearer(exp=1))):
                    client.get(SINGLE.format(path), headers=headers)
                client.post(BATCH, json={"user_ids": [user, "evil"]}, headers=good)
                raw_exchange(str(client.base_url), b"GET / HTTP/9.9\r\n\r\n")
            counts.append(len(_of_requests(stream.getvalue())))
    assert counts[0] == counts[1], stream.getvalue()


def _of_requests(told: str) -> list[str]:
    """Leave out what tells of a dependency: on a busy machine one may be away for a moment."""
    return [line for line in told.splitlines() if not re.search(r"\b(dependency_(away|back)|rate_limits_\w+)\b", line)]


def _answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/health/live").is_success
    except httpx2.TransportError:
        return False


class TestThePage:
    """No rule without a check: each row of the page names tests, and they exist."""

    _RISKS: Final = {f"API{number}" for number in range(1, 11)}

    # How each promise of SECURITY.md begins, and the rows that answer for it.
    _PROMISES: Final[Mapping[str, tuple[str, ...]]] = {
        "Only the aggregates leave": (
            "API3: broken object property level authorization",
            "The service's login can do little",
        ),
        "Nobody without a valid token learns anything": (
            "API1: broken object level authorization",
            "API2: broken authentication",
            "API5: broken function level authorization",
        ),
        "No input makes the service fail": ("API4: unrestricted resource consumption", "Whatever is sent"),
        "No log line holds": ("The log names nobody",),
        "The host app's writes never fail or wait": ("The host app's writes neither fail nor wait",),
        "What is installed from `uv.lock` is what was locked": ("What is installed is what was locked",),
    }

    def _rows(self) -> dict[str, list[str]]:
        rows = {}
        for line in _PAGE.read_text("utf-8").splitlines():
            if line.startswith("| ") and "`test_" in line:
                rows[line.split("|")[1].strip()] = re.findall(r"`(test_\w+\.py(?:::\w+)+)`", line)
        return rows

    def test_every_risk_has_its_row(self) -> None:
        """The ten risks of OWASP's API Security Top 10 (2023) are all there, and every row has tests."""
        rows = self._rows()
        assert self._RISKS <= {name.split(":")[0] for name in rows}
        assert all(rows.values())

    def test_every_promise_has_its_rows(self) -> None:
        """What SECURITY.md promises, no more and no less, is answered for by rows of the page."""
        text = (root() / "SECURITY.md").read_text("utf-8")
        [promised] = re.findall(r"^## What is promised\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
        promises = re.findall(r"^- (.*)$", promised, re.MULTILINE)
        answered = [[begin for begin in self._PROMISES if promise.startswith(begin)] for promise in promises]
        assert [[begin] for begin in self._PROMISES] == answered
        assert set().union(*self._PROMISES.values()) <= self._rows().keys()

    def test_every_test_that_is_named_exists(self) -> None:
        """A test that is renamed or removed is missed here."""
        for name, tests in self._rows().items():
            for test in tests:
                assert _exists(*test.split("::")), (name, test)

    def test_every_row_with_a_promise_has_tests(self) -> None:
        """No row of the page's tables goes without."""
        text = _PAGE.read_text("utf-8")
        rows = [
            line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| risk", "| what"))
        ]
        assert len(rows) == len(self._rows())


def _exists(file: str, *names: str) -> bool:
    path = root() / "tests" / file
    if not path.is_file():
        return False
    body: list[ast.stmt] = ast.parse(path.read_text("utf-8")).body
    for name in names:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                body = node.body
                break
        else:
            return False
    return True
