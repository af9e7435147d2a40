from __future__ import annotations

import asyncio

import pytest

from proxy.server import auth
from proxy.server.auth import MAX_DELAYED, MAX_UNDELAYED_PER_S, AuthFailureThrottle


async def delayed(throttle: AuthFailureThrottle, count: int) -> int:
    """Return how many of `count` failures at once have to wait."""
    tasks = [asyncio.create_task(throttle.delay()) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    waiting = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return waiting


async def test_a_few_failures_are_answered_at_once() -> None:
    assert await delayed(AuthFailureThrottle(lambda: 7.0), MAX_UNDELAYED_PER_S) == 0


async def test_a_flood_is_delayed_up_to_as_many_as_connections_can_be_spared() -> None:
    throttle = AuthFailureThrottle(lambda: 7.0)
    assert await delayed(throttle, MAX_UNDELAYED_PER_S + 5) == 5
    assert await delayed(throttle, MAX_DELAYED + 100) == MAX_DELAYED
    assert await delayed(throttle, 3) == 3  # those before have left and no longer count


async def test_the_next_second_counts_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_UNDELAYED_PER_S", 1)
    now = 7.0
    throttle = AuthFailureThrottle(lambda: now)
    assert await delayed(throttle, 2) == 1
    now = 8.0
    assert await delayed(throttle, 1) == 0
