"""The rule: argmin of Φ(x)·Ψ(m) + λ·c(m, x) over the eligible models. Who is eligible is eligibility.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from router_core.decision import RoutingDecision, ScoreDetails, ScoreTable, argmin_with_ties
from router_core.eligibility import Eligibility
from router_core.errors import NoEligibleModel
from router_core.pool import Pool
from router_core.pricing import CENT_USD, REFERENCE, reference_usd
from router_core.types import Assignment, Doubles, Indices, Price, Requirements

CostUnit = Literal["reference", "cents"]
DEFAULT_LAMBDA = 0.1
TIE_TOLERANCE = 0.005


@dataclass(frozen=True, slots=True)
class ScoringParams:
    """What a request is willing to pay for fewer errors."""

    lambda_: float = DEFAULT_LAMBDA
    """λ: the error probability that the whole reference price (or one cent) is worth."""
    latency_weight: float = 0.0
    """USD that one second of waiting is worth."""
    max_cost_usd: float | None = None
    """Models whose expected cost is above it are ruled out."""
    cost_unit: CostUnit = "reference"
    reference: Price = REFERENCE
    tie: float = TIE_TOLERANCE
    """Scores this close to the best are equal; the cheapest of them is chosen."""
    cached: tuple[str, int] | None = None
    """A model, and how many tokens of this prompt it has in its cache; all others read the prompt afresh."""


def rank(
    eligibility: Eligibility, assignment: Assignment | None, needs: Requirements, terms: ScoringParams
) -> RoutingDecision:
    """Score every eligible model for one prompt.

    Args:
        assignment: Φ(x), one row; None where there is no text to embed: then each model's mean over clusters counts.

    Raises:
        NoEligibleModel: nothing was eligible, or nothing within `max_cost_usd`.
    """
    left, scores = _score(eligibility, assignment, needs, terms)
    return _decide(left, scores, terms, assignment)


def rank_by_mean(eligibility: Eligibility, needs: Requirements, terms: ScoringParams) -> RoutingDecision:
    """The model with the lowest mean error first, whatever it costs: for requests that no cluster fits."""
    left, scores = _score(eligibility, None, needs, terms)
    return _decide(left, scores.with_scores(scores.errors), terms, None, lambda_=0.0)


def rank_by_cost(
    eligibility: Eligibility, assignment: Assignment | None, needs: Requirements, terms: ScoringParams
) -> RoutingDecision:
    """The cheapest model first, whatever its errors."""
    left, scores = _score(eligibility, assignment, needs, terms)
    return _decide(left, scores.with_scores(scores.costs), terms, assignment, tie=0.0)


def _decide(
    eligibility: Eligibility,
    scores: ScoreTable,
    terms: ScoringParams,
    assignment: Assignment | None,
    *,
    lambda_: float | None = None,
    tie: float | None = None,
) -> RoutingDecision:
    tie = terms.tie if tie is None else tie
    return RoutingDecision(
        table=scores,
        choice=argmin_with_ties(scores.scores, scores.costs, tie),
        lambda_=terms.lambda_ if lambda_ is None else lambda_,
        tie=tie,
        assignment=assignment,
        cluster_names=eligibility.pool.cluster_names,
        eligibility=eligibility,
    )


def _score(
    eligibility: Eligibility, assignment: Assignment | None, needs: Requirements, terms: ScoringParams
) -> tuple[Eligibility, ScoreTable]:
    pool = eligibility.pool
    if not eligibility.rows.size:
        raise NoEligibleModel("no model can answer this request", eligibility.reasons)
    errors, output_tokens = _expected(pool, assignment)
    billed_tokens = _capped(pool, output_tokens, needs) * needs.answers
    usd = pool.prices.expected_usd(needs.prompt_tokens, billed_tokens, _cached_tokens(pool, needs, terms))
    unit = cost_unit_usd(pool, billed_tokens, needs, terms)
    if terms.max_cost_usd is not None:
        eligibility = _within(eligibility, usd, terms.max_cost_usd)
    rows = eligibility.rows
    some = slice(None) if len(rows) == len(pool) else rows
    worth = usd + terms.latency_weight * _seconds(pool, assignment) if terms.latency_weight else usd
    costs, errors = worth[some] / unit, errors[some]
    return eligibility, ScoreTable(
        names=eligibility.names,
        errors=errors,
        costs=costs,
        scores=errors + terms.lambda_ * costs,
        work_out=lambda: ScoreDetails(
            labels=_labels(pool, rows, assignment),
            costs_usd=usd[rows],
            output_tokens=billed_tokens[rows],
            seconds=_seconds(pool, assignment)[rows],
        ),
    )


def _expected(pool: Pool, assignment: Assignment | None) -> tuple[Doubles, Doubles]:
    """(M,) Φ·Ψ and (M,) output tokens for this prompt."""
    if assignment is None:
        return pool.mean_errors, pool.mean_output_tokens
    both = assignment.expected_one(pool.errors_and_tokens)
    return both[: len(pool)], both[len(pool) :]


def _seconds(pool: Pool, assignment: Assignment | None) -> Doubles:
    """(M,)"""
    if assignment is None:
        return np.asarray(pool.seconds.mean(axis=1))
    return np.asarray(assignment.expected(pool.seconds)[0])


def _capped(pool: Pool, output_tokens: Doubles, needs: Requirements) -> Doubles:
    capped = np.minimum(output_tokens, pool.output_caps)
    return capped if needs.max_output_tokens is None else np.minimum(capped, needs.max_output_tokens)


def _cached_tokens(pool: Pool, needs: Requirements, terms: ScoringParams) -> int | Doubles:
    """(M,), or 0 for all."""
    if terms.cached is None or terms.cached[0] not in pool.index:
        return 0
    model, tokens = terms.cached
    cached = np.zeros(len(pool))
    cached[pool.index[model]] = min(tokens, needs.prompt_tokens)
    return cached


def cost_unit_usd(pool: Pool, billed_tokens: Doubles, needs: Requirements, terms: ScoringParams) -> float:
    """What a cost of one is: c_ref of this request, its output the mean over the profiled models; or a cent."""
    if terms.cost_unit == "cents":
        return CENT_USD
    profiled = billed_tokens if pool.all_profiled else billed_tokens[pool.profiled]
    mean_tokens = float(np.add.reduce(profiled)) / len(profiled)  # as mean() does, without what it asks before
    return reference_usd(needs.prompt_tokens, mean_tokens, terms.reference)


def _within(eligibility: Eligibility, usd: Doubles, max_cost_usd: float) -> Eligibility:
    """Rule out what is expected to cost more than the request allows."""
    left = eligibility.filtered(~(usd > max_cost_usd), f"expected to cost more than max_cost_usd={max_cost_usd:g}")
    if not left.rows.size:
        cheapest = float(usd[eligibility.rows].min())
        message = (
            f"every able model is expected to cost more than max_cost_usd={max_cost_usd:g}; cheapest: ${cheapest:.6f}"
        )
        raise NoEligibleModel(message, left.reasons)
    return left


def _labels(pool: Pool, rows: Indices, assignment: Assignment | None) -> Doubles:
    """(m,) labels that Φ·Ψ is worth: a weighted mean of rates has the variance of so many."""
    if assignment is None:
        return pool.total_labels[rows]
    weights = assignment.weights[0].astype(np.float64)
    block = np.ix_(rows, assignment.ids[0])
    return np.asarray(1.0 / ((weights**2 / pool.label_weights[block]).sum(axis=1)))
