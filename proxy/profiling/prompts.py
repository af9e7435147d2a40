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
    """Prompts and, in the same order, their clusters."""

    prompts: tuple[ValidationPrompt, ...]
    assignment: Assignment
    clusters: int

    def chosen(self, count: int, answered: Collection[str] = ()) -> AssignedPrompts:
        """At most `count` of them, spread over clusters and families: the same ones for every model.

        Those `answered` already, by id, are all among them, whichever they are; the others fill up to `count`.
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
    """Loads and places the configured set when it is first needed."""

    def __init__(self, source: str, embedder: Embedder) -> None:
        self._source = source
        self._embedder = embedder
        self._placed: dict[str, AssignedPrompts] = {}
        self._placing = asyncio.Lock()

    async def placed(self, cluster_map: ClusterMap) -> AssignedPrompts:
        """Raises InvalidValidationSet."""
        async with self._placing:
            if cluster_map.id not in self._placed:
                self._placed = {cluster_map.id: await asyncio.to_thread(self._place, cluster_map)}
            return self._placed[cluster_map.id]

    def _place(self, cluster_map: ClusterMap) -> AssignedPrompts:
        chosen = self._load()
        vectors = self._embedder.embed([prompt.text for prompt in chosen])
        return AssignedPrompts(chosen.prompts, cluster_map.assign(vectors), cluster_map.size)

    def _load(self) -> ValidationSet:
        return builtin_validation_set() if self._source == BUILTIN else load_validation_set(Path(self._source))


def column(values: list[float | None]) -> Doubles:
    """(n,) float64; None becomes NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


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
        measured_at=rfc3339(time()),
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
