"""What a method may look at before it is tested: the known models' history, and the few answers of the new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router_core.types import Doubles, Floats, Indices


@dataclass(frozen=True, eq=False)
class Known:
    """The train prompts of one trial and what the known models scored on them."""

    texts: Sequence[str]
    """n prompts."""
    vectors: Floats
    """(n, d), rows of unit length, or zero where a text has no token."""
    scores: Doubles
    """(n, R) in [0, 1], NaN where unlabelled; R is 0 where no model is known."""
    models: tuple[str, ...]
    """R names."""
    embedder_id: str
    seed: int


@dataclass(frozen=True, eq=False)
class Asked:
    """The N train prompts that every new model was asked."""

    rows: Indices
    """(N,) of the known prompts."""
    scores: Doubles
    """(N, M) in [0, 1], NaN where unlabelled."""
    output_tokens: Doubles
    """(N, M) NaN where not measured."""


Estimator = Callable[[Asked, Floats], Doubles]
"""The answers of M new models, and (t, d) vectors of other prompts, to (t, M) expected errors."""

Method = Callable[[Known], Estimator]
"""Learns from the known models once a trial; its estimator is then used for each number of labels."""
