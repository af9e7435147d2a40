"""A caller's body to the bytes that go upstream: its own, with only what must change replaced. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from proxy.relay.sse import dump
from proxy.upstream.model_member import with_model

_USAGE = b'"stream_options":{"include_usage":true},'


def outgoing(raw: bytes | None, body: Mapping[str, Any], model: str, *, stream: bool, asks_usage: bool = True) -> bytes:
    """JSON for the upstream: the caller's body for `model`, and of a stream with usage.

    Args:
        raw: what `body` was parsed from, byte for byte; None: it differs, or was made here.
        body: with a text as `model`, if it comes with `raw`.
        model: the upstream's own name for it.
        asks_usage: whether a stream is asked for usage. False: by the caller neither.
    """
    as_it_is = "stream_options" not in body if not (stream and asks_usage) else _asks_usage(body)
    if raw is not None and (as_it_is or "stream_options" not in body):
        spliced = with_model(raw, body, model)
        if spliced is not None:
            return spliced if as_it_is else _asking_usage(spliced)
    sent = {**body, "model": model}
    if stream and asks_usage:
        options = body.get("stream_options")
        sent["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    else:
        sent.pop("stream_options", None)
        if not stream and sent.get("stream"):  # a parameter of the model's own, which this caller did not ask for
            del sent["stream"]
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
