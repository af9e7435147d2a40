from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.routing.chat_request import ChatRequest, parse_chat
from proxy.routing.token_limits import token_limits_of, with_limit


def parsed(**more: Any) -> ChatRequest:
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], **more}
    return parse_chat(json.dumps(body).encode(), [])


def test_two_limits_that_contradict_each_other_are_refused_naming_both() -> None:
    with pytest.raises(BadRequest, match=r"`max_completion_tokens` \(1\) and `max_tokens` \(5000\)") as refused:
        parsed(max_completion_tokens=1, max_tokens=5000)

    assert refused.value.param == "max_tokens"


@pytest.mark.parametrize("limits", [(5, 5), (5, None), (None, 5), (None, None), (5, 5.0), (-1, -1)])
def test_one_limit_may_be_stated_under_both_names(limits: tuple[Any, Any]) -> None:
    body = parsed(max_completion_tokens=limits[0], max_tokens=limits[1]).body

    assert (body["max_completion_tokens"], body["max_tokens"]) == limits


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", ["7", True, 1.5, [5], {"tokens": 5}])
def test_a_limit_that_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match="whole number") as refused:
        parsed(**{name: value})

    assert refused.value.param == name


@pytest.mark.parametrize("value", [0, -1, 129, 1.5, "2", True])
def test_best_of_is_bounded_as_n_is(value: Any) -> None:
    with pytest.raises(BadRequest, match="`best_of` must be a whole number from 1 to 128"):
        parsed(best_of=value)


@pytest.mark.parametrize(
    "body",
    [
        {"max_output_tokens": 9},
        {"maxOutputTokens": 9},
        {"max-new-tokens": 9},
        {"MAX_NEW_TOKENS": "9"},
        {"num_predict": 8.5},
        {"n_predict": 9},
        {"options": {"num_predict": 9}},
        {"extra_body": {"max_tokens": 9}},
        {"extra_body": {"generation_config": {"max_output_tokens": 9}}},
        {"parameters": [{"max_new_tokens": 3}, {"max_new_tokens": 9}]},
        {"inferenceConfig": {"maxTokens": 9}},
    ],
)
def test_a_limit_under_another_servers_name_is_found_wherever_it_stands(body: dict[str, Any]) -> None:
    assert token_limits_of(body).other_limit == 9


@pytest.mark.parametrize(
    "body",
    [
        {"best_of": 4},
        {"n": 2, "num_return_sequences": 4},
        {"generation_config": {"candidateCount": 4}},
        {"extra_body": {"n": 4}},
    ],
)
def test_answers_are_counted_under_every_name(body: dict[str, Any]) -> None:
    assert token_limits_of(body).answers == 4


@pytest.mark.parametrize(
    "body",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 9}},
        {"reasoning": {"max_tokens": 9}},
        {"thinking_budget": 9},
        {"generationConfig": {"thinkingConfig": {"thinkingBudget": 9}}},
        {"extra_body": {"thinking": {"token_budget": 9}}},
        {"chat_template_kwargs": {"thinking_budget": 9}},
    ],
)
def test_a_budget_of_reasoning_is_not_taken_for_the_limit_of_the_answer(body: dict[str, Any]) -> None:
    sizes = token_limits_of(body)

    assert (sizes.thinking, sizes.other_limit, sizes.limit) == (9, 0, None)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "max_tokens": 9}], "metadata": {"max_tokens": 9}},
        {"tools": [{"function": {"parameters": {"properties": {"max_tokens": 9, "n": 9}}}}]},
        {"response_format": {"json_schema": {"schema": {"maxLength": 9}}}, "guided_json": {"maxLength": 9}},
        {"logit_bias": {"n": 9}, "stop": ["n"], "temperature": 9},
    ],
)
def test_content_and_schemas_state_no_size(body: dict[str, Any]) -> None:
    sizes = token_limits_of(body)

    assert (sizes.other_limit, sizes.answers, sizes.stated) == (0, 1, False)


def test_a_smaller_limit_takes_the_place_of_the_stated_one_under_each_name_that_states_it() -> None:
    body = {"max_tokens": 64000, "max_completion_tokens": None, "n": 2}

    assert with_limit(body, 8000) == {"max_tokens": 8000, "max_completion_tokens": None, "n": 2}


NAMES = st.sampled_from(["max_tokens", "num_predict", "thinking", "reasoning", "n", "best_of", "options", "prediction"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("1e999"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=8), st.integers(1, 5000))
def test_no_body_breaks_the_reading_of_its_sizes(body: dict[str, Any], usual: int) -> None:
    sizes = token_limits_of(body)

    assert 1 <= sizes.output_tokens(usual) < 10**19
    assert sizes.output_tokens(usual, thinking_within=True) <= sizes.output_tokens(usual)
