from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, cast

import numpy as np

from router_core.profiles import Profile
from router_core.types import Doubles, Floats, Indices

# Answers of one model after which an answer counts half.
HALF_LIFE = 200.0

# The weight of all validation answers of a profile together, in live answers: they are shorter than real ones.
PRIOR_ANSWERS = 20.0

# Answers of one model that are added up together, unless the sums are read before.
BATCH_SIZE = 128

_TOKENS, _SECONDS, _WEIGHT = range(3)

# Cluster ids, their weights, tokens, seconds.
_Answer = tuple[Any, Any, float, float]


class TrafficStats:
    """Lengths and durations of live answers, by model and cluster, as sums that decay with each answer.

    `observe` is called on the event loop, `blend_into` in the thread that builds a snapshot.
    """

    def __init__(self, clusters: int, half_life: float = HALF_LIFE) -> None:
        self._clusters = clusters
        self._keep = 0.5 ** (1.0 / half_life)
        self._lock = Lock()
        self._sums: dict[str, Doubles] = {}
        # Not in the sums yet: adding many at once takes a tenth of the time.
        self._new: dict[str, list[_Answer]] = {}
        # Answers ever observed, by which the snapshot watcher sees whether there are new ones.
        self.observed = 0

    def observe(
        self,
        model: str,
        cluster_ids: Sequence[int] | Indices,
        weights: Sequence[float] | Floats,
        tokens: float | None,
        seconds: float,
    ) -> None:
        """Count one answer of `model` to a prompt with these cluster weights; nothing if its tokens are unknown.

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

    def blend_into(self, model: str, profile: Profile) -> Profile:
        """Return the profile with live answers added to its tokens and seconds; errors and labels stay as measured."""
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
        """Forget the answers of a model that was removed or changed."""
        with self._lock:
            self._sums.pop(model, None)
            self._new.pop(model, None)

    def _count(self, model: str) -> None:
        """Add the new answers to the sums: each takes a little from all before it."""
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
    """Return the weight of one validation answer: all together weigh no more than PRIOR_ANSWERS."""
    return min(1.0, PRIOR_ANSWERS / max(float(answers.sum()), 1e-9))
