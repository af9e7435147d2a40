from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import uvloop

from proxy.concurrency import (
    LRU,
    BackgroundTasks,
    DeadlineWheel,
    FairQueue,
    SilenceTimer,
    StallTolerantTimer,
    await_cancellable,
    background,
    cancel_and_wait,
    child_process,
    in_own_thread,
    in_stoppable_thread,
    run_uncancelled,
)


async def test_a_task_that_swallows_one_cancellation_ends_at_the_next() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await cancel_and_wait(task, None)
    assert task.cancelled()


async def test_uncancelled_work_is_completed_when_its_caller_is_cancelled() -> None:
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


async def test_a_cancellation_that_a_library_swallows_is_raised_all_the_same() -> None:
    async def swallow(outcome: Exception | None) -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if outcome is not None:
                raise outcome from None
        return "as if nothing had happened"

    for outcome in (None, ValueError("it went wrong")):
        working = asyncio.create_task(await_cancellable(swallow(outcome)))
        await asyncio.sleep(0)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working


async def test_what_a_library_returns_and_raises_is_passed_on() -> None:
    async def fail() -> None:
        raise ValueError("it went wrong")

    assert await await_cancellable(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ValueError, match="it went wrong"):
        await await_cancellable(fail())


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.5])
async def test_a_child_process_has_ended_however_often_its_owner_is_cancelled(after_s: float) -> None:
    children: list[asyncio.subprocess.Process] = []

    async def own() -> None:
        pipe = asyncio.subprocess.PIPE
        async with child_process("sleep", "60", stdin=pipe, stdout=pipe) as child:
            children.append(child)
            await asyncio.Event().wait()

    owner = asyncio.create_task(own())
    await asyncio.sleep(after_s)
    while not owner.done():
        owner.cancel()
        await asyncio.sleep(0)

    assert owner.cancelled()
    assert [child.returncode for child in children] == [-signal.SIGKILL] * len(children)
    gc.collect()  # what was left open would warn here, and a warning is an error


async def test_a_child_process_that_cannot_be_started_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        async with child_process("/no/such/program"):
            raise AssertionError("nothing was started")


async def test_work_in_a_thread_gives_its_result_or_raises() -> None:
    assert await in_own_thread(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(lambda: 1 // 0)


async def test_abandoned_work_in_a_thread_ends_at_its_next_step() -> None:
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


async def test_what_abandoned_work_left_open_is_closed_without_a_report() -> None:
    """The exception may come where nothing closes a file, as just before a `with` is entered."""
    began = threading.Event()

    def work() -> None:
        left_open = Path(__file__).open()  # noqa: SIM115
        began.set()
        while not left_open.closed:
            pass

    task = asyncio.create_task(in_own_thread(work))
    await asyncio.to_thread(began.wait)
    await cancel_and_wait(task)

    assert task.cancelled()
    gc.collect()  # a report would be an error here


async def test_stoppable_work_has_ended_when_its_cancellation_returns() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        began.set()
        stop.wait(30)
        ended.set()

    task = asyncio.create_task(in_stoppable_thread(work))
    await asyncio.to_thread(began.wait)
    await cancel_and_wait(task)
    assert (task.cancelled(), ended.is_set()) == (True, True)


async def test_a_loop_that_fails_is_logged_by_its_name_and_started_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.concurrency.RESTART_INTERVAL_S", 0.0)
    runs, third = 0, asyncio.Event()

    async def loop() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ValueError(f"run {runs}")
        third.set()
        await asyncio.Event().wait()

    async with background("uniroute-test", loop):
        await third.wait()
    assert [record.message for record in caplog.records] == ["background task uniroute-test failed"] * 2
    assert "run 1" in caplog.text
    assert [task for task in asyncio.all_tasks() if task.get_name() == "uniroute-test"] == []


async def test_a_loop_that_returns_is_over_and_one_without_restart_fails_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs: list[str] = []

    async def once() -> None:
        runs.append("once")

    async def failing() -> None:
        runs.append("failing")
        raise ValueError

    tasks = BackgroundTasks()
    tasks.start("uniroute-once", once)
    tasks.start("uniroute-failing", failing, restart=False)
    await asyncio.wait(list(tasks._tasks))
    assert sorted(runs) == ["failing", "once"]
    assert len(caplog.records) == 1


async def test_background_tasks_are_over_when_their_owner_is_closed_and_can_be_started_again() -> None:
    ended = 0

    async def loop() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1

    tasks = BackgroundTasks()
    for _ in range(2):
        tasks.start("uniroute-one", loop)
        tasks.start("uniroute-two", loop)
        await asyncio.sleep(0)
        await tasks.close()
    assert ended == 4


async def test_slots_are_given_in_the_order_in_which_callers_came() -> None:
    queue, admitted = FairQueue(1), []

    async def caller(name: str) -> None:
        await queue.acquire()
        admitted.append(name)

    assert queue.acquire_nowait()
    waiting = [asyncio.create_task(caller(name)) for name in "abc"]
    await asyncio.sleep(0)
    assert (queue.waiting, queue.acquire_nowait()) == (3, False)
    for _ in range(3):
        queue.release()
        assert not queue.acquire_nowait()  # the slot is the next caller's, though that one has not run yet
        await asyncio.sleep(0)
    assert admitted == ["a", "b", "c"]
    queue.release()
    assert (queue.taken, queue.waiting) == (0, 0)
    await asyncio.gather(*waiting)


async def test_a_cancelled_caller_takes_no_slot_and_passes_on_one_that_it_was_just_given() -> None:
    queue = FairQueue(1)
    await queue.acquire()
    leaving, given, last = (asyncio.create_task(queue.acquire()) for _ in range(3))
    await asyncio.sleep(0)
    await cancel_and_wait(leaving)
    assert queue.waiting == 2
    queue.release()
    given.cancel()  # before it could run with its slot
    await asyncio.wait({given, last})
    assert (given.cancelled(), last.cancelled(), queue.taken, queue.waiting) == (True, False, 1, 0)


async def test_a_raised_limit_admits_as_many_as_fit_and_no_limit_admits_all() -> None:
    queue = FairQueue(1)
    await queue.acquire()
    waiting = [asyncio.create_task(queue.acquire()) for _ in range(4)]
    await asyncio.sleep(0)
    queue.limit = 3
    queue.admit()
    assert (queue.taken, queue.waiting) == (3, 2)
    queue.limit = None
    queue.admit()
    assert (queue.taken, queue.waiting) == (5, 0)
    await asyncio.gather(*waiting)


async def test_a_wait_that_takes_too_long_is_ended_and_others_are_not() -> None:
    wheel = DeadlineWheel(0.01)

    async def wait(seconds: float) -> str:
        try:
            with wheel.within(seconds):
                await asyncio.sleep(0.2)
        except TimeoutError:
            return "late"
        return "in time"

    assert [*await asyncio.gather(*map(wait, (0.0, 0.03, 60, 0.05)))] == ["late", "late", "in time", "late"]
    assert wheel._due == {}
    assert await wait(0.02) == "late"


async def test_a_wait_is_never_ended_early() -> None:
    wheel, loop = DeadlineWheel(0.01), asyncio.get_running_loop()
    for seconds in (0.004, 0.011, 0.03):
        started = loop.time()
        with pytest.raises(TimeoutError), wheel.within(seconds):
            await asyncio.Event().wait()
        assert loop.time() - started >= seconds - 0.001  # the loop counts milliseconds


async def test_a_stall_of_this_process_counts_as_one_slice() -> None:
    loop, struck = asyncio.get_running_loop(), asyncio.Event()
    StallTolerantTimer(0.05, 0.01, struck.set)
    time.sleep(0.1)  # noqa: ASYNC251
    stalled_until = loop.time()
    await struck.wait()
    assert loop.time() - stalled_until >= 0.035  # four slices, of which the loop may take a millisecond each


async def test_a_timer_that_is_cancelled_does_not_call_back() -> None:
    struck = asyncio.Event()
    for waited_s in (0.0, 0.015):
        timer = StallTolerantTimer(0.03, 0.01, struck.set)
        await asyncio.sleep(waited_s)
        timer.cancel()
    await asyncio.sleep(0.05)
    assert not struck.is_set()


class CountedWheel(DeadlineWheel):
    ticks = 0

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self.ticks += 1
        super()._tick(loop)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_one_timer_a_tick_serves_all_waits_that_are_limited(run: Callable[[Any], float]) -> None:
    wheel = CountedWheel(0.05)

    async def wait(place: int) -> None:
        await asyncio.sleep(place / 1000)
        with pytest.raises(TimeoutError), wheel.within(place / 1000):
            await asyncio.Event().wait()

    async def wait_many() -> float:
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*map(wait, range(-20, 120)))
        return asyncio.get_running_loop().time() - started

    seconds = run(wait_many())

    assert 1 <= wheel.ticks <= seconds / 0.05 + 2
    assert wheel._due == {}


async def test_a_cancellation_is_not_taken_for_the_end_of_the_time() -> None:
    wheel = DeadlineWheel(0.01)

    async def wait() -> None:
        with wheel.within(60):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert wheel._due == {}


async def test_a_cancellation_together_with_the_end_of_the_time_counts() -> None:
    wheel = DeadlineWheel(0.01)

    async def wait() -> None:
        with wheel.within(0.01):
            try:
                await asyncio.Event().wait()
            finally:
                task.cancel()

    task = asyncio.create_task(wait())
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_at_the_end_of_the_time_is_raised_and_leaves_no_cancellation() -> None:
    wheel = DeadlineWheel(0.01)

    async def fail() -> None:
        with wheel.within(0.01):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("of its own") from None

    with pytest.raises(ValueError, match="of its own"):
        await fail()
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


def test_the_least_recently_used_entry_is_dropped() -> None:
    cache: LRU[str, int] = LRU(2)
    cache["a"] = 1
    cache["b"] = 2
    assert cache.get("a") == 1  # a use
    cache["c"] = 3
    assert (list(cache), cache.get("b"), len(cache)) == (["a", "c"], None, 2)
    cache["a"] = 4  # so is a write
    cache["d"] = 5
    assert (list(cache), cache.get("a")) == (["a", "d"], 4)
    del cache["a"]
    assert list(cache) == ["d"]


async def strikes(timer: SilenceTimer, struck: asyncio.Event) -> float:
    """Return how many seconds after its start the timer strikes."""
    started = monotonic()
    timer.start()
    async with asyncio.timeout(60):
        await struck.wait()
    return monotonic() - started


@pytest.mark.parametrize(("seconds", "latest_s"), [(0.05, 60), (60, 0.05)])
async def test_a_silence_is_told_once_it_has_lasted(seconds: float, latest_s: float) -> None:
    wheel, struck = DeadlineWheel(0.01), asyncio.Event()
    timer = SilenceTimer(wheel, seconds, struck.set, latest=monotonic() + latest_s)

    assert await strikes(timer, struck) >= 0.05
    assert wheel._due == {}


async def test_a_silence_begins_with_the_last_that_happened() -> None:
    wheel, struck = DeadlineWheel(0.01), asyncio.Event()
    timer = SilenceTimer(wheel, 0.1, struck.set)
    waiting = asyncio.create_task(strikes(timer, struck))
    for _ in range(5):
        await asyncio.sleep(0.04)
        timer.since = last = monotonic()
    await waiting

    assert monotonic() - last >= 0.1


async def test_a_timer_that_was_stopped_tells_nothing_until_it_is_started_again() -> None:
    wheel, struck = DeadlineWheel(0.01), asyncio.Event()
    timer = SilenceTimer(wheel, 0.02, struck.set)
    timer.start()
    timer.stop()
    await asyncio.sleep(0.06)
    assert (struck.is_set(), wheel._due) == (False, {})
    await strikes(timer, struck)


async def test_a_limit_that_fails_holds_up_no_other() -> None:
    wheel, struck = DeadlineWheel(0.01), asyncio.Event()
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

    def fail() -> None:
        raise ValueError("of its own")

    SilenceTimer(wheel, 0.0, fail).start()
    await strikes(SilenceTimer(wheel, 0.05, struck.set), struck)

    assert [str(error) for error in reported] == ["of its own"]
