from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import BOTH_MODES, CANARY, Fleet
from tests.support.scripted_answers import Step

pytestmark = BOTH_MODES

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
CONTENT_CHUNK: Any = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
END: Any = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def ask(http: httpx.Client, fleet: Fleet, step: Step, *, stream: bool = False) -> httpx.Response:
    fleet.fair.then(step)
    return http.post("/v1/chat/completions", json={"model": "fair", "messages": ASK, "stream": stream})


def events(reply: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "\\ud800 half a character"}}',
        b'{"error": {"message": "no number", "seen": NaN}}',
        b'{"error": {"message": null, "type": null, "code": 7}}',
        b'{"error": {"message": {"text": "nested"}, "type": 5}}',
        b'{"detail": [{"loc": ["body"], "msg": "bad"}]}',
    ],
)
def test_any_error_body_keeps_its_status_and_gets_a_message(
    http: httpx.Client, fleet: Fleet, body: bytes, stream: bool
) -> None:
    reply = ask(http, fleet, Step(status=422, body=body), stream=stream)
    error = reply.json()["error"]

    assert reply.status_code == 422
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] in (None, "7")


@pytest.mark.parametrize(
    "step",
    [
        Step(body={"choices": []}),
        Step(body={"choices": [None]}),
        Step(body={"choices": [{"message": None, "finish_reason": "stop"}]}),
        Step(body={"choices": [], "error": {"message": "boom", "code": 5}}),
        Step(headers={"content-encoding": "gzip"}, body=b"this is not gzip"),
        Step(status=204, body=b""),
    ],
)
def test_success_without_a_completion_is_an_error(http: httpx.Client, fleet: Fleet, step: Step) -> None:
    reply = ask(http, fleet, step)

    assert reply.status_code == 502
    assert reply.json()["error"]["message"]


def test_numbers_that_json_does_not_have_become_null(http: httpx.Client, fleet: Fleet) -> None:
    raw = (
        b'{"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop", "score": NaN}], "x": 1e999}'
    )
    reply = ask(http, fleet, Step(body=raw))

    assert reply.json()["choices"][0]["score"] is reply.json()["x"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_that_the_upstream_repeats_is_redacted(http: httpx.Client, fleet: Fleet, stream: bool) -> None:
    words = f"Incorrect API key provided: {CANARY}"
    reply = ask(http, fleet, Step(status=401, body={"error": {"message": words}}), stream=stream)

    assert reply.status_code == 401
    assert reply.json()["error"]["message"].endswith("it said: Incorrect API key provided: ***")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("body", [b"", b"Forbidden", {"error": {"message": "No such key"}}, {"detail": "No"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_provider_key_is_distinguished_from_the_callers_key(
    http: httpx.Client, fleet: Fleet, status: int, body: Any, stream: bool
) -> None:
    reply = ask(http, fleet, Step(status=status, body=body), stream=stream)

    assert reply.status_code == status
    assert "the provider refused its key" in reply.json()["error"]["message"]
    assert "this server's and not yours" in reply.json()["error"]["message"]


@pytest.mark.parametrize("chunks", [[], [{"choices": 5}], [{"choices": [None]}]])
def test_a_stream_of_nothing_is_an_error(http: httpx.Client, fleet: Fleet, chunks: list[Any]) -> None:
    assert ask(http, fleet, Step(events=chunks), stream=True).status_code == 502


def test_null_choices_null_deltas_and_blank_events_are_harmless(http: httpx.Client, fleet: Fleet) -> None:
    odd: list[Any] = [{"choices": None}, {"choices": [{"index": 0, "delta": None}]}, b"data:\n\n", CONTENT_CHUNK, END]
    received = events(ask(http, fleet, Step(events=odd), stream=True))

    assert [chunk["choices"] for chunk in received[:2]] == [[], [{"index": 0, "delta": {}}]]
    assert received[2]["choices"][0]["delta"]["content"] == "hi"


def a_chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more}


@pytest.mark.parametrize("name", ["reasoning_text", "thoughts", "content_parts"])
def test_any_field_of_a_delta_that_is_not_empty_is_content(http: httpx.Client, fleet: Fleet, name: str) -> None:
    many = [a_chunk({"role": "assistant", "content": ""}), *[a_chunk({name: "hm "})] * 1200, END]
    received = events(ask(http, fleet, Step(events=many), stream=True))

    assert len(received) == len(many)
    assert received[1]["choices"][0]["delta"] == {name: "hm "}


def test_chunks_without_content_are_dropped_however_many_they_are(http: httpx.Client, fleet: Fleet) -> None:
    empty = [a_chunk({"role": "assistant", "content": "", "tool_calls": [], "function_call": {"name": ""}})] * 5000
    reply = ask(http, fleet, Step(events=[*empty, CONTENT_CHUNK, END]), stream=True)
    received = events(reply)

    assert reply.status_code == 200
    assert [chunk["choices"][0]["delta"].get("content") for chunk in received[-2:]] == ["hi", None]
    assert 1 < len(received) <= 1100


def test_a_null_usage_is_sent_to_clients_that_asked_for_usage(http: httpx.Client, fleet: Fleet) -> None:
    null: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": None}
    failure = {**null, "prompt_filter_results": [1]}
    fleet.fair.then(Step(events=[null, failure, CONTENT_CHUNK, END]), Step(events=[null, failure, CONTENT_CHUNK, END]))
    body: Any = {"model": "fair", "messages": ASK, "stream": True}
    unasked = events(http.post("/v1/chat/completions", json=body))
    with_usage = events(http.post("/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}}))

    assert [chunk.get("prompt_filter_results") for chunk in unasked] == [[1], None, None]
    assert len(with_usage) == 4


@pytest.mark.parametrize("failure", [{"object": "error", "message": "boom"}, {"error": {}}, {"error": "boom"}])
def test_a_response_cut_by_an_error_never_ends_as_if_it_were_complete(
    http: httpx.Client, fleet: Fleet, failure: dict[str, Any]
) -> None:
    reply = ask(http, fleet, Step(events=[CONTENT_CHUNK, failure, END]), stream=True)

    assert "[DONE]" not in reply.text
    assert events(reply)[-1]["error"]["message"]
