from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.languages import language_of
from router_core.validation.families.registry import builtin_validation_set


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of Portugal?", "en"),
        ("¿Cuál es la capital de Portugal?", "es"),
        ("葡萄牙的首都是哪里？", "zh"),
        ("日本の首都はどこですか。", "ja"),
        ("대한민국의 수도는 어디입니까?", "ko"),
        ("Python 里怎么把一个列表排序？", "zh"),
        ("What does the word 水 mean in English?", "en"),
        ("def f(x): return x", None),
        ("2 + 2", None),
        ("", None),
    ],
)
def test_a_language_is_told_by_script_and_words(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_nineteen_in_twenty_validation_prompts_are_taken_for_their_own_language() -> None:
    prompts = builtin_validation_set()
    right = [prompt for prompt in prompts if language_of(prompt.text) == prompt.language]
    assert len(right) > 0.95 * len(prompts)


@given(st.text())
def test_any_text_has_a_language_or_none(text: str) -> None:
    assert language_of(text) is None or len(language_of(text) or "") == 2
