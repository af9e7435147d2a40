"""A study as JSON. Unknown is null; areas, their differences and peaks are ×100, all other figures as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isnan
from typing import Any, TypeVar

from router_core.evaluation.intervals import Difference
from router_core.evaluation.results import Estimate, MethodFigures, Results
from router_core.types import Doubles

_Fields = dict[str, float | None]
_Found = TypeVar("_Found")
_Shown = TypeVar("_Shown")


def document(results: Results) -> dict[str, Any]:
    return {
        "protocol": _protocol(results),
        "methods": _by_labels(results.methods, _figures),
        "differences": _by_labels(results.differences, _difference),
        "chosen": {str(labels): _chosen(results, labels) for labels in results.chosen},
        "curves": _by_labels(results.methods, _curve),
    }


def _by_labels(
    methods: Mapping[str, Mapping[int, _Found]], shown: Callable[[_Found], _Shown]
) -> dict[str, dict[str, _Shown]]:
    return {
        method: {str(labels): shown(found) for labels, found in by_labels.items()}
        for method, by_labels in methods.items()
    }


def _protocol(results: Results) -> dict[str, Any]:
    protocol = results.protocol
    return asdict(protocol) | {"models": list(protocol.models), "labels": list(protocol.labels)}


def _figures(figures: MethodFigures) -> _Fields:
    return {
        **_estimate("area", figures.area, 100.0),
        "area_trials": figures.area.trials,
        **_estimate("paper_area", figures.paper_area, 100.0),
        **_estimate("paper_area_half", figures.paper_area_half, 100.0),
        **_estimate("qnc", figures.qnc),
        "reached": known(figures.reached),
        **_estimate("peak", figures.peak, 100.0),
        **_estimate("perf_gain", figures.perf_gain),
        **_estimate("cost_save", figures.cost_save),
    }


def _estimate(name: str, found: Estimate | Difference, scale: float = 1.0) -> _Fields:
    return {
        name: known(scale * found.mean),
        f"{name}_low": known(scale * found.low),
        f"{name}_high": known(scale * found.high),
    }


def _difference(found: Difference) -> _Fields:
    return {"mean": known(100 * found.mean), "low": known(100 * found.low), "high": known(100 * found.high)}


def _chosen(results: Results, labels: int) -> _Fields:
    area, difference = results.chosen[labels], results.chosen_differences[labels]
    return _estimate("area", area, 100.0) | _estimate("difference", difference, 100.0)


def _curve(figures: MethodFigures) -> dict[str, list[float | None]]:
    return {"costs": all_known(figures.curve.costs), "qualities": all_known(100 * figures.curve.qualities)}


def known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if isnan(value) else float(value)


def all_known(values: Doubles) -> list[float | None]:
    return [known(value) for value in values.tolist()]
