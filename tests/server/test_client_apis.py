"""What holds in every API that clients speak: the same routing, limits, fallbacks, endings and records."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.server.conftest import BOTH_MODES, CANARY, Fleet
from tests.support.client_apis import (
    API_NAMES,
    PATHS,
    QUESTION,
    WITH_TOOLS,
    APIName,
    ask,
    body_of,
    turn_with_result,
    weather_tool,
)
from tests.support.scripted_answers import Step, error_body
from tests.support.waiting import wait_until

pytestmark = BOTH_MODES

EVERY_API = pytest.mark.parametrize("api", API_NAMES)
EVERY_API_WITH_TOOLS = pytest.mark.parametrize("api", WITH_TOOLS)
STREAMED_OR_NOT = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])

USAGE = {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}
CALL = {
    "id": "call_9f8e7d6c5b4a39281706",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
CALLING = Step(
    message={"role": "assistant", "content": None, "tool_calls": [CALL]}, finish_reason="tool_calls", usage=USAGE
)


@EVERY_API
@STREAMED_OR_NOT
def test_a_routed_answer_arrives_whole(http: httpx.Client, fleet: Fleet, api: APIName, stream: bool) -> None:
    fleet.fair.then(Step(usage=USAGE))
    options: dict[str, Any] = (
        {"stream_options": {"include_usage": True}} if stream and api in ("chat", "completions") else {}
    )
    reply = ask(http, api, body_of(api, stream=stream, **options))

    assert (reply.text, reply.model, reply.complete) == ("The fair answer.", "fair", True)
    assert (reply.prompt_tokens, reply.output_tokens) == (20, 7)
    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("fair", "scored")


@EVERY_API
def test_the_lambda_of_a_request_decides(http: httpx.Client, api: APIName) -> None:
    by_header = ask(http, api, body_of(api), headers={"lambda": "0"})
    by_body = ask(http, api, body_of(api, uniroute={"lambda": 0}))

    assert (by_header.model, by_body.model) == ("good", "good")


TITLE = "You are a title generator. You output ONLY a thread title. Nothing else."


def test_a_title_that_a_client_asks_for_itself_goes_to_the_cheapest_model(http: httpx.Client) -> None:
    messages = [{"role": "system", "content": TITLE}, {"role": "user", "content": "hi"}]
    unstated = ask(http, "chat", body_of("chat", messages=messages))
    stated = ask(http, "chat", body_of("chat", messages=messages), headers={"lambda": "0"})
    metrics = http.get("/metrics").text

    assert (unstated.model, unstated.headers["x-uniroute-reason"]) == ("fair", "housekeeping")
    assert (stated.model, stated.headers["x-uniroute-reason"]) == ("good", "scored")
    assert 'uniroute_requests_total{ending="complete",model="fair",reason="housekeeping"} ' in metrics


@EVERY_API
def test_our_own_fields_reach_no_upstream(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    ask(http, api, body_of(api, uniroute={"lambda": 0.1}, models=["fair"], provider={}))

    assert {"uniroute", "models", "provider"}.isdisjoint(fleet.fair.last.body)


@EVERY_API
@STREAMED_OR_NOT
def test_the_next_model_answers_where_the_first_fails(
    http: httpx.Client, fleet: Fleet, api: APIName, stream: bool
) -> None:
    fleet.fair.then(Step(status=500, body=error_body("down", "server_error", None)))
    reply = ask(http, api, body_of(api, stream=stream))

    assert (reply.text, reply.headers["x-uniroute-reason"]) == ("The good answer.", "fallback")


@EVERY_API
@STREAMED_OR_NOT
def test_the_next_model_answers_where_the_first_says_nothing(
    http: httpx.Client, fleet: Fleet, api: APIName, stream: bool
) -> None:
    fleet.fair.then(Step(message={"content": ""}))
    reply = ask(http, api, body_of(api, stream=stream))

    assert (reply.text, reply.model) == ("The good answer.", "good")


@EVERY_API
def test_a_stream_that_breaks_ends_with_one_error(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    fleet.fair.then(Step(cut_after=3))
    reply = ask(http, api, body_of(api, stream=True))

    assert (reply.text, len(reply.errors)) == ("The fair", 1)
    assert fleet.good.history == []


@EVERY_API
@STREAMED_OR_NOT
def test_a_status_of_the_upstream_is_the_clients_status(
    http: httpx.Client, fleet: Fleet, api: APIName, stream: bool
) -> None:
    fleet.fair.then(Step(status=422, body=error_body("that will not do", "invalid_request_error", None)))
    reply = ask(http, api, body_of(api, stream=stream, model="fair"))

    assert reply.status == 422
    assert "that will not do" in reply.errors[0]["error"]["message"]


@EVERY_API
def test_an_answer_cut_by_its_limit_says_so(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    fleet.fair.then(Step(finish_reason="length"))
    reply = ask(http, api, body_of(api))

    expected = {"messages": "max_tokens", "responses": "incomplete"}
    assert reply.finish == expected.get(api, "length")


@EVERY_API
def test_a_client_that_leaves_ends_the_upstreams_stream(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    fleet.fair.then(Step(message={"content": "word " * 1000}, drip_s=0.02))
    with http.stream("POST", PATHS[api], json=body_of(api, stream=True)) as reply:
        for piece in reply.iter_raw():
            if b"word" in piece:
                break

    assert fleet.fair.last.client_left.wait(120)
    assert wait_until(lambda: "ending=client_gone" in fleet.proxy.log)


@EVERY_API
def test_an_unknown_field_of_the_provider_layer_is_refused(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    reply = ask(http, api, body_of(api, api_base="http://127.0.0.1:1/v1"))

    assert (reply.status, fleet.fair.history) == (400, [])
    assert "api_base" in reply.errors[0]["error"]["message"]


@EVERY_API
@pytest.mark.parametrize(
    "within",
    [
        *("extra_body", "metadata", "reasoning", "thinking", "text", "output_config", "stream_options", "tool_choice"),
        *("response_format", "cache_control", "context_management", "client_metadata", "prediction", "tools"),
    ],
)
def test_what_is_nested_in_another_field_steers_nothing(
    http: httpx.Client, fleet: Fleet, api: APIName, within: str
) -> None:
    steering = {"api_base": fleet.good.url, "api_key": "sk-mine", "model": "good", "extra_headers": {"x-evil": "1"}}
    nested: Any = {**steering, "type": "auto", "extra_body": steering, "litellm_params": steering}
    reply = ask(http, api, {**body_of(api, model="fair"), within: [nested] if within == "tools" else nested})

    assert reply.status in (200, 400), reply.errors
    assert fleet.good.history == []
    for received in fleet.fair.history:
        assert received.headers["authorization"] == f"Bearer {CANARY}"
        assert "x-evil" not in received.headers
        assert received.body["model"] == "fair-upstream"


@EVERY_API
@pytest.mark.parametrize(
    "field", ["model", "messages", "input", "prompt", "max_tokens", "stream", "tools", "tool_choice"]
)
@pytest.mark.parametrize("value", [None, 3, -1, True, "x", [], [1], {}, {"type": 1}], ids=repr)
def test_a_field_of_any_type_is_served_or_refused(
    http: httpx.Client, fleet: Fleet, api: APIName, field: str, value: Any
) -> None:
    reply = ask(http, api, {**body_of(api), field: value})

    assert reply.status in (200, 400, 404), reply.errors
    assert reply.status == 200 or reply.errors[0]["error"]["message"]


@EVERY_API_WITH_TOOLS
@STREAMED_OR_NOT
def test_a_tool_is_called_and_its_result_goes_back_to_the_caller_of_it(
    http: httpx.Client, fleet: Fleet, api: APIName, stream: bool
) -> None:
    more: dict[str, Any] = {"tools": [weather_tool(api)], "stream": stream}
    fleet.good.then(CALLING)
    first = ask(http, api, body_of(api, **more, uniroute={"lambda": 0}))
    assert [(call.name, call.arguments) for call in first.calls] == [("weather", {"city": "Paris"})]

    second = ask(http, api, turn_with_result(api, first, "sunny", **more))

    assert (second.text, second.headers["x-uniroute-reason"]) == ("The good answer.", "sticky")
    roles = [message["role"] for message in fleet.good.last.body["messages"]]
    assert roles == ["user", "assistant", "tool"]
    assert fleet.good.last.body["messages"][2]["content"] == "sunny"


@pytest.mark.parametrize("api", ["messages", "responses"])
@STREAMED_OR_NOT
@pytest.mark.parametrize("repeated", ["call_1", ""])
def test_an_id_that_a_model_repeats_is_not_given_to_two_calls_of_a_conversation(
    http: httpx.Client, fleet: Fleet, api: APIName, stream: bool, repeated: str
) -> None:
    calling = Step(message={"content": None, "tool_calls": [{**CALL, "id": repeated}]}, finish_reason="tool_calls")
    more: dict[str, Any] = {"tools": [weather_tool(api)], "stream": stream, "model": "fair"}
    fleet.fair.then(calling, calling)
    first = ask(http, api, body_of(api, **more))
    second = ask(http, api, turn_with_result(api, first, "sunny", **more))

    assert first.calls[0].id
    assert second.calls[0].id not in ("", first.calls[0].id)


@EVERY_API_WITH_TOOLS
@STREAMED_OR_NOT
def test_reasoning_is_shown(http: httpx.Client, fleet: Fleet, api: APIName, stream: bool) -> None:
    fleet.fair.then(Step(message={"reasoning_content": "Two and two.", "content": "Four."}))
    asked: dict[str, Any] = {"thinking": {"type": "adaptive"}} if api == "messages" else {}
    reply = ask(http, api, body_of(api, stream=stream, **asked))

    assert (reply.reasoning, reply.text) == ("Two and two.", "Four.")


@EVERY_API
def test_the_answers_of_all_apis_are_in_one_record(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    reply = ask(http, api, body_of(api))

    line = re.compile(rf"decision={reply.headers['x-uniroute-decision']} .*ending=complete")
    assert wait_until(lambda: line.search(fleet.proxy.log))


@EVERY_API
@pytest.mark.parametrize("prefix", ["", "/v1", "/v1/v1", "/v1/"])
def test_every_call_is_served_with_and_without_v1(http: httpx.Client, api: APIName, prefix: str) -> None:
    reply = http.post(prefix + PATHS[api].removeprefix("/v1"), json=body_of(api))

    assert reply.status_code == 200


def test_an_error_has_the_shape_of_the_clients_api(http: httpx.Client) -> None:
    refused = http.post("/v1/messages", json=body_of("messages", temperature="hot", max_tokens=0)).json()

    assert refused["type"] == "error"
    assert refused["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in refused["error"]["message"]


@EVERY_API
def test_the_provider_key_stays_between_the_proxy_and_the_upstream(
    http: httpx.Client, fleet: Fleet, api: APIName
) -> None:
    reply = http.post(PATHS[api], json=body_of(api), headers={"x-api-key": "sk-client"})

    assert fleet.fair.last.headers["authorization"] == f"Bearer {CANARY}"
    assert CANARY not in reply.text
    assert "sk-client" not in str(fleet.fair.last.headers)


@EVERY_API
@STREAMED_OR_NOT
def test_odd_text_arrives_as_it_was_written(http: httpx.Client, fleet: Fleet, api: APIName, stream: bool) -> None:
    odd = 'a\u2028b \x85 \x0b \U0001f600 "quoted" \\ back\nline \ud83d'.encode("utf-8", "replace").decode()
    fleet.fair.then(Step(message={"content": odd}))
    reply = ask(http, api, body_of(api, stream=stream))

    assert reply.text == odd


@EVERY_API
def test_the_question_alone_decides_in_every_api(http: httpx.Client, fleet: Fleet, api: APIName) -> None:
    ask(http, api, body_of(api))

    assert fleet.fair.last.body["messages"][-1] == {"role": "user", "content": QUESTION}
