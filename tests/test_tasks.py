"""Tasks beside a block: they never outlive it, and never fail unseen."""

import asyncio
import contextlib

import pytest

from goodstanding.tasks import background, check_cancelled
from tests.parts import SECONDS


async def test_tasks_end_with_their_block() -> None:
    """Leaving the block cancels what still runs and waits until it has ended."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async with background() as spawn:
        tasks = [spawn(work()) for _ in range(3)]
        await asyncio.sleep(0)
    assert [True] * 3 == ended
    assert all(task.cancelled() for task in tasks)


async def test_the_blocks_own_exception_passes_unwrapped() -> None:
    """Whoever uses the block sees its exception, not a group."""

    async def work() -> None:
        await asyncio.Event().wait()

    async def block() -> None:
        async with background() as spawn:
            spawn(work())
            raise KeyError

    with pytest.raises(KeyError):
        await block()


async def test_a_task_that_fails_ends_the_block() -> None:
    """Nothing fails unseen: the block is cancelled and the failure is raised."""

    async def work() -> None:
        raise ValueError

    async def block() -> None:
        async with background() as spawn, asyncio.timeout(SECONDS):
            spawn(work())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        await block()
    assert raised.group_contains(ValueError)


async def test_a_cancelled_block_takes_its_tasks_along() -> None:
    """Cancelling the owner cancels the tasks, and stays a cancellation."""
    ready = asyncio.Event()
    tasks = []

    async def work() -> None:
        ready.set()
        await asyncio.Event().wait()

    async def block() -> None:
        async with background() as spawn:
            tasks.append(spawn(work()))
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        owner = group.create_task(block())
        await ready.wait()
        owner.cancel()
    assert owner.cancelled()
    assert tasks[0].cancelled()


async def test_a_finished_task_leaves_nothing_behind() -> None:
    """A block may start any number of tasks over its life."""
    done = 0

    async def work() -> None:
        nonlocal done
        done += 1

    async with background() as spawn:
        for _ in range(100):
            await spawn(work())
    assert 100 == done


async def test_a_swallowed_cancellation_is_noticed() -> None:
    """A task whose library swallowed its cancellation ends at its next check all the same."""

    async def swallows() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        check_cancelled()
        pytest.fail("the cancellation went unnoticed")

    check_cancelled()
    task = asyncio.get_running_loop().create_task(swallows())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
