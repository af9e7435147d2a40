"""A chat model's whole answer as a Message of Anthropic's API. `messages_stream` has the same of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.json_text import decode_json
from proxy.storage.usage import parse_usage, usage_of

# The member of a tool's input under which arguments are kept that are no JSON object.
UNPARSED = "arguments"

# Index of the one `function_call` of an answer among its calls.
_FUNCTION_CALL = -1

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "model_length": "model_context_window_exceeded",
    "content_filter": "refusal",
    "refusal": "refusal",
}

# Of a reason that says that the model had not ended its turn, whether it has called a tool or not.
_CUT_OFF = frozenset({"max_tokens", "model_context_window_exceeded", "refusal"})


@dataclass(frozen=True)
class AnswerFacts:
    """What an answer has to know of its request."""

    id: str
    """32 hex digits."""
    stop_sequences: tuple[str, ...] = ()
    tool_names: Mapping[str, str] = field(default_factory=dict)
    """Names of tools as the model was told them → the client's. Those that are the same are not here."""
    shows_thinking: bool = True
    used_call_ids: frozenset[str] = frozenset()
    """Of earlier turns."""

    @property
    def message_id(self) -> str:
        return f"msg_{self.id}"


def message_of(completion: Mapping[str, Any], model: str, facts: AnswerFacts) -> dict[str, Any]:
    """Return a whole completion as a Message. Only its first choice counts."""
    choice = first_choice(completion) or {}
    part = message_part(choice)
    refusal = refusal_of(part)
    text = "".join(value for kind, value in pieces_of(part) if kind == "text")
    content = _thinking_blocks(part) if facts.shows_thinking else []
    if text.strip():
        content.append({"type": "text", "text": text})
    ids = CallIds(facts)
    calls = [_call_block(call, facts, ids) for _, call in calls_of(part)]
    content += calls
    return {
        "id": facts.message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **ending_of(choice, facts, has_calls=bool(calls), refusal=refusal),
        "usage": usage_counts(usage_of(completion)),
    }


def usage_counts(usage: object) -> dict[str, Any]:
    """Return a report of usage as Anthropic counts: `input_tokens` has no tokens that a cache read or wrote."""
    counts = parse_usage(usage)
    prompt = counts.prompt_tokens or 0
    cached = min(counts.cached_tokens or 0, prompt)
    written = min(counts.written_tokens or 0, prompt - cached)
    told: dict[str, Any] = {
        "input_tokens": prompt - cached - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": counts.output_tokens or 0,
    }
    if written and counts.written_1h_tokens is not None:
        hour = min(counts.written_1h_tokens, written)
        told["cache_creation"] = {"ephemeral_5m_input_tokens": written - hour, "ephemeral_1h_input_tokens": hour}
    if counts.reasoning_tokens is not None:
        told["output_tokens_details"] = {"thinking_tokens": min(counts.reasoning_tokens, told["output_tokens"])}
    return told


def ending_of(choice: Mapping[str, Any], facts: AnswerFacts, *, has_calls: bool, refusal: str) -> dict[str, Any]:
    """Return why an answer ended, of the choice that says so."""
    finish = choice.get("finish_reason")
    reason = _STOP_REASONS.get(finish, "end_turn") if isinstance(finish, str) else "end_turn"
    if refusal and reason != "max_tokens":
        reason = "refusal"
    if reason == "refusal":
        details = {"type": "refusal", "category": None, "explanation": refusal or None}
        return {"stop_reason": reason, "stop_sequence": None, "stop_details": details}
    if has_calls and reason not in _CUT_OFF:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    matched = _matched_stop(choice, facts.stop_sequences) if reason == "end_turn" else None
    return {"stop_reason": reason if matched is None else "stop_sequence", "stop_sequence": matched}


def _matched_stop(choice: Mapping[str, Any], stops: tuple[str, ...]) -> str | None:
    """Return the stop sequence that ended an answer, as vLLM and SGLang name it; OpenRouter says only that one did."""
    for name in ("stop_reason", "matched_stop"):
        if choice.get(name) in stops:
            return str(choice[name])
    if choice.get("native_finish_reason") == "stop_sequence" and len(stops) == 1:
        return stops[0]
    return None


def first_choice(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = body.get("choices")
    if not isinstance(choices, list):
        return None
    for choice in choices:
        if isinstance(choice, Mapping) and not choice.get("index"):
            return choice
    return None


def message_part(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    part = choice.get("delta") or choice.get("message")
    return part if isinstance(part, Mapping) else {}


Kind = Literal["thinking", "signature", "redacted", "text"]

Piece = tuple[Kind, str]


def pieces_of(part: Mapping[str, Any]) -> Iterator[Piece]:
    """Yield what a message or a delta holds beside calls, in the order of its blocks."""
    content = part.get("content")
    inner = _content_pieces(content) if isinstance(content, list) else []
    yield from _reasoning(part)
    yield from (piece for piece in inner if piece[0] == "thinking")
    if isinstance(content, str):
        if content:
            yield "text", content
    else:
        yield from (piece for piece in inner if piece[0] == "text")
    if refusal := refusal_of(part):
        yield "text", refusal


def _content_pieces(content: list[Any]) -> list[Piece]:
    """Return the texts in a list of parts. Mistral's parts of thinking are lists of texts themselves."""
    found: list[Piece] = []
    for part in content:
        if not isinstance(part, Mapping):
            continue
        if isinstance(text := part.get("text"), str) and text:
            found.append(("text", text))
        thinking = part.get("thinking")
        texts = _content_pieces(thinking) if isinstance(thinking, list) else [("text", thinking)]
        found += [("thinking", text) for _, text in texts if isinstance(text, str) and text]
    return found


def refusal_of(part: Mapping[str, Any]) -> str:
    refusal = part.get("refusal")
    return refusal if isinstance(refusal, str) else ""


def _reasoning(part: Mapping[str, Any]) -> Iterator[Piece]:
    """Yield reasoning once, though many servers send it under two names: as blocks, with signatures, and as text."""
    blocks: list[Piece] = []
    for name in ("thinking_blocks", "reasoning_details"):
        listed = part.get(name)
        if isinstance(listed, list) and not blocks:
            blocks = [piece for block in listed if isinstance(block, Mapping) for piece in _block_pieces(block)]
    if not any(kind == "thinking" for kind, _ in blocks):
        for name in ("reasoning_content", "reasoning"):
            if isinstance(text := part.get(name), str) and text:
                yield "thinking", text
                break
    yield from blocks


def _block_pieces(block: Mapping[str, Any]) -> Iterator[Piece]:
    """Yield the pieces of a block of Anthropic's or OpenRouter's. Encrypted ones of other makers say nothing here."""
    if block.get("type") in ("redacted_thinking", "reasoning.encrypted"):
        data = block.get("data")
        if isinstance(data, str) and data and str(block.get("format", "anthropic")).startswith("anthropic"):
            yield "redacted", data
        return
    for name in ("thinking", "text", "summary"):
        if isinstance(text := block.get(name), str) and text:
            yield "thinking", text
            break
    if isinstance(signature := block.get("signature"), str) and signature:
        yield "signature", signature


def _thinking_blocks(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    going_on = False
    for kind, text in pieces_of(part):
        if kind == "text":
            break
        if kind == "redacted":
            blocks.append({"type": "redacted_thinking", "data": text})
            going_on = False
            continue
        if not going_on or (kind == "thinking" and blocks[-1]["signature"]):
            blocks.append({"type": "thinking", "thinking": "", "signature": ""})
            going_on = True
        blocks[-1][kind] += text
    return blocks


def calls_of(part: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the calls of a message or delta with their indexes."""
    calls = part.get("tool_calls")
    for place, call in enumerate(calls if isinstance(calls, list) else ()):
        if isinstance(call, Mapping):
            index = call.get("index")
            yield index if type(index) is int else place, call
    if isinstance(part.get("function_call"), Mapping):
        yield _FUNCTION_CALL, {"function": part["function_call"]}


class CallIds:
    """Gives each call of an answer an id of its own: the model's, if it has one and no other has it."""

    def __init__(self, facts: AnswerFacts) -> None:
        self._answer_id = facts.id
        self._used = set(facts.used_call_ids)
        self._count = 0

    def take(self, stated: object) -> str:
        chosen = stated if isinstance(stated, str) and stated and stated not in self._used else None
        if chosen is None:
            chosen = f"toolu_{self._answer_id}{self._count:02d}"
        self._used.add(chosen)
        self._count += 1
        return chosen


def _call_block(call: Mapping[str, Any], facts: AnswerFacts, ids: CallIds) -> dict[str, Any]:
    function = call.get("function")
    stated = function if isinstance(function, Mapping) else {}
    name = str(stated.get("name") or "")
    return {
        "type": "tool_use",
        "id": ids.take(call.get("id")),
        "name": facts.tool_names.get(name, name),
        "input": tool_input(stated.get("arguments")),
    }


def tool_input(arguments: object) -> dict[str, Any]:
    """Return the arguments of a call as an object. Some models write them as a string within the string."""
    for _ in range(2):
        if not isinstance(arguments, str):
            break
        text = arguments
        if not text.strip():
            return {}
        try:
            arguments = decode_json(text.encode("utf-8", "surrogatepass"))  # exact, also of numbers beyond 64 bits
        except ValueError:
            return {UNPARSED: text}
    if arguments is None:
        return {}
    return dict(arguments) if isinstance(arguments, Mapping) else {UNPARSED: arguments}
