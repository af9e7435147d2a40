from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan

from router_core.evaluation.curves import Difference
from router_core.evaluation.study import Estimate, Protocol, Results

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
"""By the ids of router_core.evaluation.study.METHODS, in the same order."""

ESTIMATING = ("knn", "kmeans_raw", "kmeans_laplace", "learned_map", "hiershrink", "ridge")
"""The rivals: like ours they estimate errors prompt by prompt, from the same answers."""


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
