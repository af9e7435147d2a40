from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.questions import Question, answering_model

COMPLETE = "complete"
# A proper answer without a word, which some upstream gave.
EMPTY = "empty"
REFUSED = "refused"
ERROR_EVENT = "error event"
# The client went away by itself.
LEFT = "left"
DROPPED = "dropped"
ACCOUNTED = (COMPLETE, EMPTY, REFUSED, ERROR_EVENT, LEFT, DROPPED)

# It looks complete and is not.
CUT = "cut"
# The answer to another question, or of another model than it says.
FOREIGN = "foreign"
MALFORMED = "malformed"
HUNG = "hung"
# What a good request may be refused with; 500 is an upstream's own.
OTHERS_FAULT = frozenset({429, 500, 502, 503, 504})
# Monotonic seconds, from and to.
Span = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    ending: str
    detail: str = ""
    model: str | None = None
    """Who answered, as the body says."""


@dataclass(frozen=True)
class Outcome:
    """Hold one request, as its client saw it. Times are monotonic seconds."""

    question: Question
    client: str
    verdict: Verdict
    started: float
    ended: float
    status: int | None = None
    decision: str | None = None

    @property
    def span(self) -> Span:
        return self.started, self.ended

    @property
    def ending(self) -> str:
        return self.verdict.ending


def judge_refusal(status: int, headers: Mapping[str, str], body: object) -> Verdict:
    """Judge whether a failure has OpenAI's shape."""
    problem = error_problem(body)
    if problem is not None:
        return Verdict(MALFORMED, f"status {status}: {problem}")
    if status not in OTHERS_FAULT:
        return Verdict(MALFORMED, f"status {status} to a good request: {str(body)[:200]}")
    if status == 429 and "retry-after" not in headers:
        return Verdict(MALFORMED, "status 429 without retry-after")
    return Verdict(REFUSED, str(status))


def judge_text(question: Question, text: str, model: str | None, *, ended: bool) -> Verdict:
    """Judge a text. `ended`: the server said that this is all."""
    if not text:
        return Verdict(EMPTY if ended else CUT, "nothing was said", model)
    named = answering_model(text)
    if not _fits(question, text) or model != (named or model):
        return Verdict(FOREIGN, f"asked {question.id}, model {model}, got {text[:80]!r}", model)
    if named is None or text != question.answer(named):
        return Verdict(CUT, f"it ends with {text[-40:]!r}", model)
    return Verdict(COMPLETE if ended else CUT, "" if ended else "no [DONE]", model)


def judge_body(question: Question, body: object) -> Verdict:
    """Judge an answer with status 200 that is no stream."""
    try:
        assert isinstance(body, dict)
        choice = body["choices"][0]
        text, finish_reason = choice["message"]["content"], choice["finish_reason"]
    except (AssertionError, LookupError, TypeError):
        return Verdict(MALFORMED, f"status 200 with {str(body)[:120]!r}")
    if finish_reason != "stop":
        return Verdict(MALFORMED, f"finish_reason {finish_reason!r}", body.get("model"))
    return judge_text(question, text or "", body.get("model"), ended=True)


def judge_events(question: Question, events: Sequence[bytes]) -> Verdict:
    """Judge a whole stream; each event without its blank line."""
    text, model, done = "", None, False
    for place, event in enumerate(events):
        if event.startswith(b":"):
            continue
        if not event.startswith(b"data: ") or done:
            return Verdict(MALFORMED, f"event {place}: {event[:80]!r}", model)
        if event == b"data: [DONE]":
            done = True
            continue
        payload = _parsed(event)
        if "error" in payload:
            return _error_event(question, text, payload, is_last=place == len(events) - 1)
        if not isinstance(payload.get("choices"), list):
            return Verdict(MALFORMED, f"event {place}: {event[:80]!r}", model)
        model = payload.get("model") or model  # of other APIs, only the first event names it
        text += "".join(choice["delta"].get("content") or "" for choice in payload["choices"])
    return judge_text(question, text, model, ended=done)


def judge_part(question: Question, text: str) -> Verdict:
    """Judge what a client had read when it left, or when an error came."""
    if _fits(question, text):
        return Verdict(LEFT)
    return Verdict(FOREIGN, f"asked {question.id}, got {text[:80]!r}")


def _fits(question: Question, text: str) -> bool:
    """Tell whether it is the beginning of an answer to this question."""
    named = answering_model(text)
    if named is not None:
        return question.answer(named).startswith(text)
    marker = f"[{question.id} by "
    return text.startswith(marker) or marker.startswith(text)


def error_problem(body: object) -> str | None:
    """Return what is wrong with OpenAI's error object; None if nothing is."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        return f"no error object: {str(body)[:120]!r}"
    for name, kinds in (("message", str), ("type", str), ("param", str | None), ("code", str | None)):
        if name not in error or not isinstance(error[name], kinds):
            return f"error.{name} is {error.get(name)!r}"
    return None if error["message"] else "error.message is empty"


def _error_event(question: Question, text: str, payload: Mapping[str, Any], *, is_last: bool) -> Verdict:
    problem = error_problem(payload)
    if problem is not None or not is_last:
        return Verdict(MALFORMED, problem or "events after an error event")
    part = judge_part(question, text)
    return Verdict(ERROR_EVENT, str(payload["error"]["code"])) if part.ending == LEFT else part


def _parsed(event: bytes) -> Mapping[str, Any]:
    try:
        payload = json.loads(event[len(b"data: ") :])
    except ValueError:
        return {}
    return payload if isinstance(payload, Mapping) else {}
