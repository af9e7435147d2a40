"""Which model a conversation belongs to: looked up for a request, and remembered of an answer.

What follows from it for a selection is decided by `selection.apply_affinity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from proxy.routing.chat_request import ChatRequest
from proxy.routing.fingerprints import (
    NO_HISTORY,
    TurnFingerprints,
    has_fingerprints,
    inspect_history,
    latest_user_text,
)
from proxy.routing.requirements import TOOL_FIELDS
from proxy.routing.trajectory import NO_TRAJECTORY, Trajectory, read_trajectory
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.sessions import LastTurn, Lookup, SessionStore, scoped_key
from proxy.upstream.payload import iter_choices, simple_text
from router_core.types import frozen


@frozen
class Affinity:
    """What ties a conversation to a model."""

    scope: str = ""
    """The client key's id; empty if no key was needed."""
    session: str | None = field(default=None, repr=False)
    """What the session's newest answer is stored under; None: there is no session, sessions are off, or this answer is
    no turn of it."""
    has_reasoning: bool = False
    producer: str | None = None
    """The model whose tool calls are answered here, or whose reasoning is carried."""
    last_turn: LastTurn | None = None
    """The session's newest answer."""
    trajectory: Trajectory = NO_TRAJECTORY
    """How the run of the agent goes."""
    stuck: tuple[tuple[str, float], ...] = ()
    """The models that made turns in which the run was stuck, each with its share of `trajectory.stuck`."""

    def cached_prompt(self, settings: Settings) -> tuple[str, int] | None:
        """Return the model that has read this session a moment ago, and how many tokens of it."""
        last = self.last_turn
        if settings.sticky_sessions != "auto" or last is None or last.age_s > settings.prompt_cache_s:
            return None
        return (last.model, last.tokens) if last.tokens else None


NO_AFFINITY = Affinity()


async def load_affinity(
    sessions: SessionStore, request: ChatRequest, key: ClientKey | None, settings: Settings
) -> Affinity:
    """Look up whom a conversation belongs to. Never fails.

    Redis is asked only if the request has a session, or fingerprints that this process does not know.
    """
    scope = key.id if key else ""
    body = request.body
    plain = request.contents is not None and request.contents.plain_messages
    history = NO_HISTORY if plain else inspect_history(body["messages"])
    session = None if settings.sticky_sessions == "off" else _session_key(scope, request)
    trajectory = NO_TRAJECTORY
    if settings.trajectory == "auto" and not plain and not TOOL_FIELDS.isdisjoint(body):
        trajectory = read_trajectory(body["messages"])
    makers = _makers(scope, body["messages"], trajectory) if trajectory.stuck else ()
    if session is None and not history.fingerprints and not any(makers):
        if not (scope or history.has_reasoning or trajectory.turns):
            return NO_AFFINITY
        return Affinity(scope, None, history.has_reasoning, trajectory=trajectory)
    fingerprints = [scoped_key(scope, each) for each in history.fingerprints]
    found = await sessions.lookup(fingerprints, session, [each for each in makers if each])
    return Affinity(
        scope,
        session if request.housekeeping is None else None,
        history.has_reasoning,
        found.producer,
        found.last,
        trajectory,
        _stuck_models(trajectory, makers, found),
    )


def _makers(scope: str, messages: Sequence[Any], trajectory: Trajectory) -> tuple[str | None, ...]:
    """Return for each run of a trajectory what the model that made its newest turn is stored under; None: nothing."""
    found: list[str | None] = []
    for run in trajectory.runs:
        turn = TurnFingerprints()
        turn.add(messages[run.place])
        fingerprint = next(turn.of_calls(latest_user_text(messages, run.place)), None) if run.share else None
        found.append(None if fingerprint is None else scoped_key(scope, fingerprint))
    return tuple(found)


def _stuck_models(trajectory: Trajectory, makers: Sequence[str | None], found: Lookup) -> tuple[tuple[str, float], ...]:
    """Share out what is stuck among the models that made it. What nobody is known to have made counts for none."""
    shares: dict[str, float] = {}
    for run, fingerprint in zip(trajectory.runs, makers, strict=False):
        model = found.makers.get(fingerprint) if fingerprint else None
        if model is None and run.later <= 1:  # the session's newest answer was the end of it
            model = found.producer or (found.last.model if found.last else None)
        if model is not None and run.share:
            shares[model] = shares.get(model, 0.0) + trajectory.stuck * run.share
    return tuple(shares.items())


def _session_key(scope: str, request: ChatRequest) -> str | None:
    """Return what the conversation of one agent of a session is stored under; None: the request names no session."""
    name, agent = request.options.session, request.options.agent
    if name is None:
        return None
    return scoped_key(scope, f"session:{name}" if agent is None else f"session:{name}\n{agent}")


# Of one answer with `n`: a caller goes on with one of them.
MAX_CHOICES = 16


class AffinityRecorder:
    """Remember which model gave an answer, for the turns that continue it. One per request.

    Pass each chunk of a stream to `observe`, or a whole completion to `observe_completion`, and then `commit`.
    """

    def __init__(self, sessions: SessionStore, affinity: Affinity, messages: Sequence[Any]) -> None:
        self._sessions = sessions
        self._affinity = affinity
        self._messages = messages
        self._turns: dict[int, TurnFingerprints] = {}

    @property
    def producer(self) -> str | None:
        """Return what `Affinity.producer` is."""
        return self._affinity.producer

    def cached_prompt(self, settings: Settings) -> tuple[str, int] | None:
        """Return what `Affinity.cached_prompt` does."""
        return self._affinity.cached_prompt(settings)

    def observe(self, chunk: Mapping[str, Any], model: str) -> None:
        """Look at a chunk before it goes out: once its last piece is sent, the next turn may arrive anywhere."""
        if simple_text(chunk) is not None and not (self._turns and chunk["choices"][0].get("finish_reason")):
            return  # text leaves no fingerprint, and the answer has none yet, or goes on
        finished = False
        for place, choice in enumerate(iter_choices(chunk)):
            index = choice.get("index")
            for name in ("message", "delta"):
                part = choice.get(name)
                if part and isinstance(part, Mapping) and has_fingerprints(part):
                    self._add_to_turn(index if isinstance(index, int) else place, part)
            finished = finished or bool(choice.get("finish_reason"))
        if finished and self._turns:
            self._record_turns(model)

    def observe_completion(self, body: Mapping[str, Any], model: str) -> None:
        self.observe(body, model)
        if self._turns:
            self._record_turns(model)

    def commit(self, model: str, tokens: int | None) -> None:
        """Record the session's newest answer. `tokens`: prompt and answer together; None: not reported."""
        if self._affinity.session is not None:
            self._sessions.record([self._affinity.session], model, tokens)

    def _add_to_turn(self, index: int, part: Mapping[str, Any]) -> None:
        """Keep the fingerprints of the first choices that have any."""
        if index not in self._turns and len(self._turns) < MAX_CHOICES:
            self._turns[index] = TurnFingerprints()
        if (turn := self._turns.get(index)) is not None:
            turn.add(part)

    def _record_turns(self, model: str) -> None:
        """Record who made the calls and the reasoning of this answer."""
        turns = [turn for turn in self._turns.values() if not turn.is_empty]
        self._turns = {}
        if not turns:
            return
        question = latest_user_text(self._messages)
        found = [each for turn in turns for each in (*turn.of_reasoning(question), *turn.of_calls(question))]
        self._sessions.record([scoped_key(self._affinity.scope, each) for each in dict.fromkeys(found)], model)
