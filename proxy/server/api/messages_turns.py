"""The turns of Anthropic's Messages API as chat messages.

messages of role `system`   those before the first answer join the first system message: some servers accept no
                            other, and at that place the order means nothing. Later ones stay where they are, behind
                            the results of tools; `adaptation` makes user's turns of them where servers want so.
tool_result                 a `tool` message right behind the turn that called, as all chat servers demand. Its
                            images and files follow in a user's turn that names the call: such messages hold text.
thinking                    all of it is `reasoning_content`; what is signed is also in `thinking_blocks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import BadRequest
from proxy.json_text import encode_json
from proxy.routing.trajectory import mark_failed

# Claude Code's first system block, for Anthropic's accounting alone. It differs in every request.
BILLING_LINE = "x-anthropic-billing-header:"

# OpenAI's limit of a tool's name. Anthropic allows 128.
MAX_NAME_CHARS = 64

MAX_ECHO = 60


def bad_field(path: str, why: str) -> BadRequest:
    return BadRequest(f"`{path}` {why}", param=path)


def read_object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise bad_field(path, "must be an object")
    return value


def read_list(value: Any, path: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise bad_field(path, "must be a list")
    return value


def read_text(parent: Mapping[str, Any], name: str, path: str, *, empty: bool = True) -> str:
    value = parent.get(name)
    if not isinstance(value, str) or not (value or empty):
        raise bad_field(
            f"{path}.{name}" if path else name, "must be a text" if empty else "must be a text that is not empty"
        )
    return value


Part = dict[str, Any]


@dataclass(frozen=True)
class _Block:
    """One block of content, and where it stands in the client's body."""

    value: Mapping[str, Any]
    path: str

    @property
    def kind(self) -> str:
        return read_text(self.value, "type", self.path)


def _blocks(content: Any, path: str) -> list[_Block]:
    """Return the blocks of a text, a list of blocks, or nothing at all."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [_Block({"type": "text", "text": content}, path)]
    return [
        _Block(read_object(block, f"{path}[{place}]"), f"{path}[{place}]")
        for place, block in enumerate(read_list(content, path))
    ]


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def with_cache_control(item: Part, block: Mapping[str, Any]) -> Part:
    cache_control = block.get("cache_control")
    return item if cache_control is None else {**item, "cache_control": cache_control}


def _content(parts: list[Part]) -> str | list[Part]:
    """Return a single text as it is. More are not joined: Anthropic's caches tell one block from two."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts


def read_items(path: str, value: Any) -> list[tuple[str, Any]]:
    return [(f"{path}[{place}]", item) for place, item in enumerate(read_list(value, path))]


@dataclass
class Notes:
    """What a translation has to remember beside the chat body."""

    left_out: list[str] = field(default_factory=list)
    tool_names: dict[str, str] = field(default_factory=dict)
    """Shortened names of tools → the client's."""

    def tool_name(self, name: str) -> str:
        """Return a name of a tool as every chat server accepts it."""
        if len(name) <= MAX_NAME_CHARS:
            return name
        digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
        short = f"{name[: MAX_NAME_CHARS - 9]}_{digest}"
        self.tool_names[short] = name
        return short


class Conversation:
    """Puts the turns into the order that chat servers demand."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._messages: list[dict[str, Any]] = []
        self._system: list[Part] = []
        self._answered = False
        """Whether an assistant's turn was read."""
        self._turn: list[_Block] = []
        """Blocks of the assistant's turn that goes on: turns in a row are one."""
        self._waiting: list[dict[str, Any]] = []
        """System messages that may not stand between calls and their results."""
        self._calls: set[str] = set()
        """Ids of the newest turn's calls that have no result yet."""
        self._results_end = 0
        """Where in `_messages` the next result goes."""

    def translate(self, system: Any, messages: Sequence[Any]) -> list[dict[str, Any]]:
        self._system += self._system_parts(_blocks(system, "system"))
        for path, value in read_items("messages", messages):
            message = read_object(value, path)
            role, blocks = message.get("role"), _blocks(message.get("content"), f"{path}.content")
            if role == "user":
                self._add_user_turn(blocks)
            elif role == "assistant":
                self._add_assistant_turn(blocks)
            elif role == "system":
                self._add_system_message(blocks)
            else:
                raise bad_field(f"{path}.role", f'must be "user", "assistant" or "system"; got {role!r}'[:200])
        self._end_turn()
        self._messages += self._waiting
        first = [{"role": "system", "content": _content(self._system)}] if self._system else []
        return [*first, *self._messages]

    def _add_assistant_turn(self, blocks: list[_Block]) -> None:
        if not self._turn:
            self._flush_waiting()
        self._answered = True
        self._turn += blocks or [_Block({"type": "text", "text": ""}, "")]

    def _add_system_message(self, blocks: list[_Block]) -> None:
        parts = self._system_parts(blocks)
        if not self._answered:
            self._system += parts
        elif parts:
            self._waiting.append({"role": "system", "content": _content(parts)})

    def _flush_waiting(self) -> None:
        self._messages += self._waiting
        self._waiting = []

    def _system_parts(self, blocks: list[_Block]) -> list[Part]:
        parts = []
        for block in blocks:
            if block.kind in _TOOL_CHANGES:
                self._leave_out(block)
                continue
            if block.kind != "text":
                raise bad_field(f"{block.path}.type", f'must be "text"; got {block.kind[:MAX_ECHO]!r}')
            text = read_text(block.value, "text", block.path)
            if text.startswith(BILLING_LINE):
                text = text.partition("\n")[2].lstrip("\n")
            if text:
                parts.append(with_cache_control(_text_part(text), block.value))
        return parts

    def _add_user_turn(self, blocks: list[_Block]) -> None:
        self._end_turn()
        results: list[dict[str, Any]] = []
        attached: list[Part] = []
        parts: list[Part] = []
        for block in blocks:
            if block.kind == "tool_result":
                message, more = self._result(block)
                results.append(message)
                attached += more
            else:
                parts += self._parts(block)
        self._messages[self._results_end : self._results_end] = results
        self._results_end += len(results)
        self._flush_waiting()
        if attached or parts or not results:
            self._messages.append({"role": "user", "content": _content([*attached, *parts])})

    def _result(self, block: _Block) -> tuple[dict[str, Any], list[Part]]:
        """Return the message of a tool's result, and what of it goes into the user's turn."""
        value, path = block.value, block.path
        call_id = read_text(value, "tool_use_id", path)
        if call_id not in self._calls:
            raise bad_field(f"{path}.tool_use_id", "must be the id of a tool_use in the turn before it, answered once")
        self._calls.discard(call_id)
        parts = [part for inner in _blocks(value.get("content"), f"{path}.content") for part in self._parts(inner)]
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        attached = [part for part in parts if part["type"] != "text"]
        if attached:
            text = f"{text}\n\n(attached to the next message)".lstrip()
            attached = [_text_part(f"Attached to the result of tool call {call_id}:"), *attached]
        if value.get("is_error") is True:
            text = mark_failed(text)
        message = {"role": "tool", "tool_call_id": call_id, "content": text}
        return with_cache_control(message, value), attached

    def _parts(self, block: _Block) -> list[Part]:
        """Return a block of a user's turn, or of a tool's result, as parts."""
        kind = block.kind
        if kind in _LEFT_OUT_BLOCKS:
            self._leave_out(block)
            return []
        read = _PARTS.get(kind)
        if read is None:
            raise bad_field(f"{block.path}.type", f"has a block of a type that is not known: {kind[:MAX_ECHO]!r}")
        parts = read(self, block)
        if parts:
            parts[-1] = with_cache_control(parts[-1], block.value)
        return parts

    def _leave_out(self, block: _Block) -> None:
        self._notes.left_out.append(f"{block.path} ({block.kind[:MAX_ECHO]})")

    def text(self, block: _Block) -> list[Part]:
        text = read_text(block.value, "text", block.path)
        return [_text_part(text)] if text else []

    def image(self, block: _Block) -> list[Part]:
        source = read_object(block.value.get("source"), f"{block.path}.source")
        return [{"type": "image_url", "image_url": {"url": _url(source, f"{block.path}.source")}}]

    def document(self, block: _Block) -> list[Part]:
        value, path = block.value, f"{block.path}.source"
        source = read_object(value.get("source"), path)
        title = value.get("title") if isinstance(value.get("title"), str) else None
        context = value.get("context") if isinstance(value.get("context"), str) else None
        self._leave_out_citations(block)
        heading = "\n".join(text for text in (title, context) if text)
        parts = [_text_part(heading)] if heading else []
        kind = source.get("type")
        if kind == "text":
            return [*parts, _text_part(read_text(source, "data", path))]
        if kind == "content":
            inner = _blocks(source.get("content"), f"{path}.content")
            return [*parts, *(part for each in inner for part in self._parts(each))]
        return [
            *parts,
            {"type": "file", "file": {"filename": title or "document.pdf", "file_data": _url(source, path)}},
        ]

    def search_result(self, block: _Block) -> list[Part]:
        self._leave_out_citations(block)
        heading = [read_text(block.value, name, block.path) for name in ("title", "source")]
        found = [
            part for each in _blocks(block.value.get("content"), f"{block.path}.content") for part in self._parts(each)
        ]
        texts = [part["text"] for part in found if part["type"] == "text"]
        return [_text_part("\n".join([*heading, *texts]))]

    def tool_reference(self, block: _Block) -> list[Part]:
        return [_text_part(read_text(block.value, "tool_name", block.path))]

    def browser_state(self, block: _Block) -> list[Part]:
        return [_text_part(encode_json({name: block.value.get(name) for name in ("tabs", "state_changes")}).decode())]

    def compaction(self, block: _Block) -> list[Part]:
        """Keep the summary that stands for earlier turns."""
        summary = block.value.get("content")
        return [_text_part(summary)] if isinstance(summary, str) and summary else []

    def _leave_out_citations(self, block: _Block) -> None:
        citations = block.value.get("citations")
        if isinstance(citations, Mapping) and citations.get("enabled") is True:
            self._notes.left_out.append(f"{block.path}.citations")

    def _end_turn(self) -> None:
        """Add the assistant's turn that was read, if there is one."""
        if not self._turn:
            return
        turn = _AssistantTurn(self._notes)
        for block in self._turn:
            if block.kind in _LEFT_OUT_BLOCKS:
                self._leave_out(block)
                turn.add_gap()
            else:
                turn.add(block)
        self._turn = []
        self._messages.append(turn.message())
        self._calls = {call["id"] for call in turn.calls}
        self._results_end = len(self._messages)


def _url(source: Mapping[str, Any], path: str) -> str:
    """Return the address of an image or a document, or a data URL."""
    kind = source.get("type")
    if kind == "url":
        return read_text(source, "url", path, empty=False)
    if kind == "base64":
        return f"data:{read_text(source, 'media_type', path)};base64,{read_text(source, 'data', path)}"
    if kind == "file":
        raise bad_field(path, "refers to a file that Anthropic holds; send it as base64 or as a url")
    raise bad_field(f"{path}.type", f"has a source of a type that is not known: {kind!r}"[:200])


class _AssistantTurn:
    """Makes one chat message of the blocks of an assistant's turn."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._texts: list[Part] = []
        self._thinking: list[str] = []
        self._signed: list[Part] = []
        self._gap = False
        self.calls: list[Part] = []

    def add_gap(self) -> None:
        """Note that the next text does not go on with the last."""
        self._gap = True

    def add(self, block: _Block) -> None:
        read = _ASSISTANT_BLOCKS.get(block.kind)
        if read is None:
            raise bad_field(f"{block.path}.type", f"has a block of a type that is not known: {block.kind[:MAX_ECHO]!r}")
        read(self, block)

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content()}
        if self._thinking:
            message["reasoning_content"] = "".join(self._thinking)
        if self._signed:
            message["thinking_blocks"] = self._signed
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def _content(self) -> str | list[Part] | None:
        return None if self.calls and not self._texts else _content(self._texts)

    def text(self, block: _Block) -> None:
        """Add a text. Texts in a row are one that citations have cut into pieces."""
        text = read_text(block.value, "text", block.path)
        if not text:
            return
        if self._gap and self._texts:
            text = f"\n\n{text}"
        self._gap = False
        self._texts.append(with_cache_control(_text_part(text), block.value))

    def compaction(self, block: _Block) -> None:
        summary = block.value.get("content")
        if isinstance(summary, str) and summary:
            self.text(_Block({**block.value, "text": summary}, block.path))
        self.add_gap()

    def thinking(self, block: _Block) -> None:
        """Add reasoning. Only the model that signed it can be sent it as thinking."""
        text = read_text(block.value, "thinking", block.path)
        signature = block.value.get("signature")
        if text:
            self._thinking.append(text)
        if isinstance(signature, str) and signature:
            self._signed.append({"type": "thinking", "thinking": text, "signature": signature})
        self.add_gap()

    def redacted_thinking(self, block: _Block) -> None:
        self._signed.append({"type": "redacted_thinking", "data": read_text(block.value, "data", block.path)})
        self.add_gap()

    def tool_use(self, block: _Block) -> None:
        value, path = block.value, block.path
        arguments = encode_json(read_object(value.get("input"), f"{path}.input")).decode()
        function = {"name": self._notes.tool_name(read_text(value, "name", path)), "arguments": arguments}
        call = {"id": read_text(value, "id", path, empty=False), "type": "function", "function": function}
        self.calls.append(with_cache_control(call, value))
        self.add_gap()

    def fallback(self, _: _Block) -> None:
        """Skip what no model reads: where another model went on with the turn."""


_TOOL_CHANGES = frozenset({"tool_addition", "tool_removal"})

# What Anthropic ran, or holds, and no chat model can be shown.
_LEFT_OUT_BLOCKS = _TOOL_CHANGES.union(
    """
    server_tool_use web_search_tool_result web_fetch_tool_result code_execution_tool_result
    bash_code_execution_tool_result text_editor_code_execution_tool_result tool_search_tool_result advisor_tool_result
    mcp_tool_use mcp_tool_result mcp_tool_listing container_upload
    """.split()
)

_PARTS: Mapping[str, Callable[[Conversation, _Block], list[Part]]] = {
    "text": Conversation.text,
    "image": Conversation.image,
    "document": Conversation.document,
    "search_result": Conversation.search_result,
    "tool_reference": Conversation.tool_reference,
    "browser_state": Conversation.browser_state,
    "compaction": Conversation.compaction,
}

_ASSISTANT_BLOCKS: Mapping[str, Callable[[_AssistantTurn, _Block], None]] = {
    "text": _AssistantTurn.text,
    "thinking": _AssistantTurn.thinking,
    "redacted_thinking": _AssistantTurn.redacted_thinking,
    "tool_use": _AssistantTurn.tool_use,
    "compaction": _AssistantTurn.compaction,
    "fallback": _AssistantTurn.fallback,
}
