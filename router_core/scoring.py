"""The rule: choose the model m with the smallest Φ(x)·Ψ(m) + λ·c(m, x) among the eligible ones.

This is UniRoute's rule (arXiv 2502.08773). Φ(x), (K,), are the prompt's cluster weights, Ψ(m), (K,), the model's error
rates per cluster, and c(m, x) is its expected cost in units of the reference price.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from router_core.decision import RoutingDecision, ScoreDetails, ScoreTable, argmin_with_ties
from router_core.eligibility import Eligibility
from router_core.errors import NoEligibleModel
from router_core.pool import Pool
from router_core.pricing import CENT_USD, REFERENCE, reference_usd
from router_core.types import Assignment, Doubles, Indices, Price, Requirements, frozen

CostUnit = Literal["reference", "cents"]
DEFAULT_LAMBDA = 0.1
TIE_TOLERANCE = 0.005


@frozen
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
    """Scores this close to the best count as equal; the cheapest of them is chosen."""
    cached: tuple[str, int] | None = None
    """A model and the tokens of this prompt that it has in its cache; every other model reads the prompt afresh."""


def rank(
    eligibility: Eligibility, assignment: Assignment | None, requirements: Requirements, params: ScoringParams
) -> RoutingDecision:
    """Score every eligible model for one prompt.

    Args:
        assignment: Φ(x), one row. None if there is no text to embed: then each model's mean over the clusters counts.

    Raises:
        NoEligibleModel: nothing was eligible, or nothing within `max_cost_usd`.
    """
    eligibility, table = _score(eligibility, assignment, requirements, params)
    return _decide(eligibility, table, params, assignment)


def rank_by_mean(eligibility: Eligibility, requirements: Requirements, params: ScoringParams) -> RoutingDecision:
    """Rank by mean error, whatever the cost, for prompts whose clusters are not known."""
    eligibility, table = _score(eligibility, None, requirements, params)
    return _decide(eligibility, table.with_scores(table.errors), params, None, lambda_=0.0)


def rank_by_cost(
    eligibility: Eligibility, assignment: Assignment | None, requirements: Requirements, params: ScoringParams
) -> RoutingDecision:
    """Rank by expected cost, whatever the errors."""
    eligibility, table = _score(eligibility, assignment, requirements, params)
    return _decide(eligibility, table.with_scores(table.costs), params, assignment, tie=0.0)


def _decide(
    eligibility: Eligibility,
    table: ScoreTable,
    params: ScoringParams,
    assignment: Assignment | None,
    *,
    lambda_: float | None = None,
    tie: float | None = None,
) -> RoutingDecision:
    tie = params.tie if tie is None else tie
    return RoutingDecision(
        table=table,
        choice=argmin_with_ties(table.scores, table.costs, tie),
        lambda_=params.lambda_ if lambda_ is None else lambda_,
        tie=tie,
        assignment=assignment,
        cluster_names=eligibility.pool.cluster_names,
        eligibility=eligibility,
    )


def _score(
    eligibility: Eligibility, assignment: Assignment | None, requirements: Requirements, params: ScoringParams
) -> tuple[Eligibility, ScoreTable]:
    pool = eligibility.pool
    if not eligibility.rows.size:
        raise NoEligibleModel("no model can answer this request", eligibility.reasons)
    errors, output_tokens = _expected_errors_and_tokens(pool, assignment)
    billed_tokens = _cap(pool, output_tokens, requirements) * requirements.answers
    cached_tokens = _cached_tokens(pool, requirements, params)
    usd = pool.prices.expected_usd(requirements.prompt_tokens, billed_tokens, cached_tokens)
    unit = cost_unit_usd(pool, billed_tokens, requirements, params)
    if params.max_cost_usd is not None:
        eligibility = _within_max_cost(eligibility, usd, params.max_cost_usd)
    rows = eligibility.rows
    selected = slice(None) if len(rows) == len(pool) else rows
    total_usd = usd + params.latency_weight * _seconds(pool, assignment) if params.latency_weight else usd
    costs, errors = total_usd[selected] / unit, errors[selected]
    return eligibility, ScoreTable(
        names=eligibility.names,
        errors=errors,
        costs=costs,
        scores=errors + params.lambda_ * costs,
        costs_usd=usd[selected],
        compute_details=lambda: ScoreDetails(
            labels=_effective_labels(pool, rows, assignment),
            output_tokens=billed_tokens[rows],
            seconds=_seconds(pool, assignment)[rows],
        ),
    )


def _expected_errors_and_tokens(pool: Pool, assignment: Assignment | None) -> tuple[Doubles, Doubles]:
    """Return (M,) Φ·Ψ and (M,) output tokens for this prompt."""
    if assignment is None:
        return pool.mean_errors, pool.mean_output_tokens
    both = assignment.expected_one(pool.errors_and_tokens)
    return both[: len(pool)], both[len(pool) :]


def _seconds(pool: Pool, assignment: Assignment | None) -> Doubles:
    """Return the (M,) seconds expected until the answer is complete."""
    if assignment is None:
        return np.asarray(pool.seconds.mean(axis=1))
    return np.asarray(assignment.expected(pool.seconds)[0])


def _cap(pool: Pool, output_tokens: Doubles, requirements: Requirements) -> Doubles:
    """Lower (M,) output tokens to the models' limits and the request's own."""
    capped = np.minimum(output_tokens, pool.output_caps)
    limit = requirements.max_output_tokens
    return capped if limit is None else np.minimum(capped, limit)


def _cached_tokens(pool: Pool, requirements: Requirements, params: ScoringParams) -> int | Doubles:
    """Return the (M,) prompt tokens that each model has in its cache; 0 if none has any."""
    if params.cached is None or params.cached[0] not in pool.index:
        return 0
    model, tokens = params.cached
    cached = np.zeros(len(pool))
    cached[pool.index[model]] = min(tokens, requirements.prompt_tokens)
    return cached


def cost_unit_usd(pool: Pool, billed_tokens: Doubles, requirements: Requirements, params: ScoringParams) -> float:
    """Return the USD that a cost of one stands for: the request at the reference price, or a cent.

    The reference price is paid for the prompt and for the mean output of the profiled models.
    """
    if params.cost_unit == "cents":
        return CENT_USD
    profiled = billed_tokens if pool.all_profiled else billed_tokens[pool.profiled]
    # The same as profiled.mean(), without the checks that make it slower.
    mean_tokens = float(np.add.reduce(profiled)) / len(profiled)
    return reference_usd(requirements.prompt_tokens, mean_tokens, params.reference)


def _within_max_cost(eligibility: Eligibility, usd: Doubles, max_cost_usd: float) -> Eligibility:
    """Rule out the models that are expected to cost more than the request allows. `usd`: (M,)."""
    left = eligibility.filtered(~(usd > max_cost_usd), f"expected to cost more than max_cost_usd={max_cost_usd:g}")
    if not left.rows.size:
        cheapest = float(usd[eligibility.rows].min())
        message = (
            f"every able model is expected to cost more than max_cost_usd={max_cost_usd:g}; cheapest: ${cheapest:.6f}"
        )
        raise NoEligibleModel(message, left.reasons)
    return left


def _effective_labels(pool: Pool, rows: Indices, assignment: Assignment | None) -> Doubles:
    """Return the (m,) labels that each Φ·Ψ is worth.

    A weighted mean Σ w_k·e_k of rates with n_k labels each has the variance of a rate with 1 / Σ (w_k² / n_k) labels.
    """
    if assignment is None:
        return pool.total_labels[rows]
    weights = assignment.weights[0].astype(np.float64)
    block = np.ix_(rows, assignment.ids[0])
    return np.asarray(1.0 / ((weights**2 / pool.label_weights[block]).sum(axis=1)))
