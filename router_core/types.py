"""The nouns that travel between rooms: prices, capabilities, needs, assignments. No computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Protocol

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

    def expected_of(self, by_cluster: Doubles) -> Doubles:
        """(M,) of a (K, M) matrix for one prompt. Equal columns give equal values: sums are made alike for each."""
        rows = by_cluster.take(self.ids[0], axis=0)
        rows *= self.weights[0, :, None]
        return np.asarray(np.add.reduce(rows, axis=0))

    def expected(self, by_cluster: Doubles) -> Doubles:
        """(n, M) of an (M, K) matrix: Φ·Ψ where that is error rates. NaN where a cluster that counts has none."""
        return np.asarray(np.einsum("np,mnp->nm", self.weights.astype(np.float64), by_cluster[:, self.ids]))


DEAREST = 1e6
"""USD per token: what is beyond is a mistake, and sums of it would overflow."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD per token, under LiteLLM's field names. A cached price that is not stated is the input price."""

    input_cost_per_token: float
    output_cost_per_token: float
    cache_read_input_token_cost: float | None = None
    cache_creation_input_token_cost: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value <= DEAREST:
                raise InvalidPrice(f"{field.name} must be USD per token, from 0 to {DEAREST:g}; got {value!r}")


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

ABILITIES: Mapping[str, str] = MappingProxyType(
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
class Needs:
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
    def abilities(self) -> tuple[str, ...]:
        """Those of ABILITIES that are asked for, in their order."""
        return tuple(ability for ability in ABILITIES if getattr(self, ability))
