"""Properties of the families of tool use, over several seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from router_core.validation.families.registry import builtin_validation_set
from router_core.validation.graders import NoToolCallGrader, ToolCallsGrader
from router_core.validation.graders.answers import ToolCall, read_reply, write_reply
from router_core.validation.graders.schemas import accepts, check_schema
from router_core.validation.validation_set import ValidationPrompt

PROMPTS = [prompt for seed in range(4) for prompt in builtin_validation_set(seed) if prompt.tools]
CALLING = [prompt for prompt in PROMPTS if isinstance(prompt.grader, ToolCallsGrader)]
ANSWERING = [prompt for prompt in PROMPTS if isinstance(prompt.grader, NoToolCallGrader)]
FAMILIES = """
    tool_selection tool_arguments tool_nesting tool_parallel tool_abstention tool_results tool_errors tool_steps
"""


def reference_calls(prompt: ValidationPrompt) -> list[ToolCall]:
    return read_reply(prompt.reference or "")[1]


def schema_of(prompt: ValidationPrompt, name: str) -> Mapping[str, Any]:
    functions: list[Any] = [tool["function"] for tool in prompt.tools]
    (parameters,) = (function["parameters"] for function in functions if function["name"] == name)
    schema: Mapping[str, Any] = parameters
    return schema


def right(prompt: ValidationPrompt, reply: str) -> bool:
    return prompt.grader.grade(reply) == 1.0


def wrong_values(value: object) -> Iterator[object]:
    """Yield values of the same shape that differ in one place."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, str(value))
    elif isinstance(value, str):
        yield from (f"{value}x", None)
    elif isinstance(value, list):
        yield from (value[1:], [*value, "extra"])
        yield from (
            [*value[:place], other, *value[place + 1 :]]
            for place in range(len(value))
            for other in wrong_values(value[place])
        )
    elif isinstance(value, dict):
        yield {**value, "extra": 1}
        for key, inner in value.items():
            yield {name: each for name, each in value.items() if name != key}
            yield from ({**value, key: other} for other in wrong_values(inner))


def test_each_way_of_using_tools_has_a_family_of_nine() -> None:
    families = [prompt.family for prompt in builtin_validation_set() if prompt.tools]
    assert {family: families.count(family) for family in families} == dict.fromkeys(FAMILIES.split(), 9)


def test_the_arguments_of_every_reference_are_valid_by_the_tool_that_is_offered() -> None:
    odd = [p.id for p in CALLING for c in reference_calls(p) if not accepts(schema_of(p, c.name), c.arguments)]
    assert odd == []


def test_the_schema_of_every_tool_is_one() -> None:
    for prompt in PROMPTS[:72]:
        for tool in prompt.tools:
            check_schema(json.loads(json.dumps(tool["function"]))["parameters"])


def test_calls_in_another_order_or_with_words_beside_them_are_right() -> None:
    for prompt in CALLING:
        assert right(prompt, write_reply("I will do that.", reversed(reference_calls(prompt))))


def test_a_call_too_many_too_few_or_of_another_tool_is_wrong() -> None:
    for prompt in CALLING:
        calls = reference_calls(prompt)
        other = ToolCall("do_it", calls[0].arguments)
        for made in (calls[1:], [*calls, calls[0]], [other, *calls[1:]], [*calls, other], []):
            assert not right(prompt, write_reply("", made))


def test_arguments_that_differ_in_one_place_are_wrong() -> None:
    for prompt in CALLING:
        first, *others = reference_calls(prompt)
        for arguments in wrong_values(first.arguments):
            assert not right(prompt, write_reply("", [replace(first, arguments=arguments), *others])), arguments


def test_calling_any_tool_is_wrong_where_words_are_due() -> None:
    for prompt in ANSWERING:
        name = prompt.tools[0]["function"]["name"]  # type: ignore[index]
        assert not right(prompt, write_reply(prompt.reference or "", [ToolCall(str(name), {})]))


@pytest.mark.parametrize("family", ["tool_results", "tool_errors", "tool_steps"])
def test_the_answer_of_another_prompt_of_the_family_is_wrong(family: str) -> None:
    prompts = [prompt for prompt in PROMPTS if prompt.family == family]
    pairs = [(p, other) for p in prompts for other in prompts if p.reference != other.reference]
    assert [(p.id, other.id) for p, other in pairs if right(p, other.reference or "")] == []


def test_repeating_the_call_that_failed_is_wrong_unless_the_error_asks_for_it() -> None:
    for prompt in PROMPTS:
        if prompt.family != "tool_errors" or '"retry": true' in json.dumps(prompt.messages).replace("\\", ""):
            continue
        tried = [call["function"] for message in prompt.messages for call in message.get("tool_calls", ())]
        calls = [ToolCall.received(each["name"], each["arguments"]) for each in tried]
        assert not right(prompt, write_reply("", calls))


def test_ids_of_calls_have_the_form_that_every_provider_takes() -> None:
    ids = [call["id"] for p in PROMPTS for message in p.messages for call in message.get("tool_calls", ())]
    assert ids
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def test_the_text_that_is_embedded_is_what_the_user_said() -> None:
    assert all("\n" not in prompt.text and "tool_call" not in prompt.text for prompt in PROMPTS)
