"""What routing saved, from the decisions that were kept: spending against what the baseline of each would have cost.

The baseline stands on each decision: the model that was asked for by name, or else the best on average that its key may
use. Only requests of which both costs are known are compared; the others are counted, so that nothing is left out in
silence. Failed attempts are part of the cost. Sums are in whole picodollars, and so exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from router_core.pricing import PICO, picousd

# Groups of one table. What comes after is summed under OTHERS.
MAX_GROUPS = 1000

OTHERS = "(others)"

Decision = Mapping[str, Any]


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
    _cost: int = 0
    _compared_cost: int = 0
    _baseline: int = 0
    _failed: int = 0
    _error: float = 0.0
    _baseline_error: float = 0.0

    def add(self, decision: Decision) -> None:
        self.requests += 1
        self.estimated += bool(decision["cost_estimated"])
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
        errors = {row["model"]: row["expected_error"] for row in decision["candidates"]}
        error, other = errors.get(decision["model"]), errors.get(baseline["model"])
        if error is not None and other is not None:
            self.judged += 1
            self._error += error
            self._baseline_error += other

    def to_json(self) -> dict[str, Any]:
        saved = self._baseline - self._compared_cost
        return {
            "requests": self.requests,
            "unpriced": self.unpriced,
            "estimated": self.estimated,
            "cost_usd": self._cost / PICO,
            "failed_attempts_cost_usd": self._failed / PICO,
            "compared": self.compared,
            "compared_cost_usd": self._compared_cost / PICO,
            "baseline_usd": self._baseline / PICO,
            "saved_usd": saved / PICO,
            "saved_share": saved / self._baseline if self._baseline else None,
            "judged": self.judged,
            "expected_error": self._error / self.judged if self.judged else None,
            "baseline_expected_error": self._baseline_error / self.judged if self.judged else None,
        }


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

    def __init__(self) -> None:
        self._total = Savings()
        self._groups: dict[str, dict[str, Savings]] = {name: {} for name in GROUPINGS}

    def add(self, decision: Decision) -> None:
        self._total.add(decision)
        for name, group_of in GROUPINGS.items():
            found = self._groups[name]
            for group in group_of(decision):
                known = group if group in found or len(found) < MAX_GROUPS else OTHERS
                found.setdefault(known, Savings()).add(decision)

    def to_json(self) -> dict[str, Any]:
        """Return the sums under `total`, and under `by`, the grouping and the group."""
        by = {name: {group: found[group].to_json() for group in sorted(found)} for name, found in self._groups.items()}
        return {"total": self._total.to_json(), "by": by}


def savings_report(decisions: Iterable[Decision]) -> dict[str, Any]:
    report = SavingsReport()
    for decision in decisions:
        report.add(decision)
    return report.to_json()
