"""The chunks of a chat stream as events of Anthropic's Messages API.

Blocks of content follow one another and never overlap, while a chat stream may mix text, reasoning and several tool
calls. While a call is open whose arguments are not complete, everything else waits behind it:

    chunks   call 0 `{"a":`    call 1 `{}`   call 0 `1}`      text `x`
    events   start 0, delta                  delta, stop 0,   start 1, delta, stop 1, start 2, delta
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import orjson

from proxy.json_text import encode_json
from proxy.server.api.messages_answer import (
    AnswerFacts,
    CallIds,
    Piece,
    calls_of,
    ending_of,
    first_choice,
    message_part,
    pieces_of,
    refusal_of,
    tool_input,
    usage_counts,
)
from proxy.server.api.messages_errors import error_event
from proxy.storage.usage import combine_usage, usage_of
from proxy.upstream.payload import simple_text
from proxy.upstream.sse import format_typed_event
from proxy.upstream.text_frame import TextRun

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _before_delta(index: int, kind: bytes, member: bytes) -> bytes:
    """Return what stands before the text of each delta of a block."""
    delta = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":' % (index, kind, member)
    return b"event: content_block_delta\ndata: " + delta


_REASONING_TEXTS = ("reasoning_content", "reasoning")


def _simple_reasoning(chunk: Mapping[str, Any]) -> str | None:
    """Return the text of a chunk that is a piece of reasoning alone, quickly. None for any other."""
    choices = chunk.get("choices")
    if type(choices) is not list or len(choices) != 1 or chunk.get("usage"):
        return None
    choice = choices[0]
    if type(choice) is not dict or choice.get("finish_reason") or choice.get("index"):
        return None
    delta = choice.get("delta")
    if type(delta) is not dict:
        return None
    text = delta.get("reasoning_content") or delta.get("reasoning")
    others = any(value and name != "role" and name not in _REASONING_TEXTS for name, value in delta.items())
    return text if type(text) is str and not others else None


# How often a call is looked at whether its arguments are whole, while others wait for it. After that they wait for the
# end of the answer.
MAX_CHECKS = 32


class _Call:
    """A tool call of a stream, as far as it has come."""

    __slots__ = ("_checked", "_checks_left", "_pieces", "_sent", "id", "is_object", "name")

    def __init__(self) -> None:
        self.id: object = None
        self.name = ""
        self.is_object: bool | None = None
        """Whether the arguments begin as a JSON object does. None: there are none yet."""
        self._pieces: list[str] = []
        self._sent = 0
        self._checked = 0
        """How many pieces there were when they were found incomplete."""
        self._checks_left = MAX_CHECKS

    def add(self, call: Mapping[str, Any]) -> None:
        self.id = self.id or call.get("id")
        function = call.get("function")
        if not isinstance(function, Mapping):
            return
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and name != self.name:  # some servers send it with each piece
            self.name += name
        if isinstance(arguments, Mapping):
            arguments = encode_json(arguments).decode()
        if isinstance(arguments, str) and arguments:
            self._pieces.append(arguments)
            if self.is_object is None and (start := arguments.lstrip()[:1]):
                self.is_object = start == "{"

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def is_complete(self) -> bool:
        if not self.is_object or len(self._pieces) == self._checked or not self._checks_left:
            return False
        last = next((piece for piece in reversed(self._pieces) if not piece.isspace()), "")
        if last.rstrip().endswith("}"):
            if _is_json(self.text):
                return True
            self._checks_left -= 1
        self._checked = len(self._pieces)
        return False

    def unsent(self) -> str:
        """Return what can be sent of the arguments now."""
        if not self.is_object:
            return ""
        unsent, self._sent = self._pieces[self._sent :], len(self._pieces)
        return "".join(unsent)


class MessageStream:
    """Turn the chunks of one chat stream into events of the Messages API."""

    keep_alive = PING

    def __init__(self, model: str, facts: AnswerFacts) -> None:
        self.answer: Mapping[str, Any] | None = None
        self._model = model
        self._facts = facts
        self._ids = CallIds(facts)
        self._started = False
        self._events: list[bytes] = []
        self._usage: object = None
        self._last_choice: Mapping[str, Any] = {}
        """The choice that said why the answer ended."""
        self._refusal = ""
        self._blocks = 0
        """How many blocks have begun."""
        self._open: Literal["text", "thinking"] | _Call | None = None
        self._before_text = b""
        """What stands before each text; empty unless a block of text is open."""
        self._before_thinking = b""
        """The same of thinking, while it has no signature."""
        self._signature = ""
        self._blank = ""
        """White space that is sent only before more text: clients may not send back a text of nothing else."""
        self._calls: dict[int, _Call] = {}
        self._queue: deque[_Call | Piece] = deque()
        self._has_calls = False

    def write(self, chunk: Mapping[str, Any]) -> bytes:
        if self._queue:
            pass  # a call that is not complete, and what comes after it
        elif self._before_text and (text := simple_text(chunk)):
            choice = chunk["choices"][0]
            if not (choice.get("finish_reason") or choice.get("index") or chunk.get("usage")):
                return self._before_text + encode_json(text) + b"}}\n\n"
        elif self._before_thinking and (text := _simple_reasoning(chunk)):
            return self._before_thinking + encode_json(text) + b"}}\n\n"
        if usage := usage_of(chunk):
            self._usage = combine_usage(self._usage, usage)
        self._begin()
        choice = first_choice(chunk)
        if choice is not None:
            self._read(choice)
        return self._take()

    def write_run(self, run: TextRun) -> bytes | None:
        if self._queue or not self._before_text or not run.frame.is_plain:
            return None
        return run.framed(self._before_text + b'"', b'"}}\n\n')

    def finish(self) -> bytes:
        self._begin()
        self._drain(ending=True)
        self._close()
        ending = ending_of(self._last_choice, self._facts, has_calls=self._has_calls, refusal=self._refusal)
        usage = usage_counts(self._usage)
        usage.pop("cache_creation", None)  # the event has no such member
        self._events += (
            format_typed_event("message_delta", delta=ending, usage=usage),
            format_typed_event("message_stop"),
        )
        return self._take()

    def fail(self, error: Mapping[str, Any], status: int) -> bytes:
        return error_event(error, status)

    def _take(self) -> bytes:
        taken, self._events = b"".join(self._events), []
        return taken

    def _begin(self) -> None:
        if self._started:
            return
        self._started = True
        message: dict[str, Any] = {
            "id": self._facts.message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_counts(self._usage),
        }
        self._events.append(format_typed_event("message_start", message=message))

    def _read(self, choice: Mapping[str, Any]) -> None:
        part = message_part(choice)
        self._refusal += refusal_of(part)
        for piece in pieces_of(part):
            if piece[0] == "text" or self._facts.shows_thinking:
                self._add(piece)
        for index, call in calls_of(part):
            self._add_call(index, call)
        if choice.get("finish_reason"):
            self._last_choice = choice

    def _add(self, piece: Piece) -> None:
        """Send a piece, or let it wait for a call that is not complete."""
        if self._queue or isinstance(self._open, _Call):
            self._queue.append(piece)
            self._drain()
        else:
            self._send(piece)

    def _add_call(self, index: int, stated: Mapping[str, Any]) -> None:
        call = self._calls.get(index)
        if call is None or _is_another(call, stated):
            call = self._calls[index] = _Call()
            self._queue.append(call)
            self._has_calls = True
        call.add(stated)
        if call is self._open:
            self._send_arguments(call)
        self._drain()

    def _drain(self, *, ending: bool = False) -> None:
        """Send what waits, up to a call that is not complete; all of it if the answer ends."""
        while self._queue:
            if isinstance(self._open, _Call) and not (ending or self._open.is_complete):
                return
            first = self._queue[0]
            if isinstance(first, _Call):
                if not (ending or (first.name and first.is_object is not None)):
                    return
                self._open_call(first)
            else:
                if isinstance(self._open, _Call):
                    self._close()
                self._send(first)
            self._queue.popleft()

    def _send(self, piece: Piece) -> None:
        kind, text = piece
        if kind == "text":
            self._send_text(text)
        elif kind == "redacted":
            self._close()
            self._start({"type": "redacted_thinking", "data": text})
            self._events.append(format_typed_event("content_block_stop", index=self._blocks - 1))
        else:
            if self._open != "thinking" or (kind == "thinking" and self._signature):
                self._close()
                self._start({"type": "thinking", "thinking": "", "signature": ""})
                self._open = "thinking"
                self._before_thinking = _before_delta(self._blocks - 1, b"thinking_delta", b"thinking")
            if kind == "signature":
                self._signature += text  # sent when the block ends: clients take each for the whole
                self._before_thinking = b""
            else:
                self._send_delta("thinking_delta", thinking=text)

    def _send_text(self, text: str) -> None:
        if self._open != "text":
            text = self._blank + text
            self._blank = "" if text.strip() else text
            if self._blank:
                return
            self._close()
            self._start({"type": "text", "text": ""})
            self._open = "text"
            self._before_text = _before_delta(self._blocks - 1, b"text_delta", b"text")
        self._events.append(self._before_text + encode_json(text) + b"}}\n\n")

    def _open_call(self, call: _Call) -> None:
        self._close()
        name = self._facts.tool_names.get(call.name, call.name)
        self._start({"type": "tool_use", "id": self._ids.take(call.id), "name": name, "input": {}})
        self._open = call
        self._send_arguments(call)

    def _send_arguments(self, call: _Call) -> None:
        if arguments := call.unsent():
            self._send_delta("input_json_delta", partial_json=arguments)

    def _start(self, block: Mapping[str, Any]) -> None:
        self._events.append(format_typed_event("content_block_start", index=self._blocks, content_block=block))
        self._blocks += 1

    def _send_delta(self, kind: str, **members: str) -> None:
        delta = {"type": kind, **members}
        self._events.append(format_typed_event("content_block_delta", index=self._blocks - 1, delta=delta))

    def _close(self) -> None:
        """End the open block, if there is one."""
        closing, self._open = self._open, None
        if closing is None:
            return
        self._before_text = self._before_thinking = b""
        if closing == "thinking" and self._signature:
            self._send_delta("signature_delta", signature=self._signature)
            self._signature = ""
        if isinstance(closing, _Call) and not closing.is_object and (arguments := tool_input(closing.text)):
            self._send_delta("input_json_delta", partial_json=encode_json(arguments).decode())
        self._events.append(format_typed_event("content_block_stop", index=self._blocks - 1))


def _is_another(call: _Call, stated: Mapping[str, Any]) -> bool:
    """Whether a server has begun another call under the index of this one, as some do that send all of them as 0."""
    call_id, function = stated.get("id"), stated.get("function")
    if isinstance(call_id, str) and call_id and call.id:
        return call_id != call.id
    begins = isinstance(function, Mapping) and function.get("name") and function.get("arguments")
    return bool(begins) and call.is_complete
