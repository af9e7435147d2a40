from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.routing.sizes import MAX_TOKENS, output_limit, stated_answers
from router_core.text import BYTES_PER_TOKEN, text_bytes, truncate_middle
from router_core.types import Requirements

SCALAR_BYTES = 4
"""A number, true or false: about one token."""

PARTS = ("content", "images")
"""Lists under these names hold parts, in a message as in a tool's result; anywhere else `type` is somebody's word."""

TEXTS = ("content", "text")

_BINARY = frozenset({"data", "file_data", "b64_json"})

_ATTACHED = {
    "image_url": "vision",
    "input_image": "vision",
    "image": "vision",
    "image_file": "vision",
    "video_url": "video",
    "input_video": "video",
    "video": "video",
    "input_audio": "audio_input",
    "audio": "audio_input",
    "audio_url": "audio_input",
    "file": "files",
    "input_file": "files",
    "document": "files",
}
"""type of a part → the ability that it needs."""


@dataclass
class ContentSummary:
    """What was found so far."""

    text_bytes: int = 0
    attachments: int = 0
    needs: dict[str, str] = field(default_factory=dict)
    """Ability → the type of the first part that needs it."""


def summarize(values: Iterable[Any], *, parts: bool) -> ContentSummary:
    """Of JSON values. `parts`: whether attachments are looked for, as in messages; a schema has none."""
    found = ContentSummary()
    waiting = [(value, False) for value in values]
    while waiting:
        value, is_part = waiting.pop()
        if isinstance(value, str):
            found.text_bytes += text_bytes(value)
        elif isinstance(value, list):
            waiting.extend((item, is_part) for item in value)
        elif isinstance(value, Mapping):
            if is_part and (ability := attachment_capability(value)) is not None:
                found.attachments += 1
                found.needs.setdefault(ability, value["type"])
            else:
                _open(value, found, waiting, parts=parts)
        elif value is not None:
            found.text_bytes += SCALAR_BYTES
    return found


def _open(value: Mapping[str, Any], found: ContentSummary, waiting: list[tuple[Any, bool]], *, parts: bool) -> None:
    for name, inner in value.items():
        found.text_bytes += text_bytes(name)
        if parts and isinstance(inner, str) and is_binary(name, inner):
            found.attachments += 1
        else:
            waiting.append((inner, parts and name in PARTS and isinstance(inner, list)))


def attachment_capability(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    return _ATTACHED.get(kind) if isinstance(kind, str) else None


def is_binary(name: str, text: str) -> bool:
    """Bytes written as text: an answer's audio sent back, an attachment of a type that nobody has told us of."""
    return name in _BINARY or (name not in TEXTS and text.startswith("data:"))


SHORT = 60
"""A newest turn of fewer characters is read together with the turns before it ("yes", "continue")."""

EARLIER_TURNS = 2

MEDIA_TOKENS = 800
"""One image, audio clip or file, whatever its size: attachments are never scanned."""

PriceCaps = tuple[float | None, float | None]
"""USD per token, in and out. None: no cap."""

NO_CAPS: PriceCaps = (None, None)

_TEXT_PARTS = ("text", "input_text")

_NO_THINKING = ("", "none", "minimal", "disable")
"""Efforts that ask a model not to think, or hardly: one that cannot does as well."""


def routing_text(messages: Sequence[Any]) -> str:
    """The newest user turn, with up to two earlier ones when it is short. Empty when no user said anything."""
    turns = _user_turns(messages)
    newest = next(turns, "")
    kept = [newest]
    if len(newest) < SHORT:
        kept += [text for text, _ in zip(turns, range(EARLIER_TURNS), strict=False)]
    return "\n".join(truncate_middle(text) for text in reversed(kept))


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


def requirements_of(
    body: Mapping[str, Any],
    read: ContentSummary | None = None,
    caps: PriceCaps = NO_CAPS,
    *,
    limit_is_cap: bool = False,
) -> Requirements:
    """`read`: what the body holds, where somebody has counted it already."""
    read = _read(body) if read is None else read
    return Requirements(
        prompt_tokens=_tokens(read),
        max_output_tokens=output_limit(body),
        limit_is_cap=limit_is_cap,
        answers=stated_answers(body),
        max_input_cost_per_token=caps[0],
        max_output_cost_per_token=caps[1],
        **dict.fromkeys(_detect(body, read), True),
    )


def requirement_sources(body: Mapping[str, Any]) -> dict[str, str]:
    """Ability that the body needs → what in it asks for that, in the caller's own words."""
    return _detect(body, _read(body))


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Bytes of UTF-8 text in everything the model reads, by four. Attachments count flat, and are not looked into."""
    return _tokens(_read(body))


def _tokens(read: ContentSummary) -> int:
    return min(read.text_bytes // BYTES_PER_TOKEN + read.attachments * MEDIA_TOKENS, MAX_TOKENS)


def _read(body: Mapping[str, Any]) -> ContentSummary:
    """`needs` of what it returns: ability → as in "messages[3] has image_url"."""
    schemas = summarize((body.get(name) for name in ("tools", "functions", "response_format")), parts=False)
    found = ContentSummary(text_bytes=schemas.text_bytes)
    for place, message in enumerate(_items(body.get("messages"))):
        here = summarize((message,), parts=True)
        found.text_bytes += here.text_bytes
        found.attachments += here.attachments
        for ability, kind in here.needs.items():
            found.needs.setdefault(ability, f"messages[{place}] has {kind}")
    return found


def _detect(body: Mapping[str, Any], read: ContentSummary) -> dict[str, str]:
    asked = _tools(body) | read.needs
    if isinstance(body.get("audio"), Mapping):
        asked["audio_output"] = "`audio`"
    elif "audio" in _items(body.get("modalities")):
        asked["audio_output"] = "`modalities`"
    response_format = body.get("response_format")
    # of a mere JSON object ({"type": "json_object"}) the price map knows nothing for any model: no need is made of it
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        asked["json_schema"] = "`response_format`"
    for name, asks in _REASONING:
        if asks(body.get(name)):
            asked.setdefault("reasoning", f"`{name}`")
    return asked


def _tools(body: Mapping[str, Any]) -> dict[str, str]:
    """A conversation that carries calls needs a model that reads calls, even where it offers no tool any more."""
    called = [
        (place, len(message["tool_calls"]))
        for place, message in enumerate(_items(body.get("messages")))
        if isinstance(message, dict) and _items(message.get("tool_calls"))
    ]
    asked: dict[str, str] = {}
    if not called and _TOOLS.isdisjoint(body):
        return asked
    offered = next((name for name in ("tools", "functions") if _items(body.get(name))), None)
    if offered:
        asked["tools"] = f"`{offered}`"
    elif called:
        asked["tools"] = f"messages[{called[0][0]}] has tool_calls"
    together = next(((place, count) for place, count in called if count > 1), None)
    if offered and body.get("parallel_tool_calls") is True:
        asked["parallel_tools"] = "`parallel_tool_calls`"
    elif together:
        asked["parallel_tools"] = f"messages[{together[0]}] has {together[1]} tool_calls"
    return asked


def _is_effort(value: Any) -> bool:
    return isinstance(value, str) and value not in _NO_THINKING


def _is_reasoning(value: Any) -> bool:
    """OpenRouter's object: an effort, a budget of tokens, or plainly enabled."""
    if not isinstance(value, Mapping) or value.get("enabled") is False:
        return False
    return value.get("enabled") is True or _is_effort(value.get("effort")) or bool(_count(value.get("max_tokens")))


def _is_thinking(value: Any) -> bool:
    """Anthropic's object; "adaptive" leaves it to the model, which must know how."""
    return isinstance(value, Mapping) and value.get("type") in ("enabled", "adaptive")


_TOOLS = frozenset({"tools", "functions"})
"""Without either, and without calls, no tool has to do with a request."""

_REASONING = (("reasoning_effort", _is_effort), ("reasoning", _is_reasoning), ("thinking", _is_thinking))


def _count(value: Any) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_TOKENS
    return value if usable else None


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
