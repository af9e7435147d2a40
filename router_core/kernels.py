"""The inner loops of routing: token ids → vector, cosines → weights, clusters → scores → chosen row.

There are two of each, in NumPy here and in C in `_compiled.c`, which is compiled where the package is built if there is
a compiler. They give the same bits: each operation is done in the same precision and the same order in both. Sums over
rows go one row after the other, sums along a row are NumPy's pairwise ones, and exponents are those of the C library,
which `math.exp` calls too. Tests hold the two to each other.

An embedder, a pool, and a map once it was used, keep the kernels that they began with.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.types import Doubles, Floats, Indices

# Rows of a table that are gathered at once, so that they stay in a core's own cache: 3,000 tokens take half the time.
BATCH_ROWS = 256

# Expected tokens are compared with limits as if they were longer by this, for weights that sum to one but for rounding.
ROUNDING = 1.001


class ScoringTerms(NamedTuple):
    """What of a request the scores depend on. `_compiled.c` has the order of the fields."""

    prompt_tokens: int
    max_output_tokens: float
    """The request's own limit; infinite if it states none."""
    answers: int
    """How many are paid for."""
    cached_row: int
    """The model that has `cached_tokens` of the prompt in its cache; −1: none has any."""
    cached_tokens: int
    latency_weight: float
    """USD that one second of waiting is worth."""
    lambda_: float
    """Infinite: the costs are the scores."""
    input_reference: float
    """USD per token; at this and the next the request would make a cost of one."""
    output_reference: float
    unit: float
    """USD that make a cost of one; 0: the reference prices say."""
    tie: float


# (m,) errors, costs, scores and USD of the rows that were scored; or these, one after the other, as float64 bytes.
Figures = Sequence[Doubles] | bytes


class TokenTable:
    """A vector for each token of a vocabulary: (V, d) float32, which may be mapped into memory."""

    def __init__(self, rows: Floats) -> None:
        self._rows = rows

    def embed(self, ids: NDArray[np.uint32], out: Floats) -> None:
        """Write into `out`, (1, d), the sum of the rows `ids`, scaled to unit length; zeros without any token."""
        first = ids if ids.size <= BATCH_ROWS else ids[:BATCH_ROWS]
        np.add.reduce(self._rows.take(first, 0), 0, out=out, keepdims=True)
        for start in range(BATCH_ROWS, ids.size, BATCH_ROWS):
            out += np.add.reduce(self._rows.take(ids[start : start + BATCH_ROWS], 0), 0)
        norm = math.sqrt(np.add.reduce(np.multiply(out, out), None))
        if norm > 0:
            out /= norm


def softmax(cosines: memoryview[Any], temperature: float) -> bytes:
    """Return exp((cosine − first)/temperature) of each of (p,) float32 cosines, as p float32 that sum to one."""
    values = cosines.tolist()
    exponents = [math.exp((cosine - values[0]) / temperature) for cosine in values]
    total = 0.0
    for exponent in exponents:
        total += exponent
    return array("f", [exponent / total for exponent in exponents]).tobytes()


class Scorer:
    """The columns of M models that a prompt is scored by, at one tier of their prices."""

    def __init__(
        self,
        by_cluster: Doubles,
        output_caps: Doubles,
        input_price: Doubles,
        output_price: Doubles,
        cached_price: Doubles,
        profiled: NDArray[np.bool_],
    ) -> None:
        """
        Args:
            by_cluster: (K, 2M) error rates, then output tokens; (K, 3M) with seconds too, which a latency weight needs.
            output_caps: (M,) output tokens that each model can write at most.
            input_price, output_price, cached_price: (M,) USD per token.
            profiled: (M,) models whose output counts in the mean that a request is expected to cost.
        """
        self._by_cluster = by_cluster
        self._caps = output_caps
        self._input, self._output, self._cached = input_price, output_price, cached_price
        self._profiled = None if profiled.all() else profiled
        models = profiled.size
        longest = by_cluster[:, models : 2 * models].max(axis=0, initial=0.0) * ROUNDING
        self._blocks = 3 if by_cluster.shape[1] > 2 * models else 2
        self._is_capped = bool((longest > output_caps).any())
        self._longest = float(longest.max(initial=0.0))

    def choose(
        self,
        ids: Indices,
        weights: Floats,
        rows: Indices | None,
        terms: ScoringTerms,
        doubts: Doubles | None = None,
    ) -> tuple[int, Figures]:
        """Score the models in `rows`, or all, and return the place of the chosen one, and the figures of all.

        Of those within `tie` of the best score the cheapest is chosen, and of equals the first.

        Args:
            ids, weights: (1, p) clusters of the prompt and their weights, which sum to one.
            rows: (m,)
            doubts: (M,) shares of what each model is expected to get right that count as errors; None: none do. What
                that adds to its errors is added to those of all models that are expected to err more, too.
        """
        (prompt_tokens, max_output_tokens, answers, cached_row, cached_tokens, latency_weight, lambda_) = terms[:7]
        input_reference, output_reference, unit, tie = terms[7:]
        rows_of_clusters = self._by_cluster.take(ids, 0)
        rows_of_clusters *= weights.T.astype(np.float64)
        # Equal columns give equal values, as each is summed in the same order.
        errors, tokens, *seconds = np.add.reduce(rows_of_clusters, 1).reshape(self._blocks, -1)
        if doubts is not None:
            errors = with_doubts(errors, doubts)
        tokens = self._billed(tokens, max_output_tokens, answers)
        usd = self._input * prompt_tokens
        if cached_row >= 0:
            fresh_usd = self._input[cached_row] * (prompt_tokens - cached_tokens)
            usd[cached_row] = fresh_usd + self._cached[cached_row] * cached_tokens
        usd += self._output * tokens
        if unit <= 0:
            counted = tokens if self._profiled is None else tokens[self._profiled]
            mean = float(np.add.reduce(counted)) / max(counted.size, 1)
            unit = max(prompt_tokens, 1.0) * input_reference + mean * output_reference
        total = usd
        if latency_weight:
            if not seconds:
                raise ValueError("a latency weight needs the columns of seconds")
            total = usd + latency_weight * seconds[0]
        if rows is not None:
            errors, usd, total = errors.take(rows), usd.take(rows), total.take(rows)
        costs = total / unit
        scores = costs
        if lambda_ < math.inf:
            scores = costs * lambda_
            scores += errors
        return argmin_with_ties(scores, costs, tie), (errors, costs, scores, usd)

    def _billed(self, tokens: Doubles, max_output_tokens: float, answers: int) -> Doubles:
        """Lower (M,) expected tokens to the models' limits and the request's own, for so many answers."""
        if self._is_capped:
            tokens = np.minimum(tokens, self._caps)
        if max_output_tokens < self._longest:
            tokens = np.minimum(tokens, max_output_tokens)
        return tokens if answers == 1 else tokens * answers


def with_doubts(errors: Doubles, doubts: Doubles) -> Doubles:
    """Return (M,) errors with what is added for doubts of the same models, up to one."""
    added = np.zeros(errors.size)
    for row in doubts.nonzero()[0].tolist():
        more = doubts[row] * (1.0 - errors[row])
        worse = errors > errors[row]
        worse[row] = True
        added[worse] = np.maximum(added[worse], more)
    return np.minimum(errors + added, 1.0)


def argmin_with_ties(scores: Doubles, costs: Doubles, tie: float) -> int:
    """Return the row of the cheapest among those within `tie` of the best score; of equals, the first."""
    (near,) = (scores <= float(np.minimum.reduce(scores)) + tie).nonzero()
    rows: list[int] = near.tolist()
    if len(rows) < 2:
        return rows[0] if rows else 0  # none if a score is NaN
    return rows[costs.take(near).argmin()]


class EmbeddingKernel(Protocol):
    def embed(self, ids: NDArray[np.uint32], out: Floats, /) -> None: ...


class ScoringKernel(Protocol):
    def choose(
        self,
        ids: Indices,
        weights: Floats,
        rows: Indices | None,
        terms: ScoringTerms,
        doubts: Doubles | None = None,
        /,
    ) -> tuple[int, Figures]: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One of the two. `name` is shown to people."""

    name: str
    token_table: Callable[[Floats], EmbeddingKernel]
    softmax: Callable[[memoryview[Any], float], bytes]
    scorer: Callable[..., ScoringKernel]


NUMPY = Kernels("NumPy", TokenTable, softmax, Scorer)

SOURCE = Path(__file__).with_name("_compiled.c")


@cache
def compiled() -> Kernels | None:
    """Return the kernels in C; None where they are not built, or were built from another version of their source."""
    try:
        import router_core._compiled as _compiled
    except ImportError:
        return None
    if SOURCE.exists() and hashlib.sha256(SOURCE.read_bytes()).hexdigest() != _compiled.SOURCE_SHA256:
        return None
    return Kernels("compiled", _compiled.TokenTable, _compiled.softmax, _compiled.Scorer)


_in_use: Kernels | None = None


def current() -> Kernels:
    """Return the kernels that this process uses: those in C, if they are there and `use` was not called."""
    return _in_use or compiled() or NUMPY


def use(kernels: Kernels | None) -> None:
    """Let this process use these kernels from now on. None: those in C, if they are there."""
    global _in_use
    _in_use = kernels
