"""uvicorn's HTTP protocol, with bounds: how long a request may take to arrive, how large it may be, how many may wait.

The server itself waits for ever for a connection's first byte and for the end of a request's head, takes a head of any
size, and prepares as many requests as a client sends behind one that is being answered. A request that arrives whole in
one piece costs nothing in here: a timer runs only while one is incomplete.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import httptools
import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from goodstanding.api import problem
from goodstanding.errors import (
    BadRequestError,
    GoodstandingError,
    HeadersTooLargeError,
    PayloadTooLargeError,
    RequestTimeoutError,
)
from goodstanding.metrics import REQUESTS_REFUSED

MOST_HEAD: Final = 16 * 1024
"""The largest head, in bytes: the request's target, its headers' names and values, and four for each header."""

MOST_MESSAGE: Final = 1 << 20
"""The most of one request that is read at all, in bytes; the largest body is a sixteenth of that."""

_PIECE: Final = 2048
"""How much is parsed at once, in bytes: some hundred of the smallest requests."""

_REQUEST_SECONDS: Final = 8.0
_LINGER_SECONDS: Final = 1.0
_STALL_SECONDS: Final = 30.0
_LAST_SECONDS: Final = 1.0
"""How long a request may still take to arrive once the server ends."""
_LATE_SECONDS: Final = 0.5
_MOMENT_SECONDS: Final = 0.05
_USED: Final = (
    *("cycle", "flow", "headers", "loop", "parser", "pipeline", "scope", "server_state", "timeout_keep_alive"),
    *("timeout_keep_alive_task", "transport"),
)
_METHODS: Final = (
    *("_should_upgrade", "_start_asgi_task", "_unset_keepalive_if_required", "on_response_complete"),
    "timeout_keep_alive_handler",
)
_log = structlog.get_logger("goodstanding")


class _Flow(FlowControl):
    """The server's, with one more reason not to read: what was read is not parsed yet."""

    held = False

    def resume_reading(self) -> None:
        """Read on, unless something is held."""
        if self.held:
            self.read_paused = False
        else:
            super().resume_reading()


class _Trailers(list[tuple[bytes, bytes]]):
    """Where the parser's headers go when the head is complete: nowhere, for whoever reads a request trusts its head."""

    def append(self, _header: tuple[bytes, bytes], /) -> None:
        """Forget it."""


_TRAILERS: Final = _Trailers()


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It is idle (the server's keep-alive timer runs), a request is arriving, or one is being answered.

    While one is arriving, `_arrival` is the timer that ends that. While one waits for those before it to be answered,
    nothing is parsed and nothing is read: the rest is held as bytes, one piece of what was read at most.
    """

    flow: _Flow

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the server gives
        super().__init__(*args, **kwargs)
        self._bounded = all(hasattr(self, name) for name in _USED) and all(
            hasattr(HttpToolsProtocol, name) for name in _METHODS
        )
        if not self._bounded:
            _log.warning("http_unbounded")
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._begun = 0
        """Requests of which a byte was parsed; one is arriving as long as fewer are completed."""
        self._completed = 0
        self._timed = 0
        """The request that the timer is for, as counted by `_begun`."""
        self._parsed = 0
        """Bytes of the present request, and of those before it in the piece in which it began."""
        self._held = bytearray()
        self._running: RequestResponseCycle | None = None
        """The request that is being answered, or was last; the server knows the last that was parsed."""
        self._too_large = False
        self._refusal: GoodstandingError | None = None
        """Why whatever else the client sends is thrown away."""
        self._stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Treat a connection that has sent nothing yet as an idle one."""
        super().connection_made(transport)  # type: ignore[arg-type] # a TCP connection's
        if self._bounded:
            self.flow = _Flow(self.transport)
            self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and tell whoever answers that nobody listens."""
        super().connection_lost(exc)
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self._arrived()
        self._taken()
        self._held.clear()
        if self._bounded:
            self._unset_keepalive_if_required()
            self.pipeline.clear()

    def eof_received(self) -> None:
        """Close, as the server does; and soon, whether or not the client reads."""
        super().eof_received()
        self._hurry()

    def data_received(self, data: bytes) -> None:
        """Read, and see to it that what has begun to arrive comes to an end."""
        if self._refusal is not None:
            return
        if not self._bounded:
            super().data_received(data)
            return
        if len(data) <= _PIECE and not self._held and not self.pipeline:
            self._parse(data)
        else:
            self._held += data
            self._go_on()
        self._see_to_the_end()

    def shutdown(self) -> None:
        """Close the connection once everything that was read is answered, and what is on its way.

        Whoever has sent a request, or half of one, could not know of the end: an idle connection lives on for a moment,
        and the next request over it is answered, and is the last.
        """
        self._stopping = True
        if self._held:
            return
        if not self._bounded or self._refusal is not None or not self._is_answered():
            super().shutdown()
        elif self._begun != self._completed:
            self._wait(_LAST_SECONDS)
        else:
            self._arrival = self.loop.call_later(_LAST_SECONDS, self._close)

    def _go_on(self) -> None:
        """Parse what is held, in pieces, until a request waits."""
        held, self._held = self._held, bytearray()
        while held and not self.pipeline and self._refusal is None:
            piece = bytes(held[:_PIECE])
            del held[:_PIECE]
            self._parse(piece)
        if self._refusal is None:
            self._held = held

    def _parse(self, data: bytes) -> None:
        begun = self._begun
        self._parsed = len(data) if begun == self._completed else self._parsed + len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # It is not taken up, so what follows is HTTP (RFC 9110, 7.8). But a body the parser does not take for one.
            if _names_body(self.scope["headers"]):
                self.cycle.more_body = True
                self._refuse(BadRequestError())
            else:
                self._parse(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(HeadersTooLargeError() if self._too_large else BadRequestError())
            return
        if self._begun != begun:
            self._parsed = len(data)
        if self._parsed > MOST_HEAD and self._begun != self._completed:
            if self._parsed > MOST_HEAD + 2 * _PIECE and self._is_head():
                self._refuse(HeadersTooLargeError())
            elif self._parsed > MOST_MESSAGE:
                self._refuse(PayloadTooLargeError())

    def _see_to_the_end(self) -> None:
        """Let nothing arrive for ever, and read nothing while something is held."""
        if self._refusal is not None or self.transport.is_closing():
            return
        arriving = self._begun != self._completed
        if arriving or not self._is_answered():
            self._unset_keepalive_if_required()
        elif self.timeout_keep_alive_task is None:
            self._rest()
        if self._held:
            self._hold()
            # What is not read is not late.
            self._arrived()
            return
        if self.flow.held:
            self._release()
        if not arriving:
            self._arrived()
        elif self._timed != self._begun:
            self._timed = self._begun
            self._wait(_LAST_SECONDS if self._stopping else _REQUEST_SECONDS)
        if self._stopping and not self._is_answered():
            super().shutdown()

    def _hold(self) -> None:
        self.flow.held = True
        self.transport.pause_reading()

    def _release(self) -> None:
        self.flow.held = False
        # The server may have a reason of its own, such as a body that nobody reads.
        if not self.flow.read_paused:
            self.transport.resume_reading()

    def on_message_begin(self) -> None:
        """Count what was begun."""
        self._begun += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Refuse a head that is too large."""
        if self._parsed > MOST_HEAD and len(self.url) + _size(self.headers) > MOST_HEAD:
            # The parser stops at it, and says that the request is malformed.
            self._too_large = True
            raise HeadersTooLargeError
        super().on_headers_complete()
        self.headers = _TRAILERS

    def on_message_complete(self) -> None:
        """Count what was completed."""
        self._completed += 1
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with what is held; see to it that a connection that is closed behind a response is closed soon."""
        super().on_response_complete()
        if not self._bounded:
            return
        if self.timeout_keep_alive_task is None:
            if self.transport.is_closing():
                self._hurry()
            elif self._held:
                self._go_on()
                self._see_to_the_end()
        elif self._refusal is not None:
            self._unset_keepalive_if_required()
            self._end(self._refusal)
        elif self._begun != self._completed:
            # The connection is not idle.
            self._unset_keepalive_if_required()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401 - as the server has it
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _should_upgrade(self) -> bool:
        """Tell that no connection becomes a WebSocket: the application has none, and it would be out of bounds."""
        return False

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
        """Forget that: the client reads. Where the connection is being closed, it has to read everything."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._taken()

    def _is_head(self) -> bool:
        """Tell whether what arrives is a head, so that there is nothing yet that could be answered."""
        # The server does not say that there may be none.
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.scope is not self.scope

    def _is_answered(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _rings_late(self, timer: asyncio.TimerHandle | None) -> bool:
        """Tell whether a timer rings long after its time: the process was stopped, and has not read what came since."""
        return timer is not None and self.loop.time() - timer.when() > _LATE_SECONDS

    def _rest(self) -> None:
        """Begin to be idle."""
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _arrived(self) -> None:
        self._timed = 0
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _overdue(self) -> None:
        """End what did not arrive in time; say so, unless something has been said."""
        if self._rings_late(self._arrival):
            self._wait(_MOMENT_SECONDS)
            return
        self._arrival = None
        if self.transport.is_closing():
            return
        if self._refusal is not None:
            self._close()
        else:
            self._refuse(RequestTimeoutError())

    def _refuse(self, error: GoodstandingError) -> None:
        """Parse no more; answer when everything before is answered."""
        REQUESTS_REFUSED.labels(error.code).inc()
        self._refusal = error
        self._arrived()
        # Closed with something unread, the connection would be reset, and the answers lost on their way.
        self._release()
        self.flow.resume_reading()
        if self.pipeline and self.cycle.more_body:
            # What is refused waits among others.
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running  # type: ignore[assignment] # there is
        if not self._is_answered():
            if not self.cycle.more_body:
                return
            if self.cycle.response_started:
                self._close()
                return
            # Whoever reads the body need not wait for it, and the answer is this one.
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        self._end(error)

    def _end(self, error: GoodstandingError) -> None:
        """Say why, and close when the client has had a moment to read that."""
        # To a request that was answered before it ended, nothing more is to be said.
        if self._is_head() or not self._is_answered():
            response = problem(error)
            headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
            lines = b"".join(b"%s: %s\r\n" % header for header in headers)
            self.transport.write(b"".join((STATUS_LINE[error.status], lines, b"\r\n", bytes(response.body))))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._wait(_LINGER_SECONDS)

    def _wait(self, seconds: float) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
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


def _names_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b" \t0")) for name, value in headers
    )


def _size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)
