"""The id of a session where the caller did not state ours: headers and fields that clients send. Never fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LONGEST_ID = 255
SESSION_HEADERS = ("x-session-id", "x-litellm-session-id", "x-claude-code-session-id")


def inherited_session(body: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> str | None:
    """The first that is a text of 1 to 255 characters; one that is not was not meant for us, and is passed over."""
    return next((found for found in _stated(body, headers) if is_session_id(found)), None)


def is_session_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_ID


def _stated(body: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> Iterator[Any]:
    for known in SESSION_HEADERS:
        values = [value.strip(" \t") for name, value in headers if name == known]
        if len(values) == 1:
            yield values[0]
    yield body.get("prompt_cache_key")
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping):
        yield metadata.get("session_id")
