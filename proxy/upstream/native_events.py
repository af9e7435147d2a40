"""The events of a whole answer, in Anthropic's Messages and OpenAI's Responses, and the answer of such events.

They are for an upstream that sends JSON where it was asked for a stream, whose client reads nothing but events, and for
one that streams where it was asked for a whole answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from proxy.errors import UpstreamError
from proxy.json_text import count_values, encode_json
from proxy.settings.model_config import NativeAPI
from proxy.upstream.payload import parse_exact
from proxy.upstream.response_memory import ValueLimit

JSONObject = dict[str, Any]


def events_of(api: NativeAPI, answer: Mapping[str, Any]) -> Iterator[JSONObject]:
    """Yield the events of an answer, of which `native_chunks` has a completion."""
    return _messages_events(answer) if api == "messages" else _responses_events(answer)


# Members of a message that come with its end.
_AT_THE_END = ("stop_reason", "stop_sequence", "container")


def _messages_events(answer: Mapping[str, Any]) -> Iterator[JSONObject]:
    end = {name: answer[name] for name in _AT_THE_END if name in answer}
    usage = answer.get("usage")
    begun = {"usage": {**usage, "output_tokens": 0}} if isinstance(usage, Mapping) else {}
    yield {
        "type": "message_start",
        "message": {**answer, "content": [], **dict.fromkeys(end), **begun},
    }
    for index, block in enumerate(_objects(answer.get("content"))):
        start, deltas = _in_deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": start}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    management = {name: answer[name] for name in ("context_management",) if name in answer}
    yield {"type": "message_delta", "delta": end, "usage": usage or {}, **management}
    yield {"type": "message_stop"}


def _in_deltas(block: JSONObject) -> tuple[JSONObject, list[JSONObject]]:
    """Return a content block as it begins, and the deltas that make it whole."""
    kind, written = block.get("type"), block.get("input")
    if kind == "text" and isinstance(block.get("text"), str):
        cited = _objects(block.get("citations"))
        citations = [{"type": "citations_delta", "citation": citation} for citation in cited]
        start = {**block, "text": "", **({"citations": []} if cited else {})}
        return start, [*_deltas(block, text="text_delta"), *citations]
    if kind == "thinking":
        start = {**block, **{name: "" for name in ("thinking", "signature") if isinstance(block.get(name), str)}}
        return start, _deltas(block, thinking="thinking_delta", signature="signature_delta")
    if isinstance(written, Mapping) and written:
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": encode_json(written).decode()}]
    return block, []


def _deltas(block: JSONObject, **kinds: str) -> list[JSONObject]:
    """Return a delta for each text that is not empty. `kinds`: the types of the deltas by the members of the block."""
    texts = {name: text for name in kinds if isinstance(text := block.get(name), str) and text}
    return [{"type": kinds[name], name: text} for name, text in texts.items()]


def _responses_events(answer: Mapping[str, Any]) -> Iterator[JSONObject]:
    for number, event in enumerate(_unnumbered(answer)):
        yield {**event, "sequence_number": number}


def _unnumbered(answer: Mapping[str, Any]) -> Iterator[JSONObject]:
    not_yet = dict.fromkeys(name for name in ("usage", "incomplete_details", "completed_at") if name in answer)
    begun = {**answer, "status": "in_progress", "output": [], **not_yet}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(_objects(answer.get("output"))):
        yield {"type": "response.output_item.added", "output_index": index, "item": _begun_item(item)}
        place = {"item_id": item.get("id", ""), "output_index": index}
        for event in _events_within(item):
            yield {**place, **event}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    end = "response.incomplete" if answer.get("status") == "incomplete" else "response.completed"
    yield {"type": end, "response": dict(answer)}


# What a tool call is called with, by the type of the item: the member, and the beginning of its events' names.
_INPUTS = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
    "mcp_call": ("arguments", "response.mcp_call_arguments"),
}


def _begun_item(item: JSONObject) -> JSONObject:
    begun = dict(item)
    if "status" in item:
        begun["status"] = "in_progress"
    lists = ("content", "summary") if item.get("type") in ("message", "reasoning") else ()
    begun |= {name: [] for name in lists if isinstance(item.get(name), list)}
    name, _ = _INPUTS.get(_kind(item), ("", ""))
    return {**begun, name: ""} if isinstance(item.get(name), str) else begun


def _events_within(item: JSONObject) -> Iterable[JSONObject]:
    kind = _kind(item)
    if kind in ("message", "reasoning"):
        yield from _parts(_objects(item.get("summary")), "summary_index", "response.reasoning_summary_part")
        yield from _parts(_objects(item.get("content")), "content_index", "response.content_part")
    elif kind in _INPUTS:
        name, prefix = _INPUTS[kind]
        if isinstance(text := item.get(name), str):
            called = {"name": item.get("name", "")} if kind == "function_call" else {}
            yield {"type": f"{prefix}.delta", "delta": text}
            yield {"type": f"{prefix}.done", name: text, **called}


# The text of a part, by its type: the member, and the beginning of its events' names.
_TEXTS = {
    "output_text": ("text", "response.output_text"),
    "refusal": ("refusal", "response.refusal"),
    "summary_text": ("text", "response.reasoning_summary_text"),
    "reasoning_text": ("text", "response.reasoning_text"),
}


def _parts(parts: Iterable[JSONObject], place: str, prefix: str) -> Iterator[JSONObject]:
    """Yield the events of the parts of an item. `place`: how the number of a part is called."""
    for number, part in enumerate(parts):
        name, of_text = _TEXTS.get(_kind(part), ("", ""))
        text, annotations = part.get(name), _objects(part.get("annotations"))
        begun = {name: ""} if isinstance(text, str) else {}
        not_yet: JSONObject = {"annotations": []} if annotations else {}
        yield {"type": f"{prefix}.added", place: number, "part": {**part, **begun, **not_yet}}
        if isinstance(text, str):
            more = {"logprobs": part.get("logprobs") or []} if of_text == "response.output_text" else {}
            yield {"type": f"{of_text}.delta", place: number, "delta": text, **more}
            for index, annotation in enumerate(annotations):
                added = {"annotation_index": index, "annotation": annotation}
                yield {"type": "response.output_text.annotation.added", place: number, **added}
            yield {"type": f"{of_text}.done", place: number, name: text, **more}
        yield {"type": f"{prefix}.done", place: number, "part": part}


def _kind(value: Mapping[str, Any]) -> str:
    kind = value.get("type")
    return kind if isinstance(kind, str) else ""


def _objects(value: Any) -> list[JSONObject]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


# Answers, put together from their events.


class AnswerBuilder(Protocol):
    """Take the events of one answer. It holds what was written, not the events."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Raises ResponseTooLarge."""

    def answer(self) -> JSONObject:
        """Return the answer, once its last event has come. Raises UpstreamError if its parts make none."""


def new_builder(api: NativeAPI) -> AnswerBuilder:
    return _MessageBuilder() if api == "messages" else _ResponseBuilder()


class _MessageBuilder:
    def __init__(self) -> None:
        self._limit = ValueLimit()
        self._message: JSONObject = {}
        self._blocks: dict[int, _BlockBuilder] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        kind, index = event.get("type"), event.get("index")
        if kind == "message_start" and isinstance(message := event.get("message"), dict):
            self._limit.add(count_values(message))
            self._message = dict(message)
        elif kind == "content_block_start" and type(index) is int and isinstance(event.get("content_block"), dict):
            self._limit.add(count_values(event["content_block"]))
            self._blocks[index] = _BlockBuilder(event["content_block"], self._limit)
        elif kind == "content_block_delta" and type(index) is int and isinstance(event.get("delta"), dict):
            if index in self._blocks:
                self._blocks[index].add(event["delta"])
        elif kind == "message_delta":
            self._add_end(event)

    def _add_end(self, event: Mapping[str, Any]) -> None:
        """Add what is known at the end alone. Usage that the end leaves out stays as at the start."""
        self._limit.add(count_values(dict(event)))
        more = {name: value for name, value in event.items() if name not in ("type", "delta", "usage")}
        end, usage = event.get("delta"), event.get("usage")
        self._message |= {**more, **(end if isinstance(end, dict) else {})}
        if isinstance(usage, dict):
            known = self._message.get("usage")
            stated = {name: value for name, value in usage.items() if value is not None}
            self._message["usage"] = {**(known if isinstance(known, dict) else {}), **stated}

    def answer(self) -> JSONObject:
        return {**self._message, "content": [self._blocks[index].block() for index in sorted(self._blocks)]}


# The member of a block that a delta continues, where it has another name there.
_CONTINUED = {"partial_json": "input"}


class _BlockBuilder:
    def __init__(self, block: JSONObject, limit: ValueLimit) -> None:
        self._block = dict(block)
        self._limit = limit
        self._texts: dict[str, list[str]] = {}

    def add(self, delta: JSONObject) -> None:
        for name, value in delta.items():
            if name == "type":
                continue
            self._limit.add(count_values(value))
            if isinstance(value, str):
                self._texts.setdefault(_CONTINUED.get(name, name), []).append(value)
            elif name == "citation":
                cited = self._block.get("citations")
                self._block["citations"] = [*(cited if isinstance(cited, list) else []), value]
            elif value is not None:
                self._block[name] = value

    def block(self) -> JSONObject:
        whole = dict(self._block)
        for name, pieces in self._texts.items():
            written, begun = "".join(pieces), whole.get(name)
            if name != "input":
                whole[name] = begun + written if isinstance(begun, str) else written
            elif written:
                whole[name] = _parsed_input(written)
        return whole


def _parsed_input(written: str) -> Any:
    try:
        return parse_exact(written.encode())[0]
    except ValueError as error:
        raise UpstreamError("the model streamed the input of a tool call that is not JSON") from error


class _ResponseBuilder:
    """The last event of a response has all of it. Some servers leave out its output there."""

    def __init__(self) -> None:
        self._limit = ValueLimit()
        self._response: JSONObject = {}
        self._items: dict[int, JSONObject] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        kind, index = event.get("type"), event.get("output_index")
        response, item = event.get("response"), event.get("item")
        if isinstance(response, dict):
            self._response = response
        elif kind == "response.output_item.done" and type(index) is int and isinstance(item, dict):
            self._limit.add(count_values(item))
            self._items[index] = item

    def answer(self) -> JSONObject:
        if self._response.get("output") or not self._items:
            return self._response
        return {**self._response, "output": [self._items[index] for index in sorted(self._items)]}
