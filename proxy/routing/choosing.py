"""Which model answers: the scored choice, its way past the deadline, and the names that ask for one model. No I/O."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from proxy.errors import NothingAble, TooLong, Unavailable
from proxy.routing.assigning import Assigner, RoutingLate
from proxy.routing.features import needs_of, routing_text
from proxy.routing.names import Way, candidates, usable_models, way_of
from proxy.routing.request import ChatRequest
from proxy.settings import Settings
from proxy.state.records import ClientKey
from proxy.state.snapshot import RoutingState
from router_core.decision import RoutingDecision
from router_core.eligibility import Eligibility, eligible
from router_core.errors import NoEligibleModel, RouterCoreError
from router_core.scoring import Terms, rank, rank_by_cost, rank_by_mean
from router_core.types import Assignment, Needs

log = logging.getLogger("uniroute.routing")

ROUTING_FAILURES = (RouterCoreError, RoutingLate, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What must never cost the caller an answer."""
_SHOWN = 10


@dataclass(frozen=True)
class Choice:
    id: str
    model: str
    reason: str
    lambda_: float
    order: tuple[str, ...]
    """Who is asked, first to last; more than one only where falling back is allowed."""
    decision: RoutingDecision | None
    """None: no model was scored."""
    ineligible: Mapping[str, str]
    """Among the models that the caller may use."""
    degraded: str | None = None
    """Why the prompt was not looked at."""


async def choose(
    request: ChatRequest,
    key: ClientKey | None,
    state: RoutingState,
    settings: Settings,
    assigner: Assigner,
    *,
    explain: bool = False,
) -> Choice:
    """The choice for this request. `explain`: score the candidates even where the name alone decides.

    Raises:
        UnknownName, Forbidden: of a name in the request.
        NothingAble, Unavailable: no candidate is left.
    """
    way = way_of(request.model, settings, state, key)
    asked = _Asked(
        request=request,
        key=key,
        state=state,
        settings=settings,
        way=way,
        allowed=candidates(request.options, state, key),
        needs=needs_of(request.body),
        terms=_terms(request, way, settings),
    )
    return await (_pinned(asked, assigner, explain=explain) if way is Way.PINNED else _routed(asked, assigner))


@dataclass(frozen=True)
class _Asked:
    """One request against one snapshot: what it asks for, and what it may have."""

    request: ChatRequest
    key: ClientKey | None
    state: RoutingState
    settings: Settings
    way: Way
    allowed: Collection[str] | None
    needs: Needs
    terms: Terms


def _terms(request: ChatRequest, way: Way, settings: Settings) -> Terms:
    options = request.options
    stated = settings.lambda_ if options.lambda_ is None else options.lambda_
    weight = settings.latency_weight if options.latency_weight is None else options.latency_weight
    return Terms(
        lambda_=0.0 if way is Way.BEST else stated,
        latency_weight=weight,
        max_cost_usd=options.max_cost_usd,
        cost_unit=settings.cost_unit,
        reference=settings.reference_price,
    )


async def _pinned(asked: _Asked, assigner: Assigner, *, explain: bool) -> Choice:
    """The named model; others are scored only to fall back on, or to explain."""
    name, fallbacks = asked.request.model, asked.request.options.fallbacks is True
    choice = Choice(_new_id(), name, "pinned", asked.terms.lambda_, (name,), None, {})
    if not (fallbacks or explain):
        return choice
    try:
        scored = await _routed(asked, assigner)
    except (NothingAble, Unavailable):
        return choice
    others = tuple(other for other in _ranking(scored) if other != name)
    order = (name, *others)[: asked.settings.fallback_attempts] if fallbacks else (name,)
    return replace(choice, order=order, decision=scored.decision, ineligible=scored.ineligible)


def _ranking(choice: Choice) -> tuple[str, ...]:
    return choice.decision.ranking if choice.decision else choice.order


async def _routed(asked: _Asked, assigner: Assigner) -> Choice:
    request, state, settings = asked.request, asked.state, asked.settings
    eligibility = eligible(state.pool, asked.needs, asked.allowed)
    usable = usable_models(state, asked.key)
    if not eligibility.rows.size:
        stand_in = _stand_in(asked, eligibility)
        if stand_in is None:
            raise _nothing_left(asked, usable, eligibility.why)
        return stand_in
    text = routing_text(request.body["messages"])
    degraded = None
    try:
        assignment = await assigner.assign(text, state.cluster_map) if text else None
        decision = _rank(asked, eligibility, assignment)
        order = decision.ranking
    except NoEligibleModel as error:  # within max_cost_usd
        raise NothingAble(f"{error}{_because(error.why, usable)}", param="uniroute.max_cost_usd") from None
    except ROUTING_FAILURES as error:
        degraded = f"{type(error).__name__}: {error}"
        log.warning("routing degraded: %s", degraded)
        decision, order = _without_looking(asked, eligibility, usable)
    attempts = 1 if request.options.fallbacks is False else settings.fallback_attempts
    return Choice(
        id=_new_id(),
        model=order[0],
        reason="only_candidate" if len(order) == 1 else "degraded" if degraded else "scored",
        lambda_=asked.terms.lambda_,
        order=order[:attempts],
        decision=decision,
        ineligible={name: why for name, why in decision.ineligible.items() if name in usable},
        degraded=degraded,
    )


def _rank(asked: _Asked, eligibility: Eligibility, assignment: Assignment | None) -> RoutingDecision:
    if asked.way is Way.CHEAP:
        return rank_by_cost(eligibility, assignment, asked.needs, asked.terms)
    if assignment is None:
        return rank_by_mean(eligibility, asked.needs, asked.terms)
    return rank(eligibility, assignment, asked.needs, asked.terms)


def _without_looking(
    asked: _Asked, eligibility: Eligibility, usable: tuple[str, ...]
) -> tuple[RoutingDecision, tuple[str, ...]]:
    """The default model if it is eligible, then by mean error."""
    try:
        decision = rank_by_mean(eligibility, asked.needs, asked.terms)
    except NoEligibleModel as error:
        raise NothingAble(f"{error}{_because(error.why, usable)}", param="uniroute.max_cost_usd") from None
    order = decision.ranking
    default = asked.settings.default_model
    if default in order:
        order = (default, *(name for name in order if name != default))
    return decision, order


def _stand_in(asked: _Asked, eligibility: Eligibility) -> Choice | None:
    """The default model while nothing is measured yet, if it could answer: a new deployment serves from the start."""
    name = asked.settings.default_model
    able = eligible(asked.state.pool, asked.needs, asked.allowed, measured=False).names
    if name is None or name not in able or asked.terms.max_cost_usd is not None:
        return None
    reason = "no model that could answer is profiled yet"
    ineligible = {other: why for other, why in eligibility.why.items() if other != name}
    return Choice(_new_id(), name, "degraded", asked.terms.lambda_, (name,), None, ineligible, degraded=reason)


def _nothing_left(asked: _Asked, usable: tuple[str, ...], why: Mapping[str, str]) -> NothingAble | Unavailable:
    if not usable:
        return Unavailable("no model is registered that this request may use")
    because = _because(why, usable)
    if not eligible(asked.state.pool, Needs(), asked.allowed).rows.size:
        return Unavailable(f"no model can be chosen yet{because}")
    if eligible(asked.state.pool, replace(asked.needs, prompt_tokens=0), asked.allowed).rows.size:
        tokens = asked.needs.prompt_tokens
        return TooLong(
            f"the request of about {tokens} tokens fits no model's context window{because}", param="messages"
        )
    return NothingAble(f"no model can take this request{because}")


def _because(why: Mapping[str, str], usable: tuple[str, ...]) -> str:
    reasons = [f"{name}: {reason}" for name, reason in why.items() if name in usable]
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return f" ({'; '.join(reasons[:_SHOWN])}{more})" if reasons else ""


def _new_id() -> str:
    return f"dec-{uuid.uuid4().hex}"


def to_json(choice: Choice) -> dict[str, Any]:
    """The decision as POST /v1/route shows it."""
    decision = choice.decision
    clusters = decision.clusters if decision and decision.assignment is not None else ()
    return {
        "decision": choice.id,
        "model": choice.model,
        "reason": choice.reason,
        "lambda": choice.lambda_,
        "clusters": [{"id": cluster, "name": name, "weight": weight} for cluster, name, weight in clusters],
        "candidates": [
            {
                "model": row.model,
                "expected_error": row.expected_error,
                "error_low": row.error_low,
                "error_high": row.error_high,
                "expected_cost_usd": row.expected_cost_usd,
                "cost": row.cost,
                "score": row.score,
                "flips_at_lambda": row.flips_at_lambda,
            }
            for row in (decision.candidates if decision else ())
        ],
        "ineligible": [{"model": name, "why": why} for name, why in choice.ineligible.items()],
    }
