"""Tasks that run beside a block of code and never outlive it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

Spawn = Callable[[Coroutine[object, object, None]], "asyncio.Task[None]"]
"""Starts a coroutine as a task whose owner is the block that gave this function."""


@asynccontextmanager
async def background() -> AsyncIterator[Spawn]:
    """Give a function that starts tasks; they are cancelled when the block ends, and waited for.

    The block's own exception passes unwrapped. A task that fails by itself ends the block: nothing fails unseen.
    """
    failure: Exception | None = None
    running: set[asyncio.Task[None]] = set()

    async with asyncio.TaskGroup() as group:

        def spawn(work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
            task = group.create_task(work)
            running.add(task)
            task.add_done_callback(running.discard)
            return task

        try:
            yield spawn
        except Exception as error:  # noqa: BLE001 - raised again below, outside the group, which would wrap it
            failure = error
        finally:
            for task in tuple(running):
                task.cancel()
    if failure is not None:
        raise failure


def check_cancelled() -> None:
    """Raise CancelledError when the current task has been cancelled; for endless tasks that call other libraries.

    Before Python 3.12 asyncio.wait_for, and so redis-py, may swallow a cancellation (python/cpython#86296).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
