"""The commonest chunk or answer, told from others at once: one choice, with a text and nothing else. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAYING_NO_MORE = frozenset({"content", "role"})


def plain_text(body: Mapping[str, Any]) -> str | None:
    """The text of such a chunk or answer, which may be empty; None of any other, which has to be looked at in general.

    Fields of the delta that are null or empty, as some servers send them all, say nothing. What the choice has beside
    its delta or message (index, finish_reason, logprobs) is not looked at.
    """
    choices = body.get("choices")
    if type(choices) is not list or len(choices) != 1:
        return None
    choice = choices[0]
    if type(choice) is not dict or ("message" in choice and "delta" in choice):
        return None
    part = choice.get("delta") or choice.get("message")
    if type(part) is not dict:
        return None
    text = part.get("content")
    if type(text) is not str or (len(part) > 1 and _says_more(part)):
        return None
    return text


def _says_more(part: Mapping[str, Any]) -> bool:
    return any(value and name not in _SAYING_NO_MORE for name, value in part.items())
