"""An outcomes file beside a deployment: which models both have, and what those scored. Judges nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_core.errors import InvalidInput
from router_core.evaluation.outcome_rows import OutcomeRow, parse_row, read_rows
from router_core.evaluation.outcomes import Outcomes, outcomes_from_rows
from router_core.pool import Pool


@dataclass(frozen=True, slots=True)
class Common:
    """Which models a file and a deployment both have, and which only one of them. All sorted."""

    models: tuple[str, ...]
    only_scored: tuple[str, ...]
    only_deployed: tuple[str, ...]


def common_models(scored: Collection[str], pool: Pool) -> Common:
    """Deployed is what has a profile and a price. Raises InvalidInput, naming the others, where two are not common."""
    routable = ~np.isnan(pool.mean_errors) & ~np.isnan(pool.prices.input)
    deployed = {name for name, able in zip(pool.names, routable, strict=True) if able}
    common = tuple(sorted(deployed & set(scored)))
    found = Common(common, tuple(sorted(set(scored) - deployed)), tuple(sorted(deployed - set(scored))))
    if len(common) < 2:
        raise InvalidInput(
            f"two models or more must be both scored and deployed. Both: {_named(common)}."
            f" Only scored: {_named(found.only_scored)}. Only deployed: {_named(found.only_deployed)}"
        )
    return found


def read_deployed(path: Path, pool: Pool) -> tuple[Outcomes, Common]:
    """The outcomes file's models that are deployed too, billed at the deployed prices.

    Raises:
        InvalidOutcomes: as `read_outcomes`.
        InvalidInput: fewer than two such models.
    """
    rows = [(where, parse_row(where, row)) for where, row in read_rows(path)]
    common = common_models({model for _, row in rows for model in row.scores}, pool)

    lines = [(where, _line(row, common.models)) for where, row in rows if row.scores.keys() & set(common.models)]
    prices = {name: pool.candidates[name].price for name in common.models}
    return outcomes_from_rows(lines, {name: price for name, price in prices.items() if price}), common


def _line(row: OutcomeRow, models: Collection[str]) -> dict[str, Any]:
    """The row with the figures of these models alone."""
    figures = {"scores": row.scores, "output_tokens": row.output_tokens}
    kept = {name: {m: value for m, value in values.items() if m in models} for name, values in figures.items()}
    return {"prompt": row.prompt, "source": row.source, **kept}


def _named(models: Collection[str]) -> str:
    return ", ".join(models) or "none"
