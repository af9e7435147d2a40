"""What the page of a cluster shows of the answers to its validation prompts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.dashboard.answers import MAX_EXPECTED_CHARS, MAX_PAGE_CHARS, shown_prompts
from proxy.profiling.job_store import MAX_TEXT_CHARS, AnswerText, PromptAnswer
from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.graders import ExactGrader, JudgeGrader, NumericGrader
from router_core.validation.validation_set import ValidationPrompt
from tests.dashboard.site import Site
from tests.dashboard.test_answers import CELL, Markup
from tests.dashboard.test_views import text_of
from tests.support.proxy_process import model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

NAME = "says-odd-things"
ANSWER = f"{CELL}\x1b[2J\u202e and the end."


@pytest.fixture(scope="module")
def measured(site: Site) -> Iterator[list[dict[str, Any]]]:
    """Measure a model that answers with markup; return its outcomes."""
    with ScriptedUpstream(lambda _: ANSWER) as upstream:
        body = {**model_entry(NAME, upstream.url), "profile": {"prompts": 6, "max_usd": 1}}
        job = site.proxy.admin("POST", "/admin/models", body).json()["job"]
        assert wait_until(lambda: site.proxy.admin("GET", f"/admin/jobs/{job}").json()["state"] == "ready")
        yield site.proxy.admin("GET", f"/admin/jobs/{job}/outcomes").json()["outcomes"]
        site.proxy.admin("DELETE", f"/admin/models/{NAME}")


def page_with(site: Site, prompt: str, key: str | None = None) -> str:
    """Return the page of the cluster that a prompt is nearest to."""
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
    clusters = site.proxy.admin("POST", "/v1/route", body).json()["clusters"]
    with site.visitor(*([key] if key else [])) as visitor:
        return visitor.get(f"/cluster?id={clusters[0]['id']}").text


def answers_on(page: str, prompt: str) -> str:
    """Return the part of a page that belongs to one prompt."""
    start = html.escape(prompt[:20], quote=False).replace('"', "&#34;").replace("'", "&#39;")
    row = page[page.index(f"<pre>{start}") :]
    return row[: row.index("</tr>")]


def test_it_shows_each_answer_with_its_grade_and_what_the_grader_looks_for(
    site: Site, measured: list[dict[str, Any]]
) -> None:
    line = measured[0]
    page = page_with(site, line["prompt"])
    shown = answers_on(page, line["prompt"])

    assert line["prompt"] in html.unescape(shown)
    assert "Graded by " in text_of(shown)
    assert f"{NAME} grade {line['scores'][NAME]:g} · {line['output_tokens'][NAME]:g} tokens ·" in text_of(shown)
    assert " s · $0.0" in text_of(shown)
    assert "ended by stop" in text_of(shown)
    assert f"{CELL} and the end." in html.unescape(shown)  # without what moves the cursor and the direction
    assert "Answers of 1 model" in text_of(page)


def test_what_a_model_answers_is_shown_and_not_run(site: Site, measured: list[dict[str, Any]]) -> None:
    for line in measured[:2]:
        page = page_with(site, line["prompt"])
        assert "&lt;script&gt;alert(1)" in page
        assert "<script>alert" not in page
        assert (Markup(page).inline, Markup(page).tags.count("img"), Markup(page).tags.count("script")) == ([], 0, 1)


def test_a_viewer_reads_answers_too(site: Site, measured: list[dict[str, Any]]) -> None:
    key = site.make_key("viewer")["key"]
    assert "and the end." in page_with(site, measured[0]["prompt"], key)


def a_prompt(grader: Any = None, number: int = 0, **more: Any) -> tuple[ValidationPrompt, float]:
    asked = ({"role": "user", "content": "What is it?"},)
    return ValidationPrompt(f"p{number}", "f", asked, grader or NumericGrader(47.5, 0.1), 10, **more), 0.5


def test_what_the_grader_looks_for_is_written_one_field_a_line() -> None:
    rubric = JudgeGrader(rubric="Is it kind?\nSay why.", model=None)
    long = ExactGrader(("x" * 5000,))
    prompts = shown_prompts([a_prompt(), a_prompt(rubric), a_prompt(long)], {})

    assert [(each.grader, each.expected) for each in prompts[:2]] == [
        ("numeric", "answer: 47.5\ntolerance: 0.1"),
        ("judge", "rubric: Is it kind?\nSay why."),
    ]
    assert len(prompts[2].expected) == MAX_EXPECTED_CHARS + 1


def test_a_prompt_with_tools_is_shown_with_them_and_its_later_turns() -> None:
    prompt = next(each for each in builtin_validation_set() if each.family == "tool_errors")
    (shown, plain) = shown_prompts([(prompt, 1.0), a_prompt()], {})
    tools, system, called, result = shown.context.split("\n")

    assert tools == "tools: reserve_room"
    assert system.startswith("system: You finish")
    assert called.startswith('called: reserve_room {"room": ')
    assert result.startswith('tool: {"error": {"code": "E31"')
    assert plain.context == ""


def test_an_answer_without_text_or_without_a_grade_says_so() -> None:
    answers = {
        "silent": PromptAnswer(failed=True),
        "cut": PromptAnswer(output_tokens=9.0, finish_reason="length", text=AnswerText("so far", 6)),
        "old": PromptAnswer(score=0.25),
    }
    (prompt,) = shown_prompts([a_prompt()], {name: {"p0": answer} for name, answer in answers.items()})

    assert {name: (each.verdict, each.text) for name, each in prompt.answers.items()} == {
        "silent": ("no answer came", None),
        "cut": ("not graded", "so far"),
        "old": ("grade 0.25", None),
    }


def test_answers_of_many_models_are_shown_shorter() -> None:
    long = PromptAnswer(score=1.0, text=AnswerText.of("x" * 9000))
    prompts = [a_prompt(number=number) for number in range(40)]
    found = {f"m{model}": {f"p{number}": long for number in range(40)} for model in range(50)}
    few, many = shown_prompts(prompts, {"m0": found["m0"]}), shown_prompts(prompts, found)

    shown = [each for prompt in many for each in prompt.answers.values()]
    assert len(few[0].answers["m0"].text or "") == MAX_TEXT_CHARS
    assert sum(len(each.text or "") for each in shown) <= MAX_PAGE_CHARS
    assert not any(each.is_whole for each in shown)
