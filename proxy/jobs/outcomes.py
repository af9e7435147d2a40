"""An outcomes file (JSONL: prompts with each model's score) to one model's profile. Asks no model."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from router_core.clustering import ClusterMap
from router_core.errors import InvalidOutcomes
from router_core.evaluation.outcome_rows import OutcomeRow, parse_row, read_rows
from router_core.profiles import Profile, measure
from router_core.types import Doubles, Embedder

UNKNOWN = float("nan")


def profile_from_outcomes(path: Path, model: str, cluster_map: ClusterMap, embedder: Embedder) -> Profile:
    """Raises InvalidOutcomes where a line is broken or no line scores `model`."""
    rows = rows_of(path, model)
    assignment = cluster_map.assign(embedder.embed([row.prompt for row in rows]))
    return measure(
        cluster_map.id,
        cluster_map.size,
        assignment,
        _column(row.scores[model] for row in rows),
        output_tokens=_column(row.output_tokens.get(model, UNKNOWN) for row in rows),
        seconds=_column(row.seconds.get(model, UNKNOWN) for row in rows),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def rows_of(path: Path, model: str) -> list[OutcomeRow]:
    """The prompts that `model` was asked; a prompt without its score is not one of them."""
    asked: list[OutcomeRow] = []
    others: set[str] = set()
    for where, line in read_rows(path):
        row = parse_row(where, line)
        others.update(row.scores)
        if model in row.scores:
            asked.append(row)
    if not asked:
        raise InvalidOutcomes(f"{path}: no line scores {model!r}; it has {', '.join(sorted(others)) or 'no lines'}")
    return asked


def _column(values: Iterable[float]) -> Doubles:
    return np.fromiter(values, dtype=np.float64)
