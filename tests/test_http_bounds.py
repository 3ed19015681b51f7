"""How long a request may take to arrive at `goodstanding serve`, and how large it may be."""

import asyncio
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from typing import Final

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from goodstanding import http_bounds
from goodstanding.http_bounds import MOST_HEAD, MOST_MESSAGE, BoundedProtocol
from tests.serving import RawAnswer, raw_exchange, wait_until

_GET: Final = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
_POST: Final = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
_CHUNKED: Final = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
_STREAM: Final = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
_BIG: Final = b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n"
_REQUEST_SECONDS: Final = 0.6
_BIG_BYTES: Final = 8 << 20


async def _application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a GET at once, anything else when it has been read, `/stream` never to its end."""
    length = _BIG_BYTES if scope["path"] == "/big" else 2
    if scope["method"] == "POST":
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
    headers = [] if scope["path"] == "/stream" else [(b"content-length", b"%d" % length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while scope["path"] == "/stream" and _STREAMING.is_set():
        await send({"type": "http.response.body", "body": b".", "more_body": True})
        await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": b"." * length})


_STREAMING: Final = threading.Event()


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    """Serve an application on loopback, with little patience."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_bounds, "_REQUEST_SECONDS", _REQUEST_SECONDS)
        patch.setattr(http_bounds, "_LINGER_SECONDS", 0.2)
        patch.setattr(http_bounds, "_STALL_SECONDS", 0.6)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        running = uvicorn.Server(
            uvicorn.Config(
                _application,
                lifespan="off",
                log_config=None,
                http=BoundedProtocol,
                timeout_keep_alive=1,
                timeout_graceful_shutdown=1,
            )
        )
        running.config.port = listener.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: running.started)
        _STREAMING.set()
        yield running
        _STREAMING.clear()
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def _connected(server: uvicorn.Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.config.port), timeout=30) as connection:
        yield connection


def _answer(connection: socket.socket) -> RawAnswer:
    answer = HTTPResponse(connection)
    answer.begin()
    body = answer.read()
    return RawAnswer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)


def _refusal(connection: socket.socket) -> tuple[int, str]:
    """Read an answer that is a problem and the connection's last; gives its status and code."""
    answer = _answer(connection)
    assert "application/problem+json" == answer.headers["content-type"]
    assert "close" == answer.headers["connection"]
    assert b"" == connection.recv(1)
    told = json.loads(answer.body)
    assert answer.status == told["status"]
    return answer.status, told["code"]


def _is_cut(connection: socket.socket) -> bool:
    """Tell whether the connection ends, without a word, after it was read from."""
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionError:
        return True
    return True


@contextmanager
def _dripping(connection: socket.socket, piece: bytes) -> Iterator[None]:
    """Send a piece again and again, as long as the block and the connection last; the block takes no 5 seconds."""
    began = time.monotonic()
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not stop.wait(0.05):
                connection.sendall(piece)

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
        assert time.monotonic() - began < 5
    finally:
        stop.set()
        thread.join(30)


class TestTime:
    """A request arrives whole in time, or its connection ends."""

    def test_a_connection_that_sends_nothing(self, server: uvicorn.Server) -> None:
        """It is closed like an idle one, without a word."""
        with _connected(server) as connection:
            began = time.monotonic()
            assert b"" == connection.recv(1)
            assert time.monotonic() - began < 5

    @pytest.mark.parametrize(
        ("begun", "piece"),
        [
            (b"G", b""),
            (b"GET /", b"a"),
            (b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
            (b"GET / HTTP/1.1\r\nX: ", b"y"),
            (_POST, b"a"),
            (_CHUNKED, b"1\r\na\r\n"),
            (_CHUNKED + b"1;", b"a"),
            (_CHUNKED + b"0\r\n", b"X: y\r\n"),
        ],
    )
    @pytest.mark.parametrize("before", [b"", _GET])
    def test_a_request_that_comes_slowly(
        self, server: uvicorn.Server, before: bytes, begun: bytes, piece: bytes
    ) -> None:
        """However busily it drips: a head or a body that is not whole in time gets 408, and the connection ends."""
        with _connected(server) as connection:
            if before:
                connection.sendall(before)
                assert 200 == _answer(connection).status
            connection.sendall(begun)
            with _dripping(connection, piece):
                assert (408, "request_timeout") == _refusal(connection)

    @pytest.mark.parametrize("before", [b"", _GET])
    def test_empty_lines_are_no_request(self, server: uvicorn.Server, before: bytes) -> None:
        """The parser skips them; the connection ends all the same."""
        with _connected(server) as connection:
            connection.sendall(before)
            with _dripping(connection, b"\r\n"):
                assert _is_cut(connection)

    def test_a_body_that_comes_after_its_answer(self, server: uvicorn.Server) -> None:
        """Whoever goes on with a body after the answer has a moment to end it."""
        with _connected(server) as connection:
            connection.sendall(_GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 100000\r\n\r\n"))
            assert 200 == _answer(connection).status
            with _dripping(connection, b"a"):
                assert _is_cut(connection)

    def test_a_body_that_ends_after_its_answer(self, server: uvicorn.Server) -> None:
        """Then the connection is as good as new."""
        with _connected(server) as connection:
            connection.sendall(_GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"))
            assert 200 == _answer(connection).status
            connection.sendall(b"123")
            connection.sendall(b"45" + _GET[:5])
            time.sleep(_REQUEST_SECONDS - 0.05)
            connection.sendall(_GET[5:])
            assert 200 == _answer(connection).status

    def test_requests_that_come_in_time(self, server: uvicorn.Server) -> None:
        """A connection may live for long, and each of its requests may take its time."""
        with _connected(server) as connection:
            for _ in range(4):
                for piece in (_GET[:1], _GET[1:20], _GET[20:]):
                    connection.sendall(piece)
                    time.sleep(0.1)
                assert 200 == _answer(connection).status

    def test_a_stream_outlives_every_timer(self, server: uvicorn.Server) -> None:
        """A request that is whole may be answered for ever, also one that comes together with another."""
        with _connected(server) as first, _connected(server) as second, _connected(server) as third:
            first.sendall(_STREAM)
            second.sendall(_GET + _STREAM)
            third.sendall(_GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\n1") + _STREAM)
            began = time.monotonic()
            while time.monotonic() < began + 1.6:
                for connection in (first, second, third):
                    assert b"" != connection.recv(1000)

    def test_a_client_that_does_not_read(self, server: uvicorn.Server) -> None:
        """What a client does not take is thrown away, and its connection with it."""
        before = set(server.server_state.connections)
        with _connected(server) as connection:
            connection.sendall(_BIG * 3)
            wait_until(lambda: bool(server.server_state.connections - before))
            wait_until(lambda: not server.server_state.connections - before, seconds=10)

    def test_a_client_that_reads_late(self, server: uvicorn.Server) -> None:
        """Whoever reads, however late, gets everything."""
        with _connected(server) as connection:
            connection.sendall(_BIG)
            time.sleep(0.4)
            assert _BIG_BYTES == len(_answer(connection).body)


def _head(length: int) -> bytes:
    """Give a request whose head is so long."""
    start = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    rest = length - len(b"/" + b"Host" + b"a" + b"X") - 2 * 4
    return start + b"y" * rest + b"\r\n\r\n"


class TestSize:
    """A request is no larger than it may be."""

    @pytest.mark.parametrize("cuts", [(), (1,), (5000, 10_000), (16_390,)])
    def test_a_head_of_16_kib(self, server: uvicorn.Server, cuts: tuple[int, ...]) -> None:
        """A byte more is too much, in however many pieces it comes."""
        for more, expected in ((0, 200), (1, 431)):
            request = _head(MOST_HEAD + more)
            with _connected(server) as connection:
                for start, end in zip((0, *cuts), (*cuts, len(request)), strict=True):
                    connection.sendall(request[start:end])
                    time.sleep(0.02)
                if expected == 200:
                    assert 200 == _answer(connection).status
                else:
                    assert (431, "headers_too_large") == _refusal(connection)

    @pytest.mark.parametrize(
        ("begun", "status", "code"),
        [
            (b"GET /", 431, "headers_too_large"),
            (b"GET / HTTP/1.1\r\nX: ", 431, "headers_too_large"),
            (b"GET / HTTP/1.1\r\nX", 431, "headers_too_large"),
            (_CHUNKED + b"0\r\nX: ", 413, "payload_too_large"),
            (_CHUNKED + b"1;", 413, "payload_too_large"),
        ],
    )
    def test_what_has_no_end(self, server: uvicorn.Server, begun: bytes, status: int, code: str) -> None:
        """No more of it is read than may be, and the answer arrives while the client is still sending."""
        with _connected(server) as connection:
            threading.Thread(target=_send_all, args=(connection, begun + b"a" * 20_000_000), daemon=True).start()
            assert (status, code) == _refusal(connection)

    def test_nothing_grows_behind_a_stream(self, server: uvicorn.Server) -> None:
        """What comes after a request that is being answered is no way around the bound."""
        before = set(server.server_state.connections)
        with _connected(server) as connection:
            connection.sendall(_STREAM + b"GET /")
            wait_until(lambda: bool(server.server_state.connections - before))
            [protocol] = server.server_state.connections - before
            assert isinstance(protocol, BoundedProtocol)
            for _ in range(10):
                connection.sendall(b"a" * 40_000)
                assert b"" != connection.recv(100_000)
            wait_until(lambda: protocol._deaf)  # noqa: SLF001 - nothing else tells
            assert len(protocol.url) < 300_000
            assert b"" != connection.recv(1000)

    def test_a_large_body_is_read_or_given_up(self, server: uvicorn.Server) -> None:
        """Up to a megabyte in all is left to the application; beyond it is 413."""
        for length, status in ((MOST_MESSAGE - 10_000, 200), (4 * MOST_MESSAGE, 413)):
            head = _POST.replace(b"1000000", b"%d" % length)
            answer = raw_exchange(f"http://127.0.0.1:{server.config.port}", head + b"a" * length)
            assert status == answer.status


class TestRefusals:
    """What is not well formed."""

    def test_it_is_answered_after_what_was_well_formed(self, server: uvicorn.Server) -> None:
        """Garbage behind requests does not take the place of their answers."""
        with _connected(server) as connection:
            connection.sendall(_GET * 3 + b"evil\r\n\r\n")
            stream = connection.makefile("rb")
            text = stream.read()
        assert 3 == text.count(b"HTTP/1.1 200 OK")
        assert 3 == text.count(b"HTTP/1.1 ")

    def test_a_broken_body_is_answered_at_once(self, server: uvicorn.Server) -> None:
        """Whoever reads the body learns that it will not come, and does not answer."""
        with _connected(server) as connection:
            connection.sendall(_CHUNKED + b"evil\r\n")
            assert (400, "bad_request") == _refusal(connection)

    def test_a_broken_body_behind_a_stream(self, server: uvicorn.Server) -> None:
        """An answer that has begun is broken off: no other is put into it."""
        with _connected(server) as connection:
            connection.sendall(_STREAM.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"))
            text = connection.recv(1000)
            connection.sendall(b"evil\r\n")
            while piece := connection.recv(1000):
                text += piece
        assert 1 == text.count(b"HTTP/1.1 ")

    def test_the_log_holds_nothing_of_it(self, server: uvicorn.Server, caplog: pytest.LogCaptureFixture) -> None:
        """A malformed request is a line that says no more than that."""
        mark = secrets.token_hex(8)
        with caplog.at_level(logging.DEBUG), _connected(server) as connection:
            connection.sendall(f"GET /{mark}\r\n{mark}\x00{mark}\r\n\r\n".encode())
            assert (400, "bad_request") == _refusal(connection)
        assert caplog.records
        assert mark not in caplog.text


def test_whole_requests_set_no_timer(server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrives in one piece costs nothing more: the only timer is the server's own, once an answer."""
    before = set(server.server_state.connections)
    calls: list[Callable[..., object]] = []
    with _connected(server) as connection:
        wait_until(lambda: bool(server.server_state.connections - before))
        [protocol] = server.server_state.connections - before
        assert isinstance(protocol, BoundedProtocol)
        loop, call_later = protocol.loop, protocol.loop.call_later

        class Watched:
            def __getattr__(self, name: str) -> object:
                return getattr(loop, name)

            def call_later(self, delay: float, callback: Callable[..., object]) -> asyncio.TimerHandle:
                calls.append(callback)
                return call_later(delay, callback)

        monkeypatch.setattr(protocol, "loop", Watched())
        for _ in range(10):
            connection.sendall(_GET)
            assert 200 == _answer(connection).status
        wait_until(lambda: 10 == len(calls))
    assert {"timeout_keep_alive_handler"} == {getattr(call, "__name__", "") for call in calls}


def test_a_server_whose_insides_differ_takes_its_own_way(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not foreseen costs the bounds, and is told."""
    monkeypatch.setattr(http_bounds, "_USED", ("what no server has",))
    url = f"http://127.0.0.1:{server.config.port}"
    with capture_logs() as lines:
        assert 200 == raw_exchange(url, _head(2 * MOST_HEAD)).status
        assert b"Invalid HTTP request received." == raw_exchange(url, b"evil\r\n\r\n").body
    assert {"http_unbounded"} == {line["event"] for line in lines}


def _send_all(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)
