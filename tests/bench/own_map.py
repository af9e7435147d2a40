"""Print what a map of one's own gains: `python -m tests.bench.own_map OUTCOMES.jsonl.gz PRICES.json [DRAWS]`.

Traffic of one kind is the prompts of an outcomes file that lie nearest to one of them, drawn anew each time. Two thirds
of it are what is known: a map is fitted to them, and models are measured on some of them, on this map and on the
built-in one. The last third is routed by both. The gain is in Area, as `uniroute evaluate` has it, in points.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from router_core.artifact import builtin_map
from router_core.embedding import static_embedder
from router_core.estimators import POOLED
from router_core.evaluation.curves import Curve, area
from router_core.fitting import EmbeddedPrompts, fit_embedded
from router_core.types import Doubles, Floats
from tests.bench.error_bounds import outcomes_of
from tests.conftest import CACHE

SIZES, LABELS, DRAWS = (5800, 3000, 1500, 700), (60, 200), 40

LAMBDAS = np.concatenate(([0.0], np.geomspace(0.01, 20.0, 60)))

# Clusters of the own map, and the prompts that each should have.
MAX_CLUSTERS, MIN_CLUSTERS, PER_CLUSTER = 64, 8, 30


def gain(vectors: Floats, errors: Doubles, costs: Doubles, size: int, labels: int, seed: int) -> tuple[float, float]:
    """Return the distance of the traffic from the built-in map's prompts, and what a map of its own gains."""
    rng = np.random.default_rng(seed)
    near = np.argsort(-(vectors @ vectors[rng.integers(len(vectors))]))[:size]
    near = rng.permutation(near)
    known, routed = near[: 2 * len(near) // 3], near[2 * len(near) // 3 :]
    asked = rng.choice(known, labels, replace=False)
    theirs = builtin_map()
    clusters = min(MAX_CLUSTERS, max(MIN_CLUSTERS, len(known) // PER_CLUSTER))
    own = fit_embedded(
        EmbeddedPrompts(["a prompt"] * len(known), vectors[known], theirs.embedder_id), clusters, seed=seed
    )
    areas = []
    for cluster_map in (theirs, own):
        weights = cluster_map.assign(vectors[asked]).dense(cluster_map.size)
        rates = POOLED.rates(errors[asked].T @ weights, np.ones_like(errors[asked]).T @ weights, cluster_map)
        expected = cluster_map.assign(vectors[routed]).dense(cluster_map.size) @ rates.T
        points = []
        for lambda_ in LAMBDAS:
            chosen = np.argmin(expected + lambda_ * costs, axis=1)
            points.append((costs[chosen].mean(), 1.0 - errors[routed, chosen].mean()))
        areas.append(area(Curve(*np.array(points).T), float(costs.min()), float(costs.max())))
    shares = theirs.prompt_shares
    assert shares is not None
    mix = theirs.assign(vectors[near]).dense(theirs.size).mean(axis=0)
    return 0.5 * float(np.abs(mix - shares).sum()), 100 * (areas[1] - areas[0])


def lines(outcomes: Path, prices: Path, draws: int) -> Iterator[str]:
    texts, errors, costs = outcomes_of(outcomes, prices)
    vectors = static_embedder(CACHE).embed(texts)
    yield "prompts labels  distance  gain in points of Area (standard error)"
    for size in SIZES:
        for labels in LABELS:
            found = np.array(
                [gain(vectors, errors, costs, min(size, len(texts)), labels, seed) for seed in range(draws)]
            )
            distance, gained = found.mean(axis=0)
            yield f"{size:7} {labels:6} {distance:9.2f}  {gained:+.2f} ({found[:, 1].std() / np.sqrt(draws):.2f})"


if __name__ == "__main__":
    for line in lines(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else DRAWS):
        print(line, flush=True)  # noqa: T201
