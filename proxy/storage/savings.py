"""What routing saved, from the decisions that were kept: spending against what the baseline of each would have cost.

The baseline stands on each decision: the model that was asked for by name, or else the best on average that its key may
use. Only requests of which both costs are known are compared; the others are counted, so that nothing is left out in
silence. Failed attempts are part of the cost, and what measuring models cost is taken off what was saved. Sums are in
whole picodollars, and so exact.

Expected errors are those of the moment of each choice. A model that was chosen by its score looks better than it is,
since the same labels chose and judge it: what `SelectionBias` finds is added, and the lower bound is without it. The
bounds do not shrink with the number of requests: all requests of a cluster share the error of the profile that they
were routed by. So each model's requests are summed by cluster, and such a mix is as certain as the labels behind it;
see `mix_deviations`. A profile of another map, or of a model that is gone, counts as one without labels. Labels are
those of now: of a model that was measured again since, they may be more or fewer than when it was chosen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from router_core.decision import Z_90, mix_deviations, wilson_interval
from router_core.estimators import SHRINKAGE
from router_core.pricing import PICO, picousd
from router_core.scoring import TIE_TOLERANCE
from router_core.selection_bias import SelectionBias

# Groups of one table. What comes after is summed under OTHERS.
MAX_GROUPS = 1000

OTHERS = "(others)"

# Decisions that are on the way to Redis are in the sums of the day a moment earlier or later.
MIN_COVERED = 0.995

Decision = Mapping[str, Any]

# The cluster of prompts that are in none: of those without text, a model's mean error is expected.
_ALL_CLUSTERS = -1


@dataclass(frozen=True, slots=True)
class MeasuredLabels:
    """The labels behind one model's profile as it is now."""

    map_id: str
    labels: tuple[float, ...]
    """By cluster."""


Evidence = Mapping[str, MeasuredLabels]


@dataclass(frozen=True, slots=True)
class ExpectedErrors:
    """What was expected of one decision. None: the model was not scored."""

    routed: float | None
    """Of the model that answered."""
    baseline: float | None
    bias: float
    """How much higher the former is, judged by labels that did not choose the model."""

    @classmethod
    def of(cls, decision: Decision, bias: SelectionBias | None) -> ExpectedErrors:
        errors = {row["model"]: row["expected_error"] for row in decision["candidates"]}
        routed, baseline = errors.get(decision["model"]), errors.get(decision["baseline"]["model"])
        return cls(routed, baseline, 0.0 if bias is None else _bias_of(decision, bias))


def _bias_of(decision: Decision, bias: SelectionBias) -> float:
    """Return the bias of a choice by score; 0 for one that other reasons made, or whose profiles are gone."""
    candidates, clusters = decision["candidates"], decision["clusters"]
    if decision["reason"] != "scored" or decision["map"] != bias.map_id or not clusters:
        return 0.0
    if candidates[0]["model"] != decision["model"] or candidates[0]["score"] == candidates[0]["cost"]:  # by cost alone
        return 0.0
    if any(row["trajectory_error"] for row in candidates):  # labels alone did not make it
        return 0.0
    found = bias.of(
        [row["model"] for row in candidates],
        [row["cost"] for row in candidates],
        decision["lambda"],
        TIE_TOLERANCE,
        {cluster["id"]: cluster["weight"] for cluster in clusters},
    )
    return found or 0.0


@dataclass
class ErrorMix:
    """Expected errors of some requests, each of one model, and how these spread over the clusters."""

    _weights: defaultdict[tuple[str, str], defaultdict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    """(model, map) → cluster → Σ of the prompts' weights."""
    _errors: defaultdict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    """(model, map) → requests, and the sum of their expected errors."""

    def add(self, model: str, error: float, decision: Decision, sign: int = 1) -> None:
        of = model, decision["map"]
        weights = self._weights[of]
        for cluster in decision["clusters"]:
            weights[cluster["id"]] += sign * cluster["weight"]
        if not decision["clusters"]:
            weights[_ALL_CLUSTERS] += sign
        counted = self._errors[of]
        counted[0] += 1
        counted[1] += error

    def deviations(self, requests: int, evidence: Evidence) -> list[float]:
        """Return the standard deviation that each model adds to the mean of so many requests."""
        return [
            self._deviation(of, {cluster: weight / requests for cluster, weight in weights.items()}, evidence)
            for of, weights in self._weights.items()
        ]

    def _deviation(self, of: tuple[str, str], weights: Mapping[int, float], evidence: Evidence) -> float:
        model, map_id = of
        requests, errors = self._errors[of]
        measured = evidence.get(model)
        labels = measured.labels if measured is not None and measured.map_id == map_id else ()
        total = sum(labels)
        # What the model has in clusters that no prompt was in counts for the whole of the mix.
        counts = [total if k == _ALL_CLUSTERS else labels[k] if 0 <= k < len(labels) else 0.0 for k in weights]
        columns = [[*weights.values(), 0.0], [errors / requests] * (len(counts) + 1)]
        behind = [*counts, max(total - sum(counts), 0.0)]
        mix, rates = (np.array([column]) for column in columns)
        return float(mix_deviations(mix, rates, np.array([behind]) + SHRINKAGE)[0])


@dataclass
class Savings:
    """The sums of some requests."""

    requests: int = 0
    unpriced: int = 0
    """Requests of unknown cost."""
    estimated: int = 0
    """Requests whose usage no upstream reported."""
    compared: int = 0
    """Requests of which the cost and that of the baseline are known."""
    judged: int = 0
    """Those of which the expected errors of both models are known."""
    scored: int = 0
    """Requests that feedback speaks of, and of which the expected error is known."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    _cost: int = 0
    _compared_cost: int = 0
    _baseline: int = 0
    _failed: int = 0
    _error: float = 0.0
    _bias: float = 0.0
    _baseline_error: float = 0.0
    _observed: float = 0.0
    _observed_expected: float = 0.0
    _routed_mix: ErrorMix = field(default_factory=ErrorMix)
    _baseline_mix: ErrorMix = field(default_factory=ErrorMix)
    _difference_mix: ErrorMix = field(default_factory=ErrorMix)

    def add(self, decision: Decision, errors: ExpectedErrors) -> None:
        self.requests += 1
        self.estimated += bool(decision["cost_estimated"])
        usage = decision["usage"]
        self.prompt_tokens += usage["prompt_tokens"] or 0
        self.cached_tokens += usage["cached_tokens"] or 0
        self.output_tokens += usage["output_tokens"] or 0
        if decision["score"] is not None and errors.routed is not None:
            self.scored += 1
            self._observed += 1.0 - decision["score"]
            self._observed_expected += errors.routed + errors.bias
        cost, baseline = decision["cost_usd"], decision["baseline"]
        if cost is None:
            self.unpriced += 1
            return
        self._cost += picousd(cost)
        self._failed += picousd(decision["failed_attempts_cost_usd"] or 0.0)
        if baseline["cost_usd"] is None:
            return
        self.compared += 1
        self._compared_cost += picousd(cost)
        self._baseline += picousd(baseline["cost_usd"])
        if errors.routed is not None and errors.baseline is not None:
            self._judge(decision, errors.routed, errors.baseline, errors.bias)

    def _judge(self, decision: Decision, error: float, other: float, bias: float) -> None:
        model, baseline = decision["model"], decision["baseline"]["model"]
        self.judged += 1
        self._error += error
        self._bias += bias
        self._baseline_error += other
        self._routed_mix.add(model, error, decision)
        self._baseline_mix.add(baseline, other, decision)
        self._difference_mix.add(model, error, decision)
        self._difference_mix.add(baseline, other, decision, sign=-1)

    def to_json(self, evidence: Evidence) -> dict[str, Any]:
        saved = self._baseline - self._compared_cost
        return {
            "requests": self.requests,
            "unpriced": self.unpriced,
            "estimated": self.estimated,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "cost_usd": self._cost / PICO,
            "failed_attempts_cost_usd": self._failed / PICO,
            "compared": self.compared,
            "compared_cost_usd": self._compared_cost / PICO,
            "baseline_usd": self._baseline / PICO,
            "saved_usd": saved / PICO,
            "saved_share": saved / self._baseline if self._baseline else None,
            "judged": self.judged,
            **self._expected(evidence),
            "scored": self.scored,
            **self._observed_errors(),
        }

    def _expected(self, evidence: Evidence) -> dict[str, float | None]:
        """Return the mean expected errors of what was routed and of the baselines, and their difference, with bounds.

        Models are measured on the same prompts, so that what they get wrong there by chance is alike: the deviations of
        a mean of several models add up at most, and those of a difference cancel out in part.
        """
        n = self.judged
        if not n:
            names = ("expected_error", "baseline_expected_error", "error_difference")
            return {"selection_bias": None, **{f"{name}{end}": None for name in names for end in ("", "_low", "_high")}}
        routed, baseline, difference = (
            mix.deviations(n, evidence) for mix in (self._routed_mix, self._baseline_mix, self._difference_mix)
        )
        error, other, bias = self._error / n, self._baseline_error / n, self._bias / n
        return {
            **_bounded("expected_error", error, bias, sum(routed), least=0.0),
            **_bounded("baseline_expected_error", other, 0.0, sum(baseline), least=0.0),
            **_bounded("error_difference", error - other, bias, math.hypot(*difference), least=-1.0),
            "selection_bias": bias,
        }

    def _observed_errors(self) -> dict[str, float | None]:
        """Return what feedback says of the answers, with bounds, and what was expected of the same answers."""
        if not self.scored:
            return dict.fromkeys(("observed_error", "observed_error_low", "observed_error_high", "scored_expected"))
        rate = self._observed / self.scored
        low, high = wilson_interval(np.array([rate]), np.array([float(self.scored)]))
        return {
            "observed_error": rate,
            "observed_error_low": float(low[0]),
            "observed_error_high": float(high[0]),
            "scored_expected": self._observed_expected / self.scored,
        }


def _bounded(name: str, mean: float, bias: float, deviation: float, *, least: float) -> dict[str, float | None]:
    """Return a mean error with its 90 % bounds: half of the labels may find too much bias."""
    doubt, corrected = Z_90 * deviation, mean + bias
    low, high = min(mean, corrected) - doubt, max(mean, corrected) + doubt
    return {name: corrected, f"{name}_low": max(low, least), f"{name}_high": min(high, 1.0)}


def _cluster(decision: Decision) -> str:
    clusters = decision["clusters"]
    return str(max(clusters, key=lambda each: each["weight"])["name"]) if clusters else "(none)"


# How requests are grouped. A request with several tags counts in each of their groups.
GROUPINGS: Mapping[str, Callable[[Decision], Iterable[str]]] = {
    "day": lambda decision: (decision["ended_at"][:10],),
    "model": lambda decision: (decision["model"],),
    "key": lambda decision: (decision["key"] or "(none)",),
    "tag": lambda decision: decision["tags"] or ("(none)",),
    "cluster": lambda decision: (_cluster(decision),),
    "baseline": lambda decision: (decision["baseline"]["model"] or "(none)",),
}


class SavingsReport:
    """The sums of all decisions, and those by each of GROUPINGS."""

    def __init__(self, bias: SelectionBias | None = None) -> None:
        """`bias`: of the models as they are measured now."""
        self._bias = bias
        self._total = Savings()
        self._groups: dict[str, dict[str, Savings]] = {name: {} for name in GROUPINGS}
        self._first: str | None = None
        self._last: str | None = None

    def add(self, decision: Decision) -> None:
        errors = ExpectedErrors.of(decision, self._bias)
        self._total.add(decision, errors)
        ended_at: str = decision["ended_at"]
        self._first = ended_at if self._first is None else min(self._first, ended_at)
        self._last = ended_at if self._last is None else max(self._last, ended_at)
        for name, group_of in GROUPINGS.items():
            found = self._groups[name]
            for group in group_of(decision):
                known = group if group in found or len(found) < MAX_GROUPS else OTHERS
                found.setdefault(known, Savings()).add(decision, errors)

    def to_json(self, evidence: Evidence, spending: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the sums under `total`, and under `by`, the grouping and the group.

        Args:
            evidence: of the models that are measured now.
            spending: what was spent in the same period in all, and on measuring; None: it is not to be netted out,
                since the decisions are only some of those of the period.
        """
        by = {
            name: {group: found[group].to_json(evidence) for group in sorted(found)}
            for name, found in self._groups.items()
        }
        total = self._total.to_json(evidence)
        net = None if spending is None else (picousd(total["saved_usd"]) - picousd(spending["profiling"]["usd"])) / PICO
        return {
            "first": self._first,
            "last": self._last,
            "total": {**total, "net_saved_usd": net},
            "by": by,
            "spending": spending,
        }


def quality_in_words(total: Mapping[str, Any]) -> str:
    """Say how the expected errors of what was routed compare with those of the baselines."""
    difference = total["error_difference"]
    if difference is None:
        return "Of no request the expected errors of both models are known."
    low, high = total["error_difference_low"], total["error_difference_high"]
    told = (
        f"Of 100 requests, routing is expected to get {_points(difference)} wrong than the baseline"
        f" ({_points(low)} to {_points(high)})"
    )
    if low > 0:
        return f"{told}: it is the price of what was saved."
    if high < 0:
        return f"{told}: it is better, and not by chance of the labels."
    return f"{told}: the labels do not tell the two apart."


def _points(share: float) -> str:
    return f"{abs(100 * share):.1f} {'more' if share >= 0 else 'fewer'}"


def coverage_in_words(report: Mapping[str, Any]) -> str:
    """Say of which part of all spending the decisions are that the report is made from."""
    if report["first"] is None:
        return "No decision is kept of this time."
    first, last = (report[name][:16].replace("T", " ") for name in ("first", "last"))
    told = f"The report is made from the decisions that are kept, of {first} to {last} UTC."
    days = report["spending"]["days"]
    spent = sum(day["cost_usd"] for day in days.values())
    if spent <= 0:
        return told
    by_day = report["by"]["day"]
    share = sum(by_day[day]["cost_usd"] for day in days if day in by_day) / spent
    in_all = f"All requests of the whole days from {min(days)} to {max(days)} together cost ${spent:,.6f}"
    if share < MIN_COVERED:
        limits = "max_decisions, max_decision_bytes and max_decisions_per_s"
        return f"{told} {in_all}, of which these have {share:.1%}: see the settings {limits}."
    return f"{told} {in_all}, and these are all of them."
