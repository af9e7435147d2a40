"""What a completion or a chunk of one says: content, an end, usage. Reads only, never fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxy.relay.plain import plain_text
from router_core.tokens import text_bytes

_NO_CONTENT = frozenset({"role"})
"""What a delta may have without saying anything. Whatever else is not empty is content, by whatever name."""
_NO_TEXT = frozenset({"role", "id", "type", "index", "format", "data", "url", "image_url", "signature", "annotations"})
"""Parts of a message that are no text which a model wrote: names of things, sounds, pictures, what is encrypted."""
_DEEPEST = 6
_EMPTY_BY_RIGHT = frozenset({"length", "content_filter", "max_tokens"})
"""Ends of an answer that another model is not asked to better: the limit was the caller's, the filter a verdict."""


def has_content(body: Mapping[str, Any]) -> bool:
    """Of a chunk or a whole completion."""
    plain = plain_text(body)
    if plain is not None:
        return bool(plain)
    for part in _parts(body):
        for name, value in part.items():
            if value and name not in _NO_CONTENT and _says(value):
                return True
    return False


def _says(value: Any, depth: int = 0) -> bool:
    """Whether anything within is not empty."""
    if depth < _DEEPEST and isinstance(value, Mapping):
        return any(inner and _says(inner, depth + 1) for inner in value.values())
    if depth < _DEEPEST and isinstance(value, list):
        return any(inner and _says(inner, depth + 1) for inner in value)
    return bool(value)


def content_bytes(body: Mapping[str, Any]) -> int:
    """UTF-8 bytes of what a model wrote in a chunk or a whole completion; sounds and images are not counted."""
    plain = plain_text(body)
    if plain is not None:
        return text_bytes(plain)
    return sum(_text_size(part) for part in _parts(body))


def _text_size(part: Mapping[str, Any]) -> int:
    """Of the texts in a delta or a message. The same thoughts under two names were written once."""
    texts: list[str] = []
    for name, value in part.items():
        if value and name not in _NO_TEXT:
            _gather(value, texts, 0)
    if len(texts) < 2:
        return text_bytes(texts[0]) if texts else 0
    return sum(text_bytes(text) for text in set(texts))


def _gather(value: Any, texts: list[str], depth: int) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif depth < _DEEPEST and isinstance(value, list):
        for inner in value:
            _gather(inner, texts, depth + 1)
    elif depth < _DEEPEST and isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NO_TEXT:
                _gather(inner, texts, depth + 1)


def is_empty_answer(body: Mapping[str, Any]) -> bool:
    """A whole completion that says nothing, though nothing kept it from speaking."""
    return not has_content(body) and not _EMPTY_BY_RIGHT.intersection(finish_reasons(body))


def finish_reasons(body: Mapping[str, Any]) -> set[str]:
    return {choice["finish_reason"] for choice in choices_of(body) if isinstance(choice.get("finish_reason"), str)}


def is_usage_chunk(chunk: Mapping[str, Any]) -> bool:
    return bool(chunk.get("usage")) and not chunk.get("choices")


def says_no_usage(chunk: Mapping[str, Any]) -> bool:
    """`usage` is null, and it says nothing else."""
    return "usage" in chunk and not chunk["usage"] and not chunk.get("choices") and _ENVELOPE.issuperset(chunk)


_ENVELOPE = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})


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
