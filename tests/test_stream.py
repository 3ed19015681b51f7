"""The stream over real sockets: events, refusals, clients that vanish or do not read, and a server that stops."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, Self

import asyncpg
import httpx2
import jwt
import psutil
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from jwt.algorithms import ECAlgorithm
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

import goodstanding
from goodstanding import create_app, main, subscribers
from goodstanding.data import UserId
from goodstanding.embedded import Postgres, Valkey
from goodstanding.main import utc_now
from goodstanding.stream import before_stopping
from goodstanding.subscribers import Timing
from tests.conftest import emptied
from tests.parts import metric
from tests.serving import (
    GONE,
    NIL,
    Backend,
    bearer,
    check_problem,
    client_of,
    command,
    environment_of,
    free_port,
    open_backend,
    serving,
    wait_until,
)
from tests.streaming import SECONDS, STREAM, streaming


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of the service as it runs in production."""
    with client_of(create_app(backend.settings(cors_origins="https://app.example"))) as opened:
        yield opened


class TestEvents:
    """What is sent."""

    def test_now_and_then_on_every_change(self, backend: Backend, client: httpx2.Client) -> None:
        """A stream begins with the present value, and a session that the host app writes becomes an event by itself."""
        user, match = backend.match(completed=2)
        with streaming(client, user) as stream:
            assert 200 == stream.answer.status_code
            assert "text/event-stream; charset=utf-8" == stream.answer.headers["content-type"]
            assert "no-store" == stream.answer.headers["cache-control"]
            assert "no" == stream.answer.headers["x-accel-buffering"]
            assert stream.answer.headers["x-request-id"]
            assert ("retry: 2000",) == stream.block().lines
            first = stream.event()
            assert ("reputation", 2) == (first.kind, first.data["score"])
            members = ["user_id", "score", "badge_color", "completed_sessions", "no_shows", "cache_timestamp"]
            assert members == list(first.data)
            backend.session(match, "no_show")
            second = stream.event()
            assert (user, 1, 2, 1) == tuple(
                second.data[name] for name in ("user_id", "score", "completed_sessions", "no_shows")
            )
            assert second.data["cache_timestamp"] > first.data["cache_timestamp"]
            single = client.get(f"/api/user/reputation/{user}", headers=bearer()).json()
            # It may have been computed again since: changes may be told twice.
            assert single.pop("cache_timestamp") >= second.data.pop("cache_timestamp")
            assert {"user_id": user, **single} == second.data

    def test_every_window_sees_a_change(self, backend: Backend, client: httpx2.Client) -> None:
        """Two streams of different processes show the same event under the same id."""
        user, match = backend.match()
        with (
            client_of(create_app(backend.settings())) as elsewhere,
            streaming(client, user) as one,
            streaming(elsewhere, user) as two,
        ):
            assert one.event().place == two.event().place
            backend.session(match, "no_show")
            first, second = one.event(), two.event()
            assert -1 == first.data["score"] == second.data["score"]
            assert first.place == second.place

    def test_many_users_in_the_order_asked(self, backend: Backend, client: httpx2.Client) -> None:
        """Several users come in the order asked, either case is one user, and an unknown one is told as such."""
        one, two = backend.user(completed=1), backend.user(no_shows=1)
        with streaming(client, two, NIL, one.upper(), one, two) as stream:
            events = [stream.event() for _ in range(3)]
        told = [(event.kind, event.data["user_id"], event.data.get("score")) for event in events]
        assert [("reputation", two, -1), ("user_not_found", NIL, None), ("reputation", one, 1)] == told

    def test_a_deleted_user_is_told(self, backend: Backend, client: httpx2.Client) -> None:
        """When a watched user is deleted, the stream says so, and also when he is there again."""
        user = backend.user()
        with streaming(client, user) as stream:
            assert "reputation" == stream.event().kind
            backend.execute("delete from public.user_profiles where id = $1", user)
            assert ("user_not_found", {"user_id": user}) == ((gone := stream.event()).kind, gone.data)
            backend.execute("insert into public.user_profiles (id) values ($1)", user)
            assert "reputation" == stream.event().kind

    def test_a_stream_goes_on_where_it_was(self, backend: Backend, client: httpx2.Client) -> None:
        """With the last id, nothing is sent but what has changed; after a change, everything is."""
        users = [backend.user(completed=1), backend.user(completed=2)]
        with streaming(client, *users) as stream:
            last = [stream.event() for _ in range(2)][-1].place
        again = {"Last-Event-ID": last}
        with streaming(client, *reversed(users), **again) as stream:
            assert ("retry: 2000",) == stream.block().lines
            assert (": nothing has changed",) == stream.block().lines
        backend.execute("delete from public.user_profiles where id = $1", users[0])
        wait_until(lambda: 404 == client.get(f"/api/user/reputation/{users[0]}", headers=bearer()).status_code)
        with streaming(client, *users, **again) as stream:
            assert ["user_not_found", "reputation"] == [stream.event().kind for _ in range(2)]

    def test_head_tells_the_headers(self, backend: Backend, client: httpx2.Client) -> None:
        """HEAD answers at once, like GET and without a stream."""
        opened = metric("goodstanding_streams")
        answer = client.head(STREAM, params={"user_id": backend.user()}, headers=bearer())
        assert (200, b"") == (answer.status_code, answer.content)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert opened == metric("goodstanding_streams")

    def test_the_time_of_a_stream_is_not_the_time_of_an_answer(self, backend: Backend, client: httpx2.Client) -> None:
        """A request is timed until its first value is there; how long a stream lives is in no histogram."""
        labels = {"route": STREAM, "method": "GET", "status": "200", "source": "none"}
        with streaming(client, backend.user()) as stream:
            stream.event()
            assert metric("goodstanding_http_request_seconds_count", **labels) >= 1
            assert metric("goodstanding_streams") >= 1

    def test_a_browser_elsewhere_may_resume(self, client: httpx2.Client) -> None:
        """A page of an allowed origin may send the token and the last id."""
        asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET"}
        asked |= {"Access-Control-Request-Headers": "authorization, last-event-id"}
        answer = client.options(STREAM, headers=asked)
        assert 200 == answer.status_code
        assert "last-event-id" in answer.headers["access-control-allow-headers"].lower()


class TestOutages:
    """An open stream outlives whatever the process works with."""

    def test_without_redis_changes_come_by_notify(self, backend: Backend) -> None:
        """A service without a Redis URL tells its streams just as soon."""
        user, match = backend.match()
        with client_of(create_app(backend.settings(redis_url=""))) as client, streaming(client, user) as stream:
            assert 0 == stream.event().data["score"]
            backend.session(match, "no_show")
            assert -1 == stream.event().data["score"]

    def test_while_redis_is_away_changes_come_all_the_same(self, backend: Backend, valkey: Valkey) -> None:
        """When Redis dies, a change is told within about 2 seconds, and the stream goes on after Redis is back."""
        user, match = backend.match()
        with client_of(create_app(backend.settings())) as client, streaming(client, user) as stream:
            assert 0 == stream.event().data["score"]
            valkey.kill()
            try:
                backend.session(match, "no_show")
                began = time.monotonic()
                assert -1 == stream.event().data["score"]
                assert time.monotonic() - began < 4
            finally:
                emptied(valkey)
            wait_until(lambda: "ready" == client.get("/health/ready").json()["status"])
            backend.session(match, "no_show")
            assert -2 == stream.event().data["score"]

    def test_while_postgresql_is_away_nothing_is_lost(self, backend: Backend, postgres: Postgres) -> None:
        """When PostgreSQL dies, streams stay open, and what is written after its return is told."""
        user, match = backend.match()
        with client_of(create_app(backend.settings())) as client, streaming(client, user) as stream:
            assert 0 == stream.event().data["score"]
            postgres.kill()
            wait_until(lambda: "database" in client.get("/health/ready").json()["degraded"])
            postgres.start()
            wait_until(lambda: _written(backend, match))
            assert -1 == stream.event().data["score"]


def _written(backend: Backend, match: str) -> bool:
    """Insert a session, once the database takes it."""
    with suppress(asyncpg.PostgresError, OSError):
        backend.session(match, "no_show")
        return True
    return False


class TestRefusals:
    """What does not begin is an ordinary error."""

    @pytest.mark.parametrize(
        ("users", "code"),
        [
            ([], "invalid_input"),
            ([f"00000000-0000-4000-8000-{n:012x}" for n in range(51)], "invalid_input"),
            (["x"], "invalid_user_id"),
            ([NIL, NIL.replace("-", "")], "invalid_user_id"),
            ([""], "invalid_user_id"),
        ],
    )
    def test_one_to_fifty_canonical_ids(self, client: httpx2.Client, users: list[str], code: str) -> None:
        """None, more than 50, or an id in any other form is refused, without an echo."""
        check_problem(client.get(STREAM, params={"user_id": users}, headers=bearer()), 422, code)

    def test_fifty_are_taken(self, client: httpx2.Client) -> None:
        """Fifty users, one of them named again, are one stream."""
        users = [f"00000000-0000-4000-8000-{n:012x}" for n in range(50)]
        with streaming(client, *users, users[0]) as stream:
            assert users == [stream.event().data["user_id"] for _ in range(50)]

    def test_who_may(self, backend: Backend, client: httpx2.Client) -> None:
        """Without a token it is 401, also where single reads are open to all; with another role 403."""
        check_problem(client.get(STREAM, params={"user_id": NIL}), 401)
        check_problem(client.get(STREAM, params={"user_id": NIL}, headers=bearer("anon")), 403)
        with client_of(create_app(backend.settings(public_reads=True))) as opened:
            check_problem(opened.get(STREAM, params={"user_id": NIL}), 401)
        with streaming(client, NIL, **bearer("service_role")) as stream:
            assert 200 == stream.answer.status_code

    def test_only_get(self, client: httpx2.Client) -> None:
        """Any other method is refused with the right ones."""
        answer = client.post(STREAM, headers=bearer())
        check_problem(answer, 405)
        assert "GET, HEAD" == answer.headers["allow"]

    def test_so_many_for_a_caller_and_for_a_process(self, backend: Backend) -> None:
        """A caller's next stream is 429, a full process is 503, and a client that leaves makes room at once."""
        settings = backend.settings(streams_per_caller=2, streams_per_process=3)
        with client_of(create_app(settings)) as client, ExitStack() as stack:
            one, other = bearer(), bearer()
            stack.enter_context(streaming(client, NIL, **one))
            with streaming(client, NIL, **one):
                check_problem(client.get(STREAM, params={"user_id": NIL}, headers=one), 429, "rate_limited")
                stack.enter_context(streaming(client, NIL, **other))
                full = client.get(STREAM, params={"user_id": NIL}, headers=other)
                check_problem(full, 503, "temporarily_unavailable")
            wait_until(lambda: 200 == client.head(STREAM, params={"user_id": NIL}, headers=one).status_code, seconds=2)

    def test_without_a_database_it_does_not_begin(self, backend: Backend, postgres: Postgres) -> None:
        """Values that cannot be had are 503, before anything is streamed."""
        with client_of(create_app(backend.settings(load_deadline_ms=200))) as client:
            postgres.pause()
            try:
                check_problem(client.get(STREAM, params={"user_id": GONE}, headers=bearer()), 503)
            finally:
                postgres.resume()


class TestEnds:
    """How a stream ends."""

    def test_with_a_client_that_goes_before_the_first_value(
        self, backend: Backend, postgres: Postgres, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its place is free at once, and nothing is an error: everybody could write into the log by it."""
        user, before = backend.user(), metric("goodstanding_streams")
        head = f"GET {STREAM}?user_id={user} HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\n\r\n"
        with serving(create_app(backend.settings(load_deadline_ms=9000))) as url:
            address = httpx2.URL(url)
            postgres.pause()
            try:
                with socket.create_connection((address.host, address.port or 80)) as connection:
                    connection.sendall(head.encode())
                    wait_until(lambda: metric("goodstanding_streams") == before + 1)
                time.sleep(0.2)
            finally:
                postgres.resume()
            wait_until(lambda: metric("goodstanding_streams") == before)
        assert [] == [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]

    def test_with_the_token(self, backend: Backend, client: httpx2.Client) -> None:
        """When the token expires, the stream says when to come back and ends in order."""
        who = bearer(exp=int(utc_now().timestamp()) + 2)
        with streaming(client, backend.user(), **who) as stream:
            stream.event()
            rest = [line for line in stream.rest() if line]
        assert 1 == len(rest)
        assert 500 <= int(rest[0].removeprefix("retry: ")) <= 3000

    def test_with_the_key(self, backend: Backend) -> None:
        """When the key of the token is published no longer, the stream ends, and the client is not let in again."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = json.loads(ECAlgorithm.to_jwk(key.public_key())) | {"kid": "1"}
        keys = [public]
        publishing = FastAPI()
        publishing.get("/")(lambda: {"keys": keys})
        claims = {"role": "service_role", "exp": 2**40}
        who = {"Authorization": f"Bearer {jwt.encode(claims, key, 'ES256', headers={'kid': '1'})}"}
        with serving(publishing) as url:
            settings = backend.settings(jwks_url=url).model_copy(update={"jwks_refresh_seconds": 0.1})
            with client_of(create_app(settings)) as client:
                user, match = backend.match()
                with streaming(client, user, **who) as stream, streaming(client, user) as other:
                    assert [0, 0] == [one.event().data["score"] for one in (stream, other)]
                    keys.clear()
                    assert stream.block().lines[0].startswith("retry: ")
                    assert [] == stream.rest()
                    backend.session(match, "no_show")
                    assert -1 == other.event().data["score"]
                    check_problem(client.get(STREAM, params={"user_id": user}, headers=who), 401)

    def test_with_the_client(self, backend: Backend, client: httpx2.Client) -> None:
        """A client that goes away, in order or not, is noticed at once."""
        open_before = metric("goodstanding_streams")
        gone = metric("goodstanding_streams_ended_total", reason="gone")
        user = backend.user()
        with streaming(client, user) as stream:
            stream.event()
            assert open_before + 1 == metric("goodstanding_streams")
        wait_until(lambda: open_before == metric("goodstanding_streams"), seconds=2)
        assert gone + 1 == metric("goodstanding_streams_ended_total", reason="gone")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let streams beat all the time, and be dropped after half a second of not reading."""
    monkeypatch.setattr(main, "Subscribers", lambda *a, **k: _Subscribers(*a, timing=_HASTY, **k))


_Subscribers: Final = subscribers.Subscribers
_HASTY: Final = Timing(heartbeat=0, look=0.001, send=0.5)


@contextmanager
def _narrow(app: FastAPI, protocol: Literal["h11", "httptools"], loop: Literal["asyncio", "uvloop"]) -> Iterator[int]:
    """Serve an app on a socket whose connections take little; gives the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(
            app, http=protocol, loop=loop, lifespan="on", log_config=None, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        port: int = listener.getsockname()[1]
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


class _Deaf:
    """A client that asks for a stream and never reads it."""

    def __init__(self, port: int, users: list[UserId]) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.connect(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        query = "&".join(f"user_id={user}" for user in users)
        lines = [f"GET {STREAM}?{query} HTTP/1.1", "Host: x", f"Authorization: {bearer()['Authorization']}", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def server_end(self) -> int | None:
        """Give the file descriptor of the server's end of the connection, as long as this process has it."""
        ours = psutil.Process().net_connections("tcp")
        return next((one.fd for one in ours if getattr(one.raddr, "port", 0) == self.port and one.fd != -1), None)


@pytest.mark.parametrize("protocol", ["h11", "httptools"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.filterwarnings("default")
def test_a_client_that_does_not_read_is_cut_off(
    backend: Backend,
    hasty: None,
    protocol: Literal["h11", "httptools"],
    loop: Literal["asyncio", "uvloop"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that never reads loses its connection: its file descriptor is closed, while others are served."""
    del hasty
    slow = metric("goodstanding_streams_ended_total", reason="slow")
    user = backend.user()
    app = create_app(backend.settings())
    with (
        _narrow(app, protocol, loop) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client,
        streaming(client, user) as reading,
        _Deaf(port, [user]) as deaf,
    ):
        wait_until(lambda: deaf.server_end() is not None)
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                reading.block()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            wait_until(lambda: slow + 1 == metric("goodstanding_streams_ended_total", reason="slow"))
            wait_until(lambda: deaf.server_end() is None, seconds=2)
            assert thread.is_alive()
        finally:
            stop.set()
            thread.join(SECONDS)
    assert [] == [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "WARNING"}]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone has this option")
def test_a_client_that_vanishes_is_given_up(backend: Backend, client: httpx2.Client) -> None:
    """The kernel gives a connection up half a minute after what was sent has not arrived, not after 15 minutes."""
    with _Deaf(client.base_url.port or 0, [backend.user()]) as deaf:

        def patience() -> int:
            end = deaf.server_end()
            if end is None:
                return 0
            with socket.socket(fileno=os.dup(end)) as connection:
                return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

        wait_until(lambda: 30_000 == patience())


class TestInAHostsApp:
    """Streams behind whatever a host puts before them."""

    def test_behind_a_middleware_that_reads_the_request_itself(self, backend: Backend) -> None:
        """Where the server's own connection cannot be reached, streams work, and clients that leave are noticed."""

        class Middleware(BaseHTTPMiddleware):
            async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
                return await call_next(request)

        app = FastAPI()
        app.include_router(goodstanding.router(backend.settings()), prefix="/v2")
        app.add_middleware(Middleware)
        user, match = backend.match()
        before = metric("goodstanding_streams")
        with serving(app) as url, httpx2.Client(base_url=f"{url}/v2") as client:
            with streaming(client, user) as stream:
                assert 0 == stream.event().data["score"]
                backend.session(match, "no_show")
                assert -1 == stream.event().data["score"]
            wait_until(lambda: before == metric("goodstanding_streams"), seconds=2)


_HOST: Final = """
from fastapi import FastAPI
import goodstanding
app = FastAPI()
app.include_router(goodstanding.router())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "ending", "code"),
    [
        (("goodstanding", "serve"), signal.SIGTERM, 0),
        (("goodstanding", "serve"), signal.SIGINT, 0),
        (("goodstanding", "serve", "--workers", "2"), signal.SIGTERM, 0),
        (("uvicorn", "host:app"), signal.SIGTERM, -signal.SIGTERM),
    ],
    ids=["term", "int", "workers", "host"],
)
def test_a_server_that_stops_tells_its_clients_to_come_back(
    backend: Backend, tmp_path: Path, words: tuple[str, ...], ending: signal.Signals, code: int
) -> None:
    """With 50 open streams the server ends at once and in order; each client is told when to come back."""
    (tmp_path / "host.py").write_text(_HOST)
    port = free_port()
    variables = environment_of(backend.settings()) | {
        "GOODSTANDING_STREAMS_PER_CALLER": "100",
        "GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000",
        "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))),
    }
    who, user = bearer(), backend.user()
    with command(*words, "--port", str(port), environment=variables) as process, ExitStack() as stack:
        wait_until(lambda: process.poll() is not None or _answers(port), seconds=90)
        assert process.stdout is not None
        streams = []
        client = stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS))
        for _ in range(50):
            streams.append(stack.enter_context(streaming(client, user, **who)))
            streams[-1].event()
        began = time.monotonic()
        process.send_signal(ending)
        delays = [int(line.removeprefix("retry: ")) for stream in streams for line in stream.rest() if line]
        ended = process.wait(SECONDS)
        took = time.monotonic() - began
        told = process.stdout.read()
    assert 50 == len(delays)
    assert all(500 <= delay <= 3000 for delay in delays)
    assert len(set(delays)) > 10
    assert "Traceback" not in told
    assert "Cancel" not in told
    assert code == ended, told
    # Less than a second on a machine that does nothing else; a server that waited for its streams would take 10.
    assert took < 4, told


def _answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health/live").is_success
    except httpx2.TransportError:
        return False


class TestBeforeStopping:
    """The signal that ends a server is heard before the server hears it."""

    async def test_it_precedes_whoever_handles_the_signal(self) -> None:
        """Our call is made, then the handler that was there before; afterwards that one alone is there again."""
        heard: list[str] = []
        called = asyncio.Event()

        def stop() -> None:
            heard.append("ours")
            called.set()

        previous = signal.signal(signal.SIGTERM, lambda *_: heard.append("theirs"))
        try:
            theirs = signal.getsignal(signal.SIGTERM)
            with before_stopping(stop):
                signal.raise_signal(signal.SIGTERM)
                async with asyncio.timeout(SECONDS):
                    await called.wait()
            assert ["theirs", "ours"] == heard
            assert theirs is signal.getsignal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, previous)

    async def test_a_signal_that_nobody_handles_stays_so(self) -> None:
        """Where a signal simply ends the process, it still does."""
        previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            with before_stopping(lambda: None):
                assert signal.SIG_DFL is signal.getsignal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, previous)

    async def test_a_handler_installed_later_is_left_alone(self) -> None:
        """Whoever takes the signal over afterwards keeps it, and may still call us when nobody is left to be told."""
        previous = signal.getsignal(signal.SIGINT)
        heard: list[int] = []
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
        try:
            with before_stopping(lambda: None):
                ours = signal.getsignal(signal.SIGINT)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            assert signal.SIG_IGN is signal.getsignal(signal.SIGINT)
            assert callable(ours)
            ours(signal.SIGINT, None)
            assert [signal.SIGINT] == heard
        finally:
            signal.signal(signal.SIGINT, previous)

    def test_elsewhere_than_in_the_main_thread_nothing_is_touched(self) -> None:
        """In another thread, where Python takes no handlers, the block simply runs."""
        ran: list[object] = []

        def run() -> None:
            with before_stopping(lambda: None):
                ran.append(signal.getsignal(signal.SIGTERM))

        before = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(SECONDS)
        assert [before] == ran
