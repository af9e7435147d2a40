"""What an answer says of itself where its request asks for it, in each API, by the official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.server.conftest import Fleet, open_fleet
from tests.support.client_apis import API_NAMES, PATHS, QUESTION, APIName, body_of

ASK: Any = [{"role": "user", "content": QUESTION}]
ASKING: Any = {"uniroute": {"metadata": True}}
NAMES = {"decision", "model", "reason", "expected_error", "cost_usd", "saved_usd"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    with open_fleet(tmp_path_factory.mktemp("metadata"), embedder_cache) as opened:
        yield opened


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fleet.base_url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture
def claude(fleet: Fleet) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=fleet.url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def check(found: Any) -> None:
    assert set(found) == NAMES
    assert (found["model"], found["reason"], round(found["expected_error"], 3)) == ("fair", "scored", 0.3)
    assert found["saved_usd"] == pytest.approx(99 * found["cost_usd"])


@pytest.mark.parametrize("api", API_NAMES)
def test_a_whole_answer_says_how_it_came_about(fleet: Fleet, api: APIName) -> None:
    body = body_of(api)
    plain = httpx.post(fleet.url + PATHS[api], json=body, timeout=60)
    asked = httpx.post(fleet.url + PATHS[api], json=body, headers={"x-uniroute-metadata": "1"}, timeout=60)

    assert "uniroute" not in plain.json()
    check(asked.json()["uniroute"])
    assert asked.json()["uniroute"]["decision"] == asked.headers["x-uniroute-decision"]


@pytest.mark.parametrize("api", API_NAMES)
def test_a_stream_says_it_once_at_its_end(fleet: Fleet, api: APIName) -> None:
    reply = httpx.post(fleet.url + PATHS[api], json=body_of(api, stream=True, **ASKING), timeout=60)
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    found = [event.get("response", event)["uniroute"] for event in events if "uniroute" in event.get("response", event)]

    assert len(found) == 1
    check(found[0])
    assert reply.text.count('"uniroute"') == 1


def test_openais_client_reads_chat_answers_with_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="auto", messages=ASK, extra_body=ASKING)
    chunks = list(
        client.chat.completions.create(
            model="auto", messages=ASK, stream=True, stream_options={"include_usage": True}, extra_body=ASKING
        )
    )

    check((whole.model_extra or {})["uniroute"])
    check((chunks[-1].model_extra or {})["uniroute"])
    assert chunks[-1].choices == []
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_openais_client_reads_streamed_responses_with_it(client: openai.OpenAI) -> None:
    with client.responses.stream(model="auto", input=QUESTION, extra_body=ASKING) as stream:
        final = stream.get_final_response()
    stored = client.responses.retrieve(final.id)

    assert final.output_text == "The fair answer."
    check((final.model_extra or {})["uniroute"])
    assert "uniroute" not in (stored.model_extra or {})


def test_openais_client_reads_text_completions_with_it(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="auto", prompt=QUESTION, stream=True, extra_body=ASKING))

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "The fair answer."
    check((chunks[-1].model_extra or {})["uniroute"])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_anthropics_client_reads_messages_with_it(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model="auto", max_tokens=99, messages=ASK, extra_body=ASKING)
    with claude.messages.stream(model="auto", max_tokens=99, messages=ASK, extra_body=ASKING) as stream:
        events = list(stream)
        text = stream.get_final_text()

    check((whole.model_extra or {})["uniroute"])
    assert text == "The fair answer."
    assert events[-1].type == "message_stop"


def test_failed_attempts_are_taken_off_what_was_saved(fleet: Fleet) -> None:
    from tests.support.scripted_answers import Step

    fleet.fair.then(
        Step(message={"role": "assistant", "content": ""}, usage={"prompt_tokens": 7, "completion_tokens": 1})
    )
    found = httpx.post(
        fleet.base_url + "/chat/completions", json={"model": "auto", "messages": ASK, **ASKING}, timeout=60
    ).json()["uniroute"]

    assert (found["model"], found["reason"]) == ("good", "fallback")
    assert found["saved_usd"] == pytest.approx(-(7 * 1e-7 + 1 * 4e-7))


@pytest.mark.parametrize("value", ["yes", 1])
def test_a_wish_that_is_no_flag_is_a_400(fleet: Fleet, value: Any) -> None:
    body = {"model": "auto", "messages": ASK, "uniroute": {"metadata": value}}
    assert httpx.post(f"{fleet.base_url}/chat/completions", json=body, timeout=60).status_code == 400
