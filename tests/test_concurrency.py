"""A task that swallows its cancellation ends all the same."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from proxy.concurrency import cancel_and_wait, in_own_thread, in_stoppable_thread, run_uncancelled


async def test_a_task_that_swallows_one_cancellation_ends_at_the_next() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await cancel_and_wait(task, None)
    assert task.cancelled()


async def test_what_is_begun_comes_to_its_end_whoever_is_cancelled() -> None:
    begun, closing, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def close() -> None:
        begun.set()
        await closing.wait()
        closed.set()

    task = asyncio.create_task(run_uncancelled(close()))
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    closing.set()
    await asyncio.wait({task})
    assert closed.is_set()
    assert task.cancelled()


async def test_work_in_a_thread_gives_its_result_or_raises() -> None:
    assert await in_own_thread(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(lambda: 1 // 0)


async def test_work_in_a_thread_that_nobody_waits_for_ends_at_its_next_step() -> None:
    began, swallowed = threading.Event(), 0

    def work() -> None:
        nonlocal swallowed
        began.set()
        while swallowed < 2:  # as libraries do that catch what they do not know
            try:
                for _ in iter(int, 1):
                    pass
            except BaseException:  # noqa: BLE001
                swallowed += 1
        for _ in iter(int, 1):
            pass

    before = set(threading.enumerate())
    task = asyncio.create_task(in_own_thread(work))
    await asyncio.to_thread(began.wait)
    await cancel_and_wait(task)
    assert (task.cancelled(), swallowed) == (True, 2)
    assert [each for each in set(threading.enumerate()) - before if each.name == "uniroute-loading"] == []


async def test_work_that_looks_whether_it_is_wanted_has_ended_when_its_cancellation_returns() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        began.set()
        stop.wait(30)
        ended.set()

    task = asyncio.create_task(in_stoppable_thread(work))
    await asyncio.to_thread(began.wait)
    await cancel_and_wait(task)
    assert (task.cancelled(), ended.is_set()) == (True, True)
