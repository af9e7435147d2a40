from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from types import MappingProxyType

import numpy as np

from router_core.types import Doubles, Indices, Price, frozen

# The price that makes costs scale-free: $2.50 in and $10 out per million tokens.
REFERENCE = Price(input_cost_per_token=2.5e-6, output_cost_per_token=1e-5)

CENT_USD = 0.01

# Picodollars in a dollar.
PICO = 10**12


@frozen
class TokenUsage:
    """The tokens of one request, in disjoint buckets: each token is counted, and paid, once."""

    fresh_tokens: int
    """Prompt tokens that are in no other bucket."""
    cached_tokens: int
    output_tokens: int
    """Answer tokens that are in no other bucket."""
    written_tokens: int = 0
    """Prompt tokens written to the provider's cache."""
    written_1h_tokens: int = 0
    """Prompt tokens written to the provider's cache for an hour."""
    audio_input_tokens: int = 0
    cached_audio_tokens: int = 0
    image_input_tokens: int = 0
    reasoning_tokens: int = 0
    audio_output_tokens: int = 0
    image_output_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, whose number decides the tier."""
        return sum(getattr(self, name) for name in RATES_IN)


# Bucket of TokenUsage → the fields of Price that may state its price; the first that does counts.
RATES_IN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fresh_tokens": ("input_cost_per_token",),
        "cached_tokens": ("cache_read_input_token_cost", "input_cost_per_token"),
        "written_tokens": ("cache_creation_input_token_cost", "input_cost_per_token"),
        "written_1h_tokens": (
            "cache_creation_input_token_cost_above_1hr",
            "cache_creation_input_token_cost",
            "input_cost_per_token",
        ),
        "audio_input_tokens": ("input_cost_per_audio_token", "input_cost_per_token"),
        "cached_audio_tokens": (
            "cache_read_input_audio_token_cost",
            "cache_read_input_token_cost",
            "input_cost_per_token",
        ),
        "image_input_tokens": ("input_cost_per_image_token", "input_cost_per_token"),
    }
)

RATES_OUT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "output_tokens": ("output_cost_per_token",),
        "reasoning_tokens": ("output_cost_per_reasoning_token", "output_cost_per_token"),
        "audio_output_tokens": ("output_cost_per_audio_token", "output_cost_per_token"),
        "image_output_tokens": ("output_cost_per_image_token", "output_cost_per_token"),
    }
)

RATES: Mapping[str, tuple[str, ...]] = MappingProxyType({**RATES_IN, **RATES_OUT})

_APART = tuple(bucket for bucket in RATES if bucket not in ("fresh_tokens", "output_tokens"))

_tokens_apart = attrgetter(*_APART)

_AUDIO_IN = frozenset({"audio_input_tokens", "cached_audio_tokens"})


def rate_usd(price: Price, bucket: str) -> float:
    """Return the USD for a token of this bucket, at one tier."""
    *apart, always = RATES[bucket]
    for name in apart:
        usd: float | None = getattr(price, name)
        if usd is not None:
            return float(usd)
    return float(getattr(price, always))


def bill_usd(price: Price, usage: TokenUsage) -> float:
    """Return the cost of a request in USD: each bucket at its own price, all at the tier of the whole prompt."""
    tier = price.at(usage.prompt_tokens) if price.tiers else price
    usd = usage.fresh_tokens * tier.input_cost_per_token + usage.output_tokens * tier.output_cost_per_token
    if any(apart := _tokens_apart(usage)):
        for bucket, tokens in zip(_APART, apart, strict=True):
            if tokens:
                usd += tokens * rate_usd(tier, bucket)
    return usd


def max_price_usd(
    prompt_tokens: int,
    output_tokens: int,
    price: Price,
    *,
    audio_input: bool = True,
    audio_output: bool = True,
    images: bool = True,
) -> float:
    """Return the most that a request of so many tokens can cost in USD, whichever buckets they turn out to be in.

    Args:
        audio_input, audio_output, images: whether the request can have any; buckets that it cannot have are ignored.
    """
    dearest = 0.0
    for above, usd_in, usd_out in _max_rates(price, audio_input, audio_output, images):
        if prompt_tokens > above:
            dearest = max(dearest, prompt_tokens * usd_in + output_tokens * usd_out)
    return dearest


@lru_cache(maxsize=1024)
def _max_rates(
    price: Price,
    audio_input: bool,  # noqa: FBT001  keywords would take longer
    audio_output: bool,  # noqa: FBT001
    images: bool,  # noqa: FBT001
) -> tuple[tuple[int, float, float], ...]:
    """Return of each tier: the tokens above which it applies, and the highest price of a token in and out."""
    possible = {bucket for bucket in RATES if images or not bucket.startswith("image_")}
    possible -= set() if audio_input else _AUDIO_IN
    possible -= set() if audio_output else {"audio_output_tokens"}
    return tuple(
        (
            above,
            max(rate_usd(tier, bucket) for bucket in RATES_IN if bucket in possible),
            max(rate_usd(tier, bucket) for bucket in RATES_OUT if bucket in possible),
        )
        for above, tier in ((-1, price), *price.tiers)
    )


def picousd(usd: float) -> int:
    """Round to whole picodollars, whose sums are exact where sums of floats drift. $1e-9 are 1,000 of them."""
    return round(usd * PICO)


@dataclass(frozen=True, eq=False, slots=True)
class PriceColumns:
    """USD per token of M models, each (M,) float64; NaN where the price is unknown."""

    input: Doubles
    output: Doubles
    cached: Doubles
    """For prompt tokens in the model's cache; the input price where no other is stated."""
    tiers: tuple[tuple[int, PriceColumns], ...] = ()
    """The columns for prompts of more than so many tokens, one for each tier of any model. Ascending."""

    @classmethod
    def from_prices(cls, prices: Sequence[Price | None]) -> PriceColumns:
        limits = sorted({tokens for price in prices if price is not None for tokens, _ in price.tiers})
        above = tuple((tokens, cls._of_tier(prices, tokens + 1)) for tokens in limits)
        return cls._of_tier(prices, 0, above)

    @classmethod
    def _of_tier(
        cls, prices: Sequence[Price | None], prompt_tokens: int, above: tuple[tuple[int, PriceColumns], ...] = ()
    ) -> PriceColumns:
        tiers = [None if price is None else price.at(prompt_tokens) for price in prices]

        def column(bucket: str) -> Doubles:
            return np.array([np.nan if tier is None else rate_usd(tier, bucket) for tier in tiers])

        return cls(column("fresh_tokens"), column("output_tokens"), column("cached_tokens"), above)

    def select(self, rows: Indices) -> PriceColumns:
        """Return the columns of the models in `rows`."""
        above = tuple((tokens, tier.select(rows)) for tokens, tier in self.tiers)
        return PriceColumns(self.input[rows], self.output[rows], self.cached[rows], above)

    def at(self, prompt_tokens: float) -> PriceColumns:
        """Return the columns that a prompt of this length is billed at."""
        columns = self
        for tokens, tier in self.tiers:
            if prompt_tokens > tokens:
                columns = tier
        return columns

    def expected_usd(
        self, prompt_tokens: int | Doubles, output_tokens: Doubles, cached_tokens: int | Doubles = 0
    ) -> Doubles:
        """Return (M,) USD for `prompt_tokens` in and (M,) `output_tokens` out; or (n, M) for (n, 1) and (n, M).

        Args:
            cached_tokens: (M,) how many of the prompt's tokens each model has in its cache.
        """
        columns = self.at(prompt_tokens) if self.tiers and isinstance(prompt_tokens, int) else self
        fresh_tokens = prompt_tokens - cached_tokens
        usd = columns.input * fresh_tokens + columns.cached * cached_tokens + columns.output * output_tokens
        if self.tiers and not isinstance(prompt_tokens, int):
            for tokens, tier in self.tiers:
                usd = np.where(
                    prompt_tokens > tokens, tier.expected_usd(prompt_tokens, output_tokens, cached_tokens), usd
                )
        return usd


def reference_usd(prompt_tokens: int, output_tokens: float, reference: Price = REFERENCE) -> float:
    """Return c_ref(x), the USD for the same tokens at the reference price; never 0, as costs are divided by it."""
    return max(prompt_tokens, 1) * reference.input_cost_per_token + output_tokens * reference.output_cost_per_token
