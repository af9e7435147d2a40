"""What each request used and cost, written to Redis in the background. `record` never waits and never fails."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from redis.exceptions import RedisError

from proxy.limits.scripts import SETTLE, state_key
from proxy.state.store import Store, StoreUnavailable
from proxy.tasks import end
from router_core.pricing import TokenUsage, bill_usd, picousd
from router_core.types import Price

log = logging.getLogger("uniroute.usage")

STREAM: Final = "uniroute:usage"
TOTALS: Final = "uniroute:usage:totals"
MOST_ENTRIES = 100_000
MOST_QUEUED = 50_000
BATCH = 200
FLUSH_S = 0.5
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What an upstream reported. None: it did not."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    @property
    def whole(self) -> int | None:
        """Prompt and answer together."""
        if self.prompt_tokens is None or self.output_tokens is None:
            return None
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One answered, failed or abandoned request."""

    decision: str
    at: float
    """Unix seconds, at the end."""
    model: str
    key_id: str | None
    reason: str
    ending: str
    """complete, empty, failed, busy (nobody had a place), broken (after content), client_gone."""
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    """None: tokens or price unknown."""
    seconds: float
    first_token_s: float | None
    reservation: str | None = None
    """What was set aside of the key's limits, and is settled with this record."""
    estimated: bool = False
    """The cost is an estimate: the model reported no usage."""


def counts_of(usage: object) -> TokenCounts:
    """OpenAI's `usage` object; whatever is missing or broken in it is None. Never fails."""
    if not isinstance(usage, Mapping):
        return TokenCounts()
    prompt, output = _details(usage, "prompt_tokens_details"), _details(usage, "completion_tokens_details")
    return TokenCounts(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        cached_tokens=_count(prompt.get("cached_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
        reasoning_tokens=_count(output.get("reasoning_tokens")),
    )


def _details(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = usage.get(name)
    return value if isinstance(value, Mapping) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12 else None


def cost_usd(counts: TokenCounts, price: Price | None) -> float | None:
    """In disjoint buckets: cached tokens are part of the prompt's count, and paid once."""
    if price is None or counts.prompt_tokens is None or counts.output_tokens is None:
        return None
    cached = min(counts.cached_tokens or 0, counts.prompt_tokens)
    return bill_usd(price, TokenUsage(counts.prompt_tokens - cached, cached, counts.output_tokens))


class UsageRecorder:
    """A bounded queue in front of a Redis stream and one hash of totals per model."""

    def __init__(self, store: Store, on_dropped: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._on_dropped = on_dropped
        self._settle = store.client.register_script(SETTLE)
        self._queue: deque[UsageRecord] = deque()
        self._writing: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        return len(self._queue)

    def record(self, entry: UsageRecord) -> None:
        if len(self._queue) >= MOST_QUEUED:
            self._queue.popleft()
            self._on_dropped()
        self._queue.append(entry)

    def start(self) -> None:
        self._writing = asyncio.create_task(self._write_on(), name="uniroute-usage")

    async def stop(self) -> None:
        """Writes what is queued, if Redis takes it."""
        await end(self._writing)
        try:
            while self._queue:
                await self.flush()
        except StoreUnavailable as error:
            log.error("%d usage records are lost: %s", len(self._queue), error)

    async def flush(self) -> None:
        """One batch. Raises StoreUnavailable; the batch then stays queued."""
        batch = [self._queue[place] for place in range(min(BATCH, len(self._queue)))]
        if not batch:
            return
        async with self._store.asking("record usage") as client, client.pipeline(transaction=True) as pipe:
            for entry in batch:
                stored = {"record": json.dumps(asdict(entry))}
                pipe.xadd(STREAM, stored, maxlen=MOST_ENTRIES, approximate=True)  # type: ignore[arg-type]
                _add_to_totals(pipe, entry)
                if entry.key_id is not None:
                    await self._settle(keys=[state_key(entry.key_id)], args=_settling(entry), client=pipe)
            replies = await pipe.execute(raise_on_error=False)  # what broke the rest of it once would again, for ever
        if broken := [reply for reply in replies if isinstance(reply, RedisError)]:
            log.warning("%d of %d usage figures were not counted: %s", len(broken), len(replies), broken[0])
        for entry in batch:
            if self._queue and self._queue[0] is entry:
                self._queue.popleft()

    async def _write_on(self) -> None:
        while True:
            try:
                await self.flush()
            except StoreUnavailable as error:
                log.debug("usage waits: %s", error)
                await asyncio.sleep(RETRY_S)
            if len(self._queue) < BATCH:
                await asyncio.sleep(FLUSH_S)


def _settling(entry: UsageRecord) -> list[str]:
    """What the script is told of a client key's record; '' is unknown."""
    known = entry.prompt_tokens is not None and entry.output_tokens is not None
    tokens = str((entry.prompt_tokens or 0) + (entry.output_tokens or 0)) if known else ""
    cost = "" if entry.cost_usd is None else str(picousd(entry.cost_usd))
    day = datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%d")
    return [entry.key_id or "", entry.reservation or "", tokens, cost, day, day[:7]]


def _add_to_totals(pipe: Any, entry: UsageRecord) -> None:
    key = f"{TOTALS}:{entry.model}"
    pipe.hincrby(key, "requests", 1)
    pipe.hincrby(key, entry.ending, 1)
    for name in ("prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"):
        if count := getattr(entry, name):
            pipe.hincrby(key, name, count)
    if entry.cost_usd is None:
        pipe.hincrby(key, "cost_unknown", 1)
    else:
        pipe.hincrbyfloat(key, "cost_usd", entry.cost_usd)
