"""The caller's body and headers, parsed once. Keeps the body whole for the upstream; forwards nothing itself."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import BadRequest
from proxy.routing.attachments import Contents
from proxy.routing.exact_json import exact_object
from proxy.routing.options import Options, read_options
from proxy.routing.quick_json import quick_object
from proxy.routing.refused import refuse_control_fields
from proxy.routing.sizes import check_sizes

_OURS = frozenset({"uniroute", "models", "route", "provider"})
"""Ours, and OpenRouter's: they mean something here and nothing to an upstream."""


@dataclass(frozen=True)
class ChatRequest:
    body: Mapping[str, Any]
    """What goes upstream: the caller's JSON object less our own fields. `model` is replaced on the way."""
    model: str
    stream: bool
    include_usage: bool
    """The caller asked for the usage chunk of a stream."""
    options: Options
    raw: bytes | None = field(default=None, repr=False)
    """What `body` was parsed from, byte for byte; None where that held more than goes upstream."""
    contents: Contents | None = field(default=None, repr=False)
    """What the parser counted of `body` on its way. None: it did not."""


def parse_chat(raw: bytes, headers: list[tuple[str, str]]) -> ChatRequest:
    """Raises BadRequest. `headers`: lower-case names, repeated ones repeated; those that `options` reads will do."""
    read = quick_object(raw)
    body = exact_object(raw) if read is None else read.document
    refuse_control_fields(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest('`model` must be the name of a model, or "auto" to have one chosen', param="model")
    check_sizes(body)
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("`messages` must be a list with at least one message", param="messages")
    if set(map(type, body["messages"])) != {dict}:
        raise BadRequest("every item of `messages` must be an object with `role` and `content`", param="messages")
    ours = not _OURS.isdisjoint(body)
    return ChatRequest(
        body={name: value for name, value in body.items() if name not in _OURS} if ours else body,
        model=model,
        stream=_flag(body, "stream"),
        include_usage=_asks_for_usage(body),
        options=read_options(body, headers),
        raw=None if ours else raw.removeprefix(codecs.BOM_UTF8),
        contents=None if read is None else read.contents,
    )


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, finite numbers, whole characters, no key twice, MAX_DEPTH levels and MAX_VALUES values.

    Raises:
        BadRequest: saying what is wrong, and where.
    """
    read = quick_object(raw)
    return exact_object(raw) if read is None else read.document


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"`{name}` must be true or false; got {value!r}"[:200], param=name)
    return bool(value)


def _asks_for_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise BadRequest("`stream_options` must be an object", param="stream_options")
    if not isinstance(options.get("include_usage"), bool | None):
        name = "stream_options.include_usage"
        raise BadRequest(f"`{name}` must be true or false", param=name)
    return options.get("include_usage") is True
