from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, dataclass_transform

import numpy as np
from numpy.typing import NDArray

from router_core.errors import InvalidPrice

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make a dataclass that type checkers hold frozen, for objects that are made for every request.

    To set the fields of a truly frozen one takes four times as long as those of any other: a tenth of a request.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


class Embedder(Protocol):
    """Turns text into unit vectors. `id` changes whenever the vectors do."""

    @property
    def id(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return (n, dimension) float32, rows of unit length; a text without any token gives a zero row."""


@frozen
class Assignment:
    """Φ for n prompts, sparse: the p nearest clusters of each and their weights."""

    ids: Indices
    """(n, p) cluster numbers, nearest first."""
    weights: Floats
    """(n, p), rows sum to one."""
    cosines: Floats | None = None
    """(n,) how near each prompt is to its nearest centroid; None: not known."""

    def __len__(self) -> int:
        return len(self.ids)

    def dense(self, clusters: int) -> Doubles:
        """Return (n, clusters) weights, rows sum to one."""
        rows = np.zeros((len(self), clusters))
        np.put_along_axis(rows, self.ids, self.weights.astype(np.float64), axis=1)
        return rows

    def expected(self, by_cluster: Doubles) -> Doubles:
        """Return the (n, M) expected values of an (M, K) matrix: Φ·Ψ if these are error rates.

        NaN where one of a prompt's clusters has no value.
        """
        return np.asarray(np.einsum("np,mnp->nm", self.weights.astype(np.float64), by_cluster[:, self.ids]))


# USD per token. More is a mistake, and sums of it would overflow.
MAX_PRICE = 1e6
# Tiers of one price; the longest known table has four.
MAX_TIERS = 32


@dataclass(frozen=True, slots=True)
class Price:
    """USD per token, under LiteLLM's field names. None: not priced apart; `pricing.RATES` says which field counts."""

    input_cost_per_token: float
    output_cost_per_token: float
    cache_read_input_token_cost: float | None = None
    cache_creation_input_token_cost: float | None = None
    cache_creation_input_token_cost_above_1hr: float | None = None
    """For tokens that are cached for an hour, not for minutes."""
    input_cost_per_audio_token: float | None = None
    cache_read_input_audio_token_cost: float | None = None
    input_cost_per_image_token: float | None = None
    output_cost_per_reasoning_token: float | None = None
    output_cost_per_audio_token: float | None = None
    output_cost_per_image_token: float | None = None
    tiers: tuple[tuple[int, Price], ...] = ()
    """(tokens, price): if the prompt is longer than so many tokens, every token costs this instead. Ascending."""

    def __post_init__(self) -> None:
        for name in PRICE_FIELDS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_PRICE:
                raise InvalidPrice(f"{name} must be USD per token, from 0 to {MAX_PRICE:g}; got {value!r}")

    @classmethod
    def from_fields(cls, fields: Mapping[str, float | None]) -> Price:
        """Read LiteLLM's flat fields, such as `input_cost_per_token_above_200k_tokens`.

        A rate that a tier does not state is that of the tier below. None counts as not stated; fields that are no price
        are ignored.

        Raises:
            InvalidPrice: the input or the output price is missing, an amount is none, or one is stated twice.
        """
        base: dict[str, float] = {}
        tiers: dict[int, dict[str, float]] = {}
        for name, value in fields.items():
            if value is None or (field := price_field(name)) is None:
                continue
            rate, tokens = field
            rates = base if tokens is None else tiers.setdefault(tokens, {})
            if rate in rates:
                raise InvalidPrice(f"{name} is stated twice, under two names")
            rates[rate] = value
        if missing := [name for name in PRICE_FIELDS[:2] if name not in base]:
            raise InvalidPrice(
                f"a price needs both input_cost_per_token and output_cost_per_token; {missing[0]} is missing"
            )
        if len(tiers) > MAX_TIERS:
            raise InvalidPrice(f"a price has at most {MAX_TIERS} tiers; got {len(tiers)}")
        above, rates = [], base
        for tokens in sorted(tiers):
            rates = rates | tiers[tokens]
            above.append((tokens, _checked_tier(rates, tokens)))
        return cls(**base, tiers=tuple(above))

    def at(self, prompt_tokens: float) -> Price:
        """Return the tier that a request with such a prompt, its cached tokens included, is billed at."""
        price = self
        for tokens, tier in self.tiers:
            if prompt_tokens > tokens:
                price = tier
        return price

    def to_fields(self) -> dict[str, float]:
        """Write LiteLLM's flat fields, from which `from_fields` reads the same price."""
        fields = {name: value for name in PRICE_FIELDS if (value := getattr(self, name)) is not None}
        below = self
        for tokens, tier in self.tiers:
            # A tier that states nothing new still says where it begins.
            changed = [name for name in PRICE_FIELDS if getattr(tier, name) != getattr(below, name)]
            for name in changed or PRICE_FIELDS[:1]:
                fields[flat_price_field(name, tokens)] = getattr(tier, name)
            below = tier
        return fields


# The input and the output price, which every price has, come first.
PRICE_FIELDS = tuple(column.name for column in fields(Price) if column.name != "tiers")
_ABOVE = re.compile(rf"({'|'.join(PRICE_FIELDS)})_above_([0-9]{{1,12}})(k?)_tokens")


# The same few dozen names come up for each of thousands of models.
@lru_cache(maxsize=1024)
def price_field(name: str) -> tuple[str, int | None] | None:
    """Split a flat field into its rate and the prompt tokens above which it holds (None: from the first).

    Returns None if the field is no price.
    """
    if name in PRICE_FIELDS:
        return name, None
    match = _ABOVE.fullmatch(name)
    return match and (match[1], int(match[2]) * (1000 if match[3] else 1))


def flat_price_field(rate: str, tokens: int | None) -> str:
    """Return the flat field of a rate and its tier: the inverse of `price_field`."""
    if tokens is None:
        return rate
    return f"{rate}_above_{tokens // 1000}k_tokens" if tokens % 1000 == 0 else f"{rate}_above_{tokens}_tokens"


def _checked_tier(rates: Mapping[str, Any], tokens: int) -> Price:
    try:
        return Price(**rates)
    except InvalidPrice as error:
        raise InvalidPrice(f"above {tokens} prompt tokens: {error}") from None


FREE = Price(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can take.

    None is unknown: such a model is used only as long as no other candidate is known to have the capability.
    """

    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    tools: bool | None = None
    parallel_tools: bool | None = None
    """Several tool calls in one turn."""
    vision: bool | None = None
    video: bool | None = None
    audio_input: bool | None = None
    audio_output: bool | None = None
    files: bool | None = None
    """PDF and the like, as an attachment."""
    json_schema: bool | None = None
    reasoning: bool | None = None
    """Thinks before it answers, and takes the parameters that say how long."""

    @property
    def shares_window(self) -> bool:
        """Whether prompt and answer share a window: no output limit is known, or it is as large as the window."""
        return self.max_output_tokens is None or self.max_output_tokens >= (self.max_input_tokens or 0)


UNKNOWN_CAPABILITIES = Capabilities()

# What a request may require and a model may lack: field of Capabilities and of Requirements → in words.
CAPABILITY_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "tools": "call tools",
        "parallel_tools": "call several tools in one turn",
        "vision": "read images",
        "video": "watch video",
        "audio_input": "hear audio",
        "audio_output": "answer in audio",
        "files": "read files",
        "json_schema": "keep to a JSON schema",
        "reasoning": "take reasoning parameters",
    }
)


@frozen
class Requirements:
    """What one request requires of a model. Token counts are estimates."""

    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    """The request's own limit for an answer."""
    limit_is_cap: bool = False
    """The limit is only a cap: a model that cannot write so much is sent a smaller one."""
    answers: int = 1
    """OpenAI's `n`: how many answers are paid for."""
    max_input_cost_per_token: float | None = None
    """USD; a model whose price is above it is ruled out."""
    max_output_cost_per_token: float | None = None
    tools: bool = False
    parallel_tools: bool = False
    vision: bool = False
    video: bool = False
    audio_input: bool = False
    audio_output: bool = False
    files: bool = False
    json_schema: bool = False
    reasoning: bool = False

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The names of the required capabilities, in the order of CAPABILITY_NAMES."""
        return tuple(name for name in CAPABILITY_NAMES if getattr(self, name))
