from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from tests.chaos.outcomes import Span, error_problem
from tests.chaos.world import World, unused_address
from tests.support.proxy_process import model_entry as entry_of
from tests.support.proxy_process import uniform_profile

NAME = "bystander"
PAUSE_S = 0.5
SETTLED_S = 10.0
_DROPPED = "dropped"


@dataclass
class Administrator:
    """Change the price of one model that has room for no prompt, so that no request is ever routed to it."""

    world: World
    rng: Random
    answers: Counter[str] = field(default_factory=Counter)
    """By call and status."""
    problems: list[str] = field(default_factory=list)
    dropped: list[Span] = field(default_factory=list)
    """When a call was made that got no answer."""
    longest_s: float = 0.0
    possible: set[float] = field(default_factory=set)
    """Input prices that may be in force: the last acknowledged one, and those since whose call had no clear end."""

    async def run(self, until: float) -> None:
        changes = (self._put_price, self._put_price, self._change, self._list)
        while time.monotonic() < until:
            await asyncio.sleep(PAUSE_S)
            await (self.rng.choice(changes) if self.possible else self._add)()

    async def check(self) -> None:
        """Check after the run that every worker knows of every change within seconds."""
        deadline = time.monotonic() + SETTLED_S
        found = await self._price()
        while found not in self.possible and time.monotonic() < deadline:
            await asyncio.sleep(PAUSE_S)
            found = await self._price()
        if found not in self.possible:
            self.problems.append(f"the price of {NAME} is {found}, not one of {sorted(self.possible)}")

    async def _price(self) -> float | None:
        reply = await self._call("GET", f"/admin/models/{NAME}", kind="read")
        if reply is None or reply.status_code != 200:
            return None
        return float(reply.json()["price"]["input_cost_per_token"])

    async def _add(self) -> None:
        price = 1e-6
        body = {**entry_of(NAME, unused_address(), price=price, max_input_tokens=1), "profile": uniform_profile(0.01)}
        reply = await self._call("POST", "/admin/models", body, kind="add")
        if reply is not None and reply.status_code in (201, 409):
            self.possible = {price}

    async def _put_price(self) -> None:
        price = self.rng.randint(1, 1000) / 1e9
        body = {"input_cost_per_token": price, "output_cost_per_token": price}
        reply = await self._call("PUT", f"/admin/models/{NAME}/pricing", body, kind="price")
        if reply is not None and reply.status_code == 200:
            self.possible = {price}
        else:
            self.possible.add(price)

    async def _change(self) -> None:
        body = {"model_info": {"max_output_tokens": self.rng.randint(1000, 9000)}}
        await self._call("PATCH", f"/admin/models/{NAME}", body, kind="change")

    async def _list(self) -> None:
        await self._call("GET", "/admin/models", kind="list")

    async def _call(self, method: str, path: str, body: Any = None, *, kind: str) -> httpx.Response | None:
        started = time.monotonic()
        try:
            reply = await asyncio.to_thread(self.world.admin, method, path, body)
        except httpx.HTTPError:
            self.answers[f"{kind}: {_DROPPED}"] += 1
            self.dropped.append((started, time.monotonic()))
            return None
        self.longest_s = max(self.longest_s, time.monotonic() - started)
        self.answers[f"{kind}: {reply.status_code}"] += 1
        if reply.status_code not in (200, 201, 409, 503):
            self.problems.append(f"{method} {path} answered {reply.status_code}: {reply.text[:200]}")
        if reply.is_error and (problem := error_problem(reply.json())):
            self.problems.append(f"{method} {path} answered {reply.status_code}: {problem}")
        return reply
