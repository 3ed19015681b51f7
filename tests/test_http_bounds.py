"""How long a request may take to arrive at `goodstanding serve`, how large it may be, and how many may wait."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from typing import Final

import pytest
import uvicorn
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from goodstanding import api, http_bounds
from goodstanding.http_bounds import MOST_HEAD, MOST_MESSAGE, BoundedProtocol
from tests.serving import RawAnswer, raw_exchange, wait_until

_GET: Final = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
_POST: Final = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
_CHUNKED: Final = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
_STREAM: Final = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
_BIG: Final = b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n"
_SLOW: Final = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
_WATCH: Final = b"GET /watch HTTP/1.1\r\nHost: a\r\n\r\n"
_LEAST: Final = b"GET / HTTP/1.1\r\n\r\n"
_UPGRADE: Final = b"Connection: upgrade\r\nUpgrade: h2c\r\n"
_STATUS: Final = re.compile(rb"HTTP/1.1 (\d+)")
_REQUEST_SECONDS: Final = 0.6
_PATIENCE: Final = (http_bounds._REQUEST_SECONDS + http_bounds._LINGER_SECONDS, api._BODY_SECONDS)  # noqa: SLF001 - told to nobody
"""As `serve` has it: the tests here have less."""
_BIG_BYTES: Final = 8 << 20


async def _application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a GET at once, anything else when it has been read, `/stream` never to its end.

    `/slow` is answered, and its body read, when it may be; `/watch` only looks whether its client is there.
    """
    length = _BIG_BYTES if scope["path"] == "/big" else 2
    if scope["path"] == "/watch":
        while (await receive())["type"] != "http.disconnect":
            pass
        _GONE.set()
        return
    if scope["path"] == "/slow":
        if scope["method"] == "GET":
            # Whoever asks for a body makes the server read on.
            await receive()
        while not _MAY_ANSWER.acquire(blocking=False):  # noqa: ASYNC110 - another thread releases it
            await asyncio.sleep(0.01)
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
_MAY_ANSWER: Final = threading.Semaphore(0)
_GONE: Final = threading.Event()


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    """Serve an application on loopback, with little patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_bounds, "_REQUEST_SECONDS", _REQUEST_SECONDS)
        patch.setattr(http_bounds, "_LINGER_SECONDS", 0.2)
        patch.setattr(http_bounds, "_STALL_SECONDS", 0.6)
        with _serving() as running:
            _STREAMING.set()
            yield running
            _STREAMING.clear()


@pytest.fixture
def slow() -> Iterator[threading.Semaphore]:
    """Give what lets one that is slow be answered."""
    yield _MAY_ANSWER
    while _MAY_ANSWER.acquire(blocking=False):
        pass


@contextmanager
def _serving() -> Iterator[uvicorn.Server]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        running = uvicorn.Server(
            uvicorn.Config(
                _application,
                lifespan="off",
                log_config=None,
                http=BoundedProtocol,
                timeout_keep_alive=1,
                timeout_graceful_shutdown=4,
            )
        )
        running.config.port = listener.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: running.started)
        yield running
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def _connected(server: uvicorn.Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.config.port), timeout=30) as connection:
        yield connection


@contextmanager
def _observed(server: uvicorn.Server) -> Iterator[tuple[socket.socket, BoundedProtocol]]:
    """Connect; gives both ends."""
    before = set(server.server_state.connections)
    with _connected(server) as connection:
        wait_until(lambda: bool(server.server_state.connections - before))
        [protocol] = server.server_state.connections - before
        assert isinstance(protocol, BoundedProtocol)
        yield connection, protocol


def _end(server: uvicorn.Server, protocol: BoundedProtocol) -> None:
    """Tell the server to end, and wait until a connection knows."""
    server.should_exit = True
    wait_until(lambda: protocol._stopping)  # noqa: SLF001 - nothing else tells


def _read(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    with connection.makefile("rb") as stream:
        return stream.read()


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


def test_a_slow_request_ends_within_ten_seconds() -> None:
    """What is tested here with less patience ends in time with as much as `serve` has."""
    assert all(5 <= seconds < 10 for seconds in _PATIENCE)


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

    def test_a_body_that_is_too_large_comes_after_its_answer(self, server: uvicorn.Server) -> None:
        """It is given up, and not answered twice: the client would take that for the answer to another request."""
        with _connected(server) as connection:
            connection.sendall(_GET.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % (4 * MOST_MESSAGE)))
            assert 200 == _answer(connection).status
            threading.Thread(target=_send_all, args=(connection, b"a" * 4 * MOST_MESSAGE), daemon=True).start()
            assert b"" == connection.recv(1)

    @pytest.mark.parametrize("begun", [_GET[:1], _GET[:-1], _POST])
    def test_a_request_that_begins_together_with_another(
        self, server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch, begun: bytes
    ) -> None:
        """Its time counts from its first byte, and the connection is not idle when the other is answered."""
        with _observed(server) as (connection, protocol):
            monkeypatch.setattr(protocol, "timeout_keep_alive", 0.1)
            connection.sendall(_GET + begun)
            assert 200 == _answer(connection).status
            assert (408, "request_timeout") == _refusal(connection)

    @pytest.mark.parametrize("begun", [_GET[:1], _POST])
    def test_a_request_that_begins_behind_a_slow_one(
        self, server: uvicorn.Server, slow: threading.Semaphore, begun: bytes
    ) -> None:
        """It has no more time than any other, and is refused when the one before it is answered."""
        with _observed(server) as (connection, protocol):
            connection.sendall(_SLOW + begun)
            wait_until(lambda: protocol._refusal is not None)  # noqa: SLF001 - nothing else tells
            slow.release()
            text = _read(connection)
        assert [b"200", b"408"] == _STATUS.findall(text)

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

    def test_a_client_that_does_not_read_and_hangs_up(self, server: uvicorn.Server) -> None:
        """Its connection is closed behind what it does not take, and does not wait for that."""
        with _observed(server) as (connection, protocol):
            _limit_buffer(protocol, 2 * _BIG_BYTES)
            connection.sendall(_BIG + b"GET /")
            wait_until(lambda: protocol.transport.get_write_buffer_size() > 0)
            connection.shutdown(socket.SHUT_WR)
            wait_until(lambda: protocol not in server.server_state.connections, seconds=10)

    def test_a_client_that_reads_a_little(self, server: uvicorn.Server) -> None:
        """Where the connection is to be closed, some of what was sent does not do."""
        with _observed(server) as (connection, protocol):
            _limit_buffer(protocol, _BIG_BYTES + (2 << 20), _BIG_BYTES + (1 << 20))
            connection.sendall(_BIG + _BIG.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            wait_until(protocol.transport.is_closing)
            while protocol.flow.write_paused:
                connection.recv(1 << 16)
            wait_until(lambda: protocol not in server.server_state.connections, seconds=10)

    def test_a_client_that_goes_away_with_requests_waiting(self, server: uvicorn.Server) -> None:
        """Whoever answers the first of them learns of it."""
        _GONE.clear()
        with _observed(server) as (connection, protocol):
            connection.sendall(_WATCH + _GET)
            wait_until(lambda: bool(protocol.pipeline))
        wait_until(_GONE.is_set)

    def test_a_client_that_reads_late(self, server: uvicorn.Server) -> None:
        """Whoever reads, however late, gets everything."""
        with _connected(server) as connection:
            connection.sendall(_BIG)
            time.sleep(0.4)
            assert _BIG_BYTES == len(_answer(connection).body)


def _limit_buffer(protocol: BoundedProtocol, high: int, low: int | None = None) -> None:
    """Let so much be written to a client who does not read before the protocol hears of it, and of its end."""
    done = threading.Event()

    def limit() -> None:
        protocol.transport.set_write_buffer_limits(high, low)
        done.set()

    protocol.loop.call_soon_threadsafe(limit)
    assert done.wait(30)


class TestNumber:
    """Requests behind one that is being answered."""

    def test_few_are_prepared(self, server: uvicorn.Server, slow: threading.Semaphore) -> None:
        """The rest waits as bytes, of which one piece is read, for however long; all are answered in the end."""
        count = 20_000
        with _observed(server) as (connection, protocol):
            sender = threading.Thread(target=connection.sendall, args=(_SLOW + _LEAST * count,), daemon=True)
            sender.start()
            wait_until(lambda: len(protocol._held) > 10_000)  # noqa: SLF001 - nothing else tells
            time.sleep(max(_REQUEST_SECONDS, server.config.timeout_keep_alive) + 0.1)
            most, rest = 0, count + 1
            slow.release()
            with connection.makefile("rb") as stream:
                while rest:
                    most = max(most, len(protocol.pipeline))
                    assert len(protocol._held) < 300_000  # noqa: SLF001 - nothing else tells
                    assert b"HTTP/1.1 200 OK\r\n" == stream.readline()
                    while stream.readline() != b"\r\n":
                        pass
                    assert b".." == stream.read(2)
                    rest -= 1
            assert 50 < most < 150
            sender.join(30)

    def test_a_body_that_nobody_reads(self, server: uvicorn.Server, slow: threading.Semaphore) -> None:
        """Nothing more of it is read, also where it waited behind another; whoever reads late gets it whole."""
        body = b"a" * (MOST_MESSAGE - 10_000)
        head = b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        with _observed(server) as (connection, protocol):
            sender = threading.Thread(target=connection.sendall, args=(_SLOW + head + body,), daemon=True)
            sender.start()
            wait_until(lambda: protocol.flow.held)
            slow.release()
            assert 200 == _answer(connection).status
            wait_until(lambda: protocol.flow.read_paused and not protocol.flow.held)
            time.sleep(0.1)
            assert not protocol.transport.is_reading()
            assert len(protocol.cycle.body) < 400_000
            slow.release()
            assert 200 == _answer(connection).status
            sender.join(30)

    def test_what_was_read_is_answered_before_the_server_stops(self, slow: threading.Semaphore) -> None:
        """Also what was not parsed yet."""
        with _serving() as server, _observed(server) as (connection, protocol):
            connection.sendall(_SLOW + _GET * 500)
            wait_until(lambda: len(protocol._held) > 10_000)  # noqa: SLF001 - nothing else tells
            _end(server, protocol)
            slow.release()
            text = _read(connection)
        assert 501 == text.count(b"HTTP/1.1 200 OK")

    def test_an_idle_connection_lives_on_for_one_more_request(self) -> None:
        """It is answered, says that it is the last, and the connection ends; also where it comes in pieces."""
        for pieces in ((_GET,), (_GET[:10], _GET[10:])):
            with _serving() as server, _observed(server) as (connection, protocol):
                connection.sendall(_GET)
                assert 200 == _answer(connection).status
                _end(server, protocol)
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.05)
                text = _read(connection)
            assert text.startswith(b"HTTP/1.1 200 OK")
            assert b"\r\nconnection: close\r\n" in text

    def test_a_connection_that_stays_idle_is_closed_without_a_word(self) -> None:
        """New, or used before."""
        for requests in (0, 1):
            with _serving() as server, _observed(server) as (connection, protocol):
                for _ in range(requests):
                    connection.sendall(_GET)
                    assert 200 == _answer(connection).status
                _end(server, protocol)
                assert not _read(connection)

    def test_a_request_that_does_not_go_on_is_refused_before_the_server_stops(self) -> None:
        """It has a second, and not the eight that it has on other days."""
        with _serving() as server, _observed(server) as (connection, protocol):
            connection.sendall(_GET[:10])
            wait_until(lambda: protocol._arrival is not None)  # noqa: SLF001 - nothing else tells
            server.should_exit = True
            assert _read(connection).startswith(b"HTTP/1.1 408 ")


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
        with _observed(server) as (connection, protocol):
            connection.sendall(_STREAM + b"GET /")
            for _ in range(10):
                connection.sendall(b"a" * 40_000)
                assert b"" != connection.recv(100_000)
            wait_until(lambda: protocol._refusal is not None)  # noqa: SLF001 - nothing else tells
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
        """Garbage behind requests does not take the place of their answers, nor does what follows it lose them."""
        with _connected(server) as connection:
            connection.sendall(_GET * 3 + b"evil\r\n\r\n")
            connection.sendall(b"evil" * 1000)
            text = _read(connection)
        assert [b"200"] * 3 + [b"400"] == _STATUS.findall(text)

    def test_a_request_that_waits_is_refused_alone(self, server: uvicorn.Server, slow: threading.Semaphore) -> None:
        """A body that breaks behind others takes nothing from them."""
        with _observed(server) as (connection, protocol):
            connection.sendall(_SLOW + _GET + _CHUNKED + b"evil\r\n")
            wait_until(lambda: protocol._refusal is not None)  # noqa: SLF001 - nothing else tells
            slow.release()
            text = _read(connection)
        assert [b"200", b"200", b"400"] == _STATUS.findall(text)

    def test_an_upgrade_is_not_taken_up(self, server: uvicorn.Server) -> None:
        """What follows is HTTP as before, in whatever pieces it comes."""
        upgrade = _GET.replace(b"\r\n\r\n", b"\r\n" + _UPGRADE + b"Content-Length: 0\r\n\r\n")
        requests = upgrade * 40 + _GET + _GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        for cut in (0, len(upgrade) * 40 + 9, len(requests) - 3):
            with _connected(server) as connection:
                connection.sendall(requests[:cut])
                connection.sendall(requests[cut:])
                assert 42 == _read(connection).count(b"HTTP/1.1 200 OK")

    @pytest.mark.parametrize("framing", [b"Content-Length: %d" % len(_GET), b"Transfer-Encoding: chunked"])
    def test_an_upgrade_with_a_body(self, server: uvicorn.Server, framing: bytes) -> None:
        """The parser does not read that: it is refused, and its body is not taken for another request."""
        head = b"POST / HTTP/1.1\r\nHost: a\r\n" + _UPGRADE + framing + b"\r\n\r\n"
        for pieces in ((head + _GET,), (head, _GET)):
            with _connected(server) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                assert (400, "bad_request") == _refusal(connection)

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

    @pytest.mark.parametrize(
        ("request_", "code"),
        [
            (b"GET /\x00\r\n\r\n", "bad_request"),
            (_CHUNKED.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n") + b"evil", "bad_request"),
            (_CHUNKED.replace(b"\r\n\r\n", b"\r\n" + _UPGRADE + b"\r\n"), "bad_request"),
            (b"GET /" + b"a" * 30_000, "headers_too_large"),
            (_POST, "request_timeout"),
        ],
    )
    def test_it_is_counted_and_not_logged(
        self, server: uvicorn.Server, caplog: pytest.LogCaptureFixture, request_: bytes, code: str
    ) -> None:
        """Whoever sends nothing but that fills no log."""

        def refused() -> float:
            return REGISTRY.get_sample_value("goodstanding_http_refused_total", {"code": code}) or 0.0

        before = refused()
        with caplog.at_level(logging.DEBUG), capture_logs() as lines, _connected(server) as connection:
            connection.sendall(request_)
            assert code == _refusal(connection)[1]
        assert before + 1 == refused()
        assert [] == caplog.records
        assert [] == lines


def test_whole_requests_set_no_timer(server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrives in one piece costs nothing more: the only timer is the server's own, once an answer."""
    calls: list[Callable[..., object]] = []
    with _observed(server) as (connection, protocol):
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
