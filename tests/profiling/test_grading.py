"""Answers are graded in a child process: one that hangs or breaks it costs one label."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.profiling import grading as module
from proxy.profiling.grading import GradingProcess
from router_core.validation.graders import ChoiceGrader, Grader, JsonSchemaGrader, JudgeGrader, NumericGrader
from router_core.validation.validation_set import ValidationPrompt
from tests.support.waiting import until

SLOW = JsonSchemaGrader({"contains": {"pattern": "^(x|xx|xxx)*[^x]{2}"}})
FOR_MINUTES = "[" + ",".join([f'"{"x" * 30}"'] * 600) + "]"


@pytest.fixture
async def grading() -> AsyncIterator[GradingProcess]:
    opened = GradingProcess()
    yield opened
    await opened.close()


def a_prompt(grader: Grader) -> ValidationPrompt:
    return ValidationPrompt("p1", "numbers", ({"role": "user", "content": "6 × 7?"},), grader, 20)


async def test_an_answer_is_graded_by_the_grader_of_its_prompt(grading: GradingProcess) -> None:
    assert await grading.grade(a_prompt(NumericGrader(42)), "The answer is 42.") == 1.0
    assert await grading.grade(a_prompt(NumericGrader(42)), "The answer is 43.") == 0.0
    assert await grading.grade(a_prompt(JudgeGrader("x")), "42") is None


async def test_an_answer_that_takes_minutes_is_unlabelled_and_the_next_one_is_graded(
    grading: GradingProcess, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [await grading.grade(a_prompt(SLOW), answer) for answer in (FOR_MINUTES, '["xx11"]')]

    assert scores == [None, 1.0]
    assert "validation prompt 'p1' could not be graded by json_schema: it took more than 2 s" in caplog.text


async def test_a_grader_that_fails_leaves_its_answer_unlabelled(
    grading: GradingProcess, caplog: pytest.LogCaptureFixture
) -> None:
    broken = ChoiceGrader("B", ())

    assert await grading.grade(a_prompt(broken), "B") is None
    assert "by choice: InvalidValidationSet; it counts as unlabelled" in caplog.text


async def test_a_killed_grading_process_is_restarted(grading: GradingProcess) -> None:
    await grading.grade(a_prompt(NumericGrader(42)), "1")
    (child,) = children()
    os.kill(int(child), signal.SIGKILL)

    assert await grading.grade(a_prompt(NumericGrader(42)), "42") == 1.0


async def test_the_grading_process_gets_no_keys_and_ends_when_idle(
    grading: GradingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setattr(module, "IDLE_TIMEOUT_S", 0.0)
    await grading.grade(a_prompt(NumericGrader(42)), "42")
    (child,) = children()

    assert b"sk-canary" not in Path(f"/proc/{child}/environ").read_bytes()  # noqa: ASYNC240 - no disk
    await until(lambda: not children())
    assert await grading.grade(a_prompt(NumericGrader(42)), "42") == 1.0


async def test_the_score_of_a_cancelled_answer_is_not_given_to_the_next(grading: GradingProcess) -> None:
    await grading.grade(a_prompt(NumericGrader(42)), "1")
    cancelled = asyncio.create_task(grading.grade(a_prompt(SLOW), FOR_MINUTES))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cancelled.cancel()

    assert await grading.grade(a_prompt(NumericGrader(42)), "42") == 1.0
    assert cancelled.cancelled()


def children() -> list[str]:
    """The processes to grade in; this one may have others."""
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [child for child in own if b"grading_process" in Path(f"/proc/{child}/cmdline").read_bytes()]
