from __future__ import annotations

import pytest

from router_core.text import MAX_END_CHARS, estimate_tokens, text_bytes, truncate_middle


@pytest.mark.parametrize(
    ("text", "size", "tokens"), [("", 0, 1), ("abc", 3, 1), ("a" * 40, 40, 10), ("字" * 8, 24, 6), ("\ud800", 1, 1)]
)
def test_a_token_is_four_bytes_and_every_text_has_one(text: str, size: int, tokens: int) -> None:
    assert (text_bytes(text), estimate_tokens(text)) == (size, tokens)


def test_a_short_text_is_not_truncated() -> None:
    whole = " " + "a" * (2 * MAX_END_CHARS - 2) + "\n"
    assert truncate_middle(whole) == whole


def test_a_truncated_text_keeps_its_two_ends() -> None:
    assert (
        truncate_middle("a" * MAX_END_CHARS + "b" + "c" * MAX_END_CHARS)
        == "a" * MAX_END_CHARS + "\n" + "c" * MAX_END_CHARS
    )


def test_blanks_around_a_truncated_text_are_dropped() -> None:
    assert truncate_middle(" " * MAX_END_CHARS + "a" * MAX_END_CHARS + "\n" * MAX_END_CHARS) == "a" * MAX_END_CHARS
    assert (
        truncate_middle("\n" * MAX_END_CHARS + "a" * 2 * MAX_END_CHARS + "b")
        == "a" * MAX_END_CHARS + "\n" + "a" * (MAX_END_CHARS - 1) + "b"
    )
