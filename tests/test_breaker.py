"""The circuit breaker: what opens a circuit, and that only a probe closes it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from goodstanding.breaker import FAILURES_TO_OPEN, Breaker, watch
from goodstanding.errors import TemporarilyUnavailableError
from goodstanding.tasks import background
from tests.parts import eventually, metric


@pytest.fixture
def breaker() -> Breaker:
    """Give a closed circuit."""
    return Breaker("something")


def _is_closed(breaker: Breaker) -> bool:
    return breaker.closed  # through a call, for a type checker takes an attribute to stay what it was


def _up() -> float:
    return metric("goodstanding_dependency_up", dependency="something")


def test_three_failures_in_a_row_open_the_circuit(breaker: Breaker) -> None:
    """Two failures are bad luck, three are a state."""
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed()
    assert _is_closed(breaker)
    assert 1 == _up()
    breaker.failed()
    assert not _is_closed(breaker)
    assert 0 == _up()


def test_a_success_between_failures_keeps_it_closed(breaker: Breaker) -> None:
    """Only failures without a success between them count."""
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert _is_closed(breaker)


def test_an_answer_does_not_close_an_open_circuit(breaker: Breaker) -> None:
    """An answer that was under way when the circuit opened says nothing about now."""
    breaker.open()
    breaker.succeeded()
    assert not _is_closed(breaker)


def test_closing_forgets_the_failures_before(breaker: Breaker) -> None:
    """After it is back, a dependency may fail twice again."""
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed()
    breaker.close()
    breaker.failed()
    breaker.failed()
    assert _is_closed(breaker)
    assert 1 == _up()


@asynccontextmanager
async def _watched(
    breaker: Breaker, probe: Callable[[], Awaitable[None]], *, while_closed: bool = False
) -> AsyncIterator["asyncio.Task[None]"]:
    async with background() as spawn:
        yield spawn(watch(breaker, probe, every=0.001, while_closed=while_closed))


async def test_a_good_probe_closes_an_open_circuit(breaker: Breaker) -> None:
    """The first probe that succeeds brings the dependency back."""
    answers = [TemporarilyUnavailableError(), TemporarilyUnavailableError(), None]

    async def probe() -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    breaker.open()
    async with _watched(breaker, probe):
        await eventually(lambda: breaker.closed)
    assert [] == answers


async def test_a_closed_circuit_is_probed_only_on_request(breaker: Breaker) -> None:
    """With `while_closed`, three bad probes in a row open what no request noticed; without, nobody probes."""
    was_closed = []

    async def probe() -> None:
        was_closed.append(breaker.closed)
        raise TemporarilyUnavailableError

    async with _watched(breaker, probe, while_closed=True):
        await eventually(lambda: len(was_closed) > FAILURES_TO_OPEN)
    assert [*[True] * FAILURES_TO_OPEN, False] == was_closed[: FAILURES_TO_OPEN + 1]
    breaker.close()
    was_closed.clear()
    turns = 0

    def many_turns() -> bool:
        nonlocal turns
        turns += 1
        return turns > 20

    async with _watched(breaker, probe):
        await eventually(many_turns)
    assert [] == was_closed
    assert _is_closed(breaker)


async def test_a_bad_probe_leaves_an_open_circuit_open(breaker: Breaker) -> None:
    """A dependency that is still away stays away."""
    probes = 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        raise TemporarilyUnavailableError

    breaker.open()
    async with _watched(breaker, probe):
        await eventually(lambda: probes >= 3)
    assert not _is_closed(breaker)


async def test_the_watch_outlives_an_error_that_nobody_foresaw(breaker: Breaker) -> None:
    """A client library that raises what it should not counts as a bad probe, and ends nothing."""
    answers: list[Exception | None] = [RuntimeError("the transport is closed")] * FAILURES_TO_OPEN

    async def probe() -> None:
        error = answers.pop(0) if answers else None
        if error is not None:
            raise error

    async with _watched(breaker, probe, while_closed=True) as task:
        await eventually(lambda: not breaker.closed)
        await eventually(lambda: breaker.closed)
        assert not task.done()


async def test_one_probe_at_a_time(breaker: Breaker) -> None:
    """A probe that hangs is not followed by another, and cancelling it is neutral."""
    running, most = 0, 0

    async def probe() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.Event().wait()
        finally:
            running -= 1

    breaker.open()
    async with _watched(breaker, probe):
        await eventually(lambda: running == 1)
    assert 1 == most
    assert 0 == running
    assert not _is_closed(breaker)
