"""Which model answers: the scored choice, its way past the deadline, and the names that ask for one model. No I/O."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from proxy.errors import NothingAble, Unavailable
from proxy.routing.asked import Asked, terms_of
from proxy.routing.assigning import Assigner, RoutingLate
from proxy.routing.features import needs_of, routing_text
from proxy.routing.names import Way, candidates, usable_models, way_of
from proxy.routing.refusals import because, nothing_left
from proxy.routing.request import ChatRequest
from proxy.settings import Settings
from proxy.state.records import ClientKey
from proxy.state.snapshot import RoutingState
from router_core.decision import RoutingDecision
from router_core.eligibility import Eligibility, eligible
from router_core.errors import NoEligibleModel, RouterCoreError
from router_core.scoring import rank, rank_by_cost, rank_by_mean
from router_core.types import Assignment, Needs

log = logging.getLogger("uniroute.routing")

ROUTING_FAILURES = (RouterCoreError, RoutingLate, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What must never cost the caller an answer."""


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
    needs: Needs = field(default_factory=Needs)
    """What the request asks for, whoever answers."""


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
    asked = Asked(
        request=request,
        key=key,
        state=state,
        settings=settings,
        way=way,
        allowed=candidates(request.options, state, key),
        needs=needs_of(request.body),
        terms=terms_of(request, way, settings),
    )
    choice = await (_pinned(asked, assigner, explain=explain) if way is Way.PINNED else _routed(asked, assigner))
    return replace(choice, needs=asked.needs)


async def _pinned(asked: Asked, assigner: Assigner, *, explain: bool) -> Choice:
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


async def _routed(asked: Asked, assigner: Assigner) -> Choice:
    request, state, settings = asked.request, asked.state, asked.settings
    eligibility = eligible(state.pool, asked.needs, asked.allowed)
    usable = usable_models(state, asked.key)
    if not eligibility.rows.size:
        stand_in = _stand_in(asked, eligibility)
        if stand_in is None:
            raise nothing_left(asked, usable, eligibility.why)
        return stand_in
    text = routing_text(request.body["messages"])
    degraded = None
    try:
        assignment = await assigner.assign(text, state.cluster_map) if text else None
        decision = _rank(asked, eligibility, assignment)
        order = decision.ranking
    except NoEligibleModel as error:  # within max_cost_usd
        raise NothingAble(f"{error}{because(error.why, usable)}", param="uniroute.max_cost_usd") from None
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


def _rank(asked: Asked, eligibility: Eligibility, assignment: Assignment | None) -> RoutingDecision:
    if asked.way is Way.CHEAP:
        return rank_by_cost(eligibility, assignment, asked.needs, asked.terms)
    if assignment is None:
        return rank_by_mean(eligibility, asked.needs, asked.terms)
    return rank(eligibility, assignment, asked.needs, asked.terms)


def _without_looking(
    asked: Asked, eligibility: Eligibility, usable: tuple[str, ...]
) -> tuple[RoutingDecision, tuple[str, ...]]:
    """The default model if it is eligible, then by mean error."""
    try:
        decision = rank_by_mean(eligibility, asked.needs, asked.terms)
    except NoEligibleModel as error:
        raise NothingAble(f"{error}{because(error.why, usable)}", param="uniroute.max_cost_usd") from None
    order = decision.ranking
    default = asked.settings.default_model
    if default in order:
        order = (default, *(name for name in order if name != default))
    return decision, order


def _stand_in(asked: Asked, eligibility: Eligibility) -> Choice | None:
    """The default model while nothing is measured yet, if it could answer: a new deployment serves from the start."""
    name = asked.settings.default_model
    able = eligible(asked.state.pool, asked.needs, asked.allowed, measured=False).names
    if name is None or name not in able or asked.terms.max_cost_usd is not None:
        return None
    reason = "no model that could answer is profiled yet"
    ineligible = {other: why for other, why in eligibility.why.items() if other != name}
    return Choice(_new_id(), name, "degraded", asked.terms.lambda_, (name,), None, ineligible, degraded=reason)


def _new_id() -> str:
    return f"dec-{uuid.uuid4().hex}"
