from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import time

import numpy as np

from router_core.clustering import ClusterMap
from router_core.errors import InvalidOutcomes
from router_core.evaluation.outcomes import OutcomeRow, parse_row, read_rows
from router_core.profiles import Profile, measure
from router_core.text import rfc3339
from router_core.types import Assignment, Doubles, Embedder
from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.loading import load_validation_set
from router_core.validation.validation_set import ValidationPrompt, ValidationSet, choose_prompts

BUILTIN = "builtin"


@dataclass(frozen=True)
class AssignedPrompts:
    """Validation prompts and, in the same order, their clusters."""

    prompts: tuple[ValidationPrompt, ...]
    assignment: Assignment
    clusters: int

    def select(self, count: int, answered: Collection[str] = ()) -> AssignedPrompts:
        """Select up to `count` prompts, spread over clusters and families: the same ones for every model.

        Args:
            answered: ids of prompts that are all selected first; others fill up to `count`.
        """
        families = [prompt.family for prompt in self.prompts]
        ranked = choose_prompts(self.assignment, len(self.prompts), families=families).tolist()
        fixed = {row for row in ranked if self.prompts[row].id in answered}
        others = [row for row in ranked if row not in fixed]
        wanted = fixed.union(others[: max(0, count - len(fixed))])
        rows = [row for row in ranked if row in wanted]
        assignment = Assignment(self.assignment.ids[rows], self.assignment.weights[rows])
        return AssignedPrompts(tuple(self.prompts[row] for row in rows), assignment, self.clusters)


class ValidationPrompts:
    """Load the configured validation set, and assign its prompts to clusters, when it is first needed."""

    def __init__(self, source: str, embedder: Embedder) -> None:
        self._source = source
        self._embedder = embedder
        self._assigned: dict[str, AssignedPrompts] = {}
        self._assigning = asyncio.Lock()

    async def load(self, cluster_map: ClusterMap) -> AssignedPrompts:
        """Return the prompts with their clusters on this map, or raise InvalidValidationSet."""
        async with self._assigning:
            if cluster_map.id not in self._assigned:
                self._assigned = {cluster_map.id: await asyncio.to_thread(self._assign, cluster_map)}
            return self._assigned[cluster_map.id]

    def _assign(self, cluster_map: ClusterMap) -> AssignedPrompts:
        validation_set = self._read()
        vectors = self._embedder.embed([prompt.text for prompt in validation_set])
        return AssignedPrompts(validation_set.prompts, cluster_map.assign(vectors), cluster_map.size)

    def _read(self) -> ValidationSet:
        return builtin_validation_set() if self._source == BUILTIN else load_validation_set(Path(self._source))


def column(values: list[float | None]) -> Doubles:
    """Return (n,) float64, with NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


UNKNOWN = float("nan")


def profile_from_outcomes(path: Path, model: str, cluster_map: ClusterMap, embedder: Embedder) -> Profile:
    """Read a profile from an outcomes file, or raise InvalidOutcomes if a line is broken or no line scores `model`."""
    rows = rows_of(path, model)
    assignment = cluster_map.assign(embedder.embed([row.prompt for row in rows]))
    return measure(
        cluster_map.id,
        cluster_map.size,
        assignment,
        _column(row.scores[model] for row in rows),
        output_tokens=_column(row.output_tokens.get(model, UNKNOWN) for row in rows),
        seconds=_column(row.seconds.get(model, UNKNOWN) for row in rows),
        measured_at=rfc3339(time()),
    )


def rows_of(path: Path, model: str) -> list[OutcomeRow]:
    """Return the rows that have a score of `model`."""
    scored: list[OutcomeRow] = []
    others: set[str] = set()
    for where, line in read_rows(path):
        row = parse_row(where, line)
        others.update(row.scores)
        if model in row.scores:
            scored.append(row)
    if not scored:
        raise InvalidOutcomes(f"{path}: no line scores {model!r}; it has {', '.join(sorted(others)) or 'no lines'}")
    return scored


def _column(values: Iterable[float]) -> Doubles:
    return np.fromiter(values, dtype=np.float64)
