from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.graders import JudgeGrader
from router_core.validation.loading import load_validation_set
from router_core.validation.validation_set import ValidationPrompt, ValidationSet

EVERY = builtin_validation_set()
EXPECTED_FAMILIES = """
    arithmetic word_problems mathematics units dates logic code_output code_writing debugging sql json_extraction
    formatting strings reading summaries writing chat classification translation chinese spanish other_languages
    general_facts commonsense science medicine law_and_politics history
    tool_selection tool_arguments tool_nesting tool_parallel tool_abstention tool_results tool_errors tool_steps
"""
REPLIES_WITHOUT_AN_ANSWER = (
    "", " \n", "I don't know.", "I don't know", "As an AI language model, I cannot help with that.", "No lo sé.", "...",
    "Sorry, I can't answer this.", "我不知道。", "```\n```", "null", "<think>the answer",
)  # fmt: skip


def test_the_set_is_large_and_varied() -> None:
    assert len(EVERY) >= 360
    assert set(EVERY.families) >= set(EXPECTED_FAMILIES.split())
    assert {"en", "zh", "es", "fr", "de", "pt", "ja"} <= {prompt.language for prompt in EVERY}


def test_every_prompt_has_a_grader_that_needs_no_judge() -> None:
    assert not [prompt.id for prompt in EVERY if isinstance(prompt.grader, JudgeGrader)]


def test_each_level_holds_a_fifth_of_the_set_or_more() -> None:
    levels = Counter(prompt.level for prompt in EVERY)
    assert set(levels) == {1, 2, 3}
    assert min(levels.values()) > len(EVERY) / 5


def test_the_reference_answer_of_every_prompt_is_right() -> None:
    assert [p.id for p in EVERY if p.reference is None or p.grader.grade(p.reference) != 1] == []


def test_repeating_the_prompt_is_never_right() -> None:
    echoes = [p.id for p in EVERY if max(p.grader.grade(p.text), p.grader.grade(f"{p.text}\n{p.text}")) >= 0.5]
    assert echoes == []


@pytest.mark.parametrize("reply", REPLIES_WITHOUT_AN_ANSWER)
def test_saying_nothing_is_never_right(reply: str) -> None:
    assert [p.id for p in EVERY if p.grader.grade(reply) >= 0.5] == []


def test_the_answer_to_another_prompt_is_hardly_ever_right() -> None:
    shifted = EVERY.prompts[37:] + EVERY.prompts[:37]
    right = [p.id for p, other in zip(EVERY, shifted, strict=True) if p.grader.grade(other.reference or "") == 1]
    assert len(right) < len(EVERY) / 10


def test_a_reference_within_a_chatty_reply_is_right_for_open_answers() -> None:
    open_types = {"numeric", "choice", "sql", "json_schema"}
    open_prompts = [p for p in EVERY if p.grader.type in open_types and not getattr(p.grader, "whole", False)]
    assert [p.id for p in open_prompts if p.grader.grade(f"Sure!\n\nThe answer is:\n{p.reference}") != 1] == []


def test_another_seed_gives_other_prompts_of_the_same_families() -> None:
    other = builtin_validation_set(1)
    shared = {prompt.id for prompt in EVERY} & {prompt.id for prompt in other}
    assert other.id != EVERY.id
    assert len(shared) < len(EVERY) / 4
    assert set(other.families) == set(EVERY.families)


def test_a_seed_gives_the_same_set_in_another_process() -> None:
    code = (
        "import sys; from router_core.validation.families.registry import builtin_validation_set as made;"
        " sys.stdout.write(made().id)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == EVERY.id


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_seed_gives_a_full_set(seed: int) -> None:
    assert len(builtin_validation_set(seed)) == len(EVERY)


def test_levels_of_arithmetic_really_differ() -> None:
    digits = {
        level: [len(p.reference or "") for p in EVERY if (p.family, p.level) == ("arithmetic", level)]
        for level in (1, 3)
    }
    assert sum(digits[3]) / len(digits[3]) > 1.5 * sum(digits[1]) / len(digits[1])


def test_prompts_of_a_family_do_not_all_begin_alike() -> None:
    openings: dict[str, Counter[str]] = {}
    for prompt in EVERY:
        openings.setdefault(prompt.family, Counter())[prompt.text[:16]] += 1
    alike = {family for family, counts in openings.items() if max(counts.values()) > 0.55 * sum(counts.values())}
    assert alike == set()


def test_the_exported_set_loads_as_the_same_set(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps(prompt.to_json()) for prompt in EVERY), encoding="utf-8")
    assert load_validation_set(path).id == EVERY.id


def test_the_reference_and_the_grader_are_no_part_of_what_is_sent() -> None:
    prompt = next(p for p in EVERY if p.family == "sql")
    assert prompt.reference is not None
    assert all(prompt.reference not in message["content"] for message in prompt.messages)
    assert "INSERT" not in prompt.text


def test_the_text_that_is_embedded_leaves_the_system_prompt_out() -> None:
    prompt = next(p for p in EVERY if p.messages[0]["role"] == "system")
    assert prompt.messages[0]["content"] not in prompt.text
    assert "messages" in prompt.to_json()


def test_a_set_with_a_repeated_id_is_refused() -> None:
    first: ValidationPrompt = EVERY.prompts[0]
    with pytest.raises(ValueError, match="occurs twice"):
        ValidationSet((first, first))
