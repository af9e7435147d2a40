"""Use OpenAI's official client with only its base URL changed. It still asks for gpt-4o."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import BOTH_MODES, CANARY, Fleet
from tests.support.scripted_answers import Step

pytestmark = BOTH_MODES

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"api_key": {"type": "string"}, "city": {"type": "string"}}},
    },
}
CALLS: Any = [
    {"id": f"call_{city}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}}
    for city in ("Oslo", "Rome", "Lima")
]
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {"type": "object", "properties": {"headers": {"type": "string"}}}},
}


def test_an_unknown_model_name_is_routed_and_answered(client: openai.OpenAI, fleet: Fleet) -> None:
    reply = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=ASK)
    answer = reply.parse()

    assert answer.choices[0].message.content == "The fair answer."
    assert answer.model == reply.headers["x-uniroute-model"] == "fair"
    assert reply.headers["x-uniroute-reason"] == "scored"
    assert float(reply.headers["x-uniroute-overhead-ms"]) >= 0
    assert fleet.fair.last.body["model"] == "fair-upstream"
    assert fleet.fair.last.headers["authorization"] == f"Bearer {CANARY}"


def test_a_header_moves_one_request_to_the_expensive_model(client: openai.OpenAI) -> None:
    best = client.chat.completions.create(model="gpt-4o", messages=ASK, extra_headers={"lambda": "0"})
    usual = client.chat.completions.create(model="gpt-4o", messages=ASK)

    assert (best.model, usual.model) == ("good", "fair")


def test_the_body_wins_over_the_header(client: openai.OpenAI, fleet: Fleet) -> None:
    answer = client.chat.completions.create(
        model="auto", messages=ASK, extra_headers={"lambda": "0"}, extra_body={"uniroute": {"lambda": 0.5}}
    )

    assert answer.model == "fair"
    assert "uniroute" not in fleet.fair.last.body


@pytest.mark.parametrize(("name", "model"), [("uniroute/best", "good"), ("uniroute/cheap", "fair"), ("good", "good")])
def test_names_that_ask_for_something(client: openai.OpenAI, name: str, model: str) -> None:
    assert client.chat.completions.create(model=name, messages=ASK).model == model


async def test_the_async_client_gets_an_answer(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model="gpt-4o", messages=ASK)

    assert answer.choices[0].message.content == "The fair answer."


def test_streaming_without_usage_gives_no_usage(client: openai.OpenAI, fleet: Fleet) -> None:
    chunks = list(client.chat.completions.create(model="gpt-4o", messages=ASK, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The fair answer."
    assert all(chunk.usage is None and chunk.model == "fair" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert fleet.fair.last.body["stream_options"] == {"include_usage": True}


async def test_streaming_with_usage_ends_with_a_chunk_without_choices(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(
        model="gpt-4o", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 11
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_three_parallel_tool_calls_arrive_whole(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(
        Step(message={"role": "assistant", "content": None, "tool_calls": CALLS}, finish_reason="tool_calls")
    )
    answer = client.chat.completions.create(model="gpt-4o", messages=ASK, tools=[TOOL], parallel_tool_calls=True)

    assert [call.model_dump() for call in answer.choices[0].message.tool_calls or []] == CALLS
    assert answer.choices[0].finish_reason == "tool_calls"
    assert fleet.fair.last.body["tools"] == [TOOL]


def test_three_parallel_tool_calls_arrive_whole_in_a_stream(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(Step(message={"content": None, "tool_calls": CALLS}, finish_reason="tool_calls"))
    with client.chat.completions.stream(model="gpt-4o", messages=ASK, tools=[TOOL]) as stream:
        answer = stream.get_final_completion()

    calls = answer.choices[0].message.tool_calls or []
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        (call["id"], "weather", call["function"]["arguments"]) for call in CALLS
    ]


def test_two_answers_and_their_streams_do_not_mix(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="gpt-4o", messages=ASK, n=2)
    pieces: dict[int, str] = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model="gpt-4o", messages=ASK, n=2, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""

    assert [choice.message.content for choice in whole.choices] == ["The fair answer."] * 2
    assert pieces == {0: "The fair answer.", 1: "The fair answer."}


def test_every_parameter_reaches_the_upstream_as_it_was_sent(client: openai.OpenAI, fleet: Fleet) -> None:
    sent: dict[str, Any] = {
        "temperature": 0.1,
        "top_p": 0.9,
        "stop": ["END"],
        "max_tokens": 7,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": 1},
        "user": "u-1",
        "response_format": SCHEMA,
        "seed": 3,
        "tool_choice": "auto",
        "tools": [TOOL],
        "logprobs": True,
        "top_logprobs": 2,
        "store": False,
        "metadata": {"team": "blue", "client_id": "7"},
        "service_tier": "auto",
        "prompt_cache_key": "cache-1",
        "reasoning_effort": "low",
    }
    unknown = {"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}, "brand_new_field": [1, {"a": None}]}
    client.chat.completions.create(model="fair", messages=ASK, extra_body=unknown, **sent)

    assert fleet.fair.last.body == {"messages": ASK, "model": "fair-upstream", **sent, **unknown}


def test_message_shapes_reach_the_upstream_untouched(client: openai.OpenAI, fleet: Fleet) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "name": "bob",
            "content": [
                {"type": "text", "text": "Look", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
                {"type": "not_invented_yet", "value": 1},
            ],
        },
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": CALLS[:1]},
        {"role": "tool", "tool_call_id": "call_Oslo", "content": "rain", "extra": {"b": 1}},
    ]
    client.chat.completions.create(model="good", messages=messages)

    assert fleet.good.last.body["messages"] == messages


def test_unknown_fields_of_an_answer_come_back(client: openai.OpenAI, fleet: Fleet) -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "two and two", "annotations": []}
    fleet.fair.then(Step(message=message, extra={"service_tier": "flex", "timings": {"ms": 1.5}}))
    answer = client.chat.completions.create(model="fair", messages=ASK, logprobs=True).model_dump()

    assert answer["choices"][0]["message"]["reasoning_content"] == "two and two"
    assert answer["timings"] == {"ms": 1.5}
    assert (answer["service_tier"], answer["system_fingerprint"]) == ("flex", "fp_scripted")
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -0.25


def test_reasoning_and_logprobs_come_back_in_a_stream(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(Step(message={"content": "four", "reasoning_content": "two and two"}))
    chunks = list(client.chat.completions.create(model="fair", messages=ASK, stream=True, logprobs=True))
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]

    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "two and two"
    assert chunks[1].choices[0].logprobs is not None
    assert chunks[0].system_fingerprint == "fp_scripted"


def test_the_models_are_listed_with_the_names_that_route(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]

    assert listed == ["auto", "uniroute/auto", "uniroute/best", "uniroute/cheap", "fair", "good"]
    assert client.models.retrieve("uniroute/best").object == "model"
    assert client.models.retrieve("a-name-that-is-routed").owned_by == "uniroute"
