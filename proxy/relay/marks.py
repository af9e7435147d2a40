"""What an answer leaves to be recognised by, gathered as it passes and remembered where it ends. Never fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxy.routing.thread import Thread
from proxy.routing.trail import Trail, leaves_marks, newest_question
from proxy.storage.sessions import Conversations, scoped
from proxy.upstream.payload import choices_of, plain_text

MOST_CHOICES = 16
"""Of one answer with `n`: a caller goes on with one of them."""


class AnswerMarks:
    """One per request: `see` each chunk of a stream or `answer` the whole, then `finish`."""

    def __init__(self, memory: Conversations, thread: Thread, messages: Sequence[Any]) -> None:
        self._memory = memory
        self._thread = thread
        self._messages = messages
        self._trails: dict[int, Trail] = {}

    def see(self, chunk: Mapping[str, Any], model: str) -> None:
        """Before `chunk` goes out: once its last piece is with the caller, the next turn may arrive anywhere."""
        if plain_text(chunk) is not None and not (self._trails and chunk["choices"][0].get("finish_reason")):
            return  # the text of an answer is no mark of it, and it has none yet, or goes on
        ended = False
        for place, choice in enumerate(choices_of(chunk)):
            index = choice.get("index")
            for name in ("message", "delta"):
                if isinstance(part := choice.get(name), Mapping) and leaves_marks(part):
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
            self._memory.remember([self._thread.session], model, tokens)

    def _add(self, index: int, part: Mapping[str, Any]) -> None:
        """Of the first choices with a mark; those with none need no memory."""
        if index not in self._trails and len(self._trails) < MOST_CHOICES:
            self._trails[index] = Trail()
        if (trail := self._trails.get(index)) is not None:
            trail.add(part)

    def _remember(self, model: str) -> None:
        trails = [trail for trail in self._trails.values() if not trail.is_empty]
        self._trails = {}
        if not trails:
            return
        question = newest_question(self._messages)
        marks = [mark for trail in trails for mark in (*trail.reasoning_marks(question), *trail.call_marks(question))]
        self._memory.remember([scoped(self._thread.scope, mark) for mark in dict.fromkeys(marks)], model)
