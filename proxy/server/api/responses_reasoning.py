"""Reasoning of a chat model, as an item of the Responses API and back.

Its text is the item's summary. What a provider has signed or encrypted must come back to it unchanged: the client holds
that in `encrypted_content`, which is readable, and no secret.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proxy.json_text import decode_json, encode_json

# `encrypted_content` that begins so was written here.
CARRIED_MARK = "uniroute1."

# Of an item in an answer of ours: the id of its response is a part of it.
OWN_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_\d+", re.ASCII)

# Members of a chat message that a provider may have signed.
CARRIED_FIELDS = ("thinking_blocks", "reasoning_details")

_PROOFS = ("signature", "data")

# Members of a block that grow piece by piece; all others are stated at once.
_GROWING = frozenset({"thinking", "text", "summary"})

_TEXT_FIELDS = ("reasoning_content", "reasoning")


def reasoning_text(part: Mapping[str, Any]) -> str:
    """Return the text of reasoning in a chat message or a delta, under whichever name the server writes it."""
    for name in _TEXT_FIELDS:
        if isinstance(text := part.get(name), str) and text:
            return text
    if isinstance(content := part.get("content"), list):  # Mistral's thoughts are parts of it
        thoughts = [each.get("thinking") for each in mappings(content) if each.get("type") == "thinking"]
        return "".join(_plain_text(thought) for thought in thoughts)
    blocks = [block for name in CARRIED_FIELDS for block in mappings(part.get(name))]
    return "".join(_plain_text(block.get(name)) for block in blocks for name in ("thinking", "text", "summary"))


def _plain_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "".join(each["text"] for each in mappings(value) if isinstance(each.get("text"), str))


def mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the objects in a list; nothing if it is no list."""
    if isinstance(value, list):
        yield from (each for each in value if isinstance(each, Mapping))


class CarriedReasoning:
    """Collect what must come back to the provider, from a message or from the deltas of one."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[_Block]] = {}

    def add(self, part: Mapping[str, Any]) -> bool:
        """Add what a message or a delta has of it; return whether it has any."""
        found = False
        for name in CARRIED_FIELDS:
            for place, block in enumerate(mappings(part.get(name))):
                found = True
                blocks = self._blocks.setdefault(name, [])
                # Two blocks of one list are two, unless their index says otherwise.
                if blocks and blocks[-1].continues(block) and (not place or "index" in block):
                    blocks[-1].add(block)
                else:
                    blocks.append(_Block(block))
        return found

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return the members of a chat message that hold signed blocks; none if nothing is signed."""
        members: dict[str, list[dict[str, Any]]] = {}
        for name, blocks in self._blocks.items():
            built = [block.to_json() for block in blocks]
            signed = [block for block in built if any(block.get(proof) for proof in _PROOFS)]
            if signed:
                # Anthropic refuses thinking without a signature; OpenRouter wants all details as they were.
                members[name] = signed if name == "thinking_blocks" else built
        return members


class _Block:
    """One block of reasoning, whole or in pieces."""

    def __init__(self, block: Mapping[str, Any]) -> None:
        self._members: dict[str, Any] = {}
        self._pieces: dict[str, list[str]] = {}
        self.add(block)

    def continues(self, block: Mapping[str, Any]) -> bool:
        """Return whether `block` is a further piece of this one. Text after a signature begins the next."""
        known = self._members
        if block.get("type") != known.get("type") or block.get("index") != known.get("index") or known.get("data"):
            return False
        return not (known.get("signature") and any(block.get(name) for name in _GROWING))

    def add(self, block: Mapping[str, Any]) -> None:
        for name, value in block.items():
            if name in _GROWING and isinstance(value, str):
                self._pieces.setdefault(name, []).append(value)
            elif value is not None:
                self._members[name] = value

    def to_json(self) -> dict[str, Any]:
        return {**self._members, **{name: "".join(pieces) for name, pieces in self._pieces.items()}}


def is_own_reasoning(item: Any) -> bool:
    """Return whether an item is reasoning that was made here: its id or its content says so."""
    if not isinstance(item, Mapping) or item.get("type") != "reasoning":
        return False
    stated, encrypted = item.get("id"), item.get("encrypted_content")
    has_own_id = isinstance(stated, str) and OWN_ITEM_ID.fullmatch(stated) is not None
    return has_own_id or (isinstance(encrypted, str) and encrypted.startswith(CARRIED_MARK))


def encode_carried(members: Mapping[str, Any]) -> str:
    """Write members of a chat message as `encrypted_content`."""
    return CARRIED_MARK + base64.urlsafe_b64encode(encode_json(members)).decode()


def decode_carried(text: Any) -> dict[str, Sequence[Mapping[str, Any]]] | None:
    """Read what `encode_carried` wrote. None: it is something else."""
    if not isinstance(text, str) or not text.startswith(CARRIED_MARK):
        return None
    try:
        members = decode_json(base64.urlsafe_b64decode(text.removeprefix(CARRIED_MARK)))
    except (binascii.Error, ValueError):
        return None
    if not isinstance(members, dict):
        return None
    return {name: list(mappings(members[name])) for name in CARRIED_FIELDS if name in members}
