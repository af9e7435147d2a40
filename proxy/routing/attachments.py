"""How much text a model reads of a body, and what is attached to it: one walk that never looks into an attachment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from router_core.tokens import text_bytes

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
class Contents:
    """What was found so far."""

    text_bytes: int = 0
    attachments: int = 0
    needs: dict[str, str] = field(default_factory=dict)
    """Ability → the type of the first part that needs it."""


def contents(values: Iterable[Any], *, parts: bool) -> Contents:
    """Of JSON values. `parts`: whether attachments are looked for, as in messages; a schema has none."""
    found = Contents()
    waiting = [(value, False) for value in values]
    while waiting:
        value, is_part = waiting.pop()
        if isinstance(value, str):
            found.text_bytes += text_bytes(value)
        elif isinstance(value, list):
            waiting.extend((item, is_part) for item in value)
        elif isinstance(value, Mapping):
            if is_part and (ability := attached(value)) is not None:
                found.attachments += 1
                found.needs.setdefault(ability, value["type"])
            else:
                _open(value, found, waiting, parts=parts)
        elif value is not None:
            found.text_bytes += SCALAR_BYTES
    return found


def _open(value: Mapping[str, Any], found: Contents, waiting: list[tuple[Any, bool]], *, parts: bool) -> None:
    for name, inner in value.items():
        found.text_bytes += text_bytes(name)
        if parts and isinstance(inner, str) and is_binary(name, inner):
            found.attachments += 1
        else:
            waiting.append((inner, parts and name in PARTS and isinstance(inner, list)))


def attached(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    return _ATTACHED.get(kind) if isinstance(kind, str) else None


def is_binary(name: str, text: str) -> bool:
    """Bytes written as text: an answer's audio sent back, an attachment of a type that nobody has told us of."""
    return name in _BINARY or (name not in TEXTS and text.startswith("data:"))
