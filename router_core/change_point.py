"""Whether a model became worse, or better: the hour from which on its answers are graded otherwise than before.

Compare all labels before an hour with all from it on, for every hour, by the likelihood of one rate against that of
two: the generalised likelihood ratio for a change in a sequence of binomial variables (Hinkley and Hinkley, Biometrika
57, 1970). Each label counts less what was expected of its prompt, so that harder prompts are no change of the model.
Unlike a test of all labels, of which those of before the change dilute the others, it tells within tens of labels.

`python -m tests.bench.quality_alarms` prints how many labels it takes, and how often it is wrong: looked at every hour
for two weeks of labels, about once in 1,000 days of one model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_core.types import Doubles

# The signed root of twice the log likelihood ratio from which on it is told.
THRESHOLD = 4.5

# Labels that each side must have at least.
MIN_LABELS_BEFORE, MIN_LABELS_AFTER = 30.0, 10.0

# With very many labels a smaller change is certain, too, and not worth a look.
MIN_CHANGE = 0.05

TEST = "likelihood ratio of one rate against two, over every hour (Hinkley and Hinkley, 1970)"


@dataclass(frozen=True, slots=True)
class GradedHours:
    """The labels of some hours together."""

    labels: float
    errors: float
    expected: float
    """Σ of the errors that were expected of the same answers."""

    @property
    def rate(self) -> float:
        return self.errors / self.labels if self.labels > 0 else math.nan

    @property
    def expected_rate(self) -> float:
        return self.expected / self.labels if self.labels > 0 else math.nan


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """The hour that parts the labels most."""

    hour: int
    before: GradedHours
    after: GradedHours
    statistic: float
    """The signed root of twice the log likelihood ratio: positive where the model became worse."""
    difference: float
    """By how much the error rate rose, less what was expected of the prompts."""

    @property
    def is_certain(self) -> bool:
        return abs(self.statistic) >= THRESHOLD and abs(self.difference) >= MIN_CHANGE


def change_point(hours: Sequence[int], labels: Doubles, errors: Doubles, expected: Doubles) -> ChangePoint | None:
    """Return the strongest change among (B,) ascending hours; None where no hour has enough labels on both sides."""
    if len(hours) < 2:
        return None
    mean = expected.sum() / max(labels.sum(), 1e-9)
    adjusted = errors - (expected - mean * labels)
    counts, sums = (np.concatenate(([0.0], np.cumsum(each))) for each in (labels, adjusted))
    before, after = counts[1:-1], counts[-1] - counts[1:-1]
    usable = np.flatnonzero((before >= MIN_LABELS_BEFORE) & (after >= MIN_LABELS_AFTER))
    if not usable.size:
        return None
    before, after = before[usable], after[usable]
    wrong_before = np.clip(sums[1:-1][usable], 0.0, before)
    wrong_after = np.clip(sums[-1] - sums[1:-1][usable], 0.0, after)
    together = wrong_before + wrong_after
    gain = _log_likelihood(wrong_before, before) + _log_likelihood(wrong_after, after)
    ratio = np.maximum(2.0 * (gain - _log_likelihood(together, before + after)), 0.0)
    best = int(np.argmax(ratio))
    place = int(usable[best]) + 1
    difference = float(wrong_after[best] / after[best] - wrong_before[best] / before[best])

    def graded(part: slice) -> GradedHours:
        return GradedHours(*(float(each[part].sum()) for each in (labels, errors, expected)))

    return ChangePoint(
        hour=hours[place],
        before=graded(slice(None, place)),
        after=graded(slice(place, None)),
        statistic=math.copysign(math.sqrt(ratio[best]), difference),
        difference=difference,
    )


def _log_likelihood(wrong: Doubles, labels: Doubles) -> Doubles:
    """Return (B,) log likelihoods of `wrong` of `labels` at their own rates."""
    right = labels - wrong
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(part > 0, part * np.log(part / labels), 0.0) for part in (wrong, right)]
    return np.asarray(parts[0] + parts[1])
