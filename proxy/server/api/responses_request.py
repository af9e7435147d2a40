"""OpenAI's Responses API, version of November 2026, as a chat request. See `translation.py`.

Every field of a request is passed, mapped, refused, or left out and named; `KNOWN_FIELDS` has them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import BadRequest
from proxy.routing.chat_request import OWN_FIELDS, without_own_fields
from proxy.routing.requirements import estimate_tokens
from proxy.server.api.responses_answer import (
    AnswerPlan,
    ResponseStream,
    failure,
    request_echo,
    whole_answer,
)
from proxy.server.api.responses_input import Conversation, numbered, tools_among
from proxy.server.api.responses_reasoning import is_own_reasoning
from proxy.server.api.responses_tools import ToolTable, read_tool_choice
from proxy.server.api.translation import APIName, RelayedEvents, call_ids_in
from proxy.upstream.sse import format_typed_event

# Fields that a chat body has under the same name.
_PASSED = (
    *("model", "stream", "metadata", "temperature", "top_p", "user", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prompt_cache_options", "service_tier", "top_logprobs"),
)

# Fields that are read here.
_MAPPED = frozenset(
    {"input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens", "text", "reasoning"}
    | {"include", "truncation", "store", "stream_options", "background", "conversation", "prompt"}
    | {"previous_response_id"}
)

# Fields that concern OpenAI's own tools and books, or nobody but the client.
_LEFT_OUT = frozenset({"max_tool_calls", "context_management", "moderation", "client_metadata"})

KNOWN_FIELDS = _MAPPED.union(_PASSED, _LEFT_OUT)

# Why a field is refused, if it states anything.
_REFUSED = {
    "background": "responses in the background are not offered here; send it without, and read the stream",
    "conversation": "conversations are not kept here; send `previous_response_id`, or the whole input",
    "prompt": "prompt templates are not kept here; send `instructions` and `input`",
}

ENCRYPTED_REASONING, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"


@dataclass(frozen=True)
class ResponsesTranslation:
    """A request of the Responses API as a chat request, and its answer as a response."""

    document: Mapping[str, Any] = field(repr=False)
    input: Any = field(repr=False)
    """The client's, with reasoning of chat models, which is not for an upstream of this API."""
    body: Mapping[str, Any] = field(repr=False)
    left_out: tuple[str, ...]
    stored: bool
    plan: AnswerPlan = field(repr=False)
    api: APIName = "responses"

    def answer(self, completion: Mapping[str, Any], model: str) -> dict[str, Any]:
        return whole_answer(self.plan, completion, model)

    def stream(self, model: str) -> ResponseStream:
        return ResponseStream(self.plan, model)

    def fail_relayed(self, seen: RelayedEvents, error: Mapping[str, Any], status: int) -> bytes:
        """Repeat the newest response that the client has seen, or else one of our own, as one that failed."""
        number = 0 if seen.sequence_number is None else seen.sequence_number + 1
        if seen.response is None:
            return self.stream(seen.model).fail_after(number, error, status)
        response = {**seen.response, "model": seen.model, "status": "failed", "error": failure(error, status)}
        return format_typed_event("response.failed", response=response, sequence_number=number)


def translate(document: Mapping[str, Any], *, answer_id: str, created_at: int) -> ResponsesTranslation:
    """Translate a request whose `previous_response_id`, if it has one, was expanded into its `input`.

    Args:
        answer_id: 32 hexadecimal digits, of which the ids of the answer are made.
        created_at: Unix seconds.

    Raises:
        BadRequest: naming the field as the client wrote it.
    """
    for name, why in _REFUSED.items():
        if document.get(name) not in (None, False):
            raise BadRequest(f"`{name}`: {why}", param=name)
    instructions = _items(document.get("instructions"), "instructions", "system")
    items = _items(document.get("input"), "input", "user")
    tools = ToolTable([*numbered(_list(document, "tools"), "tools"), *tools_among(items)])
    conversation = Conversation(tools)
    conversation.add_all([*instructions, *items])
    if not conversation.messages:
        raise BadRequest("`input` must hold something for a model to answer", param="input")
    included = _list(document, "include")
    stored = _flag(document, "store", default=True)
    body: dict[str, Any] = {name: document[name] for name in document if name in OWN_FIELDS}
    body |= {name: document[name] for name in _PASSED if document.get(name) is not None}
    body["messages"] = conversation.messages
    body |= _tool_fields(document, tools)
    body |= _text_fields(document)
    asks_logprobs = LOGPROBS in included or bool(document.get("top_logprobs"))
    body |= _sampling_fields(document, asks_logprobs=asks_logprobs)
    plan = AnswerPlan(
        id=answer_id,
        created_at=created_at,
        echo=request_echo(document, stored=stored),
        tools=tools,
        encrypts_reasoning=ENCRYPTED_REASONING in included,
        stored=stored,
        has_logprobs=asks_logprobs,
        used_call_ids=call_ids_in(conversation.messages),
    )
    return ResponsesTranslation(
        document=_native_document(document),
        input=document.get("input"),
        body=body,
        left_out=(*_left_out(document, included), *tools.left_out, *conversation.left_out),
        stored=stored,
        plan=plan,
    )


def count_tokens(document: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request, expanded as for `translate`. Raises BadRequest naming the field."""
    model = document.get("model")
    if model is not None and not (isinstance(model, str) and model):
        raise BadRequest("`model` must be a text that is not empty", param="model")
    return estimate_tokens(translate(document, answer_id="", created_at=0).body)


def _native_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for an upstream of this API, which knows no ids and no reasoning that were made here."""
    native = {name: value for name, value in without_own_fields(document).items() if name != "previous_response_id"}
    items = native.get("input")
    if isinstance(items, list) and any(map(is_own_reasoning, items)):
        native["input"] = [item for item in items if not is_own_reasoning(item)]
    return native


def _items(value: Any, name: str, role: str) -> list[tuple[str, Any]]:
    """Return items with their paths; a text is one message of `role`."""
    if value is None:
        return []
    if isinstance(value, str):
        return [(name, {"role": role, "content": value})] if value else []
    if not isinstance(value, list):
        raise BadRequest(f"`{name}` must be a text or a list of items", param=name)
    return list(numbered(value, name))


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequest(f"`{name}` must be a list", param=name)
    return value


def _object(document: Mapping[str, Any], name: str, path: str | None = None) -> Mapping[str, Any]:
    value = document.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRequest(f"`{path or name}` must be an object", param=path or name)
    return value


def _flag(document: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = document.get(name)
    if not isinstance(value, bool | None):
        raise BadRequest(f"`{name}` must be true or false", param=name)
    return default if value is None else value


def _tool_fields(document: Mapping[str, Any], tools: ToolTable) -> dict[str, Any]:
    choice, offered = read_tool_choice(document.get("tool_choice"), tools)
    parallel = document.get("parallel_tool_calls")
    if not offered:  # chat servers refuse a choice among no tools
        return {}
    stated = {"tool_choice": choice, "parallel_tool_calls": parallel}
    return {"tools": offered, **{name: value for name, value in stated.items() if value is not None}}


def _text_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    text = _object(document, "text")
    form = _object(text, "format", "text.format")
    fields = {} if text.get("verbosity") is None else {"verbosity": text["verbosity"]}
    kind = form.get("type", "text")
    if kind == "json_object":
        return {**fields, "response_format": {"type": kind}}
    if kind == "json_schema":
        if not isinstance(form.get("schema"), Mapping):
            raise BadRequest("`text.format.schema` must be a JSON schema", param="text.format.schema")
        names = ("name", "schema", "strict", "description")
        schema = {"name": "response", **{name: form[name] for name in names if form.get(name) is not None}}
        return {**fields, "response_format": {"type": kind, "json_schema": schema}}
    if kind != "text":
        message = "`text.format.type` must be text, json_object or json_schema"
        raise BadRequest(message, param="text.format.type")
    return fields


def _sampling_fields(document: Mapping[str, Any], *, asks_logprobs: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    limit = document.get("max_output_tokens")
    if limit is not None:
        if type(limit) is not int or limit < 1:
            message = f"`max_output_tokens` must be a whole number of tokens, 1 or more; got {limit!r}"[:200]
            raise BadRequest(message, param="max_output_tokens")
        fields["max_completion_tokens"] = limit
    if (effort := _object(document, "reasoning").get("effort")) is not None:
        if not isinstance(effort, str):
            raise BadRequest(f"`reasoning.effort` must be a text; got {effort!r}"[:200], param="reasoning.effort")
        fields["reasoning_effort"] = effort
    if asks_logprobs:
        fields["logprobs"] = True
    _object(document, "stream_options")
    if document.get("stream") is True:
        fields["stream_options"] = {"include_usage": True}
    return fields


def _left_out(document: Mapping[str, Any], included: list[Any]) -> list[str]:
    """Name what a chat model cannot be sent, among it fields that nobody knows."""
    named = [
        name
        for name, value in document.items()
        if value is not None and (name in _LEFT_OUT or name not in KNOWN_FIELDS | OWN_FIELDS)
    ]
    named += [f"reasoning.{name}" for name in ("context", "mode") if _object(document, "reasoning").get(name)]
    if document.get("truncation") == "auto":
        named.append("truncation")
    for place, each in enumerate(included):
        if each not in (ENCRYPTED_REASONING, LOGPROBS):
            named.append(f"include[{place}] ({str(each)[:60]})")
    return named
