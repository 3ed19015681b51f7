"""A circuit breaker: remembers whether a dependency is worth asking, so that a dead one costs nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from goodstanding.errors import GoodstandingError
from goodstanding.metrics import DEPENDENCY_UP
from goodstanding.tasks import check_cancelled

_log = structlog.get_logger("goodstanding")
FAILURES_TO_OPEN: Final = 3
"""So many failures in a row, without one success between them, open the circuit."""


class Breaker:
    """The circuit of one dependency. Requests only report what happened to them; a probe alone closes it again.

    A caller that goes away reports nothing: cancellation is neutral.
    """

    __slots__ = ("_failures", "_gauge", "closed", "dependency")

    def __init__(self, dependency: str) -> None:
        self.dependency = dependency
        self.closed = True
        self._failures = 0
        self._gauge = DEPENDENCY_UP.labels(dependency)
        self._gauge.set(1)

    def succeeded(self) -> None:
        """Note an answer; it does not close an open circuit, since it may have been under way for long."""
        self._failures = 0

    def failed(self) -> None:
        """Note a failure; the third in a row opens the circuit."""
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN:
            self.open()

    def open(self) -> None:
        """Stop asking, at once: the dependency itself said that it cannot serve."""
        if self.closed:
            self.closed = False
            self._gauge.set(0)
            _log.warning("dependency_away", dependency=self.dependency)

    def close(self) -> None:
        """Ask again."""
        self._failures = 0
        if not self.closed:
            self.closed = True
            self._gauge.set(1)
            _log.info("dependency_back", dependency=self.dependency)


async def watch(
    breaker: Breaker, probe: Callable[[], Awaitable[None]], *, every: float, while_closed: bool = False
) -> None:
    """Probe a dependency every `every` seconds, one probe at a time, until cancelled: a good probe closes its circuit.

    `while_closed` probes a closed circuit too, and the third bad probe in a row opens it: for what no request would
    notice, and without taking one late answer of a busy machine for an outage.
    `probe` bounds itself in time and raises GoodstandingError when the dependency is away.
    """
    failures = 0
    while True:
        check_cancelled()
        await asyncio.sleep(every)
        if breaker.closed and not while_closed:
            continue
        try:
            await probe()
        except Exception as error:  # noqa: BLE001 - whatever ails a dependency, its watch outlives it
            if not isinstance(error, GoodstandingError):
                _log.exception("probe_failed", dependency=breaker.dependency)
            failures += 1
            if while_closed and failures >= FAILURES_TO_OPEN:
                breaker.open()
        else:
            failures = 0
            breaker.close()
