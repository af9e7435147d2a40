"""How long answers of live traffic are, per model and cluster: decayed sums of this process. Stores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from router_core.profiles import Profile
from router_core.types import Doubles

HALF_LIFE = 200.0
"""Answers of one model after which an answer counts half."""
PRIOR_ANSWERS = 20.0
"""How many live answers the validation answers of a profile weigh, all together: they are shorter than real ones."""
_TOKENS, _SECONDS, _WEIGHT = range(3)


class LiveExpectations:
    """`observe` after each answer, `blended` when a state is built. Used on one event loop."""

    def __init__(self, clusters: int, half_life: float = HALF_LIFE) -> None:
        self._clusters = clusters
        self._keep = 0.5 ** (1.0 / half_life)
        self._sums: dict[str, Doubles] = {}
        self.observed = 0
        """Answers ever observed: who builds states compares it with what it last saw."""

    def observe(
        self, model: str, cluster_ids: Sequence[int], weights: Sequence[float], tokens: float | None, seconds: float
    ) -> None:
        """Count one answer of `model` to a prompt with these cluster weights. Without a token count it is left out."""
        if tokens is None:
            return
        sums = self._sums.setdefault(model, np.zeros((3, self._clusters)))
        sums *= self._keep
        sums[:, list(cluster_ids)] += np.outer((tokens, seconds, 1.0), weights)
        self.observed += 1

    def blended(self, model: str, profile: Profile) -> Profile:
        """The profile with live answers added to its tokens and seconds; errors and labels are as measured."""
        sums = self._sums.get(model)
        if sums is None:
            return profile
        prior = _prior(profile.answers)
        timed_prior = _prior(profile.timed_answers)
        return replace(
            profile,
            token_sums=cast(Doubles, prior * profile.token_sums + sums[_TOKENS]),
            second_sums=cast(Doubles, timed_prior * profile.second_sums + sums[_SECONDS]),
            answers=cast(Doubles, prior * profile.answers + sums[_WEIGHT]),
            timed_answers=cast(Doubles, timed_prior * profile.timed_answers + sums[_WEIGHT]),
        )

    def forget(self, model: str) -> None:
        """After a model was removed or changed."""
        self._sums.pop(model, None)


def _prior(answers: Doubles) -> float:
    """What one validation answer counts: all together no more than PRIOR_ANSWERS."""
    return min(1.0, PRIOR_ANSWERS / max(float(answers.sum()), 1e-9))
