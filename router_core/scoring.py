"""The rule: argmin of Φ(x)·Ψ(m) + λ·c(m, x) over the eligible models. Who is eligible is eligibility.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from router_core.decision import RoutingDecision, Scores
from router_core.eligibility import Eligibility
from router_core.errors import NoEligibleModel
from router_core.flips import choose
from router_core.pool import Pool
from router_core.pricing import CENT_USD, REFERENCE, reference_usd
from router_core.types import Assignment, Doubles, Indices, Needs, Price

CostUnit = Literal["reference", "cents"]
DEFAULT_LAMBDA = 0.1
TIE = 0.005


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request is willing to pay for fewer errors."""

    lambda_: float = DEFAULT_LAMBDA
    """λ: the error probability that the whole reference price (or one cent) is worth."""
    latency_weight: float = 0.0
    """USD that one second of waiting is worth."""
    max_cost_usd: float | None = None
    """Models whose expected cost is above it are ruled out."""
    cost_unit: CostUnit = "reference"
    reference: Price = REFERENCE
    tie: float = TIE
    """Scores this close to the best are equal; the cheapest of them is chosen."""
    cached: tuple[str, int] | None = None
    """A model, and how many tokens of this prompt it has in its cache; all others read the prompt afresh."""


def rank(eligibility: Eligibility, assignment: Assignment | None, needs: Needs, terms: Terms) -> RoutingDecision:
    """Score every eligible model for one prompt.

    Args:
        assignment: Φ(x), one row; None where there is no text to embed: then each model's mean over clusters counts.

    Raises:
        NoEligibleModel: nothing was eligible, or nothing within `max_cost_usd`.
    """
    left, scores = _score(eligibility, assignment, needs, terms)
    return _decide(left, scores, terms, assignment)


def rank_by_mean(eligibility: Eligibility, needs: Needs, terms: Terms) -> RoutingDecision:
    """The model with the lowest mean error first, whatever it costs: for requests that no cluster fits."""
    left, scores = _score(eligibility, None, needs, terms)
    return _decide(left, scores.rescored(scores.errors), terms, None, lambda_=0.0)


def rank_by_cost(
    eligibility: Eligibility, assignment: Assignment | None, needs: Needs, terms: Terms
) -> RoutingDecision:
    """The cheapest model first, whatever its errors."""
    left, scores = _score(eligibility, assignment, needs, terms)
    return _decide(left, scores.rescored(scores.costs), terms, assignment, tie=0.0)


def _decide(
    eligibility: Eligibility,
    scores: Scores,
    terms: Terms,
    assignment: Assignment | None,
    *,
    lambda_: float | None = None,
    tie: float | None = None,
) -> RoutingDecision:
    tie = terms.tie if tie is None else tie
    return RoutingDecision(
        table=scores,
        choice=choose(scores.scores, scores.costs, tie),
        lambda_=terms.lambda_ if lambda_ is None else lambda_,
        tie=tie,
        assignment=assignment,
        cluster_names=eligibility.pool.cluster_names,
        eligibility=eligibility,
    )


def _score(
    eligibility: Eligibility, assignment: Assignment | None, needs: Needs, terms: Terms
) -> tuple[Eligibility, Scores]:
    pool = eligibility.pool
    if not eligibility.rows.size:
        raise NoEligibleModel("no model can answer this request", eligibility.why)
    output_tokens = _expected(pool.output_tokens, assignment)
    billed_tokens = _capped(pool, output_tokens, needs) * needs.answers
    seconds = _expected(pool.seconds, assignment)
    usd = pool.prices.expected_usd(needs.prompt_tokens, billed_tokens, _cached_tokens(pool, needs, terms))
    unit = _unit_usd(pool, billed_tokens, needs, terms)
    if terms.max_cost_usd is not None:
        eligibility = _within(eligibility, usd, terms.max_cost_usd)
    rows = eligibility.rows
    errors, labels = _errors(pool, rows, assignment)
    costs = (usd[rows] + terms.latency_weight * seconds[rows]) / unit
    return eligibility, Scores(
        names=eligibility.names,
        errors=errors,
        labels=labels,
        costs_usd=usd[rows],
        costs=costs,
        scores=errors + terms.lambda_ * costs,
        output_tokens=billed_tokens[rows],
        seconds=seconds[rows],
    )


def _expected(matrix: Doubles, assignment: Assignment | None) -> Doubles:
    """(M, K) by cluster to (M,) for this prompt."""
    if assignment is None:
        return np.asarray(matrix.mean(axis=1))
    return np.asarray(assignment.expected(matrix)[0])


def _capped(pool: Pool, output_tokens: Doubles, needs: Needs) -> Doubles:
    capped = np.minimum(output_tokens, pool.max_output_tokens)
    return capped if needs.max_output_tokens is None else np.minimum(capped, needs.max_output_tokens)


def _cached_tokens(pool: Pool, needs: Needs, terms: Terms) -> int | Doubles:
    """(M,), or 0 for all."""
    if terms.cached is None or terms.cached[0] not in pool.index:
        return 0
    model, tokens = terms.cached
    cached = np.zeros(len(pool))
    cached[pool.index[model]] = min(tokens, needs.prompt_tokens)
    return cached


def _unit_usd(pool: Pool, billed_tokens: Doubles, needs: Needs, terms: Terms) -> float:
    """What a cost of one is: c_ref of this request, its output the mean over the profiled models; or a cent."""
    if terms.cost_unit == "cents":
        return CENT_USD
    profiled = ~np.isnan(pool.mean_errors)
    return reference_usd(needs.prompt_tokens, float(billed_tokens[profiled].mean()), terms.reference)


def _within(eligibility: Eligibility, usd: Doubles, max_cost_usd: float) -> Eligibility:
    """Rule out what is expected to cost more than the request allows."""
    left = eligibility.narrowed(~(usd > max_cost_usd), f"expected to cost more than max_cost_usd={max_cost_usd:g}")
    if not left.rows.size:
        cheapest = float(usd[eligibility.rows].min())
        message = (
            f"every able model is expected to cost more than max_cost_usd={max_cost_usd:g}; cheapest: ${cheapest:.6f}"
        )
        raise NoEligibleModel(message, left.why)
    return left


def _errors(pool: Pool, rows: Indices, assignment: Assignment | None) -> tuple[Doubles, Doubles]:
    """(m,) Φ·Ψ, and the (m,) labels that it is worth: a weighted mean of rates has the variance of so many."""
    if assignment is None:
        return pool.mean_errors[rows], pool.total_labels[rows]
    weights = assignment.weights[0].astype(np.float64)
    block = np.ix_(rows, assignment.ids[0])
    return pool.errors[block] @ weights, 1.0 / ((weights**2 / pool.label_weights[block]).sum(axis=1))
