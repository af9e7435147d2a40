"""An outcomes file (JSONL: prompts with each model's score) to one model's profile. Asks no model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from router_core.clustering import ClusterMap
from router_core.errors import InvalidInput
from router_core.profiles import Profile, measure
from router_core.types import Doubles, Embedder


class InvalidOutcomes(InvalidInput):
    """An outcomes file that cannot be used; the message names the line."""


@dataclass(frozen=True)
class Outcome:
    """What one model made of one prompt. NaN: not stated."""

    prompt: str
    score: float
    output_tokens: float
    seconds: float


def profile_from_outcomes(path: Path, model: str, cluster_map: ClusterMap, embedder: Embedder) -> Profile:
    """Raises InvalidOutcomes where a line is broken or no line scores `model`."""
    outcomes = list(read_outcomes(path, model))
    assignment = cluster_map.assign(embedder.embed([outcome.prompt for outcome in outcomes]))
    return measure(
        cluster_map.id,
        cluster_map.size,
        assignment,
        _column(outcome.score for outcome in outcomes),
        output_tokens=_column(outcome.output_tokens for outcome in outcomes),
        seconds=_column(outcome.seconds for outcome in outcomes),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def read_outcomes(path: Path, model: str) -> Iterator[Outcome]:
    """The prompts that `model` was asked; a prompt without its score is not one of them."""
    others: set[str] = set()
    found = False
    for number, row in _rows(path):
        scores = row.get("scores")
        if not isinstance(row.get("prompt"), str) or not isinstance(scores, dict):
            raise InvalidOutcomes(f'{path}, line {number}: needs "prompt" (text) and "scores" (model: score)')
        others.update(scores)
        if model in scores:
            found = True
            yield _outcome(row, model, f"{path}, line {number}")
    if not found:
        raise InvalidOutcomes(f"{path}: no line scores {model!r}; it has {', '.join(sorted(others)) or 'no lines'}")


def _outcome(row: Mapping[str, Any], model: str, where: str) -> Outcome:
    score = _number(row, "scores", model, where)
    if not 0 <= score <= 1:
        raise InvalidOutcomes(f"{where}: a score lies in [0, 1]; got {score!r}")
    tokens, seconds = (_number(row, field, model, where) for field in ("output_tokens", "seconds"))
    return Outcome(row["prompt"], score, tokens, seconds)


def _number(row: Mapping[str, Any], field: str, model: str, where: str) -> float:
    values = row.get(field) or {}
    value = values.get(model, float("nan")) if isinstance(values, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value == float("inf"):
        raise InvalidOutcomes(f"{where}: {field}[{model!r}] must be a number, 0 or more; got {value!r}")
    return float(value)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except OSError as error:
        raise InvalidOutcomes(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InvalidOutcomes(f"{path}: is not UTF-8 text") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidOutcomes(f"{where}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InvalidOutcomes(f"{where}: must be a JSON object")
    return row


def _column(values: Iterator[float]) -> Doubles:
    return np.fromiter(values, dtype=np.float64)
