"""What a job may still spend. Money is set aside before a prompt is asked, so that the total never exceeds the cap."""

from __future__ import annotations

import asyncio
import math


class Budget:
    """`max_usd` None: no cap. Used on one event loop."""

    def __init__(self, max_usd: float | None, spent_usd: float = 0.0) -> None:
        self._left = math.inf if max_usd is None else max_usd - spent_usd
        self._in_flight = 0
        self._settled = asyncio.Condition()

    async def set_aside(self, usd: float) -> bool:
        """Wait while answers on their way may still give money back; False once it can never suffice."""
        async with self._settled:
            while usd > self._left and self._in_flight:
                await self._settled.wait()
            if usd > self._left:
                return False
            self._left -= usd
            self._in_flight += 1
            return True

    async def add(self, usd: float) -> bool:
        """More for a prompt that has something set aside. Never waits: two that wait for each other wait for ever."""
        async with self._settled:
            enough = usd <= self._left
            if enough:
                self._left -= usd
            return enough

    async def settle(self, set_aside: float, spent: float) -> None:
        """Give back what was not spent."""
        async with self._settled:
            self._left += set_aside - spent
            self._in_flight -= 1
            self._settled.notify_all()
