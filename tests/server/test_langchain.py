from __future__ import annotations

import warnings
from typing import Any

import pytest
from pydantic import SecretStr

from tests.server.conftest import BOTH_MODES, Fleet
from tests.support.scripted_answers import Step

pytestmark = BOTH_MODES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from langchain_openai import ChatOpenAI

CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.fixture
def chat(fleet: Fleet) -> ChatOpenAI:
    return ChatOpenAI(model="gpt-4o", base_url=fleet.base_url, api_key=SecretStr("none"), max_retries=0)


def test_langchain_gets_a_completion(chat: ChatOpenAI) -> None:
    answer = chat.invoke("What is 2 + 2?")

    assert answer.content == "The fair answer."
    assert answer.response_metadata["model_name"] == "fair"


def test_langchain_streams_with_usage(chat: ChatOpenAI) -> None:
    chunks: list[Any] = list(chat.stream("What is 2 + 2?", stream_usage=True))

    assert "".join(chunk.content for chunk in chunks) == "The fair answer."
    assert sum(chunk.usage_metadata["total_tokens"] for chunk in chunks if chunk.usage_metadata) == 11


async def test_langchain_calls_tools(chat: ChatOpenAI, fleet: Fleet) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    fleet.fair.then(Step(message={"role": "assistant", "content": None, "tool_calls": [CALL]}))
    answer: Any = await chat.bind_tools([tool]).ainvoke("Weather in Oslo?")

    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Oslo"})]
