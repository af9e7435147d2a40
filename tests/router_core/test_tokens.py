"""The estimate that prices a prompt."""

import pytest

from router_core.text import estimate_tokens, text_bytes


@pytest.mark.parametrize(
    ("text", "size", "tokens"), [("", 0, 1), ("abc", 3, 1), ("a" * 40, 40, 10), ("字" * 8, 24, 6), ("\ud800", 1, 1)]
)
def test_a_token_is_four_bytes_and_every_text_has_one(text: str, size: int, tokens: int) -> None:
    assert (text_bytes(text), estimate_tokens(text)) == (size, tokens)
