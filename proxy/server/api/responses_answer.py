"""A chat model's answer as a response of OpenAI's Responses API, whole and as events.

A chat stream may mix text, reasoning and several calls. The events of a response are in sequence: an item begins when
the one before it is done. So what comes for a later item waits in a queue, and the first item of it is sent live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from proxy.json_text import encode_json
from proxy.server.api.responses_reasoning import CarriedReasoning, encode_carried, mappings, reasoning_text
from proxy.server.api.responses_tools import ClientTool, ToolTable, call_item, item_prefix
from proxy.storage.usage import combine_usage, parse_usage, usage_of
from proxy.upstream.chunk_reader import choice_index, split_completion
from proxy.upstream.payload import iter_choices, simple_text
from proxy.upstream.sse import KEEP_ALIVE, format_typed_event
from proxy.upstream.text_frame import TextRun


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What the answer to a request has to be like."""

    id: str
    """32 hexadecimal digits, of which all ids are made."""
    created_at: int
    echo: Mapping[str, Any] = field(repr=False)
    """The members of a response that repeat the request."""
    tools: ToolTable = field(repr=False)
    encrypts_reasoning: bool
    """The client asks for `encrypted_content`, to send it back."""
    stored: bool
    has_logprobs: bool
    used_call_ids: frozenset[str] = frozenset()
    """Of earlier turns."""


def request_echo(document: Mapping[str, Any], *, stored: bool) -> dict[str, Any]:
    """Return the members of a response that repeat the request, with the API's defaults where they are known."""
    stated = {name: value for name, value in document.items() if value is not None}
    text, reasoning = (stated[name] if isinstance(stated.get(name), Mapping) else {} for name in ("text", "reasoning"))
    return {
        "background": False,
        "instructions": stated.get("instructions"),
        "max_output_tokens": stated.get("max_output_tokens"),
        "max_tool_calls": stated.get("max_tool_calls"),
        "metadata": stated.get("metadata", {}),
        "parallel_tool_calls": stated.get("parallel_tool_calls", True),
        "previous_response_id": stated.get("previous_response_id"),
        "prompt_cache_key": stated.get("prompt_cache_key"),
        "prompt_cache_retention": stated.get("prompt_cache_retention"),
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "safety_identifier": stated.get("safety_identifier"),
        "store": stored,
        "temperature": stated.get("temperature"),
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": stated.get("tool_choice", "auto"),
        "tools": stated.get("tools", []),
        "top_logprobs": stated.get("top_logprobs", 0),
        "top_p": stated.get("top_p"),
        "truncation": stated.get("truncation", "disabled"),
        "user": stated.get("user"),
    }


def whole_answer(plan: AnswerPlan, completion: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return a whole completion as a response: what a stream of it would end with."""
    stream = ResponseStream(plan, model)
    for chunk in split_completion(dict(completion)):
        stream.write(chunk)
    stream.finish()
    return dict(stream.answer or {})


class Emit(Protocol):
    def __call__(self, kind: str, members: Mapping[str, Any]) -> None:
        """Write one event, with the next sequence number."""


class _Item(Protocol):
    """An item of the output. Until it has begun, what comes for it is kept."""

    prefix: str
    """Of its id."""

    @property
    def ready(self) -> bool:
        """Whether enough is known of it to begin."""

    @property
    def complete(self) -> bool:
        """Whether nothing more can come for it once another item has followed."""

    def begin(self, emit: Emit, item_id: str, index: int) -> None: ...

    def end(self, status: str) -> dict[str, Any]:
        """Write the events that end it, and return the item."""

    def partial(self) -> dict[str, Any] | None:
        """Return the item of an answer that failed; None if a client could take it for complete."""


class _Reasoning:
    """The reasoning before an answer. Its text is one part of the summary."""

    prefix = "rs"
    ready = True
    complete = True

    def __init__(self, *, encrypts: bool, stored: bool) -> None:
        self.carried = CarriedReasoning()
        self._encrypts = encrypts
        self._stored = stored
        self._pieces: list[str] = []
        self._emit: Emit | None = None
        self._id = ""
        self._where: dict[str, Any] = {}

    def add(self, text: str) -> None:
        if self._emit is not None:
            if not self._pieces:
                self._begin_part(self._emit)
            self._emit("response.reasoning_summary_text.delta", {**self._where, "delta": text})
        self._pieces.append(text)

    def begin(self, emit: Emit, item_id: str, index: int) -> None:
        self._emit, self._id = emit, item_id
        self._where = {"item_id": item_id, "output_index": index, "summary_index": 0}
        item = {"id": item_id, "type": "reasoning", "status": "in_progress", "summary": []}
        emit("response.output_item.added", {"output_index": index, "item": item})
        if self._pieces:
            self._begin_part(emit)
            emit("response.reasoning_summary_text.delta", {**self._where, "delta": "".join(self._pieces)})

    def _begin_part(self, emit: Emit) -> None:
        emit("response.reasoning_summary_part.added", {**self._where, "part": _summary("")})

    def end(self, status: str) -> dict[str, Any]:
        assert self._emit is not None
        if self._pieces:
            text = "".join(self._pieces)
            self._emit("response.reasoning_summary_text.done", {**self._where, "text": text})
            self._emit("response.reasoning_summary_part.done", {**self._where, "part": _summary(text)})
        item = {**self.partial(), "status": status}
        self._emit("response.output_item.done", {"output_index": self._where["output_index"], "item": item})
        return item

    def partial(self) -> dict[str, Any]:
        summary = [_summary("".join(self._pieces))] if self._pieces else []
        item: dict[str, Any] = {"id": self._id, "type": "reasoning", "status": "incomplete", "summary": summary}
        carried = self.carried.to_json()
        # A response that is kept is read again for the next turn, which may need what the provider has signed.
        if self._encrypts or (self._stored and carried):
            item["encrypted_content"] = encode_carried(carried)
        return item


def _summary(text: str) -> dict[str, str]:
    return {"type": "summary_text", "text": text}


class _Part:
    """A part of a message: its text, or a refusal."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def to_json(self) -> dict[str, Any]:
        text = "".join(self.pieces)
        if self.kind == "refusal":
            return {"type": "refusal", "refusal": text}
        return {"type": "output_text", "text": text, "annotations": self.annotations, "logprobs": self.logprobs}


class _Message:
    prefix = "msg"
    ready = True
    complete = True

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._emit: Emit | None = None
        self._id = ""
        self._index = 0

    def add(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> None:
        """Add a piece of a part. Another kind than before begins the next part."""
        part = self._parts[-1] if self._parts else None
        if part is None or part.kind != kind:
            if self._emit is not None and part is not None:
                self._end_part(self._emit, len(self._parts) - 1)
            part = _Part(kind)
            self._parts.append(part)
            if self._emit is not None:
                self._begin_part(self._emit, len(self._parts) - 1)
        if self._emit is not None:
            self._write_delta(self._emit, len(self._parts) - 1, text, logprobs)
        part.pieces.append(text)
        part.logprobs += logprobs

    def annotate(self, annotation: dict[str, Any]) -> None:
        """Add an annotation to the last part, if that is text."""
        part = self._parts[-1] if self._parts else None
        if part is None or part.kind == "refusal":
            return
        if self._emit is not None:
            self._write_annotation(self._emit, len(self._parts) - 1, len(part.annotations), annotation)
        part.annotations.append(annotation)

    @property
    def open_text(self) -> list[str] | None:
        """Return the pieces of the text that is being sent, to which pieces may be added that were sent otherwise."""
        if self._emit is None or not self._parts or self._parts[-1].kind == "refusal":
            return None
        return self._parts[-1].pieces

    def text_event_start(self) -> bytes:
        """Return all of a delta's event that stands before its text."""
        start = {"type": "response.output_text.delta", **self._where(len(self._parts) - 1), "logprobs": []}
        return b"event: response.output_text.delta\ndata: " + orjson.dumps(start)[:-1] + b',"delta":'

    def begin(self, emit: Emit, item_id: str, index: int) -> None:
        self._emit, self._id, self._index = emit, item_id, index
        item = {"id": item_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        emit("response.output_item.added", {"output_index": index, "item": item})
        for place, part in enumerate(self._parts):
            self._begin_part(emit, place)
            self._write_delta(emit, place, "".join(part.pieces), part.logprobs)
            for number, annotation in enumerate(part.annotations):
                self._write_annotation(emit, place, number, annotation)
            if place < len(self._parts) - 1:
                self._end_part(emit, place)

    def end(self, status: str) -> dict[str, Any]:
        assert self._emit is not None
        if self._parts:
            self._end_part(self._emit, len(self._parts) - 1)
        item = {**self.partial(), "status": status}
        self._emit("response.output_item.done", {"output_index": self._index, "item": item})
        return item

    def partial(self) -> dict[str, Any]:
        content = [part.to_json() for part in self._parts]
        return {"id": self._id, "type": "message", "status": "incomplete", "role": "assistant", "content": content}

    def _where(self, place: int) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self._index, "content_index": place}

    def _begin_part(self, emit: Emit, place: int) -> None:
        part = _Part(self._parts[place].kind).to_json()
        emit("response.content_part.added", {**self._where(place), "part": part})

    def _write_delta(self, emit: Emit, place: int, text: str, logprobs: list[dict[str, Any]]) -> None:
        if self._parts[place].kind == "refusal":
            emit("response.refusal.delta", {**self._where(place), "delta": text})
        else:
            emit("response.output_text.delta", {**self._where(place), "delta": text, "logprobs": logprobs})

    def _write_annotation(self, emit: Emit, place: int, number: int, annotation: dict[str, Any]) -> None:
        where = {**self._where(place), "annotation_index": number}
        emit("response.output_text.annotation.added", {**where, "annotation": annotation})

    def _end_part(self, emit: Emit, place: int) -> None:
        part = self._parts[place].to_json()
        if part["type"] == "refusal":
            emit("response.refusal.done", {**self._where(place), "refusal": part["refusal"]})
        else:
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            emit("response.output_text.done", {**self._where(place), **done})
        emit("response.content_part.done", {**self._where(place), "part": part})


# How often a call is looked at whether its arguments are whole, while others wait for it.
MAX_CHECKS = 32


class _Call:
    """A call of a tool. It begins once the function's name is whole: with its arguments, or at the end."""

    prefix = ""

    def __init__(self, tools: ToolTable, call_ids: _CallIds) -> None:
        self.chat_id = ""
        self.done = False
        self._tools = tools
        self._call_ids = call_ids
        self._name: dict[str, None] = {}
        self._pieces: list[str] = []
        self._checks_left = MAX_CHECKS
        self._emit: Emit | None = None
        self._item: dict[str, Any] = {}
        self._where: dict[str, Any] = {}

    def add(self, call_id: Any, function: Mapping[str, Any]) -> None:
        if isinstance(call_id, str) and call_id and not self.chat_id:
            self.chat_id = call_id
        name, arguments = function.get("name"), function.get("arguments")
        # Some servers repeat the name with every piece of the arguments.
        if isinstance(name, str) and name and self._emit is None:
            self._name[name] = None
        if arguments in (None, ""):
            return
        piece = arguments if isinstance(arguments, str) else encode_json(arguments).decode()
        self._pieces.append(piece)
        if self._emit is not None:
            self._write_delta(self._emit, piece)

    @property
    def _tool(self) -> ClientTool:
        return self._tools.client_tool("".join(self._name))

    @property
    def _is_written_at_once(self) -> bool:
        """Whether the item holds no arguments as text, so that it can only be written once they are whole."""
        return self._tool.kind not in ("function", "custom")

    @property
    def ready(self) -> bool:
        return bool(self._name and self._pieces) and not self._is_written_at_once

    @property
    def complete(self) -> bool:
        """Return whether the arguments are an object with members, after which nothing can follow."""
        if not self._checks_left or not self._pieces or not self._pieces[-1].rstrip().endswith("}"):
            return False
        self._checks_left -= 1
        try:
            return bool(orjson.loads("".join(self._pieces)))
        except orjson.JSONDecodeError:
            return False

    def begin(self, emit: Emit, item_id: str, index: int) -> None:
        tool, arguments = self._tool, "".join(self._pieces)
        self._where = {"item_id": f"{item_prefix(tool.kind)}_{item_id}", "output_index": index}
        call_id = self._call_ids.take(self.chat_id, f"call_{item_id}")
        self._item = {"item_id": self._where["item_id"], "call_id": call_id}
        self._emit = emit
        if self._is_written_at_once:
            return
        item = call_item(tool, **self._item, arguments="", status="in_progress")
        emit("response.output_item.added", {"output_index": index, "item": item})
        if arguments:
            self._write_delta(emit, arguments)

    def _write_delta(self, emit: Emit, piece: str) -> None:
        if self._tool.kind == "function":
            emit("response.function_call_arguments.delta", {**self._where, "delta": piece})

    def end(self, status: str) -> dict[str, Any]:
        assert self._emit is not None
        emit, tool = self._emit, self._tool
        self.done = True
        if not self._pieces and status == "completed":
            self._pieces.append("{}")  # what clients can parse
            self._write_delta(emit, "{}")
        arguments = "".join(self._pieces)
        item = call_item(tool, **self._item, arguments=arguments, status=status)
        if tool.kind == "function":
            done = {"name": item["name"], "arguments": arguments}
            emit("response.function_call_arguments.done", {**self._where, **done})
        elif tool.kind == "custom":
            if item["input"]:
                emit("response.custom_tool_call_input.delta", {**self._where, "delta": item["input"]})
            emit("response.custom_tool_call_input.done", {**self._where, "input": item["input"]})
        else:
            begun = {**item, "status": "in_progress"}
            emit("response.output_item.added", {"output_index": self._where["output_index"], "item": begun})
        emit("response.output_item.done", {"output_index": self._where["output_index"], "item": item})
        return item

    def partial(self) -> None:
        return None


class _CallIds:
    """The call ids of one answer: each once."""

    def __init__(self, used: frozenset[str]) -> None:
        """`used`: the ids of earlier turns."""
        self._taken = set(used)

    def take(self, wanted: str, otherwise: str) -> str:
        call_id = wanted if wanted and wanted not in self._taken else otherwise
        self._taken.add(call_id)
        return call_id


class _CallTable:
    """The calls of one answer, found by the index or the id that a delta states."""

    def __init__(self) -> None:
        self._by_index: dict[int, _Call] = {}
        self._newest: _Call | None = None

    def find(self, index: Any, call_id: Any) -> _Call | None:
        """Return the call that a delta continues; None: it begins another.

        Another id under a known index is another call, and so is an id without an index.
        """
        known = self._by_index.get(index) if type(index) is int else self._newest
        if known is None or (call_id and known.chat_id not in ("", call_id)) or (call_id and type(index) is not int):
            return None
        return known

    def add(self, index: Any, call: _Call) -> None:
        if type(index) is int:
            self._by_index[index] = call
        self._newest = call


# The index of the one `function_call` of older servers among the calls.
_FUNCTION_CALL = -1

# finish_reason → why the response is incomplete.
_INCOMPLETE = {"length": "max_output_tokens", "max_tokens": "max_output_tokens", "content_filter": "content_filter"}

_SERVICE_TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast"})


class ResponseStream:
    """Turn the chunks of one stream into events. `answer` is the whole response, once `finish` was called."""

    keep_alive = KEEP_ALIVE

    def __init__(self, plan: AnswerPlan, model: str) -> None:
        self.answer: Mapping[str, Any] | None = None
        self._plan = plan
        self._model = model
        self._events: list[bytes] = []
        self._sequence = 0
        self._begun = False
        self._ended = False
        self._output: list[dict[str, Any]] = []
        self._queue: deque[_Item] = deque()
        self._calls = _CallTable()
        self._call_ids = _CallIds(plan.used_call_ids)
        self._usage: object = None
        self._finish_reason: Any = None
        self._service_tier: Any = None
        # Whether the first item of the queue has begun.
        self._is_begun = False
        # Of the text that is being sent: the start of its events, and its pieces so far.
        self._text: tuple[bytes, list[str]] | None = None

    def write(self, chunk: Mapping[str, Any]) -> bytes:
        if self._text is not None and (text := simple_text(chunk)) and not chunk.get("usage"):
            choice = chunk["choices"][0]
            if not (choice.get("index") or choice.get("finish_reason") or choice.get("logprobs")):
                start, pieces = self._text
                pieces.append(text)
                number = self._sequence
                self._sequence = number + 1
                return b'%b%b,"sequence_number":%d}\n\n' % (start, encode_json(text), number)
        if self._ended:
            return b""
        self._begin()
        self._read(chunk)
        return self._take_events()

    def write_run(self, run: TextRun) -> bytes | None:
        if self._text is None or not run.frame.is_plain:
            return None
        start, pieces = self._text
        pieces.append(run.text)
        texts = [text for text in run.texts if text]
        number = self._sequence
        self._sequence = number + len(texts)
        return b"".join(
            [b'%b"%b","sequence_number":%d}\n\n' % (start, text, number + place) for place, text in enumerate(texts)]
        )

    def finish(self) -> bytes:
        if self._ended:
            return b""
        self._begin()
        reason = _INCOMPLETE.get(self._finish_reason) if isinstance(self._finish_reason, str) else None
        while self._queue:
            self._end_first("incomplete" if reason and len(self._queue) == 1 else "completed")
        self._ended = True
        response = self._response(
            "incomplete" if reason else "completed",
            output=self._output,
            usage=_usage(self._usage),
            incomplete_details={"reason": reason} if reason else None,
        )
        self._emit(f"response.{response['status']}", {"response": response})
        self.answer = response
        return self._take_events()

    def fail(self, error: Mapping[str, Any], status: int) -> bytes:
        if self._ended:
            return b""
        self._begin()
        self._ended, self._text = True, None
        open_items = [self._queue[0].partial()] if self._queue and self._is_begun else []
        response = self._response(
            "failed",
            output=[*self._output, *(item for item in open_items if item is not None)],
            usage=None if self._usage is None else _usage(self._usage),
            error=failure(error, status),
        )
        self._emit("response.failed", {"response": response})
        return self._take_events()

    def fail_after(self, number: int, error: Mapping[str, Any], status: int) -> bytes:
        """Return the event that ends a stream whose events up to this sequence number another has written."""
        self._begun, self._sequence = number > 0, number
        return self.fail(error, status)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            response = self._response("in_progress", output=[], usage=None)
            self._emit("response.created", {"response": response})
            self._emit("response.in_progress", {"response": response})

    def _read(self, chunk: Mapping[str, Any]) -> None:
        if usage := usage_of(chunk):
            self._usage = combine_usage(self._usage, usage)
        self._service_tier = chunk.get("service_tier") or self._service_tier
        for position, choice in enumerate(iter_choices(chunk)):
            if choice_index(choice, position) == 0:  # a response is one answer
                part = choice.get("delta") or choice.get("message")
                if isinstance(part, Mapping):
                    self._add(part, choice.get("logprobs"))
                self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def _add(self, part: Mapping[str, Any], logprobs: Any) -> None:
        self._add_reasoning(part)
        tokens = _logprobs(logprobs) if self._plan.has_logprobs else []
        if text := _content_text(part.get("content")):
            self._message().add("output_text", text, tokens)
        if isinstance(refusal := part.get("refusal"), str) and refusal:
            self._message().add("refusal", refusal, [])
        for annotation in mappings(part.get("annotations")):
            self._annotate(annotation)
        for index, call_id, function in _calls_in(part):
            self._add_call(index, call_id, function)
        self._advance()

    def _add_reasoning(self, part: Mapping[str, Any]) -> None:
        text = reasoning_text(part)
        carried = CarriedReasoning()
        if not text and not carried.add(part):
            return
        last = self._queue[-1] if self._queue else None
        if not isinstance(last, _Reasoning):
            last = _Reasoning(encrypts=self._plan.encrypts_reasoning, stored=self._plan.stored)
            self._append(last)
        last.carried.add(part)
        if text:
            last.add(text)

    def _message(self) -> _Message:
        """Return the message to which text belongs: the last item, or a new one."""
        last = self._queue[-1] if self._queue else None
        if not isinstance(last, _Message):
            last = _Message()
            self._append(last)
        return last

    def _annotate(self, annotation: Mapping[str, Any]) -> None:
        cited = annotation.get("url_citation")
        if annotation.get("type") != "url_citation" or not isinstance(cited, Mapping):
            return
        for item in reversed(self._queue):
            if isinstance(item, _Message):
                defaults = {"start_index": 0, "end_index": 0, "title": "", "url": ""}
                found = {name: cited.get(name) or default for name, default in defaults.items()}
                item.annotate({"type": "url_citation", **found})
                return

    def _add_call(self, index: Any, call_id: Any, function: Mapping[str, Any]) -> None:
        call = self._calls.find(index, call_id)
        if call is None:
            call = _Call(self._plan.tools, self._call_ids)
            call.add(call_id, function)
            self._calls.add(index, call)
            self._append(call)
        elif not call.done:  # nothing but blanks can follow whole arguments
            call.add(call_id, function)

    def _append(self, item: _Item) -> None:
        """Queue an item; end those before it that are complete."""
        self._queue.append(item)
        while len(self._queue) > 1 and self._queue[0].complete:
            self._end_first("completed")

    def _advance(self) -> None:
        """Begin the first item, if enough is known of it, and note whether plain text may be sent for it."""
        if not self._queue:
            return
        first = self._queue[0]
        if not self._is_begun and first.ready:
            self._begin_first()
        pieces = first.open_text if isinstance(first, _Message) else None
        if pieces is None or not isinstance(first, _Message):
            self._text = None
        elif self._text is None or self._text[1] is not pieces:
            self._text = first.text_event_start(), pieces

    def _begin_first(self) -> None:
        first, index = self._queue[0], len(self._output)
        self._is_begun = True
        place = f"{self._plan.id}_{index}"
        first.begin(self._emit, f"{first.prefix}_{place}" if first.prefix else place, index)

    def _end_first(self, status: str) -> None:
        if not self._is_begun:
            self._begin_first()
        self._text = None
        self._output.append(self._queue[0].end(status))
        self._queue.popleft()
        self._is_begun = False

    def _emit(self, kind: str, members: Mapping[str, Any]) -> None:
        self._events.append(format_typed_event(kind, **members, sequence_number=self._sequence))
        self._sequence += 1

    def _take_events(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events

    def _response(
        self,
        status: str,
        *,
        output: list[dict[str, Any]],
        usage: Mapping[str, Any] | None,
        error: Mapping[str, Any] | None = None,
        incomplete_details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        stated = self._service_tier
        tier = stated if isinstance(stated, str) and stated in _SERVICE_TIERS else None
        return {
            "id": f"resp_{self._plan.id}",
            "object": "response",
            "created_at": self._plan.created_at,
            "status": status,
            "model": self._model,
            "error": error,
            "incomplete_details": incomplete_details,
            "output": output,
            "usage": usage,
            "service_tier": tier,
            **self._plan.echo,
        }


def _calls_in(part: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Mapping[str, Any]]]:
    """Yield the index, the id and the function of each call in a message or a delta."""
    for call in mappings(part.get("tool_calls")):
        function = call.get("function")
        yield call.get("index"), call.get("id"), function if isinstance(function, Mapping) else {}
    if isinstance(function := part.get("function_call"), Mapping):
        yield _FUNCTION_CALL, None, function


def _content_text(content: Any) -> str:
    """Return the text of a message's or a delta's content, which some servers send in parts."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in mappings(content) if part.get("type") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def _logprobs(stated: Any) -> list[dict[str, Any]]:
    content = stated.get("content") if isinstance(stated, Mapping) else None
    return [
        {**_token(each), "top_logprobs": [_token(top) for top in mappings(each.get("top_logprobs"))]}
        for each in mappings(content)
    ]


def _token(stated: Mapping[str, Any]) -> dict[str, Any]:
    token = str(stated.get("token") or "")
    code = stated.get("bytes")
    coded = code if isinstance(code, list) else list(token.encode("utf-8", "replace"))
    return {"token": token, "logprob": stated.get("logprob") or 0.0, "bytes": coded}


def _usage(reported: object) -> dict[str, Any]:
    """Return the usage of a response, always whole: clients refuse one without a count."""
    counts = parse_usage(reported)
    read, written = counts.prompt_tokens or 0, counts.output_tokens or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {
            "cached_tokens": counts.cached_tokens or 0,
            "cache_write_tokens": counts.written_tokens or 0,
        },
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens or 0},
        "total_tokens": read + written,
    }


# Codes by which clients decide whether to send a request again, to shorten it, or to give up.
_KNOWN_CODES = frozenset(
    {"context_length_exceeded", "insufficient_quota", "usage_not_included", "rate_limit_exceeded", "server_error"}
    | {"invalid_prompt", "server_is_overloaded", "slow_down"}
)


def error_code(error: Mapping[str, Any], status: int) -> str:
    """Return the code of a failed response, for an error object of OpenAI and its HTTP status."""
    for stated in (error.get("code"), error.get("type")):
        if isinstance(stated, str) and stated in _KNOWN_CODES:
            return stated
    if status == 429:
        return "rate_limit_exceeded"
    # What the client sent is at fault, and would be again.
    return "invalid_prompt" if 400 <= status < 500 and status != 408 else "server_error"


def failure(error: Mapping[str, Any], status: int) -> dict[str, str]:
    """Return the `error` of a failed response, for an error object of OpenAI and its HTTP status."""
    return {"code": error_code(error, status), "message": str(error.get("message") or "the model failed")}
