from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from proxy.cli.console import Progress, load_embedder, read_prompts
from router_core.clustering import ClusterMap
from router_core.evaluation.outcomes import parse_row, read_rows
from router_core.fitting import EmbeddedPrompts, PromptSample, batches, count_nearest, embed_prompts, sample_prompts
from router_core.text import truncate_middle
from router_core.types import Doubles, Embedder, Indices

PROGRESS_INTERVAL = 10_000  # prompts


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What to fit a cluster map to, and how."""

    paths: Sequence[Path]
    clusters: int
    seed: int
    embedder: str
    data_dir: Path


class FitBackend(Protocol):
    """Where the work of fitting is done. Every backend gives the same map."""

    def sample(self) -> PromptSample: ...

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts: ...

    def count(self, fitted: ClusterMap) -> Indices:
        """Return (K,): how many of all prompts lie nearest to each cluster."""


class LocalBackend:
    """Fit in this process, one step after the other."""

    def __init__(self, plan: FitPlan, bars: Progress) -> None:
        self._plan = plan
        self._bars = bars

    def sample(self) -> PromptSample:
        return sample_prompts(self._read("reading"), self._plan.clusters, seed=self._plan.seed)

    def embed(self, prompts: Sequence[str]) -> EmbeddedPrompts:
        vectors = embed_prompts(prompts, self._embedder, self._bars.update)
        return EmbeddedPrompts(prompts, vectors, self._embedder.id)

    def count(self, fitted: ClusterMap) -> Indices:
        hard = fitted.with_hard_assignment()
        counts = np.zeros(hard.size, dtype=np.int64)
        for batch in batches(self._read("counting")):
            counts += count_nearest(batch, self._embedder, hard)
        return counts

    @cached_property
    def _embedder(self) -> Embedder:
        return load_embedder(self._plan.embedder, self._plan.data_dir)

    def _read(self, label: str) -> Iterator[str]:
        return with_progress(read_prompts(self._plan.paths), label, self._bars)


class ProgressRate:
    """Show how many prompts are done, and how many a second, on a bar without a known end."""

    def __init__(self, label: str, bars: Progress) -> None:
        self._label = label
        self._bars = bars
        self._started = time.monotonic()

    def update(self, done: int, *, all_done: bool = False) -> None:
        per_second = done / max(time.monotonic() - self._started, 1e-3)
        self._bars.update(self._label, done, done if all_done else 0, f"{per_second:,.0f}/s")


def with_progress(texts: Iterable[str], label: str, bars: Progress) -> Iterator[str]:
    """Yield the texts, and show on a bar how many they are."""
    rate, done = ProgressRate(label, bars), 0
    for done, text in enumerate(texts, 1):
        yield text
        if done % PROGRESS_INTERVAL == 0:
            rate.update(done)
    rate.update(done, all_done=True)


@dataclass(frozen=True, eq=False)
class OutcomeModels:
    models: tuple[str, ...]
    """R names, sorted."""
    scores: Doubles
    """(n, R) in [0, 1] of n prompts, NaN where unlabelled."""


def outcome_models(outcomes: Path | None, prompts: Sequence[str]) -> OutcomeModels:
    """Read the scores of these prompts from an outcomes file; several of one model on one prompt become their mean.

    Args:
        prompts: as prompt files are read.

    Raises:
        InvalidOutcomes: naming the line and the fix.
    """
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for where, line in read_rows(outcomes) if outcomes else ():
        scored = parse_row(where, line)
        row = rows.get(truncate_middle(scored.prompt))
        if row is not None:
            for model, score in scored.scores.items():
                found[model].append((row, score))
    models = tuple(sorted(found))
    scores = np.empty((len(prompts), len(models)))
    for column, model in enumerate(models):
        scores[:, column] = _means(found[model], len(prompts))
    return OutcomeModels(models, scores)


def _means(scored: Sequence[tuple[int, float]], prompts: int) -> Doubles:
    """Return (prompts,): the mean score of each row, NaN for rows without one."""
    rows, scores = np.array([row for row, _ in scored]), np.array([score for _, score in scored])
    counts = np.bincount(rows, minlength=prompts)
    sums = np.bincount(rows, weights=scores, minlength=prompts)
    return np.asarray(np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0))
