from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any, TypeVar

from router_core.evaluation.curves import Difference
from router_core.evaluation.study import Estimate, MethodMetrics, Protocol, Results
from router_core.types import Doubles

_STUDIED = "trial", "best new model", " The others are averaged."

_DEPLOYED = "bootstrap draw", "best model", " The intervals are of the others."


def median_labels(results: Results) -> int:
    """The N that is shown where there is room for one."""
    return results.protocol.labels[len(results.protocol.labels) // 2]


def columns(results: Results) -> list[str]:
    """What the columns of a table by N are called."""
    return [f"N = {labels}" for labels in results.protocol.labels]


def protocol_sentences(results: Results) -> list[str]:
    """What it was run on, how, and what a cost and an interval are."""
    protocol = results.protocol
    what = f"{protocol.outcomes}: {protocol.prompts:,} prompts, {len(protocol.models)} models."
    how = _study(protocol) if is_study(results) else _deployed(protocol)
    return [what, *how, _costs(protocol), _intervals(results)]


def is_study(results: Results) -> bool:
    """Not of deployed profiles: those are as they are, and there is nothing to choose prompts for."""
    return bool(results.chosen)


def _study(protocol: Protocol) -> list[str]:
    trials = "one trial" if protocol.trials == 1 else f"each of {protocol.trials} trials"
    who = (
        f"{protocol.new_models} models are new and {protocol.known_models} are known"
        if protocol.known_models
        else f"all {protocol.new_models} models are new, and none is known"
    )
    return [
        f"In {trials} (seed {protocol.seed}) {who}.",
        "A new model is seen through its answers to N prompts;"
        f" {protocol.test_prompts:,} others are routed, among the new models.",
    ]


def _deployed(protocol: Protocol) -> list[str]:
    return [
        f"{protocol.test_prompts:,} prompts that all of the models have a score on are routed by the deployed profiles,"
        f" of {protocol.labels[0]} labels on average (N)."
    ]


def _costs(protocol: Protocol) -> str:
    if protocol.measured_lengths:
        return "An answer is billed by its measured length, where the file has it."
    return "The file has no lengths of answers: the prompt alone is billed."


def _intervals(results: Results) -> str:
    protocol = results.protocol
    if not is_study(results):
        return (
            f"In brackets: 95 % intervals, by {protocol.trials} bootstrap draws of the prompts (seed {protocol.seed})."
        )
    alone = " One trial alone has none to speak of." if protocol.trials == 1 else ""
    return f"In brackets: 95 % bootstrap intervals of the mean over trials.{alone}"


def area_is_known(results: Results) -> bool:
    """Else there is nothing to draw, whatever the method and N: all lie between the same models."""
    return not all(isnan(figures.area.mean) for figures in results.methods[OURS].values())


def undefined_sentence(results: Results) -> str:
    """Empty where every trial defines Area. It lies between two models: with one that is both there is nothing."""
    of = results.protocol.trials
    defined = min(figures.area.trials for figures in results.methods[OURS].values())
    if defined >= of:
        return ""
    kind, best, rest = _STUDIED if is_study(results) else _DEPLOYED
    many = f"{of - defined} of {of} {kind}{'s' if of > 1 else ''}"
    return f"Area is undefined in {many}: the {best} was the cheapest.{rest if defined else ''}"


UNKNOWN = "–"


def number(value: float, form: str) -> str:
    return UNKNOWN if isnan(value) else format(value, form)


def points(found: Estimate) -> str:
    """A mean score ×100 with its interval."""
    return _with_interval(100 * found.mean, 100 * found.low, 100 * found.high, ".1f")


def points_apart(found: Difference) -> str:
    """A difference of mean scores ×100 with its interval; two decimals, since it is smaller and surer."""
    return _with_interval(100 * found.mean, 100 * found.low, 100 * found.high, "+z.2f")


def ratio(found: Estimate) -> str:
    return _with_interval(found.mean, found.low, found.high, ".2f")


def percent(found: Estimate) -> str:
    return _with_interval(found.mean, found.low, found.high, "+z.1%")


def _with_interval(mean: float, low: float, high: float, form: str) -> str:
    return UNKNOWN if isnan(mean) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


@dataclass(frozen=True, slots=True)
class MethodStyle:
    """The colours tell apart on white and on near black, also for most who see few colours."""

    label: str
    short: str
    """For where there is little room."""
    colour: str
    dashes: tuple[float, ...] = ()
    """On and off, in line widths; () is a whole line."""


OURS = "ours"

# By the ids of router_core.evaluation.study.METHODS, in the same order.
LOOKS: Mapping[str, MethodStyle] = {
    "cheapest": MethodStyle("cheapest model", "cheapest", "#8a8f98", (1.0, 1.5)),
    "best_single": MethodStyle("best single model", "best single", "#6b7280", (6.0, 1.5, 1.0, 1.5)),
    "random_mix": MethodStyle("random mix (ZeroRouter)", "random mix", "#8a8f98", (4.0, 2.0)),
    "knn": MethodStyle("k nearest neighbours", "k-NN", "#0e9f8e"),
    "kmeans_raw": MethodStyle("K-means, raw (UniRoute)", "K-means raw", "#2f7ed8"),
    "kmeans_laplace": MethodStyle("K-means, Laplace", "K-means Laplace", "#5cb3e6", (5.0, 1.5)),
    "learned_map": MethodStyle("LearnedMap (UniRoute)", "LearnedMap", "#a668d6"),
    "hiershrink": MethodStyle("HierShrink", "HierShrink", "#c79a14"),
    "ridge": MethodStyle("ridge regression", "ridge", "#c2679b", (5.0, 1.5)),
    OURS: MethodStyle("ours", "ours", "#e4572e"),
    "oracle": MethodStyle("oracle", "oracle", "#8a8f98", (1.5, 2.5)),
}

# The rivals: like ours they estimate errors prompt by prompt, from the same answers.
ESTIMATING = ("knn", "kmeans_raw", "kmeans_laplace", "learned_map", "hiershrink", "ridge")


def best_rivals(results: Results) -> list[str]:
    """Those of the estimating methods that were run: none, where profiles as deployed were."""
    return [method for method in ESTIMATING if method in results.differences]


def best_rival_of_each_size(results: Results) -> dict[int, str]:
    """N → the rival with the smallest paired difference; an N with none that is known is left out."""
    found = {}
    for labels in results.protocol.labels:
        apart = {method: results.differences[method][labels].mean for method in best_rivals(results)}
        known = {method: mean for method, mean in apart.items() if not isnan(mean)}
        if known:
            found[labels] = min(known, key=known.__getitem__)
    return found


def headline(results: Results) -> str:
    """In one sentence, for the N in the middle; empty where nothing is known of it."""
    labels, best = median_labels(results), best_rival_of_each_size(results)
    if labels not in best:
        return ""
    apart = results.differences[best[labels]][labels]
    return (
        f"With {labels} labels, the Area of ours is {points(results.methods[OURS][labels].area)}. Less that of the best"
        f" rival there, {LOOKS[best[labels]].label}, it is {points_apart(apart)}."
    )


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
