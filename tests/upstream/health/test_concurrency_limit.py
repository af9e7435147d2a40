from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import ModelAtCapacity
from proxy.server.responses import render_error
from proxy.settings.model_config import ModelInfo
from proxy.upstream import concurrency_limit
from proxy.upstream.concurrency_limit import ConcurrencyLimiter, ConcurrencyLimits
from tests.upstream.health.makers import Clock

ONE = ConcurrencyLimits(max_parallel=1, max_queued=2)
NO_CAP = ConcurrencyLimits()


@dataclass(frozen=True)
class Slot:
    """Hold a slot that was acquired."""

    limiter: ConcurrencyLimiter
    model: str
    acquired_at: float

    def release(self) -> None:
        self.limiter.release(self.model, self.acquired_at)


async def acquired(
    limiter: ConcurrencyLimiter, limits: ConcurrencyLimits, model: str = "small", max_wait_s: float = 5.0
) -> Slot:
    return Slot(limiter, model, await limiter.acquire(model, limits, max_wait_s))


def queued(limiter: ConcurrencyLimiter, limits: ConcurrencyLimits = ONE, max_wait_s: float = 5.0) -> asyncio.Task[Slot]:
    return asyncio.create_task(acquired(limiter, limits, max_wait_s=max_wait_s))


async def settle() -> None:
    """Let everything go on that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def is_idle(limiter: ConcurrencyLimiter) -> bool:
    return all(queue.is_unused for queue in limiter._queues.values())


async def test_beyond_a_bound_models_without_requests_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency_limit, "MAX_REMEMBERED", 3)
    limiter = ConcurrencyLimiter()
    for number in range(10):
        limiter.release(str(number), await limiter.acquire(str(number), ONE))

    assert len(limiter._queues) == 3


async def test_without_a_cap_nobody_waits() -> None:
    limiter = ConcurrencyLimiter()
    slots = [await acquired(limiter, NO_CAP) for _ in range(100)]
    for slot in slots:
        slot.release()
    assert is_idle(limiter)


async def test_a_released_slot_is_the_first_waiters() -> None:
    limiter = ConcurrencyLimiter()
    first_slot = await acquired(limiter, ONE)
    first, second = queued(limiter), queued(limiter)
    await settle()
    assert not first.done()
    first_slot.release()
    await settle()
    assert (first.done(), second.done()) == (True, False)
    (await first).release()
    (await second).release()
    assert is_idle(limiter)


async def test_a_later_request_does_not_overtake_those_that_wait() -> None:
    limiter = ConcurrencyLimiter()
    first_slot = await acquired(limiter, ONE)
    waiting = queued(limiter)
    await settle()
    first_slot.release()
    late = queued(limiter)
    await settle()
    assert (waiting.done(), late.done()) == (True, False)
    (await waiting).release()
    (await late).release()


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry() -> None:
    clock = Clock()
    limiter = ConcurrencyLimiter(clock)
    for _ in range(20):
        slot = await acquired(limiter, ONE)
        clock.now += 8
        slot.release()
    first_slot = await acquired(limiter, ONE)
    waiting = [queued(limiter) for _ in range(2)]
    await settle()
    with pytest.raises(ModelAtCapacity) as caught:
        await acquired(limiter, ONE)
    assert caught.value.retry_after_s == pytest.approx(24.0)
    status, body, headers = render_error(caught.value)
    assert (status, body["error"]["code"], headers) == (429, "model_busy", {"retry-after": "24"})
    first_slot.release()
    for task in waiting:
        (await task).release()
    assert is_idle(limiter)


async def test_without_a_queue_the_second_goes_elsewhere() -> None:
    limiter, limits = ConcurrencyLimiter(), ConcurrencyLimits(max_parallel=1, max_queued=0)
    first_slot = await acquired(limiter, limits)
    with pytest.raises(ModelAtCapacity) as caught:
        await acquired(limiter, limits)
    assert 1.0 <= caught.value.retry_after_s <= 60.0
    first_slot.release()


async def test_the_wait_in_the_queue_ends() -> None:
    limiter, limits = ConcurrencyLimiter(), ONE
    first_slot = await acquired(limiter, limits, max_wait_s=0.05)
    with pytest.raises(ModelAtCapacity):
        await acquired(limiter, limits, max_wait_s=0.05)
    first_slot.release()
    assert is_idle(limiter)


async def test_a_request_that_leaves_the_queue_leaves_nothing_in_it() -> None:
    limiter = ConcurrencyLimiter()
    first_slot = await acquired(limiter, ONE)
    leaving, staying = queued(limiter), queued(limiter)
    await settle()
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    third = queued(limiter)
    await settle()
    first_slot.release()
    (await staying).release()
    (await third).release()
    assert is_idle(limiter)


async def test_a_slot_given_to_a_request_that_is_cancelled_at_that_moment_goes_to_the_next() -> None:
    limiter = ConcurrencyLimiter()
    first_slot = await acquired(limiter, ONE)
    leaving, staying = queued(limiter), queued(limiter)
    await settle()
    first_slot.release()  # the slot is the leaving one's now, though it has not run yet
    leaving.cancel()
    (await asyncio.wait_for(staying, 60)).release()
    assert leaving.cancelled()
    assert is_idle(limiter)


async def test_a_slot_released_while_the_first_waiter_leaves_goes_to_the_next() -> None:
    limiter = ConcurrencyLimiter()
    first_slot = await acquired(limiter, ONE)
    leaving, staying = queued(limiter), queued(limiter)
    await settle()
    leaving.cancel()
    first_slot.release()
    (await asyncio.wait_for(staying, 60)).release()
    assert is_idle(limiter)


async def test_a_raised_cap_lets_in_those_who_wait_and_a_lowered_one_holds_for_the_next() -> None:
    limiter, two = ConcurrencyLimiter(), ConcurrencyLimits(max_parallel=2, max_queued=2)
    first_slot = await acquired(limiter, ONE)
    waiting = queued(limiter)
    await settle()
    third = queued(limiter, two)
    second = await asyncio.wait_for(waiting, 60)
    fourth = queued(limiter, ONE)
    await settle()
    first_slot.release()
    await settle()
    assert not third.done()
    second.release()
    (await third).release()
    (await fourth).release()
    assert is_idle(limiter)


async def test_models_do_not_wait_for_each_other() -> None:
    limiter = ConcurrencyLimiter()
    slots = [await acquired(limiter, ONE, name) for name in ("small", "large")]
    assert len(slots) == 2


async def test_it_tells_who_waits_how_long_and_who_is_turned_away() -> None:
    clock = Clock()
    waits: list[tuple[str, float]] = []
    full: list[str] = []
    limiter = ConcurrencyLimiter(
        clock, on_wait=lambda model, seconds: waits.append((model, seconds)), on_full=full.append
    )
    first = await acquired(limiter, ONE)
    waiting = [queued(limiter), queued(limiter)]
    await settle()
    assert limiter.loads() == {"small": (1, 2)}
    with pytest.raises(ModelAtCapacity):
        await acquired(limiter, ONE)
    clock.now += 2.0
    first.release()
    (await waiting[0]).release()
    (await waiting[1]).release()
    assert (waits, full, limiter.loads()) == ([("small", 2.0), ("small", 2.0)], ["small"], {})


def test_unless_stated_as_many_may_wait_as_may_be_asked() -> None:
    assert ConcurrencyLimits.of(ModelInfo(max_parallel_requests=4)) == ConcurrencyLimits(4, 4)
    assert ConcurrencyLimits.of(ModelInfo(max_parallel_requests=4, max_queued_requests=0)) == ConcurrencyLimits(4, 0)
    assert ConcurrencyLimits.of(ModelInfo()).max_parallel is None


class RandomRequests:
    """Let requests come, wait, leave and end in any order, and check the cap after every step."""

    def __init__(self, limits: ConcurrencyLimits) -> None:
        self.limiter, self.limits = ConcurrencyLimiter(), limits
        self.running = 0
        self.most = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.ending: list[asyncio.Event] = []

    async def request(self, end: asyncio.Event) -> None:
        try:
            slot = await acquired(self.limiter, self.limits, max_wait_s=30)
        except ModelAtCapacity:
            return
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await end.wait()
        finally:
            self.running -= 1
            slot.release()

    async def play(self, steps: Iterable[tuple[str, int]]) -> None:
        for step, number in steps:
            if step == "come":
                self.ending.append(asyncio.Event())
                self.tasks.append(asyncio.create_task(self.request(self.ending[-1])))
            elif step == "run":
                await asyncio.sleep(0)
            elif self.tasks and step == "leave":
                self.tasks[number % len(self.tasks)].cancel()
            elif self.tasks:
                self.ending[number % len(self.tasks)].set()
        for end in self.ending:
            end.set()
        await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), 10)


STEPS = st.lists(st.tuples(st.sampled_from(["come", "come", "run", "run", "leave", "end"]), st.integers(0, 20)))


@settings(deadline=None, max_examples=200)
@given(STEPS, st.integers(1, 3), st.integers(0, 4))
def test_in_any_order_the_cap_holds_and_every_slot_comes_back(
    steps: list[tuple[str, int]], cap: int, waiting: int
) -> None:
    async def play() -> RandomRequests:
        requests = RandomRequests(ConcurrencyLimits(max_parallel=cap, max_queued=waiting))
        await requests.play(steps)
        return requests

    requests = asyncio.run(play())
    assert requests.most <= cap
    assert is_idle(requests.limiter)
