"""What a completion or a chunk of one says: content, an end, usage. Reads only, never fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxy.relay.plain import plain_text
from router_core.tokens import text_bytes

_CONTENT = ("content", "tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "audio", "images")
_EMPTY_BY_RIGHT = frozenset({"length", "content_filter", "max_tokens"})
"""Ends of an answer that another model is not asked to better: the limit was the caller's, the filter a verdict."""


def has_content(body: Mapping[str, Any]) -> bool:
    """Of a chunk or a whole completion."""
    plain = plain_text(body)
    if plain is not None:
        return bool(plain)
    return any(part.get(name) for part in _parts(body) for name in _CONTENT)


def content_bytes(body: Mapping[str, Any]) -> int:
    """UTF-8 bytes of what a model wrote in a chunk or a whole completion; sounds and images are not counted."""
    plain = plain_text(body)
    if plain is not None:
        return text_bytes(plain)
    size = 0
    for part in _parts(body):
        for name in _CONTENT:
            size += _text_size(part.get(name))
    return size


def _text_size(value: Any) -> int:
    """Of a text, or of the names and arguments of calls."""
    if isinstance(value, str):
        return text_bytes(value)
    if isinstance(value, list):
        return sum(_text_size(call.get("function")) for call in value if isinstance(call, Mapping))
    if isinstance(value, Mapping):
        return _text_size(value.get("name")) + _text_size(value.get("arguments"))
    return 0


def is_empty_answer(body: Mapping[str, Any]) -> bool:
    """A whole completion that says nothing, though nothing kept it from speaking."""
    return not has_content(body) and not _EMPTY_BY_RIGHT.intersection(finish_reasons(body))


def finish_reasons(body: Mapping[str, Any]) -> set[str]:
    return {choice["finish_reason"] for choice in choices_of(body) if isinstance(choice.get("finish_reason"), str)}


def is_usage_chunk(chunk: Mapping[str, Any]) -> bool:
    return bool(chunk.get("usage")) and not chunk.get("choices")


def usage_chunk(like: Mapping[str, Any], usage: object) -> dict[str, Any]:
    """The extra chunk of `include_usage`, for upstreams that put usage elsewhere."""
    kept = {name: like[name] for name in ("id", "object", "created", "model", "system_fingerprint") if name in like}
    return {**kept, "choices": [], "usage": usage}


def choices_of(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    choices = body.get("choices")
    if isinstance(choices, list):
        yield from (choice for choice in choices if isinstance(choice, Mapping))


def _parts(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for choice in choices_of(body):
        for name in ("message", "delta"):
            part = choice.get(name)
            if isinstance(part, Mapping):
                yield part
