"""The response that stays open: server-sent events in plain ASGI, since two thousand of them share one event."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from goodstanding.subscribers import Ending, Subscription
from goodstanding.tasks import background

_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_UNACKNOWLEDGED_MS: Final = 30_000


class StreamResponse(Response):
    """A subscription as `text/event-stream`; it closes the subscription, and ends when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, subscription: Subscription) -> None:
        # Not the parent's: it would declare the length of a body.
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what changes, until the subscription ends."""
        with self._subscription as subscription, suppress(TimeoutError):
            async with asyncio.timeout(None) as deadline:
                subscription.drop = _dropping(receive, deadline)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if scope["method"] == "HEAD":
                    await send({"type": "http.response.body", "body": b""})
                    return
                async with background() as spawn:
                    spawn(_watch(receive, subscription))
                    # Not awaited in place: each event would wake every coroutine between the server and here.
                    await spawn(_write(subscription, send))


async def _write(subscription: Subscription, send: Send) -> None:
    with suppress(OSError):  # some servers say so that the client is gone
        while (text := await subscription.written()) is not None:
            subscription.sending()
            await send({"type": "http.response.body", "body": text, "more_body": True})
            subscription.sent()
        subscription.sending()
        await send({"type": "http.response.body", "body": subscription.farewell()})


async def _watch(receive: Receive, subscription: Subscription) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    subscription.end(Ending.GONE)


def _dropping(receive: Receive, deadline: asyncio.Timeout) -> Callable[[], None]:
    """Give what ends a connection whose client does not read.

    A server that is asked to close waits until the client has read everything, and this one never will: only aborting
    the transport frees the socket. ASGI does not name it, but uvicorn's `receive` is a method of what holds it. Behind
    another server, or behind a middleware with a `receive` of its own, the response ends and the server closes.
    """
    transport: asyncio.Transport | None = getattr(getattr(receive, "__self__", None), "transport", None)
    # One whose client has gone while the first values were read takes no limits any more.
    if transport is not None and not transport.is_closing():
        # What the kernel does not take waits here, and nothing is written after it: better the latest values, later.
        transport.set_write_buffer_limits(high=0)
        # A client that vanished without a word, such as a phone in a tunnel, holds its place for no quarter of an hour.
        with suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS
            )

    def drop() -> None:
        if transport is not None:
            transport.abort()
        deadline.reschedule(asyncio.get_running_loop().time())

    return drop


@contextmanager
def before_stopping(call: Callable[[], None]) -> Iterator[None]:
    """Call something when the server is told to stop, before the server itself hears of it.

    A server waits for every response to end before it ends the lifespan, so the lifespan is too late for streams. Only
    handlers that somebody installed are preceded, in the main thread; they are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    ours: dict[signal.Signals, tuple[Any, Any]] = {}

    def preceding(then: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            with suppress(RuntimeError):  # the loop is closed, and somebody kept this handler
                loop.call_soon_threadsafe(call)
            then(number, frame)

        return handle

    for number in (signal.SIGINT, signal.SIGTERM):
        theirs = signal.getsignal(number)
        if callable(theirs):
            ours[number] = preceding(theirs), theirs
            signal.signal(number, ours[number][0])
    try:
        yield
    finally:
        for number, (handler, theirs) in ours.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, theirs)
