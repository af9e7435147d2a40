"""The nouns that travel between rooms: prices, capabilities, needs, assignments. No computation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.errors import InvalidPrice

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


class Embedder(Protocol):
    """Text to unit vectors. `id` changes whenever the vectors do."""

    @property
    def id(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Floats:
        """(n, dimension) float32, rows of unit length; a text without any token gives a zero row."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Φ for n prompts, sparse: the p nearest clusters of each and their weights."""

    ids: Indices
    """(n, p) cluster numbers, nearest first."""
    weights: Floats
    """(n, p), rows sum to one."""

    def __len__(self) -> int:
        return len(self.ids)

    def dense(self, clusters: int) -> Doubles:
        """(n, clusters), rows sum to one."""
        rows = np.zeros((len(self), clusters))
        np.put_along_axis(rows, self.ids, self.weights.astype(np.float64), axis=1)
        return rows

    def expected_one(self, by_cluster: Doubles) -> Doubles:
        """(M,) of a (K, M) matrix for one prompt. Equal columns give equal values: sums are made alike for each."""
        rows = by_cluster.take(self.ids[0], axis=0)
        rows *= self.weights[0, :, None]
        return np.asarray(np.add.reduce(rows, axis=0))

    def expected(self, by_cluster: Doubles) -> Doubles:
        """(n, M) of an (M, K) matrix: Φ·Ψ where that is error rates. NaN where a cluster that counts has none."""
        return np.asarray(np.einsum("np,mnp->nm", self.weights.astype(np.float64), by_cluster[:, self.ids]))


MAX_PRICE = 1e6
"""USD per token: what is beyond is a mistake, and sums of it would overflow."""
MAX_TIERS = 32
"""Of one price; the longest table that is known has four."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD per token, under LiteLLM's field names. None: no price of its own; `pricing.RATES` says which one counts."""

    input_cost_per_token: float
    output_cost_per_token: float
    cache_read_input_token_cost: float | None = None
    cache_creation_input_token_cost: float | None = None
    cache_creation_input_token_cost_above_1hr: float | None = None
    """Of tokens that are cached for an hour, not for minutes."""
    input_cost_per_audio_token: float | None = None
    cache_read_input_audio_token_cost: float | None = None
    input_cost_per_image_token: float | None = None
    output_cost_per_reasoning_token: float | None = None
    output_cost_per_audio_token: float | None = None
    output_cost_per_image_token: float | None = None
    tiers: tuple[tuple[int, Price], ...] = ()
    """Tiers: of a prompt longer than so many tokens every token costs this instead. Ascending, each one whole."""

    def __post_init__(self) -> None:
        for name in PRICE_FIELDS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_PRICE:
                raise InvalidPrice(f"{name} must be USD per token, from 0 to {MAX_PRICE:g}; got {value!r}")

    @classmethod
    def from_fields(cls, fields: Mapping[str, float | None]) -> Price:
        """Read LiteLLM's flat fields, `input_cost_per_token_above_200k_tokens` and its like among them.

        What a tier does not state is as it was below. None is not stated; names that are no price are passed over.

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
        """The tier that a whole request of such a prompt, its cached tokens included, is billed at."""
        price = self
        for tokens, tier in self.tiers:
            if prompt_tokens > tokens:
                price = tier
        return price

    def to_fields(self) -> dict[str, float]:
        """LiteLLM's flat fields, of which `of` makes the same price again."""
        fields = {name: value for name in PRICE_FIELDS if (value := getattr(self, name)) is not None}
        below = self
        for tokens, tier in self.tiers:
            # a tier that states nothing new still says where it begins
            changed = [name for name in PRICE_FIELDS if getattr(tier, name) != getattr(below, name)]
            for name in changed or PRICE_FIELDS[:1]:
                fields[flat_price_field(name, tokens)] = getattr(tier, name)
            below = tier
        return fields


PRICE_FIELDS = tuple(column.name for column in fields(Price) if column.name != "tiers")
"""The input and the output price, which every price has, come first."""
_ABOVE = re.compile(rf"({'|'.join(PRICE_FIELDS)})_above_([0-9]{{1,12}})(k?)_tokens")


def price_field(name: str) -> tuple[str, int | None] | None:
    """The rate that a field states, and above how many prompt tokens (None: from the first). None: it is no price."""
    if name in PRICE_FIELDS:
        return name, None
    match = _ABOVE.fullmatch(name)
    return match and (match[1], int(match[2]) * (1000 if match[3] else 1))


def flat_price_field(rate: str, tokens: int | None) -> str:
    """The field that states this rate: `price_field` the other way round, one name for each."""
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
    """What a model can take. None: unknown, and trusted only while no other candidate is known to be able."""

    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    tools: bool | None = None
    parallel_tools: bool | None = None
    """Several calls in one turn."""
    vision: bool | None = None
    video: bool | None = None
    audio_input: bool | None = None
    audio_output: bool | None = None
    files: bool | None = None
    """PDF and the like, as an attachment."""
    json_schema: bool | None = None
    reasoning: bool | None = None
    """Thinks before it answers, and takes the parameters that say how much."""

    @property
    def shares_window(self) -> bool:
        """Whether prompt and answer have one window: no output limit is known apart, or it is no smaller."""
        return self.max_output_tokens is None or self.max_output_tokens >= (self.max_input_tokens or 0)


UNKNOWN_CAPABILITIES = Capabilities()

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
"""What a request may need and a model may lack, a field of Capabilities and of Needs each → in words."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """What one request asks of a model. Token counts are estimates."""

    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    """The request's own limit for one answer, if it states one."""
    limit_is_cap: bool = False
    """The limit is no more than a cap: a model that cannot answer at such length is told a smaller one."""
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
        """Those of ABILITIES that are asked for, in their order."""
        return tuple(ability for ability in CAPABILITY_NAMES if getattr(self, ability))
