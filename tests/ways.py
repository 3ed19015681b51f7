"""One application behind three servers: past its fast lane, through it, and through the server's own protocol."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from goodstanding import main
from goodstanding.data import UserId
from goodstanding.fast_lane import Asked, FastLane, Ready
from goodstanding.http_bounds import BoundedProtocol
from goodstanding.http_protocol import HotProtocol
from goodstanding.main import Application, create_app, utc_now
from tests.serving import SINGLE, Backend, RawAnswer, raw_exchange, wait_until

WAYS: Final = ("route", "lane", "protocol", "repeated")
"""`repeated` is the protocol when it has seen the same bytes before, on the same connection."""

_SERVERS: Final = ("route", "lane", "protocol")
_OWN_ID: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class Clock:
    """The wall clock of the service, which stands still unless it is moved on."""

    now: datetime = field(default_factory=utc_now)

    def __call__(self) -> datetime:
        """Give the moment."""
        return self.now

    def seconds(self) -> float:
        """Give it in seconds since 1970."""
        return self.now.timestamp()


@dataclass(slots=True)
class Three:
    """One application under three servers: past its fast lane, through it, and through the server's own protocol."""

    app: Application
    clock: Clock
    urls: Mapping[str, str]
    passed: list[str]
    """The paths that the fast lane left to the application."""
    hits: list[bytes]
    """What the protocol answered by itself."""
    has_memory: bool

    def ask(self, way: str, request: bytes) -> RawAnswer:
        """Send bytes as they are, and read the answer."""
        if way == "repeated":
            return raw_exchange(self.urls["protocol"], request, times=3)
        return raw_exchange(self.urls[way], request)

    def get(self, way: str, user: str, headers: Mapping[str, str], method: str = "GET") -> RawAnswer:
        """Ask for a user."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return self.ask(way, f"{method} {SINGLE.format(user)} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())

    def warm(self, user: str, headers: Mapping[str, str]) -> None:
        """Bring a user into memory, and the caller among those who are known."""
        wait_until(lambda: self._is_hit(user, headers))

    def _is_hit(self, user: str, headers: Mapping[str, str]) -> bool:
        runtime = self.app.lane._runtime()  # noqa: SLF001 - nothing else tells what memory holds
        assert runtime is not None
        answer = self.get("route", user, headers)
        assert 200 == answer.status
        if not self.has_memory:
            return answer.headers["cache-status"].startswith("goodstanding; hit")
        return runtime.service.peek(user) is not None


@contextmanager
def _serving(app: Application, clock: Clock, *, has_memory: bool) -> Iterator[Three]:
    passed: list[str] = []
    inner = app.lane._app  # noqa: SLF001 - where the lane ends

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            passed.append(scope["path"])
        await inner(scope, receive, send)

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    app.lane._app = noted  # noqa: SLF001 - see above
    hits: list[bytes] = []

    class Noted(HotProtocol):
        """The protocol, whose own answers are noted."""

        def _send(self, lane: FastLane, ready: Ready, asked: Asked, began: float) -> None:
            hits.append(ready.body)
            super()._send(lane, ready, asked, began)

    listeners = {way: socket.create_server(("127.0.0.1", 0)) for way in _SERVERS}
    configs = {
        "protocol": uvicorn.Config(app, lifespan="on", http=Noted),
        "lane": uvicorn.Config(app, lifespan="off", http=BoundedProtocol),
        "route": uvicorn.Config(route, lifespan="off", http=BoundedProtocol),
    }
    servers: dict[str, uvicorn.Server] = {}
    for way, config in configs.items():
        config.log_config, config.access_log, config.proxy_headers, config.server_header = None, False, False, False
        config.timeout_graceful_shutdown, config.timeout_keep_alive = 1, 1
        servers[way] = uvicorn.Server(config)

    async def serve() -> None:
        async with asyncio.TaskGroup() as group:
            for way, server in servers.items():
                group.create_task(server.serve(sockets=[listeners[way]]))

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    wait_until(lambda: all(server.started for server in servers.values()) or not thread.is_alive())
    urls = {way: f"http://127.0.0.1:{listener.getsockname()[1]}" for way, listener in listeners.items()}
    try:
        yield Three(app, clock, urls, passed, hits, has_memory)
    finally:
        for server in servers.values():
            server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def three_ways(backend: Backend, **overrides: object) -> Iterator[Three]:
    """Serve an application in the three ways, with a clock of its own."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "utc_now", clock)
        patch.setattr(main, "unix_now", clock.seconds)
        app = create_app(backend.settings(**overrides))
        assert isinstance(app, Application)
        with _serving(app, clock, has_memory=overrides.get("memory_seconds") != 0) as three:
            yield three


def comparable(answer: RawAnswer) -> tuple[int, list[tuple[str, str]], bytes]:
    """Give everything but the date and an id that was drawn."""
    headers = []
    for name, value in answer.headers.items():
        if name == "x-request-id" and _OWN_ID.fullmatch(value):
            headers.append((name, "drawn"))
        elif name != "date":
            headers.append((name, value))
    return answer.status, headers, answer.body


def people_of(backend: Backend) -> dict[str, UserId]:
    """Insert users whose badges differ."""
    return {
        "gold": backend.user(completed=12),
        "green": backend.user(completed=2, no_shows=1),
        "red": backend.user(no_shows=3),
    }
