"""Which rival comes closest to ours, at each N. Uncertain as it is: the best of several looks better than it is."""

from __future__ import annotations

from math import isnan

from proxy.cli.study.names import ESTIMATING, LOOKS, OURS
from proxy.cli.study.numbers import points, points_apart
from proxy.cli.study.words import middle
from router_core.evaluation.results import Results


def rivals(results: Results) -> list[str]:
    """Those of the estimating methods that were run: none, where profiles as deployed were."""
    return [method for method in ESTIMATING if method in results.differences]


def best_rivals(results: Results) -> dict[int, str]:
    """N → the rival with the smallest paired difference; an N with none that is known is left out."""
    found = {}
    for labels in results.protocol.labels:
        apart = {method: results.differences[method][labels].mean for method in rivals(results)}
        known = {method: mean for method, mean in apart.items() if not isnan(mean)}
        if known:
            found[labels] = min(known, key=known.__getitem__)
    return found


def finding(results: Results) -> str:
    """In one sentence, for the N in the middle; empty where nothing is known of it."""
    labels, best = middle(results), best_rivals(results)
    if labels not in best:
        return ""
    apart = results.differences[best[labels]][labels]
    return (
        f"With {labels} labels, the Area of ours is {points(results.methods[OURS][labels].area)}. Less that of the best"
        f" rival there, {LOOKS[best[labels]].label}, it is {points_apart(apart)}."
    )
