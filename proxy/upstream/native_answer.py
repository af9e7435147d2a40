"""A whole answer in Anthropic's Messages or OpenAI's Responses, put together from the events of a stream.

It is for an upstream that streams where it was asked for a whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from proxy.errors import ResponseTooLarge, UpstreamError
from proxy.json_limits import MAX_VALUES, count_values
from proxy.settings.model_config import NativeAPI
from proxy.upstream.payload import parse_exact

JSONObject = dict[str, Any]


class AnswerBuilder(Protocol):
    """Take the events of one answer. It holds what was written, not the events."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Raises ResponseTooLarge."""

    def answer(self) -> JSONObject:
        """Return the answer, once its last event has come. Raises UpstreamError if its parts make none."""


def new_builder(api: NativeAPI) -> AnswerBuilder:
    return _MessageBuilder() if api == "messages" else _ResponseBuilder()


class _ValueLimit:
    """Hold no more values than a whole answer may have."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def count(self, value: Any) -> None:
        self._left -= count_values(value)
        if self._left < 0:
            raise ResponseTooLarge(f"the model's answer holds more than {MAX_VALUES} values")


class _MessageBuilder:
    def __init__(self) -> None:
        self._limit = _ValueLimit()
        self._message: JSONObject = {}
        self._blocks: dict[int, _BlockBuilder] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        kind, index = event.get("type"), event.get("index")
        if kind == "message_start" and isinstance(message := event.get("message"), dict):
            self._limit.count(message)
            self._message = dict(message)
        elif kind == "content_block_start" and type(index) is int and isinstance(event.get("content_block"), dict):
            self._limit.count(event["content_block"])
            self._blocks[index] = _BlockBuilder(event["content_block"], self._limit)
        elif kind == "content_block_delta" and index in self._blocks and isinstance(event.get("delta"), dict):
            self._blocks[index].add(event["delta"])
        elif kind == "message_delta":
            self._add_end(event)

    def _add_end(self, event: Mapping[str, Any]) -> None:
        """Add what is known at the end alone. Usage that the end leaves out stays as at the start."""
        self._limit.count(dict(event))
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
    def __init__(self, block: JSONObject, limit: _ValueLimit) -> None:
        self._block = dict(block)
        self._limit = limit
        self._texts: dict[str, list[str]] = {}

    def add(self, delta: JSONObject) -> None:
        for name, value in delta.items():
            if name == "type":
                continue
            self._limit.count(value)
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
        self._limit = _ValueLimit()
        self._response: JSONObject = {}
        self._items: dict[int, JSONObject] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        kind, index = event.get("type"), event.get("output_index")
        response, item = event.get("response"), event.get("item")
        if isinstance(response, dict):
            self._response = response
        elif kind == "response.output_item.done" and type(index) is int and isinstance(item, dict):
            self._limit.count(item)
            self._items[index] = item

    def answer(self) -> JSONObject:
        if self._response.get("output") or not self._items:
            return self._response
        return {**self._response, "output": [self._items[index] for index in sorted(self._items)]}
