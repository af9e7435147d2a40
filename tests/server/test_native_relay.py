"""An upstream that speaks the client's own API: its bytes reach the client, and the rest is as with any model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.support.client_apis import Reply, ask, body_of, turn_with_result, weather_tool
from tests.support.native_answers import (
    ENCRYPTED,
    MESSAGE,
    MESSAGE_EVENTS,
    RESPONSE,
    RESPONSE_EVENTS,
    SIGNATURE,
)
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

APIS = ("messages", "responses")
EVERY_API = pytest.mark.parametrize("api", APIS)
EVENTS = {"messages": MESSAGE_EVENTS, "responses": RESPONSE_EVENTS}
ANSWERS: dict[str, Any] = {"messages": MESSAGE, "responses": RESPONSE}


class Setting:
    """One proxy: "other" is asked in chat completions, all others in the client's own API, "sibling" at one place with
    "native".
    """

    def __init__(
        self, proxy: ProxyProcess, native: ScriptedUpstream, other: ScriptedUpstream, elsewhere: ScriptedUpstream
    ) -> None:
        self.proxy, self.native, self.other, self.elsewhere = proxy, native, other, elsewhere


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Setting]:
    with (
        ScriptedUpstream() as native,
        ScriptedUpstream(lambda _: "The other answer.") as other,
        ScriptedUpstream() as elsewhere,
    ):
        able: Any = {"api": ["chat", *APIS], "supports_reasoning": True}
        config = {
            "model_list": [
                model_entry("native", native.url, price=1e-7, **able),
                model_entry("sibling", native.url, price=1e-7, **able),
                model_entry("elsewhere", elsewhere.url, price=1e-4, **able),
                model_entry("other", other.url, price=1e-5),
            ],
            "uniroute": {"profile": {"on_start": False}, "breaker": NO_COOLDOWN},
        }
        folder = tmp_path_factory.mktemp("native")
        with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-model"}) as proxy:
            proxy.put_profile("native", 0.1)
            proxy.put_profile("other", 0.3)
            proxy.put_profile("elsewhere", 0.5)
            yield Setting(proxy, native, other, elsewhere)


@pytest.fixture
def setting(started: Setting) -> Setting:
    started.native.reset()
    started.other.reset()
    started.elsewhere.reset()
    return started


@pytest.fixture
def http(setting: Setting) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=setting.proxy.url, timeout=60) as opened:
        yield opened


def stream_of(api: str, *events: bytes, **more: Any) -> Step:
    return Step(events=list(events or EVENTS[api]), **more)


def relay(http: httpx.Client, setting: Setting, api: Any, stream: bool, **more: Any) -> Reply:
    setting.native.then(stream_of(api) if stream else Step(body=ANSWERS[api]))
    return ask(http, api, body_of(api, stream=stream, **more))


@EVERY_API
def test_the_upstreams_events_arrive_as_they_are_under_our_name_of_the_model(
    http: httpx.Client, setting: Setting, api: str
) -> None:
    setting.native.then(stream_of(api))
    path = {"messages": "/v1/messages", "responses": "/v1/responses"}[api]
    reply = http.post(path, json=body_of(api, stream=True))  # type: ignore[arg-type]

    stated = {"messages": MESSAGE["model"], "responses": RESPONSE["model"]}[api]
    assert reply.text.replace('"native"', f'"{stated}"') == b"".join(EVENTS[api]).decode()
    assert setting.native.last.path == path


@EVERY_API
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_of_a_native_model_is_recorded_as_any(
    http: httpx.Client, setting: Setting, api: str, stream: bool
) -> None:
    reply = relay(http, setting, api, stream)

    assert (reply.model, reply.complete, reply.headers["x-uniroute-model"]) == ("native", True, "native")
    line = f"decision={reply.headers['x-uniroute-decision']} model=native"
    assert wait_until(lambda: line in setting.proxy.log)
    (logged,) = [each for each in setting.proxy.log.splitlines() if line in each]
    assert f"tokens={reply.prompt_tokens}" in logged
    assert "ending=complete" in logged


@EVERY_API
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_says_how_it_came_about_where_its_request_asks_for_it(
    http: httpx.Client, setting: Setting, api: Any, stream: bool
) -> None:
    setting.native.then(stream_of(api) if stream else Step(body=ANSWERS[api]))
    reply = http.post(f"/v1/{api}", json=body_of(api, stream=stream, uniroute={"metadata": True}))
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")] if stream else [reply.text]
    last = json.loads(lines[-1])

    assert last.get("response", last)["uniroute"]["decision"] == reply.headers["x-uniroute-decision"]
    assert reply.text.count('"uniroute"') == 1


@EVERY_API
def test_a_whole_answer_in_place_of_a_stream_reaches_the_client_as_events(
    http: httpx.Client, setting: Setting, api: Any
) -> None:
    setting.native.then(Step(body=ANSWERS[api]), Step(body=ANSWERS[api]))
    whole = ask(http, api, body_of(api))
    reply = ask(http, api, body_of(api, stream=True))

    assert (reply.text, reply.model, reply.complete) == (whole.text, "native", True)
    assert reply.prompt_tokens == whole.prompt_tokens
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert setting.other.history == []


@EVERY_API
def test_another_model_is_asked_in_chat_where_the_native_one_fails(
    http: httpx.Client, setting: Setting, api: str
) -> None:
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    setting.native.then(Step(status=529, body=overloaded))
    reply = ask(http, api, body_of(api, stream=True))  # type: ignore[arg-type]

    assert (reply.text, reply.headers["x-uniroute-reason"]) == ("The other answer.", "fallback")
    assert setting.other.last.path == "/v1/chat/completions"


@EVERY_API
def test_a_native_stream_that_breaks_ends_with_one_error(http: httpx.Client, setting: Setting, api: str) -> None:
    whole = EVENTS[api]
    setting.native.then(stream_of(api, *whole, cut_after=len(whole) - 2))
    reply = ask(http, api, body_of(api, stream=True))  # type: ignore[arg-type]

    assert len(reply.errors) == 1
    assert not reply.complete
    assert setting.other.history == []


def test_anthropics_headers_do_not_reach_a_server_of_another_company(http: httpx.Client, setting: Setting) -> None:
    setting.native.then(Step(body=MESSAGE))
    http.post("/v1/messages", json=body_of("messages"), headers={"anthropic-beta": "x-1", "x-api-key": "sk-client"})

    headers = setting.native.last.headers
    assert "anthropic-beta" not in headers
    assert (headers["x-api-key"], headers["authorization"]) == ("sk-model", "Bearer sk-model")


def test_a_stored_response_is_continued_by_its_id_from_any_model(http: httpx.Client, setting: Setting) -> None:
    setting.native.then(Step(body=RESPONSE))
    first = http.post("/v1/responses", json=body_of("responses")).json()
    setting.native.then(Step(status=500, body=b""))
    following = {"previous_response_id": first["id"], "uniroute": {"fallbacks": True}}
    second = http.post("/v1/responses", json={"model": "auto", "input": "go on", **following})

    assert second.json().get("model") == "other", second.text
    assert setting.other.last.body["messages"][-1] == {"role": "user", "content": "go on"}
    assert setting.other.last.body["messages"][0]["role"] == "user"
    sent = json.loads(setting.native.history[-1].raw)
    assert "previous_response_id" not in sent
    assert sent["store"] is False


def test_the_official_clients_read_what_is_relayed(setting: Setting) -> None:
    setting.native.then(stream_of("messages"), stream_of("responses"))
    with (
        anthropic.Anthropic(base_url=setting.proxy.url, api_key="none", max_retries=0) as claude,
        claude.messages.stream(model="auto", max_tokens=100, messages=[{"role": "user", "content": "hi"}]) as messages,
    ):
        message = messages.get_final_message()
    with (
        openai.OpenAI(base_url=f"{setting.proxy.url}/v1", api_key="none", max_retries=0) as client,
        client.responses.stream(model="auto", input="hi") as responses,
    ):
        response = responses.get_final_response()

    assert (message.model, response.model) == ("native", "native")
    assert (message.stop_reason, response.status) == ("tool_use", "completed")


# What a provider alone can verify or decrypt of the answers.
PROOFS = {"messages": SIGNATURE, "responses": ENCRYPTED}
REFUSALS = {
    "messages": "messages.1.content.0: Invalid `signature` in `thinking` block",
    "responses": "The encrypted content for item rs_1 could not be verified.",
}


def goes_on(http: httpx.Client, setting: Setting, api: Any, stream: bool, **more: Any) -> tuple[Reply, str]:
    """Answer the call of a native answer. Return the reply, and what the answering model was sent last."""
    tools = [weather_tool(api)]
    first = relay(http, setting, api, False, model="native", tools=tools)
    for upstream in (setting.native, setting.elsewhere):
        upstream.then(stream_of(api) if stream else Step(body=ANSWERS[api]))
    body = turn_with_result(api, first, "file.txt", tools=tools, stream=stream, **more)
    reply = ask(http, api, body)
    upstream = setting.elsewhere if reply.model == "elsewhere" else setting.native
    return reply, json.dumps(upstream.last.body)


@EVERY_API
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more", [{"model": "elsewhere"}, {"uniroute": {"models": ["elsewhere"]}}], ids=["named", "the only one allowed"]
)
def test_reasoning_is_not_sent_to_a_provider_that_has_not_made_it(
    http: httpx.Client, setting: Setting, api: Any, stream: bool, more: Any
) -> None:
    reply, sent = goes_on(http, setting, api, stream, **more)

    assert (reply.model, reply.complete) == ("elsewhere", True)
    assert PROOFS[api] not in sent
    assert "file.txt" in sent


@EVERY_API
@pytest.mark.parametrize("model", ["native", "sibling"])
def test_reasoning_goes_back_to_the_provider_that_has_made_it(
    http: httpx.Client, setting: Setting, api: Any, model: str
) -> None:
    reply, sent = goes_on(http, setting, api, False, model=model)

    assert (reply.model, PROOFS[api] in sent) == (model, True)


@EVERY_API
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_refuses_earlier_reasoning_is_asked_once_more_without(
    http: httpx.Client, setting: Setting, api: Any, stream: bool
) -> None:
    refusal = {"type": "error", "error": {"type": "invalid_request_error", "message": REFUSALS[api]}}
    setting.native.then(Step(body=ANSWERS[api]), Step(status=400, body=refusal))
    reply, sent = goes_on(http, setting, api, stream, model="native")

    assert (reply.status, reply.complete, len(setting.native.history)) == (200, True, 3)
    assert PROOFS[api] in json.dumps(setting.native.history[1].body)
    assert PROOFS[api] not in sent


@EVERY_API
def test_a_refusal_of_a_request_without_reasoning_is_the_clients_error(
    http: httpx.Client, setting: Setting, api: Any
) -> None:
    refusal = {"type": "error", "error": {"type": "invalid_request_error", "message": REFUSALS[api]}}
    setting.native.then(Step(status=400, body=refusal))
    reply = ask(http, api, body_of(api, model="native"))

    assert (reply.status, len(setting.native.history)) == (400, 1)
