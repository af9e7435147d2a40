"""What a request used and cost, as types and as JSON. Where it is written is recorder's business."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import orjson

from router_core.pricing import TokenUsage, bill_usd, picousd
from router_core.types import Price


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
    """complete, empty, failed, busy (nobody had a place), broken (after content), client_gone,
    shutdown (cut by the end of the server)."""
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    """None: tokens or price unknown."""
    seconds: float
    first_token_s: float | None
    reservation: str | None = None
    """What was set aside of the key's limits before the request, and is settled with this."""
    estimated: bool = False
    """The cost is an estimate: the model reported no usage."""

    @property
    def cost_picousd(self) -> int | None:
        """The cost as sums of it are kept."""
        return None if self.cost_usd is None else picousd(self.cost_usd)

    def to_json(self) -> str:
        stored = dict(zip(_STORED, (*_values(self), self.cost_picousd), strict=True))
        try:
            return orjson.dumps(stored).decode()
        except TypeError:  # a cost beyond 64 bits
            return json.dumps(stored)


_NAMES = tuple(column.name for column in fields(UsageRecord))
_STORED = (*_NAMES, "cost_picousd")
_values = attrgetter(*_NAMES)


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
