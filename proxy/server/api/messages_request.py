"""Anthropic's Messages API as a chat request.

What has no chat field is in `left_out` and does not fail the request, with three exceptions: a tool that `tool_choice`
demands, content that only Anthropic can look up, and fields that ask for another kind of answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import ThreadNotSupported
from proxy.routing.chat_request import OWN_FIELDS, without_own_fields
from proxy.routing.requirements import estimate_tokens
from proxy.server.api.messages_answer import AnswerFacts, message_of
from proxy.server.api.messages_errors import error_event
from proxy.server.api.messages_stream import MessageStream
from proxy.server.api.messages_turns import (
    MAX_ECHO,
    Conversation,
    Notes,
    Part,
    bad_field,
    read_items,
    read_list,
    read_object,
    read_text,
    with_cache_control,
)
from proxy.server.api.translation import APIName, RelayedEvents, call_ids_in

EFFORTS = ("low", "medium", "high", "xhigh", "max")

# Least `budget_tokens` → the effort that is nearest to it.
EFFORT_OF_BUDGET = ((16384, "high"), (4096, "medium"), (0, "low"))


@dataclass
class MessagesTranslation:
    """A request of the Messages API as a chat request."""

    document: Mapping[str, Any]
    body: Mapping[str, Any]
    left_out: tuple[str, ...]
    facts: AnswerFacts = field(repr=False)
    api: APIName = "messages"
    stored: bool = False

    def answer(self, completion: Mapping[str, Any], model: str) -> dict[str, Any]:
        return message_of(completion, model, self.facts)

    def stream(self, model: str) -> MessageStream:
        return MessageStream(model, self.facts)

    def fail_relayed(self, seen: RelayedEvents, error: Mapping[str, Any], status: int) -> bytes:  # noqa: ARG002
        return error_event(error, status)


def translate(document: Mapping[str, Any], *, answer_id: str, created_at: int) -> MessagesTranslation:  # noqa: ARG001
    """Translate the body of POST /v1/messages.

    Args:
        answer_id: 32 hex digits, of which the ids of the message and its tool calls are made.
        created_at: not used, for the API's answers have no time.

    Raises:
        BadRequest: naming the field.
    """
    limit = document.get("max_tokens")
    if type(limit) is not int or limit < 1:
        raise bad_field("max_tokens", f"must be a whole number of tokens, 1 or more; got {limit!r}"[:200])
    request = _Request(document)
    body = request.chat_body()
    return MessagesTranslation(
        document=without_own_fields(document),
        body=body,
        left_out=tuple(request.notes.left_out),
        facts=AnswerFacts(
            id=answer_id,
            stop_sequences=tuple(body.get("stop", ())),
            tool_names=request.notes.tool_names,
            shows_thinking=_shows_thinking(document),
            used_call_ids=call_ids_in(body["messages"]),
        ),
    )


def count_tokens(document: Mapping[str, Any]) -> int:
    """Estimate the tokens of a body of POST /v1/messages/count_tokens. Raises BadRequest naming the field."""
    return estimate_tokens(_Request(document).chat_body())


def _shows_thinking(document: Mapping[str, Any]) -> bool:
    """Whether the client expects thinking in the answer.

    A plain client that asked for none reads the text of the first block. One with tools looks through all of them, and
    some models work worse in a loop of tools without their earlier thinking.
    """
    thinking = document.get("thinking")
    return bool(document.get("tools")) if thinking is None else thinking["type"] != "disabled"


class _Request:
    """Reads one body, and collects what its chat body leaves out."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self.notes = Notes()

    def chat_body(self) -> dict[str, Any]:
        document = self._document
        read_text(document, "model", "", empty=False)
        body = {name: document[name] for name in (*OWN_FIELDS, "model") if name in document}
        if document.get("thread") is not None:  # before `messages`, which are only the newest of a thread
            raise ThreadNotSupported("`thread`: no conversation is held here; send all messages", param="thread")
        messages = read_list(document.get("messages"), "messages")
        if not messages:
            raise bad_field("messages", "must have at least one message")
        body["messages"] = Conversation(self.notes).translate(document.get("system"), messages)
        for name, read in _FIELDS.items():
            if document.get(name) is not None:
                body |= read(self, document[name])
        if "stop" in body and not body["stop"]:
            del body["stop"]
        self._leave_out_others()
        return body

    def _leave_out_others(self) -> None:
        known = {*OWN_FIELDS, "model", "messages", "system", *_FIELDS}
        self.notes.left_out += [
            str(name)[:MAX_ECHO] for name, value in self._document.items() if name not in known and value is not None
        ]

    def number(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad_field(name, f"must be a number; got {value!r}"[:200])
        return {name: value}

    def stream(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise bad_field("stream", f"must be true or false; got {value!r}"[:200])
        return {"stream": value}

    def stop_sequences(self, value: Any) -> dict[str, Any]:
        if not all(isinstance(text, str) for text in read_list(value, "stop_sequences")):
            raise bad_field("stop_sequences", "must be a list of texts")
        return {"stop": value}

    def service_tier(self, value: Any) -> dict[str, Any]:
        """Read Anthropic's tiers: "auto" is what happens without the field, elsewhere too."""
        if value not in ("auto", "standard_only"):
            raise bad_field("service_tier", f'must be "auto" or "standard_only"; got {value!r}'[:200])
        return {"service_tier": "default"} if value == "standard_only" else {}

    def metadata(self, value: Any) -> dict[str, Any]:
        stated = read_object(value, "metadata")
        self.notes.left_out += [
            f"metadata.{name}"[:MAX_ECHO] for name in stated if name not in ("user_id", "session_id")
        ]
        kept = {name: stated[name] for name in ("user_id", "session_id") if stated.get(name) is not None}
        user = kept.get("user_id")
        if user is None:
            return {"metadata": kept}
        if not isinstance(user, str):
            raise bad_field("metadata.user_id", "must be a text")
        if (session := session_of_user(user)) is not None:
            kept.setdefault("session_id", session)
        return {"metadata": kept, "user": user}

    def thinking(self, value: Any) -> dict[str, Any]:
        """Keep it as it is, and say the same as an effort, which most chat models understand."""
        thinking = read_object(value, "thinking")
        kind = thinking.get("type")
        if kind == "enabled":
            budget = thinking.get("budget_tokens")
            if type(budget) is not int or budget < 1:
                raise bad_field("thinking.budget_tokens", f"must be a whole number of tokens; got {budget!r}"[:200])
            effort = next(effort for least, effort in EFFORT_OF_BUDGET if budget >= least)
            return {"thinking": value, "reasoning_effort": effort}
        if kind == "disabled":
            return {"thinking": value, "reasoning_effort": "none"}
        if kind not in ("adaptive", "between_tools"):
            raise bad_field(
                "thinking.type", f"must be enabled, adaptive, between_tools or disabled; got {kind!r}"[:200]
            )
        return {"thinking": value}

    def output_config(self, value: Any) -> dict[str, Any]:
        stated = read_object(value, "output_config")
        self.notes.left_out += [
            f"output_config.{name}"[:MAX_ECHO]
            for name, inner in stated.items()
            if name not in ("effort", "format") and inner is not None
        ]
        read: dict[str, Any] = {}
        effort = stated.get("effort")
        if effort is not None:
            if effort not in EFFORTS:
                raise bad_field("output_config.effort", f"must be one of {', '.join(EFFORTS)}; got {effort!r}"[:200])
            thinking = self._document.get("thinking")
            if thinking is None or thinking.get("type") != "disabled":
                read["reasoning_effort"] = effort
        if stated.get("format") is not None:
            read |= _response_format(stated["format"], "output_config.format")
        return read

    def output_format(self, value: Any) -> dict[str, Any]:
        return _response_format(value, "output_format")

    def tools(self, value: Any) -> dict[str, Any]:
        tools = [self._tool(read_object(tool, path), path) for path, tool in read_items("tools", value)]
        offered = [tool for tool in tools if tool is not None]
        return {"tools": offered} if offered else {}

    def _tool(self, tool: Mapping[str, Any], path: str) -> Part | None:
        """Return a tool as a function; None for those whose schema only Anthropic's models know."""
        if not _is_custom(tool):
            self.notes.left_out.append(f"{path} ({tool['type']})"[: MAX_ECHO + len(path)])
            return None
        function: Part = {"name": self.notes.tool_name(read_text(tool, "name", path, empty=False))}
        if tool.get("description") is not None:
            function["description"] = read_text(tool, "description", path)
        function["parameters"] = read_object(tool.get("input_schema"), f"{path}.input_schema")
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        if tool.get("input_examples"):
            self.notes.left_out.append(f"{path}.input_examples")
        return with_cache_control({"type": "function", "function": function}, tool)

    def tool_choice(self, value: Any) -> dict[str, Any]:
        choice = read_object(value, "tool_choice")
        kind = choice.get("type")
        tools = [tool for tool in self._document.get("tools") or () if isinstance(tool, Mapping)]
        custom = [tool.get("name") for tool in tools if _is_custom(tool)]
        read: dict[str, Any] = {}
        if kind in ("any", "tool"):
            self._check_choice(choice, custom, tools)
        if kind == "tool":
            name = self.notes.tool_name(choice["name"])
            read["tool_choice"] = {"type": "function", "function": {"name": name}}
        elif isinstance(kind, str) and kind in _TOOL_CHOICES:
            read["tool_choice"] = _TOOL_CHOICES[kind]
        else:
            raise bad_field("tool_choice.type", f"must be auto, any, tool or none; got {kind!r}"[:200])
        if choice.get("disable_parallel_tool_use") is True and kind != "none":
            read["parallel_tool_calls"] = False
        return read if custom else {}

    def _check_choice(
        self, choice: Mapping[str, Any], custom: Sequence[Any], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse to demand a tool that no chat model is offered."""
        if choice["type"] == "any":
            if not custom:
                raise bad_field("tool_choice", "demands a tool, and no tool of `tools` can be offered to a chat model")
            return
        name = read_text(choice, "name", "tool_choice", empty=False)
        if name in custom:
            return
        if any(tool.get("name") == name for tool in tools):
            raise bad_field("tool_choice.name", f"{name[:MAX_ECHO]!r} is a tool of Anthropic's models alone")
        raise bad_field("tool_choice.name", f"{name[:MAX_ECHO]!r} is not in `tools`")

    def compaction(self, _: Any) -> dict[str, Any]:
        raise bad_field("compaction", "asks for an answer that only Anthropic's own API gives")


def _is_custom(tool: Mapping[str, Any]) -> bool:
    return tool.get("type") in (None, "custom")


_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def session_of_user(user_id: str) -> str | None:
    """Return the session that Claude Code writes into its user id: in JSON, in older versions behind "_session_"."""
    if user_id.startswith("{"):
        try:
            stated = json.loads(user_id)
        except (ValueError, RecursionError):
            return None
        session = stated.get("session_id") if isinstance(stated, dict) else None
        return session if isinstance(session, str) and session else None
    return user_id.rpartition("_session_")[2] or None if "_session_" in user_id else None


def _response_format(value: Any, path: str) -> dict[str, Any]:
    stated = read_object(value, path)
    if stated.get("type") != "json_schema":
        raise bad_field(f"{path}.type", 'must be "json_schema"')
    schema = read_object(stated.get("schema"), f"{path}.schema")
    named = {"name": "answer", "schema": schema, **({"strict": True} if _is_strict(schema) else {})}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _is_strict(schema: Mapping[str, Any]) -> bool:
    """Whether OpenAI enforces a schema: every object in it names all its members as required, and allows no others."""
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if value.get("type") == "object" or isinstance(value.get("properties"), Mapping):
                members, required = value.get("properties") or {}, value.get("required") or []
                closed = value.get("additionalProperties") is False
                if not (closed and isinstance(required, list) and set(members) <= {str(name) for name in required}):
                    return False
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return True


# Fields → how each is read. `thinking` stands before `output_config`, whose effort replaces that of a budget.
_FIELDS: Mapping[str, Callable[[_Request, Any], dict[str, Any]]] = {
    "max_tokens": lambda _, value: {"max_tokens": value},
    "stream": _Request.stream,
    "stop_sequences": _Request.stop_sequences,
    "temperature": lambda request, value: request.number("temperature", value),
    "top_p": lambda request, value: request.number("top_p", value),
    "top_k": lambda request, value: request.number("top_k", value),
    "metadata": _Request.metadata,
    "service_tier": _Request.service_tier,
    "cache_control": lambda _, value: {"cache_control": read_object(value, "cache_control")},
    "tools": _Request.tools,
    "tool_choice": _Request.tool_choice,
    "thinking": _Request.thinking,
    "output_format": _Request.output_format,
    "output_config": _Request.output_config,
    "compaction": _Request.compaction,
}
