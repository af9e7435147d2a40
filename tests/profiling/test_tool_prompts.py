"""Models are measured on prompts that offer tools; those without tools are not asked them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.profiling.model_client import TOKENS_OF_TOOLS, max_cost_usd, read_answer
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Store
from router_core.types import Price
from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.graders.answers import ToolCall, read_reply, write_reply
from tests.support.makers import a_record
from tests.support.profiling import FAMILIES, a_bench, ended, model_at, write_validation_set
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import until

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    },
}


def write_set(path: Path, count: int = 40) -> None:
    """Write prompts of which every second one offers a tool; it is to be called with the prompt's number."""
    lines = []
    for number in range(count):
        line = {
            "id": f"p{number}",
            "family": FAMILIES[number % 4],
            "prompt": f"{FAMILIES[number % 4]} say the number {number}",
            "grader": {"type": "numeric", "answer": number},
            "max_tokens": 50,
        }
        if number % 2:
            line["tools"] = [ADD]
            line["grader"] = {"type": "tool_calls", "calls": [{"name": "add", "arguments": {"n": number}}]}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))


def uses_tools(*families: str) -> Any:
    """Return a skill that calls `add` for odd numbers: with the right one in these families, else with one more."""

    def answer(prompt: str) -> str:
        family, number = prompt.split(" ", 1)[0], int(prompt.rsplit(" ", 1)[-1])
        if number % 2 == 0:
            return f"The number is {number}"
        return write_reply("I add.", [ToolCall("add", {"n": number if family in families else number + 1})])

    return answer


def without_tools(record: ModelRecord) -> ModelRecord:
    return replace(record, info=record.info.model_copy(update={"supports_function_calling": False}))


async def test_a_model_is_offered_the_tools_and_its_calls_are_graded_and_kept(store: Store, tmp_path: Path) -> None:
    write_set(tmp_path / "prompts.jsonl")
    with ScriptedUpstream(uses_tools("east")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
            answers = (await bench.jobs.latest_answers(["small"], [f"p{n}" for n in range(40)]))["small"]
    assert (job.state, job.done, job.failed, job.unlabelled) == ("ready", 40, 0, 0)
    assert {prompt: answers[prompt].score for prompt in ("p0", "p1", "p3")} == {"p0": 1.0, "p1": 1.0, "p3": 0.0}
    kept = answers["p1"].text
    assert kept is not None
    assert kept.beginning == '[tool call] {"name": "add", "arguments": {"n": 1}}\n\nI add.'
    assert answers["p1"].finish_reason == "tool_calls"
    offered = [request.body.get("tools") for request in upstream.history]
    assert (offered.count([ADD]), offered.count(None)) == (20, 20)


async def test_a_profile_says_how_prompts_with_tools_went(store: Store, tmp_path: Path) -> None:
    write_set(tmp_path / "prompts.jsonl")
    with ScriptedUpstream(uses_tools("east")) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            await ended(bench.jobs, await bench.jobs.submit("small", 40, 1.0))
            await until(lambda: bench.state.current.model_state("small") == "ready")
            profile, pool = bench.state.current.profiles["small"], bench.state.current.pool
    assert profile.tool_labels is not None
    assert profile.tool_labels.sum() == pytest.approx(20)
    assert profile.tool_error_sums is not None
    assert profile.tool_error_sums.sum() == pytest.approx(10)
    assert pool.tool_excess[0] > 0  # every prompt without tools was answered well


async def test_a_model_without_tools_is_asked_other_prompts_in_their_place(store: Store, tmp_path: Path) -> None:
    write_set(tmp_path / "prompts.jsonl", 60)
    with ScriptedUpstream(uses_tools()) as upstream:
        async with a_bench(store, tmp_path, without_tools(model_at(upstream.url))) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))
            await until(lambda: bench.state.current.model_state("small") == "ready")
            profile = bench.state.current.profiles["small"]
    assert (job.state, job.total, job.done, job.unlabelled) == ("ready", 24, 24, 0)
    assert [request.body.get("tools") for request in upstream.history] == [None] * 24
    assert profile.error_sums.sum() == 0


async def test_a_model_without_tools_needs_prompts_without_tools(store: Store, tmp_path: Path) -> None:
    write_validation_set(
        tmp_path / "prompts.jsonl", tools=[ADD], grader={"type": "tool_calls", "calls": [{"name": "add"}]}
    )
    with ScriptedUpstream() as upstream:
        async with a_bench(store, tmp_path, without_tools(model_at(upstream.url))) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 24, 1.0))
    assert (job.state, upstream.history) == ("failed", [])
    assert "every validation prompt offers some" in (job.error or "")


async def test_a_server_that_refuses_tools_is_measured_on_the_other_prompts(store: Store, tmp_path: Path) -> None:
    write_set(tmp_path / "prompts.jsonl", 60)

    class Refusing(ScriptedUpstream):
        def _standing(self, path: str) -> Step:
            return Step(status=400) if self.last.body.get("tools") else super()._standing(path)

    with Refusing(uses_tools()) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url), profile={"concurrency": 1}) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", 60, 1.0))
    assert (job.state, job.done, job.failed) == ("ready", 60, 30)
    assert len(upstream.history) == 60


async def test_the_references_of_the_built_in_families_get_full_marks_over_http(store: Store, tmp_path: Path) -> None:
    prompts = [prompt for prompt in builtin_validation_set() if prompt.tools]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(prompt.to_json()) for prompt in prompts))
    by_text = {prompt.text: prompt.reference or "" for prompt in prompts}
    with ScriptedUpstream(by_text.__getitem__) as upstream:
        async with a_bench(store, tmp_path, model_at(upstream.url)) as bench:
            job = await ended(bench.jobs, await bench.jobs.submit("small", len(prompts), None))
            await until(lambda: bench.state.current.model_state("small") == "ready")
            profile = bench.state.current.profiles["small"]
    assert (job.state, job.done, job.failed, job.unlabelled) == ("ready", 72, 0, 0)
    assert profile.error_sums.sum() == 0
    sent = {request.body["messages"][-1]["role"] for request in upstream.history}
    assert sent == {"user", "tool"}


def completion(message: Any) -> Any:
    return {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": {"completion_tokens": 1}}


@pytest.mark.parametrize(
    ("calls", "read"),
    [
        ([{"id": 7, "function": {"name": "f", "arguments": '{"a": 1}'}}], [ToolCall("f", {"a": 1})]),
        ([{"function": {"name": "f", "arguments": {"a": 1}}}], [ToolCall("f", {"a": 1})]),
        ([{"id": "x", "function": {"name": "f", "arguments": ""}}], [ToolCall("f", {})]),
        ([{"function": {"name": "f", "arguments": '{"a": '}}], [ToolCall("f", '{"a": ')]),
        ([{"function": {"name": None}}, {"function": 7}, "call", None], [ToolCall("", {})] * 4),
        ({"function": {"name": "f"}}, []),
        (None, []),
    ],
)
def test_calls_are_read_however_odd_they_are(calls: Any, read: list[ToolCall]) -> None:
    answer = read_answer(completion({"content": "Look.", "tool_calls": calls}), 0.1, "small")
    text, found = read_reply(answer.text)
    assert (text, found) == ("Look.", read)


def test_a_text_that_looks_like_a_call_is_none() -> None:
    written = write_reply("", [ToolCall("add", {"n": 1})])
    assert read_reply(read_answer(completion({"content": written}), 0.1, "small").text)[1] == []


def test_what_tools_and_earlier_calls_may_cost_is_reserved() -> None:
    bare = {"messages": [{"role": "user", "content": "hi"}]}
    price = Price(1.0, 0.0)
    record = a_record()
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "add"}}]}
    least = max_cost_usd(bare, record, price, 10) + len(json.dumps([ADD])) + TOKENS_OF_TOOLS
    assert max_cost_usd({**bare, "tools": [ADD]}, record, price, 10) >= least
    assert max_cost_usd({"messages": [*bare["messages"], turn]}, record, price, 10) > max_cost_usd(
        bare, record, price, 10
    )
