"""What an outcomes file says of prompts that are at hand. Fits nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router_core.evaluation.outcome_rows import parse_row, read_rows
from router_core.excerpt import excerpt
from router_core.types import Doubles


@dataclass(frozen=True, eq=False)
class KnownModels:
    models: tuple[str, ...]
    """R names, sorted."""
    scores: Doubles
    """(n, R) in [0, 1] of n prompts, NaN where unlabelled."""


def known_models(outcomes: Path | None, prompts: Sequence[str]) -> KnownModels:
    """Scores of these prompts, as prompt files are read; several of one model on one prompt count as their mean.

    Raises:
        InvalidOutcomes: naming the line and the fix.
    """
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for where, line in read_rows(outcomes) if outcomes else ():
        scored = parse_row(where, line)
        row = rows.get(excerpt(scored.prompt))
        if row is not None:
            for model, score in scored.scores.items():
                found[model].append((row, score))
    models = tuple(sorted(found))
    scores = np.empty((len(prompts), len(models)))
    for column, model in enumerate(models):
        scores[:, column] = _means(found[model], len(prompts))
    return KnownModels(models, scores)


def _means(scored: Sequence[tuple[int, float]], prompts: int) -> Doubles:
    rows, scores = np.array([row for row, _ in scored]), np.array([score for _, score in scored])
    counts = np.bincount(rows, minlength=prompts)
    sums = np.bincount(rows, weights=scores, minlength=prompts)
    return np.asarray(np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0))
