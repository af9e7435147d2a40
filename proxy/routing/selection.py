from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.errors import NoEligibleModelError, ServiceUnavailable
from proxy.routing.affinity import NO_AFFINITY, Affinity
from proxy.routing.assigner import AssignmentTimeout, ClusterAssigner
from proxy.routing.candidates import (
    EMPTY,
    IneligibleReasons,
    RoutingMode,
    SelectionContext,
    is_clamped,
    no_candidate_error,
    over_cost_error,
    requirements_for,
    restrict_candidates,
    routing_mode,
    scoring_params,
)
from proxy.routing.chat_request import ChatRequest
from proxy.routing.requirements import routing_text
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import RoutingSnapshot
from router_core.decision import RoutingDecision
from router_core.eligibility import Eligibility, eligible, output_limit
from router_core.errors import NoEligibleModel, RouterCoreError
from router_core.pool import Pool
from router_core.scoring import rank, rank_by_cost, rank_by_mean
from router_core.types import Assignment, Requirements


def selection_to_json(choice: Selection) -> dict[str, Any]:
    """The decision as POST /v1/route shows it."""
    decision = choice.decision
    clusters = decision.clusters if decision and decision.assignment is not None else ()
    return {
        "decision": choice.id,
        "model": choice.model,
        "reason": choice.reason,
        "lambda": choice.lambda_,
        "max_tokens": _limit(choice),
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


def _limit(choice: Selection) -> dict[str, int] | None:
    """Tokens of an answer that the request states, and that the model would be told; None: none are stated."""
    stated = choice.needs.max_output_tokens
    return None if stated is None else {"stated": stated, "sent": choice.max_tokens or stated}


log = logging.getLogger("uniroute.routing")

_GONE = "not registered any more"


def apply_affinity(asked: SelectionContext, choice: Selection) -> Selection:
    """The routed choice, or the model that it must or should stay with in its place.

    Tool calls and reasoning stay with who produced them, a session with `sticky_sessions: on` with its last model.
    """
    thread = asked.thread
    if thread.producer is not None:
        if not _is_eligible(asked, choice, thread.producer):
            return _affinity_lost(asked, choice, thread.producer)
        return _prefer(asked, choice, thread.producer, alone=thread.has_reasoning)
    last = thread.last
    if asked.settings.sticky_sessions == "on" and last is not None and _is_eligible(asked, choice, last.model):
        return _prefer(asked, choice, last.model, alone=False)
    return choice


def _prefer(asked: SelectionContext, choice: Selection, name: str, *, alone: bool) -> Selection:
    """`alone`: others are asked only where the caller says so, for reasoning that they did not sign they refuse."""
    fallbacks = asked.request.options.fallbacks
    may_fall_back = fallbacks is not False if not alone else fallbacks is True
    ranking = choice.decision.ranking if choice.decision else choice.order
    order = (name, *(other for other in ranking if other != name)) if may_fall_back else (name,)
    attempts = asked.settings.fallback_attempts if may_fall_back else 1
    return replace(choice, model=name, reason="sticky", order=order, attempts=attempts)


def _is_eligible(asked: SelectionContext, choice: Selection, name: str) -> bool:
    """Eligible for this request. One that is not profiled can be called, but not be held to `max_cost_usd`."""
    if choice.decision is not None and name in choice.decision.table.names:
        return True
    if name in asked.state.profiles:  # it could have been scored, and something spoke against it
        return False
    able = eligible(
        asked.state.pool, asked.needs, asked.allowed, require_profile=False, cooling_down=asked.resting
    ).names
    return asked.terms.max_cost_usd is None and name in able


def _affinity_lost(asked: SelectionContext, choice: Selection, name: str) -> Selection:
    why = choice.ineligible.get(name) or ("ruled out" if name in asked.state.models else _GONE)
    log.warning("decision=%s cannot stay with model=%s: %s", choice.id, name, why)
    return replace(choice, left=name, ineligible={**choice.ineligible, name: why})


ROUTING_FAILURES = (
    RouterCoreError,
    AssignmentTimeout,
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What must never cost the caller an answer."""


@dataclass(frozen=True)
class Selection:
    id: str
    model: str
    reason: str
    lambda_: float
    order: Sequence[str]
    """Who may be asked, first to last; more than one only where falling back is allowed."""
    decision: RoutingDecision | None
    """None: no model was scored."""
    ineligible: Mapping[str, str]
    """Among the models that the caller may use."""
    degraded: str | None = None
    """Why the prompt was not looked at."""
    attempts: int = 1
    """How many of `order` may be asked."""
    left: str | None = None
    """Who should have gone on with this conversation, and cannot."""
    max_tokens: int | None = None
    """The limit of an answer that `model` is told in place of a larger one that the request states."""
    needs: Requirements = field(default_factory=Requirements)
    """What the request asks for, whoever answers."""

    def told_limit(self, pool: Pool, name: str) -> int | None:
        """Tokens of an answer that this model is told; None: the request states no limit."""
        return output_limit(pool, pool.index[name], self.needs)


async def select_model(
    request: ChatRequest,
    key: ClientKey | None,
    state: RoutingSnapshot,
    settings: Settings,
    assigner: ClusterAssigner,
    *,
    thread: Affinity = NO_AFFINITY,
    resting: Mapping[str, float] = EMPTY,
    loading: Collection[str] = (),
    explain: bool = False,
) -> Selection:
    """The choice for this request.

    Args:
        thread: what is remembered of the conversation that it continues.
        resting: models that failed too often lately → seconds until they may be asked again.
        loading: models that this process cannot call yet.
        explain: score the candidates even where the name alone decides.

    Raises:
        UnknownName, Forbidden: of a name in the request.
        BadRequest: of a λ that the key may not use.
        NothingAble, Unavailable: no candidate is left.
    """
    way = routing_mode(request.model, settings, state, key)
    asked = SelectionContext(
        request=request,
        key=key,
        state=state,
        settings=settings,
        way=way,
        allowed=restrict_candidates(request.options, state, key),
        needs=requirements_for(request, limit_is_cap=is_clamped(way, settings)),
        terms=scoring_params(request, way, settings, key, thread),
        thread=thread,
        resting=resting,
        loading=loading,
    )
    if way is RoutingMode.PINNED:
        choice = await select_pinned(asked, assigner, explain=explain)
    else:
        choice = apply_affinity(asked, await select_scored(asked, assigner))
    told = choice.told_limit(state.pool, choice.model)
    return choice if told == asked.needs.max_output_tokens else replace(choice, max_tokens=told)


async def select_pinned(asked: SelectionContext, assigner: ClusterAssigner, *, explain: bool) -> Selection:
    """The named model; others are scored only to fall back on, or to explain."""
    name, fallbacks = asked.request.model, asked.request.options.fallbacks is True
    choice = Selection(_new_id(), name, "pinned", asked.terms.lambda_, (name,), None, {}, needs=asked.needs)
    if not (fallbacks or explain):
        return choice
    try:
        scored = await select_scored(asked, assigner)
    except (NoEligibleModelError, ServiceUnavailable):
        return choice
    others = tuple(other for other in _ranking(scored) if other != name)
    attempts = asked.settings.fallback_attempts if fallbacks else 1
    order = (name, *others) if fallbacks else (name,)
    return replace(choice, order=order, attempts=attempts, decision=scored.decision, ineligible=scored.ineligible)


def _ranking(choice: Selection) -> Sequence[str]:
    return choice.decision.ranking if choice.decision else choice.order


async def select_scored(asked: SelectionContext, assigner: ClusterAssigner) -> Selection:
    request, state, settings = asked.request, asked.state, asked.settings
    eligibility, all_rest = _eligible(asked)
    if not eligibility.rows.size:
        stand_in = select_default(asked, eligibility)
        if stand_in is None:
            raise no_candidate_error(asked, eligibility)
        return stand_in
    text = routing_text(request.body["messages"])
    degraded, won_by_cache = None, False
    try:
        assignment = await assigner.assign(text, state.cluster_map) if text else None
        decision = _rank(asked, eligibility, assignment)
        order = decision.ranking
        won_by_cache = chosen_for_cached_prompt(asked, eligibility, assignment, decision)
    except NoEligibleModel as error:  # within max_cost_usd
        raise over_cost_error(asked, error) from None
    except ROUTING_FAILURES as error:
        degraded = f"{type(error).__name__}: {error}"
        log.warning("routing degraded: %s", degraded)
        decision, order = rank_by_mean_error(asked, eligibility)
    if all_rest:  # whoever recovers first
        degraded, order = "every model that could answer rests", tuple(sorted(order, key=asked.resting.__getitem__))
    alone = request.options.fallbacks is False
    return Selection(
        id=_new_id(),
        model=order[0],
        reason=_reason(order, degraded=degraded is not None, won_by_cache=won_by_cache),
        lambda_=asked.terms.lambda_,
        order=(order[0],) if alone else order,
        attempts=1 if alone else settings.fallback_attempts,
        decision=decision,
        ineligible=IneligibleReasons(asked, decision.eligibility),
        degraded=degraded,
        needs=asked.needs,
    )


def _eligible(asked: SelectionContext) -> tuple[Eligibility, bool]:
    """Who may be scored, and whether these are models that rest: where all who could answer do, one must be tried."""
    pool, needs, allowed = asked.state.pool, asked.needs, asked.allowed
    eligibility = eligible(pool, needs, allowed, cooling_down=asked.resting, not_ready=asked.loading)
    if eligibility.rows.size or not asked.resting:
        return eligibility, False
    with_resting = eligible(pool, needs, allowed, not_ready=asked.loading)
    return (with_resting, True) if with_resting.rows.size else (eligibility, False)


def _rank(asked: SelectionContext, eligibility: Eligibility, assignment: Assignment | None) -> RoutingDecision:
    if asked.way is RoutingMode.CHEAP:
        return rank_by_cost(eligibility, assignment, asked.needs, asked.terms)
    if assignment is None:
        return rank_by_mean(eligibility, asked.needs, asked.terms)
    return rank(eligibility, assignment, asked.needs, asked.terms)


def chosen_for_cached_prompt(
    asked: SelectionContext, eligibility: Eligibility, assignment: Assignment | None, decision: RoutingDecision
) -> bool:
    """Whether the session's last model would not have been chosen if it had to read the prompt afresh."""
    if asked.terms.cached is None or decision.chosen != asked.terms.cached[0]:
        return False
    afresh = replace(asked, terms=replace(asked.terms, cached=None))
    try:
        return _rank(afresh, eligibility, assignment).chosen != decision.chosen
    except NoEligibleModel:  # too dear then
        return True


def _reason(order: Sequence[str], *, degraded: bool, won_by_cache: bool) -> str:
    if len(order) == 1:
        return "only_candidate"
    return "degraded" if degraded else "sticky" if won_by_cache else "scored"


def rank_by_mean_error(asked: SelectionContext, eligibility: Eligibility) -> tuple[RoutingDecision, Sequence[str]]:
    """The default model if it is eligible, then by mean error."""
    try:
        decision = rank_by_mean(eligibility, asked.needs, asked.terms)
    except NoEligibleModel as error:
        raise over_cost_error(asked, error) from None
    order = decision.ranking
    default = asked.settings.default_model
    if default is not None and default in order:
        order = (default, *(name for name in order if name != default))
    return decision, order


def select_default(asked: SelectionContext, eligibility: Eligibility) -> Selection | None:
    """The default model while nothing is measured yet, if it could answer: a new deployment serves from the start."""
    name = asked.settings.default_model
    able = eligible(asked.state.pool, asked.needs, asked.allowed, require_profile=False).names
    if name is None or name not in able or asked.terms.max_cost_usd is not None:
        return None
    reason = "no model that could answer is profiled yet"
    ineligible = IneligibleReasons(asked, eligibility, but=name)
    return Selection(
        id=_new_id(),
        model=name,
        reason="degraded",
        lambda_=asked.terms.lambda_,
        order=(name,),
        decision=None,
        ineligible=ineligible,
        degraded=reason,
        needs=asked.needs,
    )


def _new_id() -> str:
    return f"dec-{os.urandom(16).hex()}"
