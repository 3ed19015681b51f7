"""What may happen to a process that serves: how it is broken, and how it is mended."""

import asyncio
import json
import random
import resource
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime, timedelta

import psutil

from goodstanding.tasks import background
from tests.faults.scene import Scene
from tests.live import Line
from tests.parts import eventually

_UNDER_WAY = 2
_FEW = 5
_MANY = 60
_SLOW_SECONDS = 0.1
_IGNORED_SECONDS = 0.3
_HALF_A_DAY = timedelta(hours=12)


@asynccontextmanager
async def terminated(scene: Scene) -> AsyncIterator[None]:
    """End it with SIGTERM in the middle of some answers, as a deployment does, and start it again."""
    first, load, cable = scene.served[0], scene.load, scene.cables["postgres"]
    await cable.slow(_SLOW_SECONDS)
    try:
        await eventually(lambda: sum(one.process == 0 for one in load.under_way) >= _UNDER_WAY)
        first.signal(signal.SIGTERM)
    finally:
        await cable.slow(0.0)
    await eventually(lambda: first.process is None or first.process.poll() is not None)
    try:
        yield
    finally:
        await first.start()


@asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    """Kill it with SIGKILL, and start it again."""
    first = scene.served[0]
    await first.kill()
    try:
        yield
    finally:
        await first.start()


@asynccontextmanager
async def frozen(scene: Scene) -> AsyncIterator[None]:
    """Stop it with SIGSTOP."""
    first = scene.served[0]
    first.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        first.signal(signal.SIGCONT)


@asynccontextmanager
async def clients_vanish(scene: Scene) -> AsyncIterator[None]:
    """Let a hundred clients a second vanish: within their request, after it, or within the answer."""

    async def come_and_go() -> None:
        while True:
            await asyncio.sleep(0.01)
            with suppress(OSError):
                await vanish(scene.rng.choice(scene.served).port, scene.load.request_of_any_kind(), scene.rng)

    async with background() as spawn:
        spawn(come_and_go())
        yield


async def vanish(port: int, request: bytes, rng: random.Random) -> None:
    """Connect, send some of a request or all of it, wait a moment, read perhaps a little, and reset the connection."""
    async with Line.to(port) as line:
        line.writer.write(request[: rng.choice((0, rng.randrange(len(request)), len(request), len(request)))])
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.random() ** 2 * 0.02):
                await line.reader.read(rng.randrange(1, 200))


@asynccontextmanager
async def _clock_moved(
    scene: Scene, processes: Sequence[int], there: signal.Signals, back: signal.Signals
) -> AsyncIterator[None]:
    before = [await _told_at(scene, process) for process in processes]

    async def are_moved() -> bool:
        now = [await _told_at(scene, process) for process in processes]
        return all(abs(moment - was) > _HALF_A_DAY for moment, was in zip(now, before, strict=True))

    for process in processes:
        scene.served[process].signal(there)
    try:
        await eventually(are_moved)
        yield
    finally:
        for process in processes:
            scene.served[process].signal(back)


async def _told_at(scene: Scene, process: int) -> datetime:
    """Tell of when an answer is, that is computed now."""
    async with Line.to(scene.served[process].port) as line:
        _, _, body = await line.ask(scene.load.past_the_cache(scene.load.oracle.people[0]))
    return datetime.fromisoformat(json.loads(body)["cache_timestamp"])


@asynccontextmanager
async def clock_ahead(scene: Scene) -> AsyncIterator[None]:
    """Move the wall clock of both processes a day ahead, and back."""
    async with _clock_moved(scene, (0, 1), signal.SIGUSR1, signal.SIGUSR2):
        yield


@asynccontextmanager
async def clock_back(scene: Scene) -> AsyncIterator[None]:
    """Move the wall clock of both processes a day back, and ahead."""
    async with _clock_moved(scene, (0, 1), signal.SIGUSR2, signal.SIGUSR1):
        yield


@asynccontextmanager
async def clocks_apart(scene: Scene) -> AsyncIterator[None]:
    """Move the wall clock of one process a day ahead and that of the other a day back, and both to where they were."""
    async with (
        _clock_moved(scene, (0,), signal.SIGUSR1, signal.SIGUSR2),
        _clock_moved(scene, (1,), signal.SIGUSR2, signal.SIGUSR1),
    ):
        yield


@asynccontextmanager
async def descriptors_used_up(scene: Scene) -> AsyncIterator[None]:
    """Leave it few file descriptors, and let idle clients take them."""
    process = scene.served[0].process
    assert process is not None
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    few = psutil.Process(process.pid).num_fds() + _FEW
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (few, limits[1]))
    async with AsyncExitStack() as stack:
        for _ in range(_MANY):
            await stack.enter_async_context(Line.to(scene.served[0].port))
        await eventually(lambda: psutil.Process(process.pid).num_fds() >= few - 1)
        try:
            assert await _is_ignored(scene.served[0].port)
            yield
        finally:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)


async def _is_ignored(port: int) -> bool:
    """Tell whether somebody new has no answer, be it that nobody takes the connection."""
    try:
        async with asyncio.timeout(_IGNORED_SECONDS), Line.to(port) as line:
            await line.get("/health/live")
    except OSError:
        return True
    return False
