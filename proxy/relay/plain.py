"""The commonest chunk, told from others at once: one choice, and in its delta a text and nothing else. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAYING_NO_MORE = frozenset({"content", "role"})


def plain_text(body: Mapping[str, Any]) -> str | None:
    """The text of such a chunk, which may be empty; None of any other, which has to be looked at in general.

    Fields of the delta that are null, as some servers send them all, say nothing. What the choice has beside its delta
    (index, finish_reason, logprobs) is not looked at.
    """
    choices = body.get("choices")
    if type(choices) is not list or len(choices) != 1:
        return None
    choice = choices[0]
    if type(choice) is not dict or "message" in choice:
        return None
    delta = choice.get("delta")
    if type(delta) is not dict:
        return None
    text = delta.get("content")
    if type(text) is not str or (len(delta) > 1 and _says_more(delta)):
        return None
    return text


def _says_more(delta: Mapping[str, Any]) -> bool:
    return any(value is not None and name not in _SAYING_NO_MORE for name, value in delta.items())
