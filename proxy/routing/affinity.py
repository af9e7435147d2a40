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
    scope: str = ""
    """The client key's id; empty where none was needed."""
    session: str | None = field(default=None, repr=False)
    """What the session is remembered under; None: there is none, or sessions are off."""
    has_reasoning: bool = False
    producer: str | None = None
    """The model that gave the tool calls which are answered here, or the reasoning that is carried."""
    last: LastTurn | None = None
    """The session's newest answer."""

    def cached(self, settings: Settings) -> tuple[str, int] | None:
        """The model that has read this session a moment ago, and how many tokens of it."""
        last = self.last
        if settings.sticky_sessions != "auto" or last is None or last.age_s > settings.prompt_cache_s:
            return None
        return (last.model, last.tokens) if last.tokens else None


NO_AFFINITY = Affinity()


async def load_affinity(
    memory: SessionStore, request: ChatRequest, key: ClientKey | None, settings: Settings
) -> Affinity:
    """Never fails. Asks Redis only where the request has a session, or something whose producer is not known here."""
    scope = key.id if key else ""
    past = inspect_history(request.body["messages"])
    name = request.options.session
    session = None if name is None or settings.sticky_sessions == "off" else scoped_key(scope, f"session:{name}")
    if session is None and not past.marks:
        return Affinity(scope, None, past.has_reasoning)
    recalled = await memory.lookup([scoped_key(scope, mark) for mark in past.marks], session)
    return Affinity(scope, session, past.has_reasoning, recalled.producer, recalled.last)


MAX_CHOICES = 16
"""Of one answer with `n`: a caller goes on with one of them."""


class AffinityRecorder:
    """One per request: `see` each chunk of a stream or `answer` the whole, then `finish`."""

    def __init__(self, memory: SessionStore, thread: Affinity, messages: Sequence[Any]) -> None:
        self._memory = memory
        self._thread = thread
        self._messages = messages
        self._trails: dict[int, TurnFingerprints] = {}

    def see(self, chunk: Mapping[str, Any], model: str) -> None:
        """Before `chunk` goes out: once its last piece is with the caller, the next turn may arrive anywhere."""
        if simple_text(chunk) is not None and not (self._trails and chunk["choices"][0].get("finish_reason")):
            return  # the text of an answer is no mark of it, and it has none yet, or goes on
        ended = False
        for place, choice in enumerate(iter_choices(chunk)):
            index = choice.get("index")
            for name in ("message", "delta"):
                if isinstance(part := choice.get(name), Mapping) and has_fingerprints(part):
                    self._add(index if isinstance(index, int) else place, part)
            ended = ended or bool(choice.get("finish_reason"))
        if ended:
            self._remember(model)

    def answer(self, body: Mapping[str, Any], model: str) -> None:
        self.see(body, model)
        self._remember(model)

    def finish(self, model: str, tokens: int | None) -> None:
        """`tokens`: prompt and answer together; None: not reported."""
        if self._thread.session is not None:
            self._memory.record([self._thread.session], model, tokens)

    def _add(self, index: int, part: Mapping[str, Any]) -> None:
        """Of the first choices with a mark; those with none need no memory."""
        if index not in self._trails and len(self._trails) < MAX_CHOICES:
            self._trails[index] = TurnFingerprints()
        if (trail := self._trails.get(index)) is not None:
            trail.add(part)

    def _remember(self, model: str) -> None:
        trails = [trail for trail in self._trails.values() if not trail.is_empty]
        self._trails = {}
        if not trails:
            return
        question = latest_user_text(self._messages)
        marks = [mark for trail in trails for mark in (*trail.reasoning_marks(question), *trail.call_marks(question))]
        self._memory.record([scoped_key(self._thread.scope, mark) for mark in dict.fromkeys(marks)], model)
