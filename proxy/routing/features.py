"""What routing needs to know of a body: the user's intent as text, token estimate, abilities asked for. Never fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from router_core.excerpt import CUT as CUT
from router_core.excerpt import excerpt
from router_core.tokens import BYTES_PER_TOKEN, text_bytes
from router_core.types import Needs

SHORT = 60
"""A newest turn of fewer characters is read together with the turns before it ("yes", "continue")."""
EARLIER_TURNS = 2
MEDIA_TOKENS = 800
"""One image, audio clip or file, whatever its size: attachments are never scanned."""
_MOST_TOKENS = 10**9
_TEXT_PARTS = ("text", "input_text")
_MEDIA = {
    "image_url": "vision",
    "input_image": "vision",
    "image": "vision",
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "file": "file",
    "input_file": "file",
    "document": "file",
    "video_url": "vision",
}


def routing_text(messages: Sequence[Any]) -> str:
    """The newest user turn, with up to two earlier ones when it is short. Empty when no user said anything."""
    turns = _user_turns(messages)
    newest = next(turns, "")
    kept = [newest]
    if len(newest) < SHORT:
        kept += [text for text, _ in zip(turns, range(EARLIER_TURNS), strict=False)]
    return "\n".join(excerpt(text) for text in reversed(kept))


def _user_turns(messages: Sequence[Any]) -> Iterator[str]:
    """Newest first; turns without text are passed over."""
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            text = _text_of(message.get("content")).strip()
            if text:
                yield text


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part for part in content if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS)
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def needs_of(body: Mapping[str, Any]) -> Needs:
    media = _media(body.get("messages"))
    return Needs(
        prompt_tokens=estimate_tokens(body),
        max_output_tokens=_count(body.get("max_completion_tokens")) or _count(body.get("max_tokens")),
        answers=min(_count(body.get("n")) or 1, 128),
        tools=bool(body.get("tools") or body.get("functions")),
        vision="vision" in media,
        audio="audio" in media or bool(body.get("audio")) or "audio" in _items(body.get("modalities")),
        json_schema=_is_schema(body.get("response_format")),
    )


def _count(value: Any) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST_TOKENS
    return value if usable else None


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_schema(response_format: Any) -> bool:
    return isinstance(response_format, Mapping) and response_format.get("type") == "json_schema"


def _media(messages: Any) -> set[str]:
    return {
        kind
        for message in _items(messages)
        if isinstance(message, Mapping)
        for part in _items(message.get("content"))
        if isinstance(part, Mapping) and isinstance(part.get("type"), str)
        if (kind := _MEDIA.get(part["type"])) is not None
    }


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Bytes of UTF-8 text in everything the model reads, by four. Attachments count flat, and are not looked into."""
    size = media = 0
    waiting: list[Any] = [body.get(name) for name in ("messages", "tools", "functions", "response_format")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            size += text_bytes(value)
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, Mapping):
            if _is_media(value):
                media += 1
            else:
                size += sum(len(name) for name in value)
                waiting.extend(value.values())
    return size // BYTES_PER_TOKEN + media * MEDIA_TOKENS


def _is_media(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind in _MEDIA
