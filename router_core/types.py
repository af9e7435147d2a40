"""The nouns that travel between rooms: prices, capabilities, needs, assignments. No computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    vision: bool | None = None
    audio: bool | None = None
    json_schema: bool | None = None


UNKNOWN_CAPABILITIES = Capabilities()


@dataclass(frozen=True, slots=True)
class Needs:
    """What one request asks of a model. Token counts are estimates."""

    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    """The request's own limit for one answer, if it states one."""
    answers: int = 1
    """OpenAI's `n`: how many answers are paid for."""
    tools: bool = False
    vision: bool = False
    audio: bool = False
    json_schema: bool = False
