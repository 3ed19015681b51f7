"""The server's HTTP protocol with the fast lane in it: what happens below ASGI."""

import socket
import threading
from collections.abc import Iterator, Mapping

import pytest

from goodstanding import http_protocol
from goodstanding.data import UserId
from goodstanding.embedded import Postgres, Valkey
from tests.serving import GONE, SINGLE, Backend, bearer, open_backend
from tests.ways import Three, comparable, three_ways


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
    return {
        "gold": backend.user(completed=12),
        "green": backend.user(completed=2, no_shows=1),
        "red": backend.user(no_shows=3),
    }


class TestProtocol:
    """What happens below ASGI."""

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

    def test_a_server_whose_insides_differ_takes_its_own_way(
        self, three: Three, people: dict[str, UserId], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was not foreseen costs speed and nothing else."""
        headers = bearer()
        three.warm(people["gold"], headers)
        expected = comparable(three.get("route", people["gold"], headers))
        monkeypatch.setattr(http_protocol, "_USED", ("what no server has",))
        assert expected == comparable(three.get("protocol", people["gold"], headers))


def _pipelined(url: str, users: list[str], headers: Mapping[str, str]) -> list[bytes]:
    """Send all requests before anything is read; gives the bodies."""
    host, _, port = url.removeprefix("http://").partition(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    requests = b"".join(f"GET {SINGLE.format(user)} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode() for user in users)
    bodies: list[bytes] = []
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        sender = threading.Thread(target=connection.sendall, args=(requests,), daemon=True)
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
