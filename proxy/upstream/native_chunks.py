"""Chat completions and chunks that say the same as answers of Anthropic's Messages and OpenAI's Responses.

They are not sent to anybody. Usage, content, ends of answers and fingerprints are read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from proxy.errors import UpstreamError
from proxy.json_text import encode_json
from proxy.settings.model_config import NativeAPI
from proxy.upstream.chunk_reader import REPORTED
from proxy.upstream.errors import error_from_body, find_error

JSONObject = dict[str, Any]

_NOTHING: Mapping[str, Any] = {}

# Values of `stop_reason` of Messages → `finish_reason`. Any other is a stop.
_FINISH_REASONS = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

# Between parts of reasoning, as where a client sends them back and they are translated.
BREAK = "\n\n"

_CALL_TYPES = frozenset({"function_call", "custom_tool_call"})


class Chunks(Protocol):
    """Turn the events of one stream into chunks of a chat completion."""

    ended: bool
    """The last event of a whole answer has come."""

    def chunk(self, event: Mapping[str, Any]) -> JSONObject:
        """Return what one event says; a chunk without choices if that is nothing. Raises UpstreamError."""


def _chunk(delta: Mapping[str, Any] | None = None, finish_reason: str | None = None, usage: Any = None) -> JSONObject:
    choices = []
    if delta or finish_reason:
        choices = [{"index": 0, "delta": dict(delta or {}), "finish_reason": finish_reason}]
    return {"choices": choices, "usage": usage} if usage else {"choices": choices}


def _completion(message: JSONObject, finish_reason: str, usage: Any) -> JSONObject:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return {"choices": [choice], **({"usage": usage} if usage else {})}


def _call(index: int, call_id: Any, name: Any, arguments: str) -> JSONObject:
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _more_of_call(index: int, arguments: Any) -> JSONObject:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]} if arguments else {}


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else _NOTHING


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _index(value: Any) -> int:
    """Return an index; -1 for what is none."""
    return value if type(value) is int else -1


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


# Anthropic's Messages.


class MessagesChunks:
    """The events of Anthropic's Messages. `headers`: of the response, for errors within it."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.ended = False
        self._headers = headers
        self._usage: JSONObject = {}
        # Index of a block → its type, and that of a tool call → its place among the calls.
        self._types: dict[int, str] = {}
        self._calls: dict[int, int] = {}

    def chunk(self, event: Mapping[str, Any]) -> JSONObject:
        kind = event.get("type")
        if kind == "error":
            raise reported_error(event, self._headers)
        if kind == "message_start":
            usage = self._add_usage(_object(event.get("message")).get("usage"))
            return _chunk(usage=usage and prompt_usage(usage))
        if kind == "content_block_start":
            return _chunk(self._start(_index(event.get("index")), _object(event.get("content_block"))))
        if kind == "content_block_delta":
            return _chunk(self._delta(_index(event.get("index")), _object(event.get("delta"))))
        if kind == "message_delta":
            reason = _object(event.get("delta")).get("stop_reason")
            usage = self._add_usage(event.get("usage"))
            return _chunk(finish_reason=finish_reason_of(reason) if reason else None, usage=usage)
        self.ended = self.ended or kind == "message_stop"
        return _chunk()

    def _start(self, index: int, block: Mapping[str, Any]) -> JSONObject:
        kind = _text(block.get("type"))
        self._types[index] = kind
        if kind == "tool_use":
            self._calls[index] = len(self._calls)
        return delta_of_block(block, self._calls.get(index, 0))

    def _delta(self, index: int, delta: Mapping[str, Any]) -> JSONObject:
        kind = delta.get("type")
        if kind == "text_delta":
            return _without_empty({"content": _text(delta.get("text"))})
        if kind in ("thinking_delta", "signature_delta"):
            return _thinking(delta)
        if kind == "input_json_delta" and index in self._calls:
            return _more_of_call(self._calls[index], _text(delta.get("partial_json")))
        texts = [_text(delta.get(name)) for name in ("partial_json", "content")]
        return _item(self._types.get(index), "".join(texts)) if any(texts) else {}

    def _add_usage(self, reported: Any) -> JSONObject | None:
        """Add a report to those before, and return the usage of the whole answer so far.

        The first has the prompt and the last has the answer. A zero stands for what is not counted yet.
        """
        if not isinstance(reported, Mapping):
            return None
        self._usage |= {name: value for name, value in reported.items() if value or name not in self._usage}
        return messages_usage(self._usage)


def finish_reason_of(stop_reason: Any) -> str:
    return _FINISH_REASONS.get(stop_reason, "stop") if isinstance(stop_reason, str) else "stop"


def messages_usage(usage: Mapping[str, Any]) -> JSONObject:
    """Return the usage as OpenAI counts: what a cache read and wrote is part of the prompt."""
    read, written = _count(usage.get("cache_read_input_tokens")), _count(usage.get("cache_creation_input_tokens"))
    kinds = {name: count for name, count in _object(usage.get("cache_creation")).items() if _count(count)}
    written = max(written, sum(kinds.values()))
    prompt, output = _count(usage.get("input_tokens")) + read + written, _count(usage.get("output_tokens"))
    in_prompt = {
        "cached_tokens": read,
        "cache_creation_tokens": written,
        **({"cache_creation_token_details": kinds} if kinds else {}),
    }
    thinking = _count(_object(usage.get("output_tokens_details")).get("thinking_tokens"))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        **({"prompt_tokens_details": in_prompt} if read or written else {}),
        **({"completion_tokens_details": {"reasoning_tokens": thinking}} if thinking else {}),
    }


def prompt_usage(usage: Mapping[str, Any]) -> JSONObject | None:
    """Return the prompt's half of a usage, for an answer that has only begun; None if that is not counted yet."""
    kept = {name: usage[name] for name in ("prompt_tokens", "prompt_tokens_details") if name in usage}
    return kept if kept.get("prompt_tokens") else None


def delta_of_block(block: Mapping[str, Any], call: int) -> JSONObject:
    """Return the delta of a whole content block. `call`: its place among the tool calls."""
    kind = block.get("type")
    if kind == "text":
        return _without_empty({"content": _text(block.get("text"))})
    if kind == "tool_use":
        stated = block.get("input")
        arguments = encode_json(stated).decode() if isinstance(stated, Mapping) and stated else ""
        return {"tool_calls": [_call(call, block.get("id"), block.get("name"), arguments)]}
    if kind == "thinking":
        return _thinking(block)
    if kind == "redacted_thinking":
        return {"thinking_blocks": [{"type": "redacted_thinking", "data": _text(block.get("data"))}]}
    stated = block.get("input")
    return _item(kind, encode_json(stated).decode() if isinstance(stated, Mapping) and stated else "")


def _thinking(part: Mapping[str, Any]) -> JSONObject:
    stated = _without_empty({name: _text(part.get(name)) for name in ("thinking", "signature")})
    return {"thinking_blocks": [{"type": "thinking", **stated}]} if stated else {}


def _without_empty(delta: JSONObject) -> JSONObject:
    return {name: value for name, value in delta.items() if value}


def _item(kind: Any, text: str = "") -> JSONObject:
    """Return a delta of what chat completions have no place for, such as the call of a tool that the provider runs."""
    return {"items": [{"type": _text(kind) or "unknown", **({"text": text} if text else {})}]}


def messages_completion(answer: Mapping[str, Any]) -> JSONObject:
    """Return a whole message as a completion."""
    reported = answer.get("usage")
    usage = messages_usage(reported) if isinstance(reported, Mapping) else None
    message = _message(_deltas_of_blocks(answer.get("content")))
    return _completion(message, finish_reason_of(answer.get("stop_reason")), usage)


def _deltas_of_blocks(content: Any) -> Iterable[JSONObject]:
    calls = 0
    for block in _objects(content):
        yield delta_of_block(block, calls)
        calls += block.get("type") == "tool_use"


def _message(deltas: Iterable[JSONObject]) -> JSONObject:
    """Put whole deltas together: texts are joined, lists are extended."""
    message: JSONObject = {"content": None}
    for delta in deltas:
        for name, value in delta.items():
            message[name] = value if message.get(name) is None else message[name] + value
    return message


# OpenAI's Responses.


class ResponsesChunks:
    """The events of OpenAI's Responses. `headers`: of the response, for errors within it."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.ended = False
        self._headers = headers
        # Index of an item in the output → its place among the calls.
        self._calls: dict[int, int] = {}
        # The part of the reasoning that is being written, by item and number; None before the first.
        self._part: tuple[int, int] | None = None
        # Whether anything but the last event has said what the answer is.
        self._has_output = False
        self._handlers: Mapping[str, Callable[[Mapping[str, Any]], JSONObject]] = {
            "response.output_text.delta": lambda event: _without_empty({"content": _text(event.get("delta"))}),
            "response.refusal.delta": lambda event: _without_empty({"refusal": _text(event.get("delta"))}),
            "response.reasoning_summary_text.delta": self._reasoning,
            "response.reasoning_text.delta": self._reasoning,
            "response.output_item.added": self._item_added,
            "response.output_item.done": self._item_done,
            "response.function_call_arguments.delta": self._arguments,
            "response.custom_tool_call_input.delta": self._arguments,
        }

    def chunk(self, event: Mapping[str, Any]) -> JSONObject:
        kind = event.get("type")
        if kind in ("error", "response.failed", "response.cancelled"):
            raise reported_error(event, self._headers)
        if kind in ("response.completed", "response.incomplete"):
            return self._end(_object(event.get("response")))
        handler = self._handlers.get(kind) if isinstance(kind, str) else None
        delta = {} if handler is None else handler(event)
        self._has_output = self._has_output or bool(delta)
        return _chunk(delta)

    def _item_added(self, event: Mapping[str, Any]) -> JSONObject:
        item = _object(event.get("item"))
        if _text(item.get("type")) not in _CALL_TYPES:
            return {}
        place = self._calls.setdefault(_index(event.get("output_index")), len(self._calls))
        return {"tool_calls": [_call_of_item(item, place)]}

    def _item_done(self, event: Mapping[str, Any]) -> JSONObject:
        item, index = _object(event.get("item")), _index(event.get("output_index"))
        kind = _text(item.get("type"))
        if kind in _CALL_TYPES and index not in self._calls:
            return self._item_added(event)
        if kind == "reasoning":
            return _encrypted(item)
        return {} if kind == "message" or kind in _CALL_TYPES else _item(kind)

    def _reasoning(self, event: Mapping[str, Any]) -> JSONObject:
        text = _text(event.get("delta"))
        if not text:
            return {}
        number = event.get("summary_index", event.get("content_index"))
        before, self._part = self._part, (_index(event.get("output_index")), _index(number))
        return {"reasoning_content": text if before in (None, self._part) else BREAK + text}

    def _arguments(self, event: Mapping[str, Any]) -> JSONObject:
        place = self._calls.get(_index(event.get("output_index")))
        return {} if place is None else _more_of_call(place, _text(event.get("delta")))

    def _end(self, response: Mapping[str, Any]) -> JSONObject:
        if find_error({"error": response.get("error")}) is not None:
            raise reported_error({"response": response}, self._headers)
        self.ended = True
        whole = responses_completion(response)
        message = whole["choices"][0]["message"]
        reason = whole["choices"][0]["finish_reason"]
        if self._calls and reason == "stop":
            reason = "tool_calls"
        return _chunk({} if self._has_output else _without_empty(message), reason, whole.get("usage"))


def responses_completion(answer: Mapping[str, Any]) -> JSONObject:
    """Return a whole response as a completion."""
    message = _message(_deltas_of_items(answer.get("output")))
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    if answer.get("status") == "incomplete":
        details = _object(answer.get("incomplete_details"))
        reason = "content_filter" if details.get("reason") == "content_filter" else "length"
    return _completion(message, reason, responses_usage(answer.get("usage")))


def responses_usage(usage: Any) -> JSONObject | None:
    """Return the usage under the names that chat completions have."""
    if not isinstance(usage, Mapping):
        return None
    names = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens", "total_tokens": "total_tokens"}
    details = {"input_tokens_details": "prompt_tokens_details", "output_tokens_details": "completion_tokens_details"}
    return {chat: usage[name] for name, chat in (names | details).items() if usage.get(name) is not None}


def _deltas_of_items(output: Any) -> Iterable[JSONObject]:
    calls, has_reasoning = 0, False
    for item in _objects(output):
        kind = _text(item.get("type"))
        if kind == "message":
            yield from map(_delta_of_part, _objects(item.get("content")))
        elif kind == "reasoning":
            for text in filter(None, _reasoning_texts(item)):
                yield {"reasoning_content": BREAK + text if has_reasoning else text}
                has_reasoning = True
            yield _encrypted(item)
        elif kind in _CALL_TYPES:
            yield {"tool_calls": [_call_of_item(item, calls)]}
            calls += 1
        else:
            yield _item(kind)


def _delta_of_part(part: Mapping[str, Any]) -> JSONObject:
    return _without_empty({"content": _text(part.get("text")), "refusal": _text(part.get("refusal"))})


def _reasoning_texts(item: Mapping[str, Any]) -> Iterable[str]:
    parts = _objects(item.get("content")) or _objects(item.get("summary"))
    return (_text(part.get("text")) for part in parts)


def _encrypted(item: Mapping[str, Any]) -> JSONObject:
    data = _text(item.get("encrypted_content"))
    return {"reasoning_details": [{"type": "reasoning.encrypted", "data": data}]} if data else {}


def _call_of_item(item: Mapping[str, Any], place: int) -> JSONObject:
    arguments = _text(item.get("arguments")) or _text(item.get("input"))
    return _call(place, item.get("call_id"), item.get("name"), arguments)


def reported_error(event: Mapping[str, Any], headers: Mapping[str, str] | None) -> UpstreamError:
    """Make an error of an event that reports one, or of a response that has failed; with its usage, which is billed."""
    response = _object(event.get("response"))
    if not response:
        return error_from_body(REPORTED, find_error(event) or dict(event), headers)
    usage = responses_usage(response.get("usage"))
    stated = response.get("error") or {"message": f"the response's status is {response.get('status')!r}"}
    return error_from_body(REPORTED, {"error": stated, **({"usage": usage} if usage else {})}, headers)


def new_chunks(api: NativeAPI, headers: Mapping[str, str] | None = None) -> Chunks:
    return MessagesChunks(headers) if api == "messages" else ResponsesChunks(headers)
