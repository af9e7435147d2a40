"""Figures as text, with their intervals. Unknown is a dash, never 0."""

from __future__ import annotations

from math import isnan

from router_core.evaluation.intervals import Difference
from router_core.evaluation.results import Estimate

UNKNOWN = "–"


def number(value: float, form: str) -> str:
    return UNKNOWN if isnan(value) else format(value, form)


def points(found: Estimate) -> str:
    """A mean score ×100 with its interval."""
    return _with_interval(100 * found.mean, 100 * found.low, 100 * found.high, ".1f")


def points_apart(found: Difference) -> str:
    """A difference of mean scores ×100 with its interval; two decimals, since it is smaller and surer."""
    return _with_interval(100 * found.mean, 100 * found.low, 100 * found.high, "+z.2f")


def ratio(found: Estimate) -> str:
    return _with_interval(found.mean, found.low, found.high, ".2f")


def percent(found: Estimate) -> str:
    return _with_interval(found.mean, found.low, found.high, "+z.1%")


def _with_interval(mean: float, low: float, high: float, form: str) -> str:
    return UNKNOWN if isnan(mean) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"
