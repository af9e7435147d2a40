"""Tokens times prices. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_core.types import Doubles, Price

REFERENCE = Price(input_cost_per_token=2.5e-6, output_cost_per_token=1e-5)
"""The fixed price that makes costs scale-free: $2.50 in and $10 out per million tokens."""
CENT_USD = 0.01
PICO = 10**12


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What an upstream reported, in disjoint buckets: a token is counted, and paid, once."""

    fresh_tokens: int
    cached_tokens: int
    output_tokens: int
    """Reasoning tokens included, as providers bill them."""


def bill_usd(price: Price, usage: TokenUsage) -> float:
    """What an answer cost, in USD. Cached tokens without a price of their own cost the input price."""
    cached_price = price.cache_read_input_token_cost
    if cached_price is None:
        cached_price = price.input_cost_per_token
    return (
        usage.fresh_tokens * price.input_cost_per_token
        + usage.cached_tokens * cached_price
        + usage.output_tokens * price.output_cost_per_token
    )


def picousd(usd: float) -> int:
    """Whole picodollars: sums of them are exact, where sums of floats drift. A token of $1e-9 is 1,000 of them."""
    return round(usd * PICO)


@dataclass(frozen=True, eq=False, slots=True)
class PriceColumns:
    """USD per token of M models, each (M,) float64; NaN where the price is unknown."""

    input: Doubles
    output: Doubles

    @classmethod
    def of(cls, prices: Sequence[Price | None]) -> PriceColumns:
        return cls(
            input=np.array([np.nan if price is None else price.input_cost_per_token for price in prices]),
            output=np.array([np.nan if price is None else price.output_cost_per_token for price in prices]),
        )

    def expected_usd(self, prompt_tokens: int | Doubles, output_tokens: Doubles) -> Doubles:
        """(M,) USD for `prompt_tokens` in and (M,) `output_tokens` out; (n, M) for (n, 1) and (n, M) of n prompts."""
        return self.input * prompt_tokens + self.output * output_tokens


def reference_usd(prompt_tokens: int, output_tokens: float, reference: Price = REFERENCE) -> float:
    """c_ref(x): the same tokens at the reference price, at least one token's worth so that it can be divided by."""
    return max(prompt_tokens, 1) * reference.input_cost_per_token + output_tokens * reference.output_cost_per_token
