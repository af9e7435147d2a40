"""The input items of the Responses API as messages of a chat.

    reasoning, message, function_call…    ->  one assistant message
    function_call_output…                 ->  tool messages, directly after it

Chat servers reject a call without its result, and a result without its call: each gets the other half.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import BadRequest
from proxy.json_text import encode_json
from proxy.routing.trajectory import has_failed, mark_failed
from proxy.server.api.responses_reasoning import decode_carried, mappings
from proxy.server.api.responses_tools import ToolTable

# What stands for a result that the client did not send.
NO_RESULT = "No result was returned."

_BREAK = "\n\n"

_ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}


@dataclass(slots=True)
class _Call:
    """A call of the open assistant message."""

    chat_id: str
    name: str
    arguments: str
    stated_id: str | None
    """By which its result is found; None: `result` is all there is."""
    result: str = NO_RESULT


@dataclass(slots=True)
class _Turn:
    """The assistant message that further items may still belong to."""

    path: str
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    carried: dict[str, list[Any]] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    _uses: Counter[str] = field(default_factory=Counter)

    def free_id(self, wanted: str) -> str:
        """Return an id that no other call of this turn has. Servers that count give every call the same one."""
        chat_id = wanted
        while self._uses[chat_id]:
            self._uses[wanted] += 1
            chat_id = f"{wanted}_{self._uses[wanted]}"
        self._uses[chat_id] += 1
        return chat_id

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _BREAK.join(self.texts) if self.texts else None}
        if self.reasoning:
            message["reasoning_content"] = _BREAK.join(self.reasoning)
        message |= self.carried
        if self.calls:
            message["tool_calls"] = [
                {"id": call.chat_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class Conversation:
    """Turn items into messages."""

    def __init__(self, tools: ToolTable) -> None:
        self.messages: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._tools = tools
        self._turn: _Turn | None = None
        # Of the system's messages in a row.
        self._system_texts: list[str] = []
        self._results: dict[str, deque[tuple[Mapping[str, Any], str]]] = defaultdict(deque)
        self._calls: Counter[str] = Counter()

    def add_all(self, items: Sequence[tuple[str, Any]]) -> None:
        """Add items, each with its path in the client's body.

        Raises:
            BadRequest: an item is not what the API defines, or names what is not kept here.
        """
        checked = [(path, item, _type_of(item, path)) for path, item in items]
        for path, item, kind in checked:
            if kind in _CALLS:
                self._calls[_call_id(item, path)] += 1
            elif kind in _RESULTS:
                self._results[_call_id(item, path)].append((item, path))
        for path, item, kind in checked:
            self._add(path, item, kind)
        self._end_turn()
        self._end_system()

    def _add(self, path: str, item: Mapping[str, Any], kind: str) -> None:
        if kind == "message":
            self._add_message(item, path)
        elif kind == "reasoning":
            self._add_reasoning(item, path)
        elif kind in _CALLS:
            name, arguments = _CALLS[kind](item, self._tools, path)
            self._add_call(path, name, arguments, stated_id=_call_id(item, path))
        elif kind in _RESULTS:
            self._add_result(item, path)
        elif kind in _PROVIDER_CALLS:
            self._add_provider_call(item, path, kind)
        elif kind in _REFUSED:
            raise BadRequest(f"`{path}` {_REFUSED[kind]}", param=path)
        elif kind not in _TOOL_LISTS:
            self.left_out.append(f"{path} ({kind})")

    def _add_message(self, item: Mapping[str, Any], path: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            message = f"`{path}.role` must be user, assistant, system or developer"
            raise BadRequest(message, param=f"{path}.role")
        content = self._content(item.get("content"), f"{path}.content")
        if role == "assistant":
            self._open_turn(path).texts += [text for text in _texts_of(content) if text]
        else:
            self._append({"role": _ROLES[role], "content": content})

    def _add_reasoning(self, item: Mapping[str, Any], path: str) -> None:
        turn = self._open_turn(path)
        texts = [part.get("text") for part in mappings(item.get("content"))]
        texts = texts or [part.get("text") for part in mappings(item.get("summary"))]
        text = _BREAK.join(text for text in texts if isinstance(text, str))
        if text:
            turn.reasoning.append(text)
        encrypted = item.get("encrypted_content")
        carried = decode_carried(encrypted)
        for name, blocks in (carried or {}).items():
            turn.carried.setdefault(name, []).extend(blocks)
        if carried is None and encrypted:
            self.left_out.append(f"{path}.encrypted_content")

    def _add_call(
        self, path: str, name: str, arguments: str, *, stated_id: str | None, own_id: str = "", result: str = NO_RESULT
    ) -> None:
        turn = self._open_turn(path)
        chat_id = turn.free_id(own_id or stated_id or "call")
        turn.calls.append(_Call(chat_id, name, arguments, stated_id, result))

    def _add_result(self, item: Mapping[str, Any], path: str) -> None:
        """End the turn whose call it answers. One that answers no call gets a call of its own."""
        call_id = _call_id(item, path)
        self._end_turn()
        if self._calls[call_id] > 0:
            self._calls[call_id] -= 1
            return
        name = item.get("name")
        self._results[call_id] = deque([(item, path)])
        self._add_call(path, name if isinstance(name, str) and name else "unknown", "{}", stated_id=call_id)
        self._end_turn()

    def _add_provider_call(self, item: Mapping[str, Any], path: str, kind: str) -> None:
        """Tell what a provider's tool has found as a call with its result."""
        name, arguments, result = _PROVIDER_CALLS[kind](item)
        if result is None:
            self.left_out.append(f"{path} ({kind})")
            return
        own_id = item["id"] if isinstance(item.get("id"), str) else ""
        self._add_call(path, name, arguments, stated_id=None, own_id=own_id, result=result)

    def _open_turn(self, path: str) -> _Turn:
        self._end_system()
        if self._turn is None:
            self._turn = _Turn(path)
        return self._turn

    def _append(self, message: dict[str, Any]) -> None:
        """Append a message of another role; those of the system in a row become one.

        Many servers accept one system message alone, or none after the first message.
        """
        self._end_turn()
        if message["role"] == "system" and isinstance(message["content"], str):
            self._system_texts.append(message["content"])
        else:
            self._end_system()
            self.messages.append(message)

    def _end_system(self) -> None:
        if self._system_texts:
            self.messages.append({"role": "system", "content": _BREAK.join(self._system_texts)})
            self._system_texts = []

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is None:
            return
        if not turn.texts and not turn.calls:
            if turn.reasoning or turn.carried:  # says nothing without the answer that it led to
                self.left_out.append(f"{turn.path} (reasoning)")
            return
        self.messages.append(turn.message())
        attachments: list[dict[str, Any]] = []
        for call in turn.calls:
            text, more = self._result_for(call)
            self.messages.append({"role": "tool", "tool_call_id": call.chat_id, "content": text})
            attachments += more
        if attachments:  # results are texts in a chat
            self.messages.append({"role": "user", "content": attachments})

    def _result_for(self, call: _Call) -> tuple[str, list[dict[str, Any]]]:
        waiting = self._results.get(call.stated_id) if call.stated_id is not None else None
        if not waiting:
            return call.result, []
        item, path = waiting.popleft()
        output = _RESULTS[item["type"]](item)
        content = self._content(output, f"{path}.output")
        if isinstance(content, str):
            return content, []
        attachments = [part for part in content if part["type"] != "text"]
        note = "(The attachments of this result follow in the next message.)"
        return _BREAK.join([*_texts_of(content), note]), attachments

    def _content(self, content: Any, path: str) -> str | list[dict[str, Any]]:
        """Return content as a text where it is nothing else: some servers know no parts."""
        if content is None or isinstance(content, str):
            return content or ""
        if not isinstance(content, list):
            raise BadRequest(f"`{path}` must be a text or a list of parts", param=path)
        parts = [self._part(part, f"{path}[{place}]") for place, part in enumerate(content)]
        if all(part["type"] == "text" for part in parts):
            return _BREAK.join(part["text"] for part in parts)
        return parts

    def _part(self, part: Any, path: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            message = f"`{path}.type` must be one of {', '.join(_PARTS)}; got {str(kind)[:60]!r}"
            raise BadRequest(message, param=f"{path}.type")
        if part.get("prompt_cache_breakpoint") is not None:
            self.left_out.append(f"{path}.prompt_cache_breakpoint")
        return _PARTS[kind](part, path)


class ExpandedInput(list[Any]):
    """An input that begins with `kept` items of earlier responses, which the client did not send now."""

    kept = 0


def numbered(items: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Yield each item with its path as the client wrote it: input[0], input[1], …"""
    kept = items.kept if isinstance(items, ExpandedInput) else 0
    for place, item in enumerate(items):
        yield f"{name}[{place - kept}]" if place >= kept else f"previous_response_id ({name}[{place}])", item


def tools_among(items: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the tools that items of the input add to those of the request, with their paths."""
    for path, item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if isinstance(kind, str) and kind in _TOOL_LISTS and isinstance(item.get("tools"), list):
            yield from numbered(item["tools"], f"{path}.tools")


def _type_of(item: Any, path: str) -> str:
    if not isinstance(item, Mapping):
        raise BadRequest(f"`{path}` must be an object", param=path)
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference" if "id" in item else None
    if not isinstance(kind, str) or not kind:
        raise BadRequest(f"`{path}.type` must name the type of the item", param=f"{path}.type")
    return kind


def _call_id(item: Mapping[str, Any], path: str) -> str:
    found = item.get("call_id") or item.get("id")
    if not isinstance(found, str) or not found:
        message = f"`{path}.call_id` must be the id of the call"
        raise BadRequest(message, param=f"{path}.call_id")
    return found


def _texts_of(content: str | list[dict[str, Any]]) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def _json(value: Any) -> str:
    return value if isinstance(value, str) else encode_json(value).decode()


def _text(part: Mapping[str, Any], path: str, name: str = "text") -> dict[str, Any]:
    if not isinstance(part.get(name), str):
        raise BadRequest(f"`{path}.{name}` must be a text", param=f"{path}.{name}")
    return {"type": "text", "text": part[name]}


def _refusal(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    return _text(part, path, "refusal")


def _image(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    url, detail = part.get("image_url"), part.get("detail")  # chat servers know no "original"
    if not isinstance(url, str) or not url:
        _refuse_file_id(part, path, "image_url")
        raise BadRequest(
            f"`{path}.image_url` must be the address of an image, or a data: URL", param=f"{path}.image_url"
        )
    image = {"url": url} if detail is None else {"url": url, "detail": "high" if detail == "original" else detail}
    return {"type": "image_url", "image_url": image}


def _file(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    data = part.get("file_data")
    if not isinstance(data, str) or not data:
        _refuse_file_id(part, path, "file_data")
        param = f"{path}.file_url" if part.get("file_url") else f"{path}.file_data"
        raise BadRequest(f"`{param}`: send the file itself, as `file_data`", param=param)
    named = {"filename": part["filename"]} if isinstance(part.get("filename"), str) else {}
    return {"type": "file", "file": {**named, "file_data": data}}


def _refuse_file_id(part: Mapping[str, Any], path: str, instead: str) -> None:
    if part.get("file_id"):
        message = f"`{path}.file_id`: no files are kept here; send it as `{instead}`"
        raise BadRequest(message, param=f"{path}.file_id")


def _audio(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(part.get("input_audio"), Mapping):
        raise BadRequest(f"`{path}.input_audio` must be an object", param=f"{path}.input_audio")
    return {"type": "input_audio", "input_audio": part["input_audio"]}


_PARTS: Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "input_text": _text,
    "input_image": _image,
    "input_file": _file,
    "input_audio": _audio,
    "output_text": _text,
    "refusal": _refusal,
    "text": _text,
    "computer_screenshot": _image,
}


def _named(item: Mapping[str, Any], path: str) -> tuple[str, str | None]:
    name, namespace = item.get("name"), item.get("namespace")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"`{path}.name` must be the name of the tool", param=f"{path}.name")
    return name, namespace if isinstance(namespace, str) else None


def _function_call(item: Mapping[str, Any], tools: ToolTable, path: str) -> tuple[str, str]:
    arguments = item.get("arguments")
    return tools.chat_name("function", *_named(item, path)), _json({} if arguments in (None, "") else arguments)


def _custom_call(item: Mapping[str, Any], tools: ToolTable, path: str) -> tuple[str, str]:
    return tools.chat_name("custom", *_named(item, path)), _json({"input": item.get("input") or ""})


def _local_shell_call(item: Mapping[str, Any], tools: ToolTable, _: str) -> tuple[str, str]:
    return tools.chat_name("local_shell", "local_shell"), _action(item)


def _shell_call(item: Mapping[str, Any], tools: ToolTable, _: str) -> tuple[str, str]:
    return tools.chat_name("shell", "shell"), _action(item)


def _patch_call(item: Mapping[str, Any], tools: ToolTable, _: str) -> tuple[str, str]:
    return tools.chat_name("apply_patch", "apply_patch"), _json({"operation": item.get("operation") or {}})


def _computer_call(item: Mapping[str, Any], _: ToolTable, __: str) -> tuple[str, str]:
    return "computer", _json(item.get("actions") or item.get("action") or {})


def _action(item: Mapping[str, Any]) -> str:
    action = item.get("action")
    stated = action if isinstance(action, Mapping) else {}
    return _json({name: value for name, value in stated.items() if value is not None and name != "type"})


# Calls that the client answers, as the name and the arguments of a function.
_CALLS: Mapping[str, Callable[[Mapping[str, Any], ToolTable, str], tuple[str, str]]] = {
    "function_call": _function_call,
    "custom_tool_call": _custom_call,
    "local_shell_call": _local_shell_call,
    "shell_call": _shell_call,
    "apply_patch_call": _patch_call,
    "computer_call": _computer_call,
}


def _stated_output(item: Mapping[str, Any]) -> Any:
    output = item.get("output")
    return output if isinstance(output, str | list) or output is None else _json(output)


def _lines(*stated: Any) -> str:
    """Join what is not empty; what is no text is written as JSON."""
    return "\n".join(_json(each) for each in stated if each)


def _shell_output(item: Mapping[str, Any]) -> Any:
    texts: list[str] = []
    failure = ""
    for chunk in mappings(item.get("output")):
        outcome = chunk.get("outcome")
        ending = outcome if isinstance(outcome, Mapping) else {}
        timed_out = ending.get("type") == "timeout"
        end = "timed out" if timed_out else f"exit code: {ending.get('exit_code', 'unknown')}"
        texts.append(_lines(chunk.get("stdout"), chunk.get("stderr"), end))
        failure = failure or (end if timed_out or has_failed(texts[-1]) else "")
    if not texts:
        return _stated_output(item)
    whole = _BREAK.join(texts)
    if not failure or has_failed(whole):
        return whole
    return mark_failed(f"{failure}{_BREAK}{whole}")  # it stands before the codes of commands that did not fail


def _patch_output(item: Mapping[str, Any]) -> Any:
    text = _lines(item.get("status") or "completed", item.get("output"))
    return mark_failed(text) if item.get("status") == "failed" else text


def _screenshot(item: Mapping[str, Any]) -> Any:
    return [item["output"]] if isinstance(item.get("output"), Mapping) else _stated_output(item)


# What a client answers to a call, as the content of a message.
_RESULTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "function_call_output": _stated_output,
    "custom_tool_call_output": _stated_output,
    "local_shell_call_output": _stated_output,
    "shell_call_output": _shell_output,
    "apply_patch_call_output": _patch_output,
    "computer_call_output": _screenshot,
}


def _mcp_call(item: Mapping[str, Any]) -> tuple[str, str, str | None]:
    error, output = item.get("error"), item.get("output")
    result = mark_failed(_json(error)) if error else None if output is None else _json(output)
    return str(item.get("name") or "mcp"), _json(item.get("arguments") or {}), result


def _code_call(item: Mapping[str, Any]) -> tuple[str, str, str | None]:
    logs = [output["logs"] for output in mappings(item.get("outputs")) if isinstance(output.get("logs"), str)]
    return "code_interpreter", _json({"code": item.get("code") or ""}), "\n".join(logs) or None


def _file_search_call(item: Mapping[str, Any]) -> tuple[str, str, str | None]:
    found = [result["text"] for result in mappings(item.get("results")) if isinstance(result.get("text"), str)]
    return "file_search", _json({"queries": item.get("queries") or []}), _BREAK.join(found) or None


# Calls that a provider has run: name, arguments, and the result where the item holds it.
_PROVIDER_CALLS: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, str, str | None]]] = {
    "mcp_call": _mcp_call,
    "code_interpreter_call": _code_call,
    "file_search_call": _file_search_call,
}

# Items that hold tools.
_TOOL_LISTS = frozenset({"additional_tools", "tool_search_output"})

_REFUSED = {
    "item_reference": "refers to an item that is not kept here; send the item itself",
    "compaction_trigger": "asks to compact the conversation, which is not offered here; send a shorter input",
}
