from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tests.chaos.clients import CLIENTS, LONG_WORDS, Ask, ClientPool, send_request
from tests.chaos.outcomes import Outcome
from tests.chaos.questions import MODELS, Json, Question, a_question

ROUTED = ("auto", "auto", "auto", "auto", "uniroute/best", "uniroute/cheap")
PINNED_SHARE = 0.3


@dataclass
class Traffic:
    pool: ClientPool
    keys: Sequence[str]
    rng: Random
    per_second: float
    clients: int = 12
    outcomes: list[Outcome] = field(default_factory=list)
    requests: int = 0

    async def run(self, until: float) -> None:
        """Send until `until` (monotonic seconds), and return once all is answered."""
        await asyncio.gather(*(self._client(Random(self.rng.random()), until) for _ in range(self.clients)))

    async def _client(self, rng: Random, until: float) -> None:
        pause_s = self.clients / self.per_second
        due = time.monotonic() + rng.uniform(0, pause_s)
        while (now := time.monotonic()) < until:
            if due > now:
                await asyncio.sleep(min(due, until) - now)
                continue
            due = max(due + rng.expovariate(1 / pause_s), now - pause_s)  # a slow time is not made up for at once
            self.outcomes.append(await self._one(rng))

    async def _one(self, rng: Random) -> Outcome:
        self.requests += 1
        name = rng.choices(list(CLIENTS), [weight for weight, _ in CLIENTS.values()])[0]
        question = a_question(self.requests, rng, words=LONG_WORDS if name == "stalls" else None)
        started = time.monotonic()
        got = await send_request(CLIENTS[name][1], self.pool, self._ask(question, rng))
        return Outcome(question, name, got.verdict, started, time.monotonic(), got.status, got.decision)

    def _ask(self, question: Question, rng: Random) -> Ask:
        model = rng.choice(list(MODELS)) if rng.random() < PINNED_SHARE else rng.choice(ROUTED)
        headers = {"x-request-id": question.id}
        extra: Json = {}
        match rng.randrange(4):
            case 0:
                headers["lambda"] = str(rng.choice((0, 0.02, 0.1, 1)))
            case 1:
                extra["uniroute"] = {"lambda": rng.choice((0, 0.02, 0.1, 1))}
            case 2:
                extra["uniroute"] = {"fallbacks": rng.random() < 0.5}
        return Ask(question, model, rng.choice(self.keys), headers, extra, rng)
