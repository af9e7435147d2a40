from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import httpx

POLL_S = 0.01
MAX_WAIT_S = 120.0


def wait_until(happened: Any, timeout_s: float = MAX_WAIT_S) -> bool:
    """Poll `happened()` until it is true or the time is up, and return which."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(POLL_S)
    return bool(happened())


def wait_patiently_for_answers() -> None:
    """Give httpx, which gives up after 5 s where a call states nothing, as long as other waits."""
    default: httpx.Timeout = inspect.signature(httpx.request).parameters["timeout"].default
    default.connect = default.read = default.write = default.pool = MAX_WAIT_S


def until_taken(send: Callable[[], httpx.Response]) -> httpx.Response:
    """Send an administrator's change until the store takes it in time, which it may not do on a busy machine."""
    deadline = time.monotonic() + MAX_WAIT_S
    while (reply := send()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert reply.is_success, reply.text
    return reply


async def until(happened: Callable[[], Any], timeout_s: float = MAX_WAIT_S) -> None:
    """Return once `happened()` is true; fail the test when it never is."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(POLL_S)
