"""uvicorn's HTTP protocol, with bounds: how long a request may take to arrive, and how large it may be.

The server itself waits for ever for a connection's first byte and for the end of a request's head, and takes a head of
any size. A request that arrives whole in one piece costs nothing in here: a timer runs only while one is incomplete.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from goodstanding.api import problem
from goodstanding.errors import (
    BadRequestError,
    GoodstandingError,
    HeadersTooLargeError,
    PayloadTooLargeError,
    RequestTimeoutError,
)

MOST_HEAD: Final = 16 * 1024
"""The largest head, in bytes: the request's target, its headers' names and values, and four for each header."""

MOST_MESSAGE: Final = 1 << 20
"""The most of one request that is read at all, in bytes; the largest body is a sixteenth of that."""

_REQUEST_SECONDS: Final = 8.0
_LINGER_SECONDS: Final = 1.0
_STALL_SECONDS: Final = 30.0
_LATE_SECONDS: Final = 0.5
_MOMENT_SECONDS: Final = 0.05
_USED: Final = (
    *("cycle", "headers", "loop", "scope", "server_state", "timeout_keep_alive", "timeout_keep_alive_handler"),
    *("timeout_keep_alive_task", "transport", "send_400_response"),
)

_log = structlog.get_logger("goodstanding")


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It is idle (the server's keep-alive timer runs), a request is arriving, or one is being answered.

    While one is arriving, `_arrival` is the timer that ends that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the server gives
        super().__init__(*args, **kwargs)
        self._bounded = all(hasattr(self, name) for name in _USED)
        if not self._bounded:
            _log.warning("http_unbounded")
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._in_pieces = False
        """Whether the head that is being read may be too large."""
        self._following = 0
        """Bytes of the present request in the pieces after the one in which it began."""
        self._too_large = False
        self._deaf = False
        """Whether whatever else the client sends is thrown away."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Treat a connection that has sent nothing yet as an idle one."""
        super().connection_made(transport)  # type: ignore[arg-type] # a TCP connection's
        if self._bounded:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        self._arrived()
        self._taken()

    def data_received(self, data: bytes) -> None:
        """Read, and see to it that what has begun to arrive comes to an end."""
        if self._deaf:
            return
        message = self.scope
        self._in_pieces = len(data) > MOST_HEAD or self._arrival is not None
        super().data_received(data)
        # The server does not say that there may be none.
        cycle: RequestResponseCycle | None = self.cycle
        if self.scope is not message:
            self._following = 0
            if cycle is not None and not cycle.more_body and self._arrival is None and cycle.scope is self.scope:
                # One that came whole, as nearly all do.
                if self.timeout_keep_alive_task is not None and not cycle.response_complete:
                    # Where requests come together, one of them may rest while the next is being answered.
                    self._unset_keepalive_if_required()
                return
        else:
            self._following += len(data)
        if self._bounded:
            self._see_to_the_end()

    def _see_to_the_end(self) -> None:
        """Let nothing arrive for ever."""
        if self.transport.is_closing() or self._deaf:
            return
        if self._following > MOST_HEAD and self._is_head():
            self._refuse(HeadersTooLargeError())
        elif self._is_whole():
            self._arrived()
            self._unset_keepalive_if_required()
        elif self.timeout_keep_alive_task is not None:
            self._arrived()
        elif self._following > MOST_MESSAGE:
            self._refuse(PayloadTooLargeError())
        elif self._arrival is None or self._following == 0:
            # The rest of a request that is answered already has only a moment.
            rest = self._is_answered() and not self._is_head()
            self._wait(_LINGER_SECONDS if rest else _REQUEST_SECONDS)

    def on_headers_complete(self) -> None:
        """Refuse a head that is too large."""
        if self._in_pieces and self._bounded and len(self.url) + _size(self.headers) > MOST_HEAD:
            # The parser stops at it, and the server answers as if the request were malformed.
            self._too_large = True
            raise HeadersTooLargeError
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """See to it that a connection that is closed behind a response is closed soon."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is None and self._bounded and self.transport.is_closing():
            self._hurry()

    def send_400_response(self, msg: str) -> None:
        """Refuse, in the contract's form, what the parser does not take."""
        if self._bounded:
            self._refuse(HeadersTooLargeError() if self._too_large else BadRequestError())
        else:
            super().send_400_response(msg)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, whether or not the client reads what was sent."""
        if self._rings_late(self.timeout_keep_alive_task):
            self.timeout_keep_alive_task = self.loop.call_later(_MOMENT_SECONDS, self.timeout_keep_alive_handler)
            return
        super().timeout_keep_alive_handler()
        self._hurry()

    def pause_writing(self) -> None:
        """Give a client who does not read a while to do it."""
        super().pause_writing()
        self._hurry()

    def resume_writing(self) -> None:
        """Forget that: the client reads."""
        super().resume_writing()
        self._taken()

    def _is_head(self) -> bool:
        """Tell whether what arrives is a head: what its end brings, the server has not learnt."""
        scope: Any = self.scope
        return scope is None or "method" not in scope

    def _is_answered(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _is_whole(self) -> bool:
        """Tell whether the last request has arrived and is being answered."""
        return not self._is_answered() and not self.cycle.more_body

    def _rings_late(self, timer: asyncio.TimerHandle | None) -> bool:
        """Tell whether a timer rings long after its time: the process was stopped, and has not read what came since."""
        return timer is not None and self.loop.time() - timer.when() > _LATE_SECONDS

    def _arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _overdue(self) -> None:
        """End what did not arrive in time; say so, unless something has been said."""
        if self._rings_late(self._arrival):
            self._wait(_MOMENT_SECONDS)
            return
        self._arrival = None
        if self.timeout_keep_alive_task is not None or self.transport.is_closing():
            return
        if self._deaf or (self._is_answered() and not self._is_head()):
            self._close()
        else:
            self._refuse(RequestTimeoutError())

    def _refuse(self, error: GoodstandingError) -> None:
        """Read no more; answer, and close when the client has had a moment to read that."""
        self._deaf = True
        if self._is_whole():
            # It comes after requests that are well formed: they are answered first.
            self.cycle.keep_alive = False
            return
        if not self._is_answered():
            if self.cycle.response_started or self.pipeline:
                self._close()
                return
            # Whoever reads the body need not wait for it, and the answer is this one.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = problem(error)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"".join((STATUS_LINE[error.status], lines, b"\r\n", bytes(response.body))))
        # Closed with something unread, the connection would be reset, and the answer lost on its way.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._wait(_LINGER_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._arrived()
        self._arrival = self.loop.call_later(seconds, self._overdue)

    def _close(self) -> None:
        self.transport.close()
        self._hurry()

    def _hurry(self) -> None:
        """Break the connection off if the client does not take what was sent to it."""
        if self._stall is None:
            self._stall = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def _taken(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def _size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)
