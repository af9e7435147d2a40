from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, cast

import numpy as np

from router_core.profiles import Profile
from router_core.types import Doubles, Floats, Indices

HALF_LIFE = 200.0
"""Answers of one model after which an answer counts half."""

PRIOR_ANSWERS = 20.0
"""How many live answers the validation answers of a profile weigh, all together: they are shorter than real ones."""

BATCH_SIZE = 128
"""Answers of one model that are added up together, unless somebody asks before."""

_TOKENS, _SECONDS, _WEIGHT = range(3)

_Answer = tuple[Any, Any, float, float]
"""Cluster ids, their weights, tokens, seconds."""


class TrafficStats:
    """`observe` after each answer, on the event loop; `blended` when a state is built, in a thread."""

    def __init__(self, clusters: int, half_life: float = HALF_LIFE) -> None:
        self._clusters = clusters
        self._keep = 0.5 ** (1.0 / half_life)
        self._lock = Lock()
        self._sums: dict[str, Doubles] = {}
        self._new: dict[str, list[_Answer]] = {}
        """Not in the sums yet: many at once take a tenth of the time."""
        self.observed = 0
        """Answers ever observed: who builds states compares it with what it last saw."""

    def observe(
        self,
        model: str,
        cluster_ids: Sequence[int] | Indices,
        weights: Sequence[float] | Floats,
        tokens: float | None,
        seconds: float,
    ) -> None:
        """Count one answer of `model` to a prompt with these cluster weights. Without a token count it is left out.

        Arrays are kept for a while, and must not be written to.
        """
        if tokens is None:
            return
        with self._lock:
            answers = self._new.setdefault(model, [])
            answers.append((cluster_ids, weights, tokens, seconds))
            self.observed += 1
            if len(answers) >= BATCH_SIZE:
                self._count(model)

    def blended(self, model: str, profile: Profile) -> Profile:
        """The profile with live answers added to its tokens and seconds; errors and labels are as measured."""
        with self._lock:
            self._count(model)
            sums = self._sums.get(model)
            if sums is None:
                return profile
            sums = sums.copy()
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
        with self._lock:
            self._sums.pop(model, None)
            self._new.pop(model, None)

    def _count(self, model: str) -> None:
        """What is new of it: each answer takes a little from all before it."""
        answers = self._new.pop(model, None)
        if not answers:
            return
        ids, weights, tokens, seconds = zip(*answers, strict=True)
        kept = self._keep ** np.arange(len(answers) - 1, -1, -1.0)
        counted = np.array([tokens, seconds, np.ones(len(answers))]) * kept
        shares, places = np.concatenate(weights), np.concatenate(ids)
        sums = self._sums.setdefault(model, np.zeros((3, self._clusters)))
        sums *= self._keep ** len(answers)
        for row, amounts in zip(sums, np.repeat(counted, [len(each) for each in ids], axis=1), strict=True):
            row += np.bincount(places, weights=amounts * shares, minlength=self._clusters)


def _prior(answers: Doubles) -> float:
    """What one validation answer counts: all together no more than PRIOR_ANSWERS."""
    return min(1.0, PRIOR_ANSWERS / max(float(answers.sum()), 1e-9))
