"""A caller's body to the bytes that go upstream: its own, with only what must change replaced. Sends nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from proxy.relay.sse import dump

_MODEL = re.compile(rb'(?<!\\)"model"[ \t\r\n]*:[ \t\r\n]*"(?:[^"\\]|\\.)*"')
_MOST_PLACES = 8
"""Members called `model` that are tried, where tools and schemas have some of their own."""
_USAGE = b'"stream_options":{"include_usage":true},'


def outgoing(raw: bytes | None, body: Mapping[str, Any], model: str, *, stream: bool) -> bytes:
    """JSON for the upstream: the caller's body for `model`, and of a stream with usage.

    Args:
        raw: what `body` was parsed from, byte for byte; None: it differs, or was made here.
        body: with a text as `model`, if it comes with `raw`.
        model: the upstream's own name for it.
    """
    asks_usage = _asks_usage(body)
    if raw is not None and (asks_usage or "stream_options" not in body):
        spliced = _with_model(raw, body, model)
        if spliced is not None:
            return spliced if asks_usage or not stream else _asking_usage(spliced)
    sent = {**body, "model": model}
    if stream:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    else:
        sent.pop("stream_options", None)
    return written(sent)


def written(body: Mapping[str, Any]) -> bytes:
    """Compact JSON."""
    try:
        return orjson.dumps(body)
    except TypeError:  # an integer beyond 64 bits, half a character
        return dump(body)


def _asks_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return bool(body.get("stream")) and isinstance(options, Mapping) and options.get("include_usage") is True


def _asking_usage(raw: bytes) -> bytes:
    start = raw.index(b"{") + 1
    return raw[:start] + _USAGE + raw[start:]


def _with_model(raw: bytes, body: Mapping[str, Any], model: str) -> bytes | None:
    """Another value of the outermost `model`. None: it is written in a way that is not seen at once."""
    value = orjson.dumps(model)
    for place, found in enumerate(_MODEL.finditer(raw)):
        if place == _MOST_PLACES:
            return None
        changed = raw[: found.start()] + b'"model":' + value + raw[found.end() :]
        if _is_outermost(raw, *found.span()) or _says(changed, {**body, "model": model}):
            return changed
    return None


def _is_outermost(raw: bytes, start: int, end: int) -> bool:
    """No object begins before it but the outermost, or none ends behind it but that."""
    return raw.count(b"{", 0, start) == 1 or raw.count(b"}", end) == 1


def _says(raw: bytes, body: Mapping[str, Any]) -> bool:
    try:
        return bool(orjson.loads(raw) == body)
    except orjson.JSONDecodeError:
        return False
