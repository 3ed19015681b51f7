"""What may happen to Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faults.scene import Scene


@asynccontextmanager
async def nothing(_scene: Scene) -> AsyncIterator[None]:
    """Break nothing."""
    yield


@asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    """Kill it with SIGKILL; it comes back empty."""
    await scene.do(scene.valkey.kill)
    try:
        yield
    finally:
        await scene.do(scene.valkey.start)


@asynccontextmanager
async def frozen(scene: Scene) -> AsyncIterator[None]:
    """Stop it with SIGSTOP: it keeps its connections and answers nothing."""
    await scene.do(scene.valkey.pause)
    try:
        yield
    finally:
        await scene.do(scene.valkey.resume)
