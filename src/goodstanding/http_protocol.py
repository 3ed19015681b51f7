"""uvicorn's HTTP protocol, with the fast lane's hits answered before there is a scope or a message.

Everything else goes the server's own way. So does everything where the server is not the one that this was written for.
Nothing is parsed in here: the bytes of a request, all but whose reputation it asks for, are looked up among those that
the server's parser has been through before.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from goodstanding.fast_lane import LENGTH, LOOK, START, Asked, FastLane, Ready
from goodstanding.http_bounds import MOST_HEAD, BoundedProtocol
from goodstanding.reputation_service import Look

_START: Final = START.encode()
_GET: Final = b"GET " + _START
_USER: Final = slice(len(_GET), len(_GET) + LENGTH - len(_START))
_HEAD: Final = slice(_USER.stop, None)
_END: Final = b"\r\n\r\n"
_USED: Final = (
    *("app", "cycle", "flow", "headers", "loop", "parser", "server_state", "timeout_keep_alive"),
    *("timeout_keep_alive_handler", "timeout_keep_alive_task", "transport"),
)
_SET_LATER: Final = frozenset({"headers", "scope", "url"})
"""These the server gives to a connection when a request begins."""

_ELSEWHERE: Final = frozenset({b"content-length", b"expect", b"transfer-encoding"})


class HotProtocol(BoundedProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the server gives
        super().__init__(*args, **kwargs)
        lane = getattr(self.app, "lane", None)
        named = _names_in(HttpToolsProtocol.on_message_begin)
        known = self._bounded and all(hasattr(self, name) for name in _USED) and named >= _SET_LATER
        self._lane: FastLane | None = lane if known and isinstance(lane, FastLane) else None
        self._answered = False
        self._asked: Asked | None = None
        self._waiting: bytes | None = None
        self._look: Look | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._lines = b""
        self._rested = float("-inf")

    def data_received(self, data: bytes) -> None:
        """Answer a request that is known by its bytes: at once, or after a look into the cache."""
        lane, begun = self._lane, self._begun
        if self._waiting is not None:
            self._held += data
            self._hold()
            return
        if lane is None or begun != self._completed or not data.startswith(_GET):
            super().data_received(data)
            return
        if self._is_idle():
            began = time.perf_counter()
            asked = lane.recognised(data[_HEAD])
            if asked is not None:
                user = data[_USER].decode("latin-1")
                prepared = lane.hit(user, asked)
                if prepared is not None:
                    self._send(lane, prepared, asked, began)
                    self._rest()
                    return
                if lane.look(user, asked, partial(self._looked, lane, asked, began)):
                    self._waiting = data
                    return
        self._asked = None
        super().data_received(data)
        if begun + 1 == self._begun == self._completed and data.endswith(_END):
            # One request, whole and alone.
            self._learn(lane, data)

    def _learn(self, lane: FastLane, data: bytes) -> None:
        if self._asked is not None:
            lane.learn(data[_HEAD], self._asked)

    def _looked(self, lane: FastLane, asked: Asked, began: float, ready: Ready | None, look: Look | None) -> None:
        """Answer what was looked for, or let the application do it with what was seen."""
        data, self._waiting = self._waiting, None
        early, self._held = self._held, bytearray()
        if data is None or self.transport.is_closing():
            return
        if ready is not None and not self._stopping:
            self._send(lane, ready, asked, began)
            self._rest()
        else:
            self._look = look
            self._parse(data)
            self._look = None
        if early:
            self._release()
            self.data_received(bytes(early))
        else:
            self._see_to_the_end()

    def shutdown(self) -> None:
        """Close the connection once what is under way is answered."""
        self._stopping = True
        # The server's own way ends the connection behind its answer.
        self._lane = None
        if self._waiting is None:
            super().shutdown()

    def on_headers_complete(self) -> None:
        """Answer at once what the fast lane remembers."""
        if self._look is not None:
            self.scope[LOOK] = self._look  # type: ignore[typeddict-unknown-key] # an application's own
        elif (lane := self._lane) is not None and len(self.url) == LENGTH and self.url.startswith(_START):
            # A head that may be too large is measured first.
            self._answered = self._parsed <= MOST_HEAD and self._hit(lane)
        if not self._answered:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Go on with the connection's next request."""
        if self._answered:
            self._answered = False
            self._completed += 1
            self.on_response_complete()
        else:
            super().on_message_complete()

    def _is_idle(self) -> bool:
        """Tell whether nothing is under way on this connection, the client reads, and nothing was refused."""
        # The server does not say that there may be none.
        cycle: RequestResponseCycle | None = self.cycle
        return (cycle is None or cycle.response_complete) and not self.flow.write_paused and self._refusal is None

    def _hit(self, lane: FastLane) -> bool:
        began = time.perf_counter()
        parser = self.parser
        if (
            parser.get_method() != b"GET"
            or not self._is_idle()
            or not parser.should_keep_alive()
            or parser.should_upgrade()
            or parser.get_http_version() != "1.1"
        ):
            return False
        self._asked = lane.asked(self.headers, _ELSEWHERE)
        if self._asked is None:
            return False
        prepared = lane.hit(self.url[-36:].decode("latin-1"), self._asked)
        if prepared is None:
            return False
        self._send(lane, prepared, self._asked, began)
        return True

    def _send(self, lane: FastLane, ready: Ready, asked: Asked, began: float) -> None:
        headers = self.server_state.default_headers
        if headers is not self._headers:
            self._headers = headers
            self._lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(
            b"".join((ready.lines, self._lines, b"x-request-id: ", asked.request_id(), _END, ready.body))
        )
        lane.note(ready.seconds, time.perf_counter() - began)

    def _rest(self) -> None:
        """Do what the server does after a response; but its timer is left to run, and looks when it rings."""
        self.server_state.total_requests += 1
        self._rested = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, unless one is waiting for a hit or got one since the timer was set."""
        rested = self.loop.time() if self._waiting is not None else self._rested
        left = rested + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()


def _names_in(method: Callable[..., object]) -> frozenset[str]:
    """Give the names that a method mentions; none where it is not Python."""
    return frozenset(getattr(getattr(method, "__code__", None), "co_names", ()))
