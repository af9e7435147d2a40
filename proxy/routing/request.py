"""The caller's body and headers, parsed once. Keeps the body whole for the upstream; forwards nothing itself."""

from __future__ import annotations

import codecs
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Never

from proxy.errors import BadRequest
from proxy.routing.features import MOST_ANSWERS
from proxy.routing.options import Options, read_options
from proxy.routing.refused import refuse_control_fields

MAX_DEPTH = 64
MAX_VALUES = 300_000
"""Texts, numbers, lists and objects in one body, all levels together: each is looked at on the event loop."""
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


def parse_chat(raw: bytes, headers: list[tuple[str, str]]) -> ChatRequest:
    """Raises BadRequest. `headers`: every header of the request, lower-case names, repeated ones repeated."""
    body = parse_object(raw)
    refuse_control_fields(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest('`model` must be the name of a model, or "auto" to have one chosen', param="model")
    _check_answers(body.get("n"))
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("`messages` must be a list with at least one message", param="messages")
    if not all(isinstance(message, dict) for message in body["messages"]):
        raise BadRequest("every item of `messages` must be an object with `role` and `content`", param="messages")
    ours = not _OURS.isdisjoint(body)
    return ChatRequest(
        body={name: value for name, value in body.items() if name not in _OURS} if ours else body,
        model=model,
        stream=_flag(body, "stream"),
        include_usage=_asks_for_usage(body),
        options=read_options(body, headers),
        raw=None if ours else raw.removeprefix(codecs.BOM_UTF8),
    )


def _check_answers(n: Any) -> None:
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_ANSWERS):
        raise BadRequest(f"`n` must be a whole number from 1 to {MOST_ANSWERS}; got {n!r}"[:200], param="n")


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, finite numbers, whole characters, no key twice, MAX_DEPTH levels and MAX_VALUES values.

    Raises:
        BadRequest: saying what is wrong, and where.
    """
    if raw.count(b"[") > MAX_VALUES:  # millions of lists keep the garbage collector busy for seconds
        raise BadRequest(f"the body holds more than {MAX_VALUES} lists")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    _check_values(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key given twice some parsers take the first, others the last: what is checked might not be what is used."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRequest(f"the body gives the key {twice[:60]!r} twice in one object", param=twice[:60])
    return made


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a number in JSON")


def _check_values(document: dict[str, Any]) -> None:
    """What parses but cannot be written again: infinite numbers, half characters, nests that exhaust the stack."""
    level: list[Any] = [document]
    seen = 0
    for _ in range(MAX_DEPTH):
        seen += len(level)
        inner: list[Any] = []
        for value in level:
            if seen + len(inner) > MAX_VALUES:
                raise BadRequest(f"the body holds more than {MAX_VALUES} values")
            if isinstance(value, dict):
                inner.extend(value.keys())
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            else:
                _check_scalar(value)
        if not inner:
            return
        level = inner
    raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_scalar(value: Any) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"the body holds half a character (lone surrogate {value[error.start]!a})") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRequest("the body holds a number too large to be represented")


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
