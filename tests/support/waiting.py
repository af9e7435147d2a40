from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

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


async def until(happened: Callable[[], Any], timeout_s: float = MAX_WAIT_S) -> None:
    """Return once `happened()` is true; fail the test when it never is."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(POLL_S)
