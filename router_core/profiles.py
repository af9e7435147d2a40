from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.errors import InvalidProfile, MapMismatch
from router_core.estimators import SHRINKAGE, mean_error, shrunk_rates
from router_core.types import Assignment, Doubles

# Labels, tokens or seconds. More is a mistake, and would overflow.
MAX_VALUE = 1e12


@dataclass(frozen=True, eq=False)
class Profile:
    """Ψ(m): what one model got wrong in each cluster of one map, as sums, so that profiles can be merged.

    All arrays are (K,) float64; w_jk is the weight of prompt j in cluster k. The rates that a model is routed by are
    computed from all models' sums together, by estimators.py.
    """

    map_id: str
    error_sums: Doubles
    """Σ_j w_jk·e_jm over labelled prompts."""
    labels: Doubles
    """Σ_j w_jk over labelled prompts."""
    token_sums: Doubles
    second_sums: Doubles
    answers: Doubles
    """Σ_j w_jk over answers of known length, unlabelled ones included: the weight behind `token_sums`."""
    timed_answers: Doubles
    """The same over answers of known duration: the weight behind `second_sums`."""
    measured_at: str | None = None
    """RFC 3339, UTC."""
    stated_rates: Doubles | None = None
    """Error rates given without sums, which are served as they are."""
    tool_error_sums: Doubles | None = None
    """Of `error_sums`, what prompts that offer tools have added. None: no such prompt was labelled."""
    tool_labels: Doubles | None = None
    """The same of `labels`."""

    def __post_init__(self) -> None:
        weights = (self.labels, self.token_sums, self.second_sums, self.answers, self.timed_answers)
        if {array.shape for array in weights} != {self.error_sums.shape} or self.labels.ndim != 1:
            raise InvalidProfile("a profile's arrays must all have one entry per cluster")
        tools = [array for array in (self.tool_error_sums, self.tool_labels) if array is not None]
        if len(tools) == 1 or any(array.shape != self.labels.shape for array in tools):
            raise InvalidProfile("a profile's tool_error_sums and tool_labels go together, one entry per cluster each")
        if not all(np.isfinite(array).all() and (array >= 0).all() for array in (*weights, *tools)):
            raise InvalidProfile("a profile's weights must be finite and 0 or more")
        rates_ok = self.stated_rates is None or ((self.stated_rates >= 0) & (self.stated_rates <= 1)).all()
        within = _within(self.error_sums, self.labels)
        if self.tool_error_sums is not None and self.tool_labels is not None:
            within = within and _within(self.tool_error_sums, self.tool_labels)
        if not rates_ok or not within:
            raise InvalidProfile("a profile's errors must lie in [0, 1]")

    @cached_property
    def total_labels(self) -> float:
        return float(self.labels.sum())

    @cached_property
    def mean_error(self) -> float:
        return mean_error(float(self.error_sums.sum()), self.total_labels)

    @property
    def mean_output_tokens(self) -> float | None:
        return _mean(self.token_sums, self.answers)

    @property
    def mean_seconds(self) -> float | None:
        return _mean(self.second_sums, self.timed_answers)

    def errors(self) -> Doubles:
        """Return (K,) error rates in [0, 1] from this profile alone: as stated, or by the shrunk estimator."""
        return (
            shrunk_rates(self.error_sums[None, :], self.labels[None, :])[0]
            if self.stated_rates is None
            else self.stated_rates
        )

    def output_tokens(self) -> Doubles:
        """Return (K,) expected output tokens, shrunk towards the model's mean; NaN if no answer was counted."""
        return self._output_tokens

    @cached_property
    def _output_tokens(self) -> Doubles:
        return _shrunk_means(self.token_sums, self.answers)

    def seconds(self) -> Doubles:
        """Return (K,) expected seconds until the answer is complete; NaN if no answer was timed."""
        return self._seconds

    @cached_property
    def _seconds(self) -> Doubles:
        return _shrunk_means(self.second_sums, self.timed_answers)

    def merged(self, other: Profile) -> Profile:
        """Return the profile of both measurements together. Their sums count; stated rates are dropped."""
        if other.map_id != self.map_id:
            raise MapMismatch(f"cannot merge a profile of map {other.map_id} into one of map {self.map_id}")
        return Profile(
            map_id=self.map_id,
            error_sums=self.error_sums + other.error_sums,
            labels=self.labels + other.labels,
            token_sums=self.token_sums + other.token_sums,
            second_sums=self.second_sums + other.second_sums,
            answers=self.answers + other.answers,
            timed_answers=self.timed_answers + other.timed_answers,
            measured_at=max(filter(None, (self.measured_at, other.measured_at)), default=None),
            tool_error_sums=_added(self.tool_error_sums, other.tool_error_sums),
            tool_labels=_added(self.tool_labels, other.tool_labels),
        )

    def to_json(self, errors: Doubles | None = None) -> dict[str, Any]:
        """Write the document that `from_json` reads; the sums make the round trip exact.

        Args:
            errors: (K,) rates to show in place of `errors()`.
        """
        rates = self.errors() if errors is None else errors
        sums = {} if self.stated_rates is not None else {"error_sums": self.error_sums.tolist()}
        if self.tool_error_sums is not None and self.tool_labels is not None:
            sums |= {"tool_error_sums": self.tool_error_sums.tolist(), "tool_labels": self.tool_labels.tolist()}
        return {
            "map": self.map_id,
            "errors": rates.tolist(),
            "labels": self.labels.tolist(),
            "mean_error": self.mean_error,
            "mean_output_tokens": self.mean_output_tokens,
            "mean_seconds": self.mean_seconds,
            "measured_at": self.measured_at,
            **sums,
            "token_sums": self.token_sums.tolist(),
            "second_sums": self.second_sums.tolist(),
            "answers": self.answers.tolist(),
            "timed_answers": self.timed_answers.tolist(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Profile:
        """Read a profile. `map`, `errors` and `labels` suffice, so that one can be written by hand.

        Rates without `error_sums` are served as they are stated.

        Raises:
            InvalidProfile: a field is missing or wrong; the message names it.
        """
        map_id = document.get("map")
        if not isinstance(map_id, str) or not map_id:
            raise InvalidProfile("profile.map must be the id of the cluster map it was measured on")
        labels = _numbers(document, "labels")
        error_sums, stated_rates = _errors(document, labels)
        answers = _numbers(document, "answers", default=labels)
        timed_answers = _numbers(document, "timed_answers", default=answers)
        measured_at = document.get("measured_at")
        if not isinstance(measured_at, str | None):
            raise InvalidProfile(f"profile.measured_at must be an RFC 3339 time or null; got {measured_at!r}")
        return cls(
            map_id=map_id,
            error_sums=error_sums,
            labels=labels,
            token_sums=_sums(document, "token_sums", "mean_output_tokens", answers),
            second_sums=_sums(document, "second_sums", "mean_seconds", timed_answers),
            answers=_weights_of(document, ("token_sums", "mean_output_tokens"), answers),
            timed_answers=_weights_of(document, ("second_sums", "mean_seconds"), timed_answers),
            measured_at=measured_at,
            stated_rates=stated_rates,
            tool_error_sums=_stated(document, "tool_error_sums"),
            tool_labels=_stated(document, "tool_labels"),
        )


def measure(
    map_id: str,
    clusters: int,
    assignment: Assignment,
    scores: Doubles,
    *,
    output_tokens: Doubles,
    seconds: Doubles,
    offers_tools: NDArray[np.bool_] | None = None,
    measured_at: str | None = None,
) -> Profile:
    """Build a profile from n graded prompts.

    Args:
        map_id: id of the cluster map that made `assignment`.
        clusters: K.
        assignment: Φ of the n prompts, in any order.
        scores: (n,) in [0, 1]; NaN is unlabelled and does not count.
        output_tokens, seconds: (n,) of each answer; NaN where not known. Each counts without the other.
        offers_tools: (n,) whether the model was offered tools; None: never.

    Raises:
        InvalidProfile: a score outside [0, 1], or lengths that differ.
    """
    if not len(scores) == len(assignment) == len(output_tokens) == len(seconds):
        raise InvalidProfile(f"{len(assignment)} prompts were assigned but {len(scores)} have scores")
    if ((scores < 0) | (scores > 1)).any():
        raise InvalidProfile("scores must lie in [0, 1]; leave an unlabelled prompt NaN")
    weights = assignment.dense(clusters)
    labelled = ~np.isnan(scores)
    counted, timed = ~np.isnan(output_tokens), ~np.isnan(seconds)
    with_tools = labelled & (False if offers_tools is None else offers_tools)
    has_tools = bool(with_tools.any())
    return Profile(
        map_id=map_id,
        error_sums=weights[labelled].T @ (1.0 - scores[labelled]),
        labels=weights[labelled].sum(axis=0),
        token_sums=weights[counted].T @ output_tokens[counted],
        second_sums=weights[timed].T @ seconds[timed],
        answers=weights[counted].sum(axis=0),
        timed_answers=weights[timed].sum(axis=0),
        measured_at=measured_at,
        tool_error_sums=weights[with_tools].T @ (1.0 - scores[with_tools]) if has_tools else None,
        tool_labels=weights[with_tools].sum(axis=0) if has_tools else None,
    )


def _within(error_sums: Doubles, labels: Doubles) -> bool:
    return bool(((error_sums >= 0) & (error_sums <= labels * (1 + 1e-6) + 1e-6)).all())


def _added(first: Doubles | None, second: Doubles | None) -> Doubles | None:
    return second if first is None else first if second is None else first + second


def _mean(sums: Doubles, weights: Doubles) -> float | None:
    total = float(weights.sum())
    return float(sums.sum()) / total if total > 0 else None


def _shrunk_means(sums: Doubles, weights: Doubles) -> Doubles:
    mean = _mean(sums, weights)
    if mean is None:
        return np.full_like(weights, np.nan)
    return (sums + SHRINKAGE * mean) / (weights + SHRINKAGE)


def _numbers(document: Mapping[str, Any], field: str, default: Doubles | None = None) -> Doubles:
    value = document.get(field)
    if value is None and default is not None:
        return default
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.full(1, np.nan)
    if numbers.ndim != 1 or not numbers.size or not ((numbers >= 0) & (numbers <= MAX_VALUE)).all():
        raise InvalidProfile(
            f"profile.{field} must be a list with one number per cluster, each from 0 to {MAX_VALUE:g}"
        )
    return numbers


def _stated(document: Mapping[str, Any], field: str) -> Doubles | None:
    return None if document.get(field) is None else _numbers(document, field)


def _errors(document: Mapping[str, Any], labels: Doubles) -> tuple[Doubles, Doubles | None]:
    """Return the error sums, and the rates if these were stated instead."""
    if document.get("error_sums") is not None:
        return _numbers(document, "error_sums"), None
    errors = _numbers(document, "errors")
    if errors.shape != labels.shape:
        raise InvalidProfile(f"profile.errors has {errors.size} entries but profile.labels has {labels.size}")
    if (errors > 1).any():
        raise InvalidProfile("profile.errors must lie in [0, 1]")
    return errors * labels, errors


def _weights_of(document: Mapping[str, Any], fields: tuple[str, ...], weights: Doubles) -> Doubles:
    """Return `weights` if any of `fields` is stated, else zeros: an unknown length is not a length of zero."""
    known = any(document.get(field) is not None for field in fields)
    return weights if known else np.zeros_like(weights)


def _sums(document: Mapping[str, Any], field: str, mean_field: str, answers: Doubles) -> Doubles:
    if document.get(field) is not None:
        return _numbers(document, field)
    mean = document.get(mean_field)
    if mean is None:
        return np.zeros_like(answers)
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not 0 <= mean <= MAX_VALUE:
        raise InvalidProfile(f"profile.{mean_field} must be a number from 0 to {MAX_VALUE:g}; got {str(mean)[:40]}")
    return answers * float(mean)
