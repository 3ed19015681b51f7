"""The server's HTTP protocol with the fast lane in it: what happens below ASGI."""

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

import pytest

from goodstanding import http_bounds, http_protocol
from goodstanding.data import UserId
from goodstanding.embedded import Postgres, Valkey
from goodstanding.fast_lane import Asked, FastLane
from tests.serving import GONE, SINGLE, Backend, RawAnswer, bearer, open_backend, wait_until
from tests.ways import Three, comparable, people_of, three_ways


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def three(backend: Backend) -> Iterator[Three]:
    """Give the service as it is."""
    with three_ways(backend) as opened:
        yield opened


@pytest.fixture(scope="module")
def people(backend: Backend) -> dict[str, UserId]:
    """Give users whose badges differ."""
    return people_of(backend)


class TestProtocol:
    """What happens below ASGI."""

    def test_a_hit_never_becomes_a_scope(self, three: Three, people: dict[str, UserId]) -> None:
        """Not even when its bytes were never seen before."""
        headers = bearer() | {"Accept": "application/json", "Cookie": "never=seen"}
        three.warm(people["gold"], headers)
        three.hits.clear()
        assert [three.get("protocol", people["gold"], headers).body] == three.hits

    def test_pipelined_requests_are_answered_in_order(self, three: Three, people: dict[str, UserId]) -> None:
        """Hits among others do not overtake them."""
        headers = bearer()
        for user in people.values():
            three.warm(user, headers)
        order = [people["gold"], GONE, people["red"], people["green"], GONE, people["gold"]] * 5
        texts = _pipelined(three.urls["protocol"], order, headers)
        alone = {user: three.get("protocol", user, headers).body for user in order}
        assert [alone[UserId(user)] for user in order] == texts

    def test_a_client_that_does_not_read_fills_no_memory(self, three: Three, people: dict[str, UserId]) -> None:
        """Ten thousand pipelined requests of one who reads later are all answered."""
        headers = bearer()
        three.warm(people["gold"], headers)
        body = three.get("protocol", people["gold"], headers).body
        texts = _pipelined(three.urls["protocol"], [people["gold"]] * 10_000, headers)
        assert 10_000 == len(texts)
        assert {body} == set(texts)

    def test_what_comes_during_a_look_waits(
        self, three: Three, people: dict[str, UserId], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No more of it is read than one piece, and all is answered in order."""
        headers = bearer()
        three.warm(people["gold"], headers)
        three.get("repeated", people["gold"], headers)
        order = [GONE, *[people["gold"]] * 4000]
        alone = {user: three.get("protocol", user, headers).body for user in set(order)}
        looks: list[Any] = []
        with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:

            def look(_lane: FastLane, _user: str, _asked: Asked, tell: object) -> bool:
                looks.append(tell)
                return True

            patch.setattr(FastLane, "look", look)
            texts = pool.submit(_pipelined, three.urls["protocol"], order, headers, apart=True)
            wait_until(lambda: bool(looks))
            [tell] = looks
            protocol = tell.func.__self__
            wait_until(lambda: len(protocol._held) > 1000)  # noqa: SLF001 - nothing else tells
            patch.undo()
            assert not protocol.transport.is_reading()
            assert len(protocol._held) < 300_000  # noqa: SLF001 - nothing else tells
            protocol.loop.call_soon_threadsafe(tell, None, None)
            assert [alone[user] for user in order] == texts.result(60)

    def test_a_request_that_begins_together_with_a_hit(
        self, three: Three, people: dict[str, UserId], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its time counts from its first byte, and the connection is not idle meanwhile."""
        monkeypatch.setattr(http_bounds, "_REQUEST_SECONDS", 0.3)
        headers = bearer()
        three.warm(people["gold"], headers)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {SINGLE.format(people['gold'])} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode()
        with _connected(three.urls["protocol"]) as connection, connection.makefile("rb") as stream:
            connection.sendall(request + b"G")
            text = stream.read()
        assert [b"200", b"408"] == re.findall(rb"HTTP/1.1 (\d+)", text)

    def test_a_request_that_is_known_may_come_in_pieces(self, three: Three, people: dict[str, UserId]) -> None:
        """Its bytes are only looked up whole; whatever comes in pieces is parsed."""
        headers = bearer()
        three.warm(people["gold"], headers)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {SINGLE.format(people['gold'])} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode()
        expected = comparable(three.ask("repeated", request))
        with _connected(three.urls["protocol"]) as connection:
            for cut in (0, 10, 60, 61, 70, len(request) - 4, len(request) - 1, 0):
                connection.sendall(request[:cut])
                time.sleep(0.01)
                connection.sendall(request[cut:])
                answer = HTTPResponse(connection)
                answer.begin()
                body = answer.read()
                assert expected == comparable(
                    RawAnswer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)
                )

    def test_an_idle_connection_is_closed_after_the_last_answer(self, three: Three, people: dict[str, UserId]) -> None:
        """The server's timer runs from the last hit, not from the first."""
        headers = bearer()
        three.warm(people["gold"], headers)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {SINGLE.format(people['gold'])} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode()
        with _connected(three.urls["protocol"]) as connection:
            for _ in range(8):
                connection.sendall(request)
                assert connection.recv(10_000).startswith(b"HTTP/1.1 200 OK")
                time.sleep(0.2)
            began = time.monotonic()
            assert b"" == connection.recv(10_000)
            assert 0.5 < time.monotonic() - began < 5

    def test_a_server_whose_insides_differ_takes_its_own_way(
        self, three: Three, people: dict[str, UserId], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was not foreseen costs speed and nothing else."""
        headers = bearer()
        three.warm(people["gold"], headers)
        expected = comparable(three.get("route", people["gold"], headers))
        monkeypatch.setattr(http_protocol, "_USED", ("what no server has",))
        assert expected == comparable(three.get("protocol", people["gold"], headers))


@contextmanager
def _connected(url: str) -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def _pipelined(url: str, users: list[str], headers: Mapping[str, str], *, apart: bool = False) -> list[bytes]:
    """Send all requests before anything is read, the first `apart` from the others if need be; gives the bodies."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    requests = [f"GET {SINGLE.format(user)} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode() for user in users]
    bodies: list[bytes] = []
    with _connected(url) as connection:
        if apart:
            connection.sendall(requests.pop(0))
            time.sleep(0.1)
        sender = threading.Thread(target=connection.sendall, args=(b"".join(requests),), daemon=True)
        sender.start()
        stream = connection.makefile("rb")
        for _ in users:
            length = 0
            stream.readline()
            while (line := stream.readline().strip().lower()) != b"":
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            bodies.append(stream.read(length))
        sender.join(30)
    return bodies
