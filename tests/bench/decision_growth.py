"""Measure one decision against the number of models and of clusters: `python -m tests.bench.decision_growth`.

A decision assigns a vector to clusters, rules models out and scores the others. The last column embeds the text too,
with the static embedder. Medians over prompts, one after the other, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from proxy.cli import console
from router_core.clustering import ClusterMap
from router_core.eligibility import eligible
from router_core.embedding import StaticEmbedder, static_embedder
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.scoring import ScoringParams, rank
from router_core.types import Floats, Price, Requirements
from tests.bench.prompts import generated_prompts

MODELS = (10, 100, 1_000)
CLUSTERS = (16, 64, 256, 1_024)
NEEDS = Requirements(prompt_tokens=200)
T = TypeVar("T")


def main() -> None:
    arguments = _arguments()
    texts = list(generated_prompts(arguments.prompts))
    rows = []
    with tempfile.TemporaryDirectory(prefix="uniroute-bench-") as folder:
        embedder = static_embedder(arguments.data_dir or Path(folder), console.echo_err)
        for clusters in CLUSTERS:
            for models in MODELS:
                decided, embedded = measure(texts, embedder, a_pool(models, a_map(clusters, embedder)))
                rows.append((f"{models:,}", f"{clusters:,}", f"{decided:.3f}", f"{embedded:.3f}"))
    columns = ("models", "K", "decide ms", "embed and decide ms")
    console.table(columns, rows, title=f"one decision, median of {len(texts):,} prompts")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--data-dir", type=Path, help="where an embedding table is already")
    return parser.parse_args()


def a_map(clusters: int, embedder: StaticEmbedder) -> ClusterMap:
    centroids = np.random.default_rng(clusters).normal(size=(clusters, embedder.dimension))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return ClusterMap(centroids.astype(np.float32), embedder_id=embedder.id)


def a_pool(models: int, cluster_map: ClusterMap) -> tuple[Pool, ClusterMap]:
    rng = np.random.default_rng(models)
    candidates = []
    for number in range(models):
        rates = {"errors": rng.uniform(size=cluster_map.size).tolist(), "labels": [2.0] * cluster_map.size}
        profile = Profile.from_json({"map": cluster_map.id, **rates, "mean_output_tokens": 200.0, "mean_seconds": 1.0})
        candidates.append(Candidate(f"model-{number}", profile, Price(*rng.uniform(1e-7, 1e-5, size=2).tolist())))
    return Pool.build(candidates, cluster_map), cluster_map


def decide(pool: Pool, cluster_map: ClusterMap, vector: Floats) -> str:
    return rank(eligible(pool, NEEDS), cluster_map.assign(vector), NEEDS, ScoringParams()).chosen


def measure(texts: Sequence[str], embedder: StaticEmbedder, over: tuple[Pool, ClusterMap]) -> tuple[float, float]:
    """Return median milliseconds without and with embedding."""
    vectors = [embedder.embed([text]) for text in texts]
    decision = partial(decide, *over)
    return _median_ms(decision, vectors), _median_ms(lambda text: decision(embedder.embed([text])), texts)


def _median_ms(work: Callable[[T], object], over: Sequence[T]) -> float:
    work(over[0])
    times = []
    for each in over:
        started = time.perf_counter()
        work(each)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
