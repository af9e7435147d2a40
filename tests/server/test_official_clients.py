"""Use the official clients of Messages and Responses, with their base URL changed: streams, tools, schemas, errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel, SecretStr

from tests.server.conftest import Fleet
from tests.support.scripted_answers import Step, error_body

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from langchain_openai import ChatOpenAI

QUESTION = "What is the weather in Oslo?"
PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLING = Step(message={"role": "assistant", "content": None, "tool_calls": [CALL]}, finish_reason="tool_calls")
THINKING = Step(message={"role": "assistant", "content": "Sunny.", "reasoning_content": "Oslo is in Norway."})
DOG = Step(message={"role": "assistant", "content": '{"name": "Rex", "age": 3}'})
BUSY = Step(status=429, body=error_body("too many requests", "rate_limit_error", "rate_limit_exceeded"))

# Of the Messages and of the Responses API.
MESSAGES_TOOL: Any = {"name": "weather", "description": "Tell the weather.", "input_schema": PARAMETERS}
RESPONSES_TOOL: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}


class Dog(BaseModel):
    name: str
    age: int


@pytest.fixture
def claude(fleet: Fleet) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=fleet.url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture
def langchain(fleet: Fleet) -> ChatOpenAI:
    return ChatOpenAI(
        model="auto", base_url=fleet.base_url, api_key=SecretStr("none"), max_retries=0, use_responses_api=True
    )


def test_anthropics_client_calls_a_tool_and_gives_back_its_result(claude: anthropic.Anthropic, fleet: Fleet) -> None:
    fleet.fair.then(CALLING)
    turns: Any = [{"role": "user", "content": QUESTION}]
    first = claude.messages.create(model="auto", max_tokens=100, messages=turns, tools=[MESSAGES_TOOL])
    call: Any = first.content[0]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second: Any = claude.messages.create(model="auto", max_tokens=100, messages=turns, tools=[MESSAGES_TOOL])

    assert (first.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Oslo"})
    assert (second.stop_reason, second.content[0].text) == ("end_turn", "The fair answer.")
    assert fleet.fair.last.body["messages"][-1] == {"role": "tool", "tool_call_id": call.id, "content": "sunny"}


def test_anthropics_client_streams_thinking_and_text(claude: anthropic.Anthropic, fleet: Fleet) -> None:
    fleet.fair.then(THINKING)
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    turns: Any = [{"role": "user", "content": QUESTION}]
    with claude.messages.stream(model="auto", max_tokens=2000, messages=turns, thinking=thinking) as stream:
        pieces = "".join(stream.text_stream)
        whole: Any = stream.get_final_message()

    assert (pieces, [block.type for block in whole.content]) == ("Sunny.", ["thinking", "text"])
    assert whole.content[0].thinking == "Oslo is in Norway."


def test_anthropics_client_streams_a_tool_call(claude: anthropic.Anthropic, fleet: Fleet) -> None:
    fleet.fair.then(CALLING)
    turns: Any = [{"role": "user", "content": QUESTION}]
    with claude.messages.stream(model="auto", max_tokens=100, messages=turns, tools=[MESSAGES_TOOL]) as stream:
        whole: Any = stream.get_final_message()

    assert [(block.name, block.input) for block in whole.content] == [("weather", {"city": "Oslo"})]


def test_anthropics_client_parses_a_structured_answer(claude: anthropic.Anthropic, fleet: Fleet) -> None:
    fleet.fair.then(DOG)
    turns: Any = [{"role": "user", "content": "a dog"}]
    parsed = claude.messages.parse(model="auto", max_tokens=100, messages=turns, output_format=Dog).parsed_output

    assert parsed == Dog(name="Rex", age=3)


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_raises_its_own_error(claude: anthropic.Anthropic, fleet: Fleet, stream: bool) -> None:
    fleet.fair.then(BUSY)
    fleet.good.then(BUSY)
    turns: Any = [{"role": "user", "content": QUESTION}]
    with pytest.raises(anthropic.RateLimitError, match="too many requests"):
        claude.messages.create(model="auto", max_tokens=100, messages=turns, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_runner_of_tools_goes_on_without_a_thread(
    claude: anthropic.Anthropic, fleet: Fleet, stream: bool
) -> None:
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return f"sunny in {city}"

    fleet.fair.then(CALLING)
    turns: Any = [{"role": "user", "content": QUESTION}]
    runner: Any = claude.beta.messages.tool_runner(
        model="auto", max_tokens=100, messages=turns, tools=[weather], stream=stream
    )
    last: Any = runner.until_done()

    assert last.content[0].text == "The fair answer."
    assert fleet.fair.last.body["messages"][-1]["content"] == "sunny in Oslo"


def test_openais_client_calls_a_tool_and_goes_on_from_the_stored_response(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(CALLING)
    first = client.responses.create(model="auto", input=QUESTION, tools=[RESPONSES_TOOL])
    call: Any = first.output[0]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(
        model="auto", input=[result], previous_response_id=first.id, tools=[RESPONSES_TOOL]
    )

    assert (call.name, call.arguments, second.output_text) == ("weather", '{"city": "Oslo"}', "The fair answer.")
    assert [each["role"] for each in fleet.fair.last.body["messages"]] == ["user", "assistant", "tool"]


def test_openais_client_streams_reasoning_and_text(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(THINKING)
    with client.responses.stream(model="auto", input=QUESTION) as stream:
        kinds = [event.type for event in stream]
        whole: Any = stream.get_final_response()

    assert "response.reasoning_summary_text.delta" in kinds
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert (whole.output[0].summary[0].text, whole.output_text) == ("Oslo is in Norway.", "Sunny.")


def test_openais_client_parses_a_structured_response(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(DOG)

    assert client.responses.parse(model="auto", input="a dog", text_format=Dog).output_parsed == Dog(name="Rex", age=3)


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_raises_its_own_error(client: openai.OpenAI, fleet: Fleet, stream: bool) -> None:
    fleet.fair.then(BUSY)
    fleet.good.then(BUSY)
    with pytest.raises(openai.RateLimitError, match="too many requests"):
        client.responses.create(model="auto", input=QUESTION, stream=stream)


def test_langchain_runs_a_loop_of_tools_over_responses(langchain: ChatOpenAI, fleet: Fleet) -> None:
    fleet.fair.then(CALLING)
    bound = langchain.bind_tools([RESPONSES_TOOL])
    turns: list[Any] = [{"role": "user", "content": QUESTION}]
    called: Any = sum_of(bound.stream(turns))
    turns += [called, {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": "sunny"}]
    answer: Any = sum_of(bound.stream(turns))

    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", {"city": "Oslo"})]
    assert (answer.text, answer.usage_metadata["output_tokens"] > 0) == ("The fair answer.", True)


def test_langchain_parses_a_structured_response(langchain: ChatOpenAI, fleet: Fleet) -> None:
    fleet.fair.then(DOG)

    assert langchain.with_structured_output(Dog).invoke("a dog") == Dog(name="Rex", age=3)


def sum_of(chunks: Iterator[Any]) -> Any:
    whole = next(chunks)
    for chunk in chunks:
        whole += chunk
    return whole
