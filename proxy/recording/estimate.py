"""What a request cost, by the usage that was reported, else by what went out and came back. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.recording.usage import TokenCounts, cost_usd
from router_core.pricing import TokenUsage, bill_usd
from router_core.tokens import BYTES_PER_TOKEN
from router_core.types import Price


@dataclass(frozen=True, slots=True)
class Received:
    """What is known of a request whose model reported no usage: it broke off, or the client left, or it never does."""

    prompt_tokens: int
    """As estimated from the request."""
    output_bytes: int
    """UTF-8, of the answer as far as it came."""


@dataclass(frozen=True, slots=True)
class Cost:
    usd: float | None
    """None: the price is not known."""
    estimated: bool = False


def cost_of(counts: TokenCounts, price: Price | None, received: Received, *, billed: bool) -> Cost:
    """`billed`: the model began, as far as is known. One that refused, or could not be reached, costs nothing."""
    reported = cost_usd(counts, price)
    if reported is not None:
        return Cost(reported)
    if not billed:
        return Cost(0.0)
    if price is None:
        return Cost(None)
    prompt = received.prompt_tokens if counts.prompt_tokens is None else counts.prompt_tokens
    output = -(-received.output_bytes // BYTES_PER_TOKEN) if counts.output_tokens is None else counts.output_tokens
    return Cost(bill_usd(price, TokenUsage(prompt, 0, output)), estimated=True)
