from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from proxy.errors import BadRequest, ModelPaused, NoEligibleModelError, ServiceUnavailable
from proxy.routing.assigner import AssignmentTimeout, ClusterAssigner
from proxy.routing.cost_weight import RoutingMode
from proxy.routing.requirements import routing_text, unknown_effort
from proxy.routing.selection_context import (
    IneligibleReasons,
    SelectionContext,
    check_allowed,
    no_candidate_error,
    over_cost_error,
)
from proxy.routing.token_limits import smaller_limit
from proxy.routing.trajectory import NO_TRAJECTORY, Trajectory
from proxy.settings.effort import EFFORTS, Effort
from proxy.storage.controls import why_paused
from router_core.decision import RoutingDecision
from router_core.eligibility import Eligibility, eligible
from router_core.errors import NoEligibleModel, RouterCoreError
from router_core.scoring import ScoringParams, rank, rank_by_cost, rank_by_mean
from router_core.types import Assignment, Requirements, frozen

log = logging.getLogger("uniroute.routing")

# Failures of scoring after which models are ranked by their mean error, so that the caller still gets an answer.
ROUTING_FAILURES = (
    RouterCoreError,
    AssignmentTimeout,
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

_UNREGISTERED = "not registered any more"


@frozen
class Selection:
    """Which models may answer a request, in which order, and why."""

    id: str
    model: str
    reason: str
    lambda_: float
    candidates: Sequence[str]
    """Models that may be asked, first to last; more than one only if falling back is allowed."""
    decision: RoutingDecision | None
    """None: no model was scored."""
    ineligible: Mapping[str, str]
    """Models that the caller may use and that were ruled out, each with the reason."""
    degraded_reason: str | None = None
    """Why the models were not ranked by their scores for this prompt; None: they were."""
    max_attempts: int = 1
    """How many models of `candidates` may be asked, until one answers."""
    lost_affinity: str | None = None
    """The model that should have continued this conversation, and cannot."""
    max_tokens: int | None = None
    """The output token limit that `model` is sent in place of a larger one in the request; None: it is unchanged."""
    requirements: Requirements = field(default_factory=Requirements)
    """What the request asks for, whichever model answers."""
    effort: Effort | None = None
    """At which `model` is asked; None: it is no effort of a model."""
    made_at: float = field(default_factory=time.monotonic, compare=False)
    """Monotonic seconds."""


async def select_model(ctx: SelectionContext, assigner: ClusterAssigner, *, explain: bool = False) -> Selection:
    """Select the models that may answer a request.

    Args:
        explain: score the candidates even if the name of the model alone decides.

    Raises:
        NoEligibleModelError, ServiceUnavailable: no candidate is left.
        BadRequest: an effort of a model would answer, and the request states one that is not known.
    """
    if ctx.mode is RoutingMode.PINNED:
        selection = await select_pinned(ctx, assigner, explain=explain)
    elif ctx.request.options.fallbacks is True and (wider := ctx.for_any_model) is not None:
        selection = await _select_before_others(ctx, wider, assigner)
    else:
        selection = apply_affinity(ctx, await select_scored(ctx, assigner))
    if ctx.snapshot.efforts and (effort := ctx.snapshot.models[selection.model].effort) is not None:
        _check_effort(ctx)
        selection = replace(selection, effort=effort)
    sent = smaller_limit(ctx.snapshot.pool, selection.model, ctx.requirements)
    return selection if sent is None else replace(selection, max_tokens=sent)


def _check_effort(ctx: SelectionContext) -> None:
    """Refuse an effort that is not known: what is sent in its place might be more than the caller allows.

    Raises:
        BadRequest: naming the field.
    """
    if (found := unknown_effort(ctx.request.body)) is None:
        return
    name, value = found
    if name == "reasoning_effort" and ctx.request.translated:  # Messages has refused it before
        name = "reasoning.effort"
    must_be = f"one of {', '.join(EFFORTS)}" if name.endswith("effort") else "a whole number of tokens"
    raise BadRequest(f"`{name}` must be {must_be}; got {value!r}"[:300], param=name)


async def select_pinned(ctx: SelectionContext, assigner: ClusterAssigner, *, explain: bool) -> Selection:
    """Select the named model. Others are scored only as fallbacks, or to explain.

    Raises:
        ModelPaused: it is paused, and no other model may answer.
        Forbidden: the effort that the request states allows only one that the key does not.
    """
    name, may_fall_back = ctx.request.model, ctx.request.options.fallbacks is True
    if name in ctx.beyond_effort:
        name = ctx.within_effort(name)
        check_allowed(name, ctx.key, ctx.snapshot)
    if name in ctx.snapshot.paused:
        return await _select_in_place_of(name, ctx, assigner)
    selection = Selection(
        ctx.decision_id, name, "pinned", ctx.params.lambda_, (name,), None, {}, requirements=ctx.requirements
    )
    if not (may_fall_back or explain):
        return selection
    try:
        scored = await select_scored(ctx, assigner)
    except (NoEligibleModelError, ServiceUnavailable):
        return selection
    if may_fall_back:
        others = (other for other in _ranking(scored) if other != name)
        selection = replace(selection, candidates=(name, *others), max_attempts=ctx.settings.fallback_attempts)
    return replace(selection, decision=scored.decision, ineligible=scored.ineligible)


async def _select_before_others(ctx: SelectionContext, wider: SelectionContext, assigner: ClusterAssigner) -> Selection:
    """Select an effort of the named model, with the other models behind its efforts.

    Args:
        wider: the same request, for any model.
    """
    of_any = await select_scored(wider, assigner)
    try:
        selection = apply_affinity(ctx, await select_scored(ctx, assigner))
    except (NoEligibleModelError, ServiceUnavailable):
        return replace(of_any, reason="fallback")
    behind = [name for name in _ranking(of_any) if name not in selection.candidates]
    attempts = ctx.settings.fallback_attempts
    return replace(selection, candidates=(*selection.candidates, *behind), max_attempts=attempts)


async def _select_in_place_of(paused: str, ctx: SelectionContext, assigner: ClusterAssigner) -> Selection:
    """Select the best-scored fallback of a paused model. Raises ModelPaused."""
    failure = ModelPaused(f"the model {paused!r} is {why_paused(paused)}")
    if ctx.request.options.fallbacks is not True:
        raise failure
    try:
        return replace(await select_scored(ctx, assigner), reason="fallback")
    except (NoEligibleModelError, ServiceUnavailable) as none_left:
        raise failure from none_left


async def select_scored(ctx: SelectionContext, assigner: ClusterAssigner) -> Selection:
    """Select the model with the best score for this prompt."""
    eligibility, all_open = _eligible(ctx)
    if not eligibility.rows.size:
        selection = select_default(ctx, eligibility)
        if selection is None:
            raise no_candidate_error(ctx, eligibility)
        return selection
    # Housekeeping is not assessed: what its harness has written says nothing of the user's work.
    text = "" if ctx.is_housekeeping else routing_text(ctx.request.body["messages"])
    degraded_reason, won_by_cache = None, False
    try:
        decision, won_by_cache = await _rank_for_text(ctx, assigner, eligibility, text)
        order = decision.ranking
    except NoEligibleModel as error:  # none is within max_cost_usd
        raise over_cost_error(ctx, error) from None
    except ROUTING_FAILURES as error:
        degraded_reason = f"{type(error).__name__}: {error}"
        log.warning("routing degraded: %s", degraded_reason)
        decision, order = rank_degraded(ctx, eligibility)
    if all_open:
        degraded_reason = "every model that could answer rests"
        order = tuple(sorted(order, key=ctx.cooling_down.__getitem__))  # the model that recovers first comes first
    no_fallbacks = ctx.request.options.fallbacks is False
    return Selection(
        id=ctx.decision_id,
        model=order[0],
        reason=_reason(ctx, order, degraded_reason, won_by_cache=won_by_cache),
        lambda_=ctx.params.lambda_,
        candidates=(order[0],) if no_fallbacks else order,
        max_attempts=1 if no_fallbacks else ctx.settings.fallback_attempts,
        decision=decision,
        ineligible=IneligibleReasons(ctx, decision.eligibility),
        degraded_reason=degraded_reason,
        requirements=ctx.requirements,
    )


def select_default(ctx: SelectionContext, eligibility: Eligibility) -> Selection | None:
    """Select the default model while no model is profiled, so that a new deployment answers from the start.

    Returns:
        None: there is no default model, or it may not answer.
    """
    name = ctx.settings.default_model
    usable = eligible(ctx.snapshot.pool, ctx.requirements, ctx.allowed, require_profile=False).names
    if name is None or name not in usable or ctx.params.max_cost_usd is not None:
        return None
    return Selection(
        id=ctx.decision_id,
        model=name,
        reason="degraded",
        lambda_=ctx.params.lambda_,
        candidates=(name,),
        decision=None,
        ineligible=IneligibleReasons(ctx, eligibility, but=name),
        degraded_reason="no model that could answer is profiled yet",
        requirements=ctx.requirements,
    )


def _eligible(ctx: SelectionContext) -> tuple[Eligibility, bool]:
    """Return which models may be scored, and whether these are only models with an open circuit, for lack of others."""
    pool, requirements, allowed = ctx.snapshot.pool, ctx.requirements, ctx.allowed
    not_ready, beyond_effort = ctx.not_ready, ctx.beyond_effort
    eligibility = eligible(
        pool,
        requirements,
        allowed,
        cooling_down=ctx.cooling_down,
        not_ready=not_ready,
        beyond_effort=beyond_effort,
    )
    if eligibility.rows.size or not ctx.cooling_down:
        return eligibility, False
    with_open = eligible(pool, requirements, allowed, not_ready=not_ready, beyond_effort=beyond_effort)
    return (with_open, True) if with_open.rows.size else (eligibility, False)


async def _rank_for_text(
    ctx: SelectionContext, assigner: ClusterAssigner, eligibility: Eligibility, text: str
) -> tuple[RoutingDecision, bool]:
    """Rank for the clusters of a prompt, and tell whether the first is so because it has the prompt in its cache.

    Raises:
        NoEligibleModel: none is within `max_cost_usd`.
        One of ROUTING_FAILURES.
    """
    assignment = await assigner.assign(text, ctx.snapshot.cluster_map) if text else None
    decision = _rank(ctx, eligibility, assignment, ctx.params)
    if ctx.params.cached is None:
        return decision, False
    return decision, chosen_for_cached_prompt(ctx, eligibility, assignment, decision)


def _rank(
    ctx: SelectionContext, eligibility: Eligibility, assignment: Assignment | None, params: ScoringParams
) -> RoutingDecision:
    """Rank by cost for the cheap mode and housekeeping, else by score, or by mean error without clusters."""
    if ctx.mode is RoutingMode.CHEAP or ctx.is_housekeeping:
        return rank_by_cost(eligibility, assignment, ctx.requirements, params)
    if assignment is None:
        return rank_by_mean(eligibility, ctx.requirements, params)
    return rank(eligibility, assignment, ctx.requirements, params)


def chosen_for_cached_prompt(
    ctx: SelectionContext, eligibility: Eligibility, assignment: Assignment | None, decision: RoutingDecision
) -> bool:
    """Whether the session's last model would not have been chosen if it had to read the prompt afresh."""
    if ctx.params.cached is None or decision.chosen != ctx.params.cached[0]:
        return False
    try:
        return _rank(ctx, eligibility, assignment, replace(ctx.params, cached=None)).chosen != decision.chosen
    except NoEligibleModel:  # at the full price of the prompt, no model is within max_cost_usd
        return True


def _reason(ctx: SelectionContext, order: Sequence[str], degraded_reason: str | None, *, won_by_cache: bool) -> str:
    """Return why the first of `order` was selected."""
    if len(order) == 1:
        return "only_candidate"
    if degraded_reason is not None:
        return "degraded"
    if ctx.is_housekeeping:
        return "housekeeping"
    return "sticky" if won_by_cache else "scored"


def rank_degraded(ctx: SelectionContext, eligibility: Eligibility) -> tuple[RoutingDecision, Sequence[str]]:
    """Rank the default model first, if it is eligible, and then by mean error."""
    try:
        decision = rank_by_mean(eligibility, ctx.requirements, ctx.params)
    except NoEligibleModel as error:
        raise over_cost_error(ctx, error) from None
    order = decision.ranking
    default = ctx.settings.default_model
    first = [name for name in order if name == default or ctx.snapshot.models[name].base == default]
    if default is not None and first:
        order = (*first, *(name for name in order if name not in first))
    return decision, order


def apply_affinity(ctx: SelectionContext, selection: Selection) -> Selection:
    """Prefer the model that a conversation belongs to over the best-scored one.

    Tool results and reasoning go back to the model that produced them, even while it rests. A session goes back to its
    last model if `sticky_sessions` is "on"; its housekeeping does not.
    """
    affinity = ctx.affinity
    if affinity.producer is not None:
        producer = _name_now(ctx, selection, affinity.producer)
        if not _is_eligible(ctx, selection, producer):
            return _without_affinity(ctx, selection, producer)
        # Others did not make these calls, and reject reasoning that they did not sign: they are asked only if the
        # caller says so.
        return _prefer(ctx, selection, producer, may_fall_back=ctx.request.options.fallbacks is True)
    last_turn = None if ctx.is_housekeeping else affinity.last_turn
    if ctx.settings.sticky_sessions == "on" and last_turn:
        last_model = _name_now(ctx, selection, last_turn.model)
        if _is_eligible(ctx, selection, last_model):
            may_fall_back = ctx.request.options.fallbacks is not False
            return _prefer(ctx, selection, last_model, may_fall_back=may_fall_back)
    return selection


def _name_now(ctx: SelectionContext, selection: Selection, name: str) -> str:
    """Return by which name a model goes on with what it has begun: of several efforts the best-scored one."""
    names = ctx.names_now(name)
    return names[0] if len(names) == 1 else next((each for each in _ranking(selection) if each in names), name)


def _prefer(ctx: SelectionContext, selection: Selection, name: str, *, may_fall_back: bool) -> Selection:
    """Put a model first; the others stay behind it only if the request may fall back."""
    others = [other for other in _ranking(selection) if other != name] if may_fall_back else []
    attempts = ctx.settings.fallback_attempts if may_fall_back else 1
    return replace(selection, model=name, reason="sticky", candidates=(name, *others), max_attempts=attempts)


def _is_eligible(ctx: SelectionContext, selection: Selection, name: str) -> bool:
    """Whether a model may answer. One without a profile may, except under `max_cost_usd`: its cost is not known."""
    if selection.decision is not None and name in selection.decision.table.names:
        return True
    if name in ctx.snapshot.profiles:  # it could have been scored, and was ruled out
        return False
    if ctx.params.max_cost_usd is not None:
        return False
    usable = eligible(
        ctx.snapshot.pool,
        ctx.requirements,
        ctx.allowed,
        require_profile=False,
        cooling_down=ctx.cooling_down,
        beyond_effort=ctx.beyond_effort,
    )
    return name in usable.names


def _without_affinity(ctx: SelectionContext, selection: Selection, name: str) -> Selection:
    """Keep the best-scored model, and note why the model that the conversation belongs to cannot answer."""
    why = selection.ineligible.get(name) or ("ruled out" if name in ctx.snapshot.models else _UNREGISTERED)
    log.warning("decision=%s cannot stay with model=%s: %s", selection.id, name, why)
    return replace(selection, lost_affinity=name, ineligible={**selection.ineligible, name: why})


def _ranking(selection: Selection) -> Sequence[str]:
    return selection.decision.ranking if selection.decision else selection.candidates


def selection_to_json(selection: Selection, trajectory: Trajectory = NO_TRAJECTORY) -> dict[str, Any]:
    """Return the decision as POST /v1/route shows it.

    Args:
        trajectory: how the run of the agent went before it.
    """
    decision, requested = selection.decision, selection.requirements.max_output_tokens
    clusters = decision.clusters if decision and decision.assignment is not None else ()
    return {
        "decision": selection.id,
        "model": selection.model,
        "effort": selection.effort,
        "reason": selection.reason,
        "lambda": selection.lambda_,
        "max_tokens": None if requested is None else {"stated": requested, "sent": selection.max_tokens or requested},
        "clusters": [{"id": cluster, "name": name, "weight": weight} for cluster, name, weight in clusters],
        "nearest_cosine": decision.nearest_cosine if decision else None,
        "novel": decision.is_novel if decision else None,
        "trajectory": trajectory.to_json(),
        "candidates": [
            {
                "model": row.model,
                "expected_error": row.expected_error,
                "error_low": row.error_low,
                "error_high": row.error_high,
                "trajectory_error": row.added,
                "tool_error": row.by_tools,
                "expected_cost_usd": row.expected_cost_usd,
                "cost": row.cost,
                "score": row.score,
                "flips_at_lambda": row.flips_at_lambda,
            }
            for row in (decision.candidates if decision else ())
        ],
        "ineligible": [{"model": name, "why": why} for name, why in selection.ineligible.items()],
    }
