from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.routing.chat_request import ChatRequest
from proxy.routing.fingerprints import TurnFingerprints, has_fingerprints, inspect_history, latest_user_text
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.sessions import LastTurn, SessionStore, scoped_key
from proxy.upstream.payload import iter_choices, simple_text


@dataclass(frozen=True, slots=True)
class Affinity:
    """What ties a conversation to a model."""

    scope: str = ""
    """The client key's id; empty if no key was needed."""
    session: str | None = field(default=None, repr=False)
    """What the session is stored under; None: there is none, or sessions are off."""
    has_reasoning: bool = False
    producer: str | None = None
    """The model whose tool calls are answered here, or whose reasoning is carried."""
    last_turn: LastTurn | None = None
    """The session's newest answer."""

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
    history = inspect_history(request.body["messages"])
    name = request.options.session
    session = None if name is None or settings.sticky_sessions == "off" else scoped_key(scope, f"session:{name}")
    if session is None and not history.fingerprints:
        if not scope and not history.has_reasoning:
            return NO_AFFINITY
        return Affinity(scope, None, history.has_reasoning)
    found = await sessions.lookup([scoped_key(scope, each) for each in history.fingerprints], session)
    return Affinity(scope, session, history.has_reasoning, found.producer, found.last)


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

    def observe(self, chunk: Mapping[str, Any], model: str) -> None:
        """Look at a chunk before it goes out: once its last piece is sent, the next turn may arrive anywhere."""
        if simple_text(chunk) is not None and not (self._turns and chunk["choices"][0].get("finish_reason")):
            return  # text leaves no fingerprint, and the answer has none yet, or goes on
        finished = False
        for place, choice in enumerate(iter_choices(chunk)):
            index = choice.get("index")
            for name in ("message", "delta"):
                if isinstance(part := choice.get(name), Mapping) and has_fingerprints(part):
                    self._add(index if isinstance(index, int) else place, part)
            finished = finished or bool(choice.get("finish_reason"))
        if finished and self._turns:
            self._record(model)

    def observe_completion(self, body: Mapping[str, Any], model: str) -> None:
        self.observe(body, model)
        if self._turns:
            self._record(model)

    def commit(self, model: str, tokens: int | None) -> None:
        """Record the session's newest answer. `tokens`: prompt and answer together; None: not reported."""
        if self._affinity.session is not None:
            self._sessions.record([self._affinity.session], model, tokens)

    def _add(self, index: int, part: Mapping[str, Any]) -> None:
        """Keep the fingerprints of the first choices that have any."""
        if index not in self._turns and len(self._turns) < MAX_CHOICES:
            self._turns[index] = TurnFingerprints()
        if (turn := self._turns.get(index)) is not None:
            turn.add(part)

    def _record(self, model: str) -> None:
        turns = [turn for turn in self._turns.values() if not turn.is_empty]
        self._turns = {}
        if not turns:
            return
        question = latest_user_text(self._messages)
        found = [each for turn in turns for each in (*turn.of_reasoning(question), *turn.of_calls(question))]
        self._sessions.record([scoped_key(self._affinity.scope, each) for each in dict.fromkeys(found)], model)
