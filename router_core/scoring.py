"""The rule: choose the model m with the smallest Φ(x)·Ψ(m) + λ·c(m, x) among the eligible ones.

This is UniRoute's rule (arXiv 2502.08773). Φ(x), (K,), are the prompt's cluster weights, Ψ(m), (K,), the model's error
rates per cluster, and c(m, x) is its expected cost in units of the reference price.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from router_core.decision import RoutingDecision, ScoreDetails, Scores, unpack
from router_core.eligibility import Eligibility
from router_core.errors import NoEligibleModel
from router_core.kernels import Figures, ScoringTerms, argmin_with_ties
from router_core.pool import Pool
from router_core.pricing import CENT_USD, REFERENCE
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
    doubts: tuple[tuple[str, float], ...] = ()
    """Models, and which share of what they are expected to get right counts as errors. See `kernels.Scorer.choose`."""


def rank(
    eligibility: Eligibility, assignment: Assignment | None, requirements: Requirements, params: ScoringParams
) -> RoutingDecision:
    """Score every eligible model for one prompt.

    Args:
        assignment: Φ(x), one row. None if there is no text to embed: then each model's mean over the clusters counts.

    Raises:
        NoEligibleModel: nothing was eligible, or nothing within `max_cost_usd`.
    """
    return _decide(eligibility, assignment, requirements, params)


def rank_by_mean(eligibility: Eligibility, requirements: Requirements, params: ScoringParams) -> RoutingDecision:
    """Rank by mean error, whatever the cost, for prompts whose clusters are not known."""
    return _decide(eligibility, None, requirements, replace(params, lambda_=0.0))


def rank_by_cost(
    eligibility: Eligibility, assignment: Assignment | None, requirements: Requirements, params: ScoringParams
) -> RoutingDecision:
    """Rank by expected cost, whatever the errors."""
    return _decide(eligibility, assignment, requirements, params, by_cost=True)


def _decide(
    eligibility: Eligibility,
    assignment: Assignment | None,
    requirements: Requirements,
    params: ScoringParams,
    *,
    by_cost: bool = False,
) -> RoutingDecision:
    pool, rows = eligibility.pool, eligibility.rows
    if not rows.size:
        raise NoEligibleModel("no model can answer this request", eligibility.reasons)
    plan, tie = pool.plan, 0.0 if by_cost else params.tie
    cached_row, cached_tokens = _cached(pool, requirements, params)
    limit, reference = requirements.max_output_tokens, params.reference
    terms = ScoringTerms(
        requirements.prompt_tokens,
        math.inf if limit is None else limit,
        requirements.answers,
        cached_row,
        cached_tokens,
        params.latency_weight,
        math.inf if by_cost else params.lambda_,
        reference.input_cost_per_token,
        reference.output_cost_per_token,
        CENT_USD if params.cost_unit == "cents" else 0.0,
        tie,
    )
    placed = plan.anywhere if assignment is None else assignment
    scorer = plan.scorer(
        requirements.prompt_tokens, weighs_seconds=params.latency_weight != 0, with_tools=requirements.tools
    )
    some_rows = None if rows.size == len(pool.names) else rows
    doubts = _doubts(pool, params.doubts) if params.doubts else None
    choice, figures = scorer.choose(placed.ids, placed.weights, some_rows, terms, doubts)

    def measured(rows: Indices) -> Doubles:
        return unpack(scorer.choose(placed.ids, placed.weights, rows, terms)[1])[0]

    if params.max_cost_usd is not None:
        eligibility, choice, figures = _within_max_cost(eligibility, figures, params.max_cost_usd, tie)
    return RoutingDecision(
        Scores(eligibility.names, figures, lambda: _details(eligibility, assignment, requirements, measured)),
        choice,
        lambda_=params.lambda_,
        tie=tie,
        assignment=assignment,
        cluster_names=pool.cluster_names,
        eligibility=eligibility,
        has_doubts=doubts is not None,
    )


def _cached(pool: Pool, requirements: Requirements, params: ScoringParams) -> tuple[int, int]:
    """Return the row of the model that has a part of the prompt in its cache, and how much; -1 and 0: none has any."""
    if params.cached is None or params.cached[0] not in pool.index:
        return -1, 0
    model, tokens = params.cached
    return pool.index[model], min(tokens, requirements.prompt_tokens)


def _doubts(pool: Pool, stated: Sequence[tuple[str, float]]) -> Doubles:
    """Lay out the doubts of the models as (M,)."""
    laid_out = np.zeros(len(pool))
    for model, share in stated:
        if (row := pool.index.get(model)) is not None:
            laid_out[row] = share
    return laid_out


def _within_max_cost(
    eligibility: Eligibility, figures: Figures, max_cost_usd: float, tie: float
) -> tuple[Eligibility, int, Figures]:
    """Rule out the models that are expected to cost more than the request allows, and choose among the others."""
    columns = unpack(figures)
    _, costs, scores, usd = columns
    cheap_enough = ~(usd > max_cost_usd)
    passed = np.ones(len(eligibility.pool), dtype=np.bool_)
    passed[eligibility.rows] = cheap_enough
    left = eligibility.filtered(passed, f"expected to cost more than max_cost_usd={max_cost_usd:g}")
    if not left.rows.size:
        message = (
            f"every able model is expected to cost more than max_cost_usd={max_cost_usd:g}; cheapest: ${usd.min():.6f}"
        )
        raise NoEligibleModel(message, left.reasons)
    choice = argmin_with_ties(scores[cheap_enough], costs[cheap_enough], tie)
    return left, choice, [column[cheap_enough] for column in columns]


def _details(
    eligibility: Eligibility,
    assignment: Assignment | None,
    requirements: Requirements,
    measured: Callable[[Indices], Doubles],
) -> ScoreDetails:
    pool, rows = eligibility.pool, eligibility.rows
    tokens = pool.mean_output_tokens if assignment is None else assignment.expected(pool.output_tokens)[0]
    seconds = pool.seconds.mean(axis=1) if assignment is None else assignment.expected(pool.seconds)[0]
    errors, by_tools = measured(rows), np.zeros(rows.size)
    if requirements.tools:
        without_tools = pool.mean_errors if assignment is None else assignment.expected(pool.errors)[0]
        by_tools = errors - without_tools[rows]
    return ScoreDetails(
        labels=_effective_labels(pool, rows, assignment),
        output_tokens=(_cap(pool, tokens, requirements) * requirements.answers)[rows],
        seconds=seconds[rows],
        measured=errors,
        by_tools=by_tools,
    )


def _cap(pool: Pool, output_tokens: Doubles, requirements: Requirements) -> Doubles:
    """Lower (M,) output tokens to the models' limits and the request's own."""
    capped = np.minimum(output_tokens, pool.max_output_tokens.astype(np.float64))
    limit = requirements.max_output_tokens
    return capped if limit is None else np.minimum(capped, limit)


def _effective_labels(pool: Pool, rows: Indices, assignment: Assignment | None) -> Doubles:
    """Return the (m,) labels that each Φ·Ψ is worth.

    A weighted mean Σ w_k·e_k of rates with n_k labels each has the variance of a rate with 1 / Σ (w_k² / n_k) labels.
    """
    if assignment is None:
        return pool.total_labels[rows]
    weights = assignment.weights[0].astype(np.float64)
    block = np.ix_(rows, assignment.ids[0])
    return np.asarray(1.0 / ((weights**2 / pool.label_weights[block]).sum(axis=1)))
