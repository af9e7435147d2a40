from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any, TypeVar

from proxy.cli.report.format import (
    LOOKS,
    OURS,
    best_rival_of_each_size,
    columns,
    median_labels,
    number,
    points,
    points_apart,
    protocol_sentences,
    undefined_sentence,
)
from router_core.evaluation.curves import Difference
from router_core.evaluation.study import Estimate, MethodMetrics, Results
from router_core.types import Doubles

FIGURES: Mapping[str, Callable[[MethodMetrics], str]] = {
    "QNC": lambda figures: number(figures.qnc.mean, ".2f"),
    "reached": lambda figures: number(figures.reached, ".0%"),
    "peak": lambda figures: number(100 * figures.peak.mean, ".1f"),
    "PerfGain": lambda figures: number(figures.perf_gain.mean, "+z.1%"),
    "CostSave": lambda figures: number(figures.cost_save.mean, "+z.1%"),
    "paper's Area": lambda figures: number(100 * figures.paper_area.mean, ".1f"),
    "Area(50 %)": lambda figures: number(100 * figures.paper_area_half.mean, ".1f"),
}

MEANINGS = (
    "QNC: the least cost that has the best single model's quality, as a share of that model's, where it is reached.",
    "Peak: the best quality ×100, whatever it costs. PerfGain, CostSave: over the best single model. The paper's Area",
    "is UniRoute's own, ×100, over all costs up to the dearest model's, or up to half of it.",
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells below the names of their columns."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str


def summary(results: Results, labels: int | None = None) -> Iterator[str | Table]:
    """Yield the lines and tables that a terminal shows.

    Args:
        labels: the N of the table that has room for one; the middle one by default.
    """
    yield from protocol_sentences(results)
    yield ""
    yield _areas(results)
    if undefined := undefined_sentence(results):
        yield undefined
    yield ""
    yield _differences(results)
    yield ""
    yield _other_figures(results, labels or median_labels(results))
    yield from MEANINGS
    if results.chosen:
        yield ""
        yield _chosen_prompts(results)


def _areas(results: Results) -> Table:
    rows = [
        (LOOKS[method].label, *(points(figures.area) for figures in by_labels.values()))
        for method, by_labels in results.methods.items()
    ]
    title = "Area ×100: mean quality over all budgets between the cheapest and the best single model"
    return Table(("method", *columns(results)), rows, title)


def _differences(results: Results) -> Table:
    best = best_rival_of_each_size(results)

    def cell(method: str, labels: int, found: Difference) -> str:
        # The mark of the best rival is as wide as no mark, so that figures stay below each other.
        return points_apart(found) + (" *" if best.get(labels) == method else "  ")

    rows = [
        (f"less {LOOKS[method].label}", *(cell(method, labels, found) for labels, found in by_labels.items()))
        for method, by_labels in results.differences.items()
    ]
    if best:
        rows += _best_rows(results, best)
    wide = [f"{column}  " for column in columns(results)]
    return Table(("ours", *wide), rows, "Area ×100 of ours, less that of each other, on the same test prompts")


def _best_rows(results: Results, best: Mapping[int, str]) -> list[tuple[str, ...]]:
    """Repeat the best rivals' rows at the end, for readers of the last lines only."""
    found = {labels: results.differences[method][labels] for labels, method in best.items()}
    every = results.protocol.labels
    return [
        ("* the best rival", *(f"{LOOKS[best[n]].short}  " if n in best else "–  " for n in every)),
        ("less the best rival", *(f"{points_apart(found[n])}  " if n in best else "–  " for n in every)),
    ]


def _other_figures(results: Results, labels: int) -> Table:
    rows = [
        (LOOKS[method].label, *(cell(by_labels[labels]) for cell in FIGURES.values()))
        for method, by_labels in results.methods.items()
    ]
    return Table((f"N = {labels}", *FIGURES), rows, "The other figures; their intervals are in --json")


def _chosen_prompts(results: Results) -> Table:
    random = results.methods[OURS]
    rows = [
        (f"{labels}", points(found), points(random[labels].area), points_apart(results.chosen_differences[labels]))
        for labels, found in results.chosen.items()
    ]
    title = "Area ×100 of ours on N prompts chosen as `uniroute models add` does, and on random ones"
    return Table(("N", "chosen", "random", "chosen less random"), rows, title)


_Fields = dict[str, float | None]

_Found = TypeVar("_Found")

_Shown = TypeVar("_Shown")


def document(results: Results) -> dict[str, Any]:
    """Return everything that `--json` prints."""
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


def _figures(figures: MethodMetrics) -> _Fields:
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


def _curve(figures: MethodMetrics) -> dict[str, list[float | None]]:
    return {"costs": all_known(figures.curve.costs), "qualities": all_known(100 * figures.curve.qualities)}


def known(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if isnan(value) else float(value)


def all_known(values: Doubles) -> list[float | None]:
    return [known(value) for value in values.tolist()]
