from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.routing.agents import is_example, own_words, texts_of
from proxy.routing.token_limits import MAX_TOKENS, requested_answers, stated_limit
from proxy.settings.effort import EFFORTS, SAMPLING, Effort, budget_within, most_tokens, params_of
from proxy.upstream.native_body import goes_on_without_thinking
from router_core.text import BYTES_PER_TOKEN, text_bytes, truncate_middle
from router_core.types import Requirements

# A number, true or false: about one token.
SCALAR_BYTES = 4

# Lists under these names hold parts, in a message as in a tool's result; anywhere else `type` may mean anything.
PARTS = ("content", "images")

TEXTS = ("content", "text")

_BINARY = frozenset({"data", "file_data", "b64_json"})

# Type of a part → the capability that it needs.
_CAPABILITY_OF_PART = {
    "image_url": "vision",
    "input_image": "vision",
    "image": "vision",
    "image_file": "vision",
    "video_url": "video",
    "input_video": "video",
    "video": "video",
    "input_audio": "audio_input",
    "audio": "audio_input",
    "audio_url": "audio_input",
    "file": "files",
    "input_file": "files",
    "document": "files",
}


@dataclass
class ContentSummary:
    """What a model has to read, counted."""

    text_bytes: int = 0
    attachments: int = 0
    needs: dict[str, str] = field(default_factory=dict)
    """Capability → the type of the first part that needs it."""
    plain_messages: bool = False
    """Each message is known to be one text of the user, the system or the model."""


def summarize(values: Iterable[Any], *, parts: bool) -> ContentSummary:
    """Count what JSON values hold. `parts`: whether attachments are looked for, as in messages; a schema has none."""
    found = ContentSummary()
    waiting = [(value, False) for value in values]
    while waiting:
        value, is_part = waiting.pop()
        if isinstance(value, str):
            found.text_bytes += text_bytes(value)
        elif isinstance(value, list):
            waiting.extend((item, is_part) for item in value)
        elif isinstance(value, Mapping):
            if is_part and (capability := attachment_capability(value)) is not None:
                found.attachments += 1
                found.needs.setdefault(capability, value["type"])
            else:
                _open(value, found, waiting, parts=parts)
        elif value is not None:
            found.text_bytes += SCALAR_BYTES
    return found


def _open(value: Mapping[str, Any], found: ContentSummary, waiting: list[tuple[Any, bool]], *, parts: bool) -> None:
    for name, inner in value.items():
        found.text_bytes += text_bytes(name)
        if parts and isinstance(inner, str) and is_binary(name, inner):
            found.attachments += 1
        else:
            waiting.append((inner, parts and name in PARTS and isinstance(inner, list)))


def attachment_capability(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    return _CAPABILITY_OF_PART.get(kind) if isinstance(kind, str) else None


def is_binary(name: str, text: str) -> bool:
    """Whether a text holds binary data: an answer's audio sent back, or an attachment of an unknown type."""
    return name in _BINARY or (name not in TEXTS and text.startswith("data:"))


# A newest turn of fewer characters ("yes", "continue") is read together with the turns before it.
MIN_TURN_CHARS = 60

MAX_EARLIER_TURNS = 2

# One image, audio clip or file, whatever its size: attachments are never scanned.
MEDIA_TOKENS = 800

# USD per token, in and out. None: no cap.
PriceCaps = tuple[float | None, float | None]

NO_CAPS: PriceCaps = (None, None)

# Efforts that ask a model to think hardly or not at all: one that cannot think does as well.
_NO_THINKING = ("", "none", "minimal", "disable")


def routing_text(messages: Sequence[Any]) -> str:
    """Return the newest user turn, with up to two earlier ones if it is short; empty if there is no user text.

    What agents write around the words of a user is left out, unless there is nothing else.
    """
    turns = _user_turns(messages)
    newest = next(turns, "")
    kept = [newest]
    if len(newest) < MIN_TURN_CHARS:
        kept += [text for text, _ in zip(turns, range(MAX_EARLIER_TURNS), strict=False)]
    return "\n".join(truncate_middle(text) for text in reversed(kept))


def _user_turns(messages: Sequence[Any]) -> Iterator[str]:
    """Yield the texts of user turns, newest first."""
    newest_of_agent = ""
    found = False
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            parts = [text for text in texts_of(message.get("content")) if text.strip()]
            if text := own_words(parts):
                found = True
                yield text
            elif parts:
                newest_of_agent = newest_of_agent or "\n".join(parts).strip()
                if is_example(parts):
                    break
    if not found and newest_of_agent:
        yield newest_of_agent


def requirements_of(
    body: Mapping[str, Any],
    contents: ContentSummary | None = None,
    caps: PriceCaps = NO_CAPS,
    *,
    limit_is_cap: bool = False,
    wishes: Collection[str] = (),
) -> Requirements:
    """Read from a body what its model must be able to do.

    Args:
        contents: what the body holds, if it was counted already.
        limit_is_cap: a limit of the answer above a model's own rules out no model.
        wishes: capabilities that rule out no model: what asks for them is left out for one that lacks them.
    """
    contents = _summarize_body(body) if contents is None else contents
    needs = _detect(body, contents)
    return Requirements(
        prompt_tokens=_tokens(contents),
        max_output_tokens=stated_limit(body),
        limit_is_cap=limit_is_cap,
        answers=requested_answers(body),
        max_input_cost_per_token=caps[0],
        max_output_cost_per_token=caps[1],
        **dict.fromkeys(needs.keys() - wishes if needs else (), True),
    )


def effort_bound(body: Mapping[str, Any]) -> int | None:
    """Return how many tokens of thinking a body allows; None: it says nothing of that.

    What is stated in several ways, as by clients that name an effort and a budget, allows no more than each of them.
    """
    if _EFFORT_FIELDS.isdisjoint(body):
        return None
    stated = (read(body[name]) for name, read in _ALLOWED_TOKENS.items() if name in body)
    return min((tokens for tokens in stated if tokens is not None), default=None)


def _count(value: Any) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_TOKENS
    return value if usable else None


def _budget(value: Any) -> int | None:
    """Return a budget of thinking; None: it sets no bound. Gemini's -1 leaves it to the model."""
    return 0 if value == 0 and type(value) is int else _count(value)


def _tokens_of_effort(value: Any) -> int | None:
    if value == "disable":
        return 0
    return most_tokens(value) if isinstance(value, str) and value in EFFORTS else None


def _tokens_of_reasoning(value: Any) -> int | None:
    if not isinstance(value, Mapping):
        return None
    if value.get("enabled") is False:
        return 0
    stated = [_tokens_of_effort(value.get("effort")), _budget(value.get("max_tokens"))]
    return min((tokens for tokens in stated if tokens is not None), default=None)


def _tokens_of_thinking(value: Any) -> int | None:
    if not isinstance(value, Mapping):
        return None
    return 0 if value.get("type") == "disabled" else _budget(value.get("budget_tokens"))


def unknown_effort(body: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the first field that says how much is to be thought in a way that is not known, and its value."""
    if _EFFORT_FIELDS.isdisjoint(body):
        return None
    reasoning, thinking = (body.get(name) for name in ("reasoning", "thinking"))
    stated = {"reasoning_effort": body.get("reasoning_effort"), "thinking_budget": body.get("thinking_budget")}
    if isinstance(reasoning, Mapping):
        stated |= {f"reasoning.{name}": reasoning.get(name) for name in ("effort", "max_tokens")}
    if isinstance(thinking, Mapping):
        stated["thinking.budget_tokens"] = thinking.get("budget_tokens")
    for name, value in stated.items():
        by_name = name.endswith("effort")
        is_known = isinstance(value, str) and value in _EFFORT_NAMES if by_name else type(value) is int
        if value is not None and not is_known:
            return name, value
    return None


# By which a request names an effort, or leaves it to the model.
_EFFORT_NAMES = frozenset({*EFFORTS, "disable", "default", "auto", ""})


def without_effort(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body that does not say how much is to be thought."""
    return {name: value for name, value in body.items() if name not in _EFFORT_FIELDS}


def with_effort(body: Mapping[str, Any], effort: Effort) -> dict[str, Any]:
    """Return a chat body that asks for the effort that was chosen, in place of the bound that the caller stated."""
    changed, stated = without_effort(body), body.get("reasoning")
    others = {} if not isinstance(stated, Mapping) else {each: stated[each] for each in stated if each not in _AMOUNTS}
    if others:  # of OpenRouter's object: how reasoning is shown
        changed["reasoning"] = {**others, "max_tokens" if isinstance(effort, int) else "effort": effort}
    elif isinstance(effort, int):
        budget, choice = budget_within(effort, stated_limit(body)), body.get("tool_choice")
        tool_demanded = choice == "required" or isinstance(choice, Mapping)
        if budget is None or tool_demanded or goes_on_without_thinking(body.get("messages")):
            changed["thinking"] = {"type": "disabled"}  # Anthropic refuses to think there
            return changed
        changed |= params_of(budget)
        for name in SAMPLING:
            changed.pop(name, None)
    else:
        changed |= params_of(effort)
    return changed


# Members of OpenRouter's `reasoning` that say how much is to be thought.
_AMOUNTS = ("effort", "max_tokens", "enabled")

# How each field says how much is to be thought.
_ALLOWED_TOKENS: Mapping[str, Callable[[Any], int | None]] = {
    "reasoning_effort": _tokens_of_effort,
    "reasoning": _tokens_of_reasoning,
    "thinking": _tokens_of_thinking,
    "thinking_budget": _budget,
    "enable_thinking": lambda value: 0 if value is False else None,
}

_EFFORT_FIELDS = frozenset(_ALLOWED_TOKENS)


def requirement_sources(body: Mapping[str, Any]) -> dict[str, str]:
    """Return which capabilities a body needs, and what in it asks for each, in the caller's own words."""
    return _detect(body, _summarize_body(body))


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a prompt: a quarter of its bytes of text, and MEDIA_TOKENS for each attachment."""
    return _tokens(_summarize_body(body))


def estimate_document_tokens(document: Mapping[str, Any]) -> int:
    """Estimate the tokens of a prompt by a body of any API, all of which the model may read."""
    return _tokens(summarize((document,), parts=True))


def _tokens(contents: ContentSummary) -> int:
    return min(contents.text_bytes // BYTES_PER_TOKEN + contents.attachments * MEDIA_TOKENS, MAX_TOKENS)


def _summarize_body(body: Mapping[str, Any]) -> ContentSummary:
    """Count what a body holds. Its `needs` are worded as in "messages[3] has image_url"."""
    schemas = summarize((body.get(name) for name in ("tools", "functions", "response_format")), parts=False)
    found = ContentSummary(text_bytes=schemas.text_bytes)
    for place, message in enumerate(_items(body.get("messages"))):
        here = summarize((message,), parts=True)
        found.text_bytes += here.text_bytes
        found.attachments += here.attachments
        for capability, kind in here.needs.items():
            found.needs.setdefault(capability, f"messages[{place}] has {kind}")
    return found


def _detect(body: Mapping[str, Any], contents: ContentSummary) -> dict[str, str]:
    if contents.plain_messages and TOOL_FIELDS.isdisjoint(body):
        asked: dict[str, str] = {}
    else:
        asked = _tools(body) | contents.needs
    if _SPECIAL.isdisjoint(body):
        return asked
    if isinstance(body.get("audio"), Mapping):
        asked["audio_output"] = "`audio`"
    elif "audio" in _items(body.get("modalities")):
        asked["audio_output"] = "`modalities`"
    response_format = body.get("response_format")
    # The price map does not say which models can write a mere JSON object ({"type": "json_object"}).
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        asked["json_schema"] = "`response_format`"
    for name, asks in _REASONING:
        if asks(body.get(name)):
            asked.setdefault("reasoning", f"`{name}`")
    return asked


def _tools(body: Mapping[str, Any]) -> dict[str, str]:
    """Detect tools. A conversation that carries calls needs a model that reads them, even if it offers no tool now."""
    called = [
        (place, len(message["tool_calls"]))
        for place, message in enumerate(_items(body.get("messages")))
        if isinstance(message, dict) and _items(message.get("tool_calls"))
    ]
    asked: dict[str, str] = {}
    if not called and TOOL_FIELDS.isdisjoint(body):
        return asked
    offered = next((name for name in ("tools", "functions") if _items(body.get(name))), None)
    if offered:
        asked["tools"] = f"`{offered}`"
    elif called:
        asked["tools"] = f"messages[{called[0][0]}] has tool_calls"
    together = next(((place, count) for place, count in called if count > 1), None)
    if offered and body.get("parallel_tool_calls") is True:
        asked["parallel_tools"] = "`parallel_tool_calls`"
    elif together:
        asked["parallel_tools"] = f"messages[{together[0]}] has {together[1]} tool_calls"
    return asked


def _is_effort(value: Any) -> bool:
    return isinstance(value, str) and value not in _NO_THINKING


def _is_reasoning(value: Any) -> bool:
    """Whether OpenRouter's object asks for reasoning: by an effort, a budget of tokens, or plainly."""
    if not isinstance(value, Mapping) or value.get("enabled") is False:
        return False
    return value.get("enabled") is True or _is_effort(value.get("effort")) or bool(_count(value.get("max_tokens")))


def _is_thinking(value: Any) -> bool:
    """Whether Anthropic's object asks for it; "adaptive" leaves it to the model, which must be able to."""
    return isinstance(value, Mapping) and value.get("type") in ("enabled", "adaptive")


# What clients of other APIs ask of any model, able or not. `server/api/adaptation.py` leaves it out where it must be.
WISHES = frozenset({"reasoning", "parallel_tools"})

# Without either of these, and without calls, a request has nothing to do with tools.
TOOL_FIELDS = frozenset({"tools", "functions"})

# Fields that may need an ability of the model, beside tools and what the messages hold.
_SPECIAL = frozenset({"audio", "modalities", "response_format", "reasoning_effort", "reasoning", "thinking"})

_REASONING = (("reasoning_effort", _is_effort), ("reasoning", _is_reasoning), ("thinking", _is_thinking))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
