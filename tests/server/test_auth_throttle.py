"""A flood of refusals is slowed down, and a few are not. With a clock that is looked at, not waited for."""

from __future__ import annotations

import asyncio

import pytest

from proxy.server import auth as brake
from proxy.server.auth import FREE_PER_S, MAX_WAITING, AuthFailureThrottle


async def held(braking: AuthFailureThrottle, count: int) -> int:
    """How many of so many refusals at once are not answered at once."""
    tasks = [asyncio.create_task(braking.hold()) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    waiting = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return waiting


async def test_a_few_refusals_are_told_at_once() -> None:
    assert await held(AuthFailureThrottle(lambda: 7.0), FREE_PER_S) == 0


async def test_a_flood_waits_and_no_more_wait_than_connections_can_be_spared() -> None:
    braking = AuthFailureThrottle(lambda: 7.0)
    assert await held(braking, FREE_PER_S + 5) == 5
    assert await held(braking, MAX_WAITING + 100) == MAX_WAITING
    assert await held(braking, 3) == 3  # whoever left waits no longer


async def test_the_next_second_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brake, "FREE_PER_S", 1)
    now = 7.0
    braking = AuthFailureThrottle(lambda: now)
    assert await held(braking, 2) == 1
    now = 8.0
    assert await held(braking, 1) == 0
