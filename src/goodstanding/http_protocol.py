"""uvicorn's HTTP protocol, with the fast lane's hits answered before there is a task, a scope or a message.

Everything else goes the server's own way. So does everything where the server is not the one that this was written for.
"""

import time
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from goodstanding.fast_lane import LENGTH, START, FastLane, Visitor

_START: Final = START.encode()
_USED: Final = ("app", "cycle", "flow", "headers", "parser", "pipeline", "server_state", "transport", "url")
_ELSEWHERE: Final = frozenset({b"content-length", b"expect", b"transfer-encoding"})


class HotProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the server gives
        super().__init__(*args, **kwargs)
        self._lane: FastLane | None = None
        self._looked = False
        self._visitor: Visitor | None = None
        self._answered = False

    def on_headers_complete(self) -> None:
        """Answer at once what the fast lane remembers."""
        if not self._looked:
            self._look()
        lane = self._lane
        if lane is None or len(self.url) != LENGTH or not self.url.startswith(_START) or not self._hit(lane):
            super().on_headers_complete()

    def _look(self) -> None:
        """See in the first request whether there is a fast lane, and all that is used of the server."""
        self._looked = True
        lane = getattr(self.app, "lane", None)
        if isinstance(lane, FastLane) and all(hasattr(self, name) for name in _USED):
            self._lane = lane

    def _hit(self, lane: FastLane) -> bool:
        began = time.perf_counter()
        # The server does not say that there may be none.
        cycle: RequestResponseCycle | None = self.cycle
        if (
            self.parser.get_method() != b"GET"
            or (cycle is not None and not cycle.response_complete)
            or self.flow.write_paused
            or not self.parser.should_keep_alive()
            or self.parser.should_upgrade()
            or self.parser.get_http_version() != "1.1"
        ):
            return False
        hit = lane.hit(self.url[-36:].decode("ascii", "replace"), self.headers, self._visitor, _ELSEWHERE)
        if hit is None:
            return False
        prepared, asked = hit
        self._visitor = asked.visitor
        lines = [STATUS_LINE[prepared.status]]
        for name, value in self.server_state.default_headers:
            lines += (name, b": ", value, b"\r\n")
        lines += (prepared.lines, b"x-request-id: ", asked.request_id, b"\r\n\r\n", prepared.body)
        self.transport.write(b"".join(lines))
        lane.observe("GET", prepared.status, "cache", time.perf_counter() - began)
        self._answered = True
        return True

    def on_message_complete(self) -> None:
        """Go on with the connection's next request."""
        if self._answered:
            self._answered = False
            self.on_response_complete()
        else:
            super().on_message_complete()
