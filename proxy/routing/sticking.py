"""Whether a conversation stays with the model that it was with. Scores nothing."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from proxy.routing.asked import Asked
from router_core.eligibility import eligible

if TYPE_CHECKING:
    from proxy.routing.choosing import Choice

log = logging.getLogger("uniroute.routing")

_GONE = "not registered any more"


def held(asked: Asked, choice: Choice) -> Choice:
    """The routed choice, or the model that it must or should stay with in its place.

    Tool calls and reasoning stay with who produced them, a session with `sticky_sessions: on` with its last model.
    """
    thread = asked.thread
    if thread.producer is not None:
        if not _may_answer(asked, choice, thread.producer):
            return _left(asked, choice, thread.producer)
        return _with_first(asked, choice, thread.producer, alone=thread.has_reasoning)
    last = thread.last
    if asked.settings.sticky_sessions == "on" and last is not None and _may_answer(asked, choice, last.model):
        return _with_first(asked, choice, last.model, alone=False)
    return choice


def _with_first(asked: Asked, choice: Choice, name: str, *, alone: bool) -> Choice:
    """`alone`: others are asked only where the caller says so, for reasoning that they did not sign they refuse."""
    fallbacks = asked.request.options.fallbacks
    may_fall_back = fallbacks is not False if not alone else fallbacks is True
    ranking = choice.decision.ranking if choice.decision else choice.order
    order = (name, *(other for other in ranking if other != name)) if may_fall_back else (name,)
    attempts = asked.settings.fallback_attempts if may_fall_back else 1
    return replace(choice, model=name, reason="sticky", order=order, attempts=attempts)


def _may_answer(asked: Asked, choice: Choice, name: str) -> bool:
    """Eligible for this request. One that is not profiled can be called, but not be held to `max_cost_usd`."""
    if choice.decision is not None and name in choice.decision.table.names:
        return True
    if name in asked.state.profiles:  # it could have been scored, and something spoke against it
        return False
    able = eligible(asked.state.pool, asked.needs, asked.allowed, measured=False, resting=asked.resting).names
    return asked.terms.max_cost_usd is None and name in able


def _left(asked: Asked, choice: Choice, name: str) -> Choice:
    why = choice.ineligible.get(name) or ("ruled out" if name in asked.state.models else _GONE)
    log.warning("decision=%s cannot stay with model=%s: %s", choice.id, name, why)
    return replace(choice, left=name, ineligible={**choice.ineligible, name: why})
