from __future__ import annotations

import pytest

from router_core.validation.graders import ChoiceGrader, ExactGrader, NumericGrader, SequenceGrader

FRUITS = ("apple", "pear", "green apple", "plum")


@pytest.mark.parametrize(
    "reply",
    [
        "1234",
        "1,234",
        "1 234",
        "1.234",
        "The answer is **1,234**.",
        "\\boxed{1234}",
        "\\[ \\boxed{1{,}234} \\]".replace("{,}", ","),
        "12 + 1222 = 1234",
        "**1234**\n\nI added 34 to 1200, in 2 steps.",
        "<think>maybe 99?</think>1234",
        "First 1200, then 34 more.\n\nAnswer: 1234 apples",
        "答案是1234。",
        "１２３４",
        "La respuesta es 1.234.",
        "$1,234.00",
    ],
)
def test_a_number_is_found_however_it_is_written(reply: str) -> None:
    assert NumericGrader(1234).grade(reply) == 1


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "1235",
        "I don't know.",
        "<think>1234",
        "It is 12 or 34.",
        "x1234",
        "1234 + 1 = 1235",
        "Answer: 7\n\n1234 - no",
    ],
)
def test_another_number_or_none_scores_zero(reply: str) -> None:
    assert NumericGrader(1234).grade(reply) == 0


def test_fractions_percents_words_and_powers_are_numbers() -> None:
    assert NumericGrader(0.75).grade("The result is 3/4.") == 1
    assert NumericGrader(0.75).grade("\\frac{3}{4}") == 1
    assert NumericGrader(25).grade("25%") == 1
    assert NumericGrader(0.25).grade("25 %") == 1
    assert NumericGrader(3).grade("Three.") == 1
    assert NumericGrader(120_000).grade("1.2 × 10^5") == 1
    assert NumericGrader(-5).grade("x = −5") == 1


def test_tolerance_is_absolute() -> None:
    assert NumericGrader(10, 0.1).grade("10.05") == 1
    assert NumericGrader(10, 0.1).grade("10.2") == 0


@pytest.mark.parametrize("reply", ["9" * 5_000, "1/0", "1e999", "-", ".", "1,,2", "10^{", "1/2/3", "٣"])
def test_odd_numerals_score_zero_and_raise_nothing(reply: str) -> None:
    assert NumericGrader(42).grade(reply) == 0


@pytest.mark.parametrize(
    "reply",
    [
        "paris",
        "Paris.",
        "**Paris**",
        '"Paris"',
        "Answer: Paris",
        "The answer is Paris.",
        "```\nParis\n```",
        "It is 'x'.\nParis",
        "PARIS!",
    ],
)
def test_a_text_is_found_within_the_reply(reply: str) -> None:
    assert ExactGrader(("Paris",)).grade(reply) == 1


@pytest.mark.parametrize("reply", ["", "London", "Not Paris but London", "Parisian", "Paris London Rome"])
def test_a_text_that_is_not_the_answer_scores_zero(reply: str) -> None:
    assert ExactGrader(("Paris",)).grade(reply) == 0


def test_a_whole_answer_allows_nothing_around_it() -> None:
    grader = ExactGrader(("A-1",), whole=True, case_sensitive=True)
    assert grader.grade(" A-1\n") == 1
    assert grader.grade("```\nA-1\n```") == 1
    assert grader.grade("Here it is: A-1") == 0
    assert grader.grade("a-1") == 0


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Ann, Bob, Cy", 1),
        ("1. Ann\n2. Bob\n3. Cy", 1),
        ("Bob is older than Cy, and Ann than Bob.\nSo: Ann > Bob > Cy", 1),
        ("Cy, Bob, Ann", 0),
        ("Ann and Bob", 0),
        ("", 0),
    ],
)
def test_an_order_counts_only_as_a_whole(reply: str, score: float) -> None:
    assert SequenceGrader(("Ann", "Bob", "Cy")).grade(reply) == score


@pytest.mark.parametrize(
    "reply",
    [
        "B",
        "b)",
        "(B)",
        "**B**",
        "B. pear",
        "The answer is B.",
        "Answer: B) pear",
        "\\boxed{B}",
        "pear",
        "It must be the pear.",
        "Option B is right, since A is sour.",
        "B, since apple (A) is sour.",
        "**Answer: B**",
        "A is wrong and so is C.\n\nThe correct answer is (B).",
        "正确答案是B。",
    ],
)
def test_a_choice_is_its_letter_or_its_words(reply: str) -> None:
    assert ChoiceGrader("B", FRUITS).grade(reply) == 1


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "A",
        "I don't know.",
        "A) apple\nB) pear\nC) green apple\nD) plum",
        "apple or pear",
        "E",
        "The answer is D, not B.",
    ],
)
def test_another_choice_or_none_scores_zero(reply: str) -> None:
    assert ChoiceGrader("B", FRUITS).grade(reply) == 0


def test_an_option_inside_a_longer_option_is_told_apart() -> None:
    assert ChoiceGrader("C", FRUITS).grade("a green apple") == 1
    assert ChoiceGrader("A", FRUITS).grade("a green apple") == 0
