"""How one request hangs together with those before it: what it carries, its session, and who is remembered for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.routing.conversation import past_of
from proxy.routing.request import ChatRequest
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.sessions import Conversations, LastTurn, scoped


@dataclass(frozen=True, slots=True)
class Thread:
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


NO_THREAD = Thread()


async def thread_of(memory: Conversations, request: ChatRequest, key: ClientKey | None, settings: Settings) -> Thread:
    """Never fails. Asks Redis only where the request has a session, or something whose producer is not known here."""
    scope = key.id if key else ""
    past = past_of(request.body["messages"])
    name = request.options.session
    session = None if name is None or settings.sticky_sessions == "off" else scoped(scope, f"session:{name}")
    if session is None and not past.marks:
        return Thread(scope, None, past.has_reasoning)
    recalled = await memory.recall([scoped(scope, mark) for mark in past.marks], session)
    return Thread(scope, session, past.has_reasoning, recalled.producer, recalled.last)
