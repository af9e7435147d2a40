from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import BOTH_MODES, Fleet
from tests.support.scripted_answers import Step, error_body

pytestmark = BOTH_MODES

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


def read_stream(http: httpx.Client, **body: Any) -> tuple[httpx.Response, list[Any]]:
    """Return every event; objects parsed, [DONE] as text."""
    with http.stream("POST", "/v1/chat/completions", json={"messages": ASK, "stream": True, **body}) as reply:
        raw = reply.read().decode()
    events = [event.removeprefix("data: ") for event in raw.split("\n\n") if event.startswith("data: ")]
    return reply, [event if event == "[DONE]" else json.loads(event) for event in events]


def text_of(events: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if event != "[DONE]"
        for choice in event.get("choices", ())
    )


def test_a_complete_stream_ends_with_done(http: httpx.Client) -> None:
    reply, events = read_stream(http, model="fair")

    assert text_of(events) == "The fair answer."
    assert events[-1] == "[DONE]"
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache, no-transform"
    assert reply.headers["x-accel-buffering"] == "no"


def test_a_stream_that_breaks_ends_with_one_error_event_and_no_done(http: httpx.Client, fleet: Fleet) -> None:
    fleet.fair.then(Step(cut_after=3))
    reply, events = read_stream(http, model="auto")

    assert reply.status_code == 200
    assert text_of(events) == "The fair"
    assert set(events[-1]) == {"error"}
    assert "[DONE]" not in events
    assert fleet.good.history == []


def test_a_stream_without_its_end_is_an_error(http: httpx.Client, fleet: Fleet) -> None:
    fleet.fair.then(Step(finish_reason=None, done=False))
    _, events = read_stream(http, model="auto")

    assert text_of(events) == "The fair answer."
    assert "ended before its answer did" in events[-1]["error"]["message"]


@pytest.mark.parametrize("step", [Step(finish_reason=None), Step(done=False)], ids=["only done", "only finish_reason"])
def test_either_sign_of_an_end_is_enough(http: httpx.Client, fleet: Fleet, step: Step) -> None:
    fleet.fair.then(step)
    _, events = read_stream(http, model="auto")

    assert events[-1] == "[DONE]"


def test_an_error_within_a_stream_reaches_the_client_as_an_exception(client: openai.OpenAI, fleet: Fleet) -> None:
    content = {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "So"}}]}
    fleet.fair.then(Step(events=[content, error_body("overloaded", "server_error", "overloaded")]))
    stream = client.chat.completions.create(model="fair", messages=ASK, stream=True)

    assert next(stream).choices[0].delta.content == "So"
    with pytest.raises(openai.APIError, match="overloaded"):
        next(stream)


WORTH_ANOTHER_TRY = {
    "500": Step(status=500, body=error_body("down", "server_error", None)),
    "429": Step(status=429, body=error_body("slow", "rate_limit", None)),
    "408": Step(status=408, body=b""),
    "an error with status 200": Step(body=error_body("no", "x", None)),
    "an empty answer": Step(message={"content": ""}),
}
ONLY_OF_STREAMS = {
    "nothing": Step(cut_after=0),
    "no content": Step(cut_after=1),
    "an error event": Step(events=[error_body("overloaded", "server_error", None)]),
    "only done": Step(events=[]),
    "not json": Step(events=[b"data: {\n\n"]),
}


@pytest.mark.parametrize("ending", [*WORTH_ANOTHER_TRY, *ONLY_OF_STREAMS])
def test_the_next_candidate_streams_where_the_first_gave_no_content(
    http: httpx.Client, fleet: Fleet, ending: str
) -> None:
    fleet.fair.then({**WORTH_ANOTHER_TRY, **ONLY_OF_STREAMS}[ending])
    reply, events = read_stream(http, model="auto")

    assert text_of(events) == "The good answer."
    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("good", "fallback")
    assert (len(fleet.fair.history), len(fleet.good.history)) == (1, 1)


@pytest.mark.parametrize("ending", WORTH_ANOTHER_TRY)
def test_the_next_candidate_answers_where_the_first_failed(http: httpx.Client, fleet: Fleet, ending: str) -> None:
    fleet.fair.then(WORTH_ANOTHER_TRY[ending])
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": ASK})

    assert reply.json()["choices"][0]["message"]["content"] == "The good answer."
    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("good", "fallback")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_an_error_of_the_caller_causes_no_fallback(http: httpx.Client, fleet: Fleet, status: int) -> None:
    fleet.fair.then(Step(status=status, body=error_body("no", "x", None)))
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": ASK})

    assert reply.status_code == status
    assert fleet.good.history == []


@pytest.mark.parametrize("extra", [{"uniroute": {"fallbacks": False}}, {"provider": {"allow_fallbacks": False}}])
def test_fallbacks_can_be_turned_off(http: httpx.Client, fleet: Fleet, extra: dict[str, Any]) -> None:
    fleet.fair.then(Step(status=503, body=b"down"))
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": ASK, **extra})

    assert reply.status_code == 503
    assert fleet.good.history == []


def test_a_pinned_model_falls_back_only_when_requested(http: httpx.Client, fleet: Fleet) -> None:
    fleet.good.then(Step(status=503, body=b"down"), Step(status=503, body=b"down"))
    alone = http.post("/v1/chat/completions", json={"model": "good", "messages": ASK})
    with_fallbacks = http.post(
        "/v1/chat/completions", json={"model": "good", "messages": ASK, "uniroute": {"fallbacks": True}}
    )

    assert (alone.status_code, with_fallbacks.status_code) == (503, 200)
    assert (with_fallbacks.headers["x-uniroute-model"], with_fallbacks.headers["x-uniroute-reason"]) == (
        "fair",
        "fallback",
    )


def test_when_all_fail_the_last_failure_is_the_response(http: httpx.Client, fleet: Fleet) -> None:
    fleet.fair.then(Step(status=503, body=error_body("first", "x", None)))
    fleet.good.then(Step(status=429, headers={"retry-after": "3"}, body=error_body("second", "x", None)))
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": ASK})

    assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")
    assert reply.json()["error"]["message"] == "second"


def test_half_characters_and_odd_line_ends_survive(http: httpx.Client, fleet: Fleet) -> None:
    words = "a\u2028b\u0085c\x0bd 中文"
    fleet.fair.then(Step(message={"content": words}))
    _, events = read_stream(http, model="fair")
    halves = [{"choices": [{"index": 0, "delta": {"content": half}}]} for half in ("\ud83d", "\ude00")]
    fleet.fair.then(Step(events=halves))
    _, split = read_stream(http, model="fair")

    assert text_of(events) == words
    assert text_of(split) == "\ud83d\ude00"


def test_comments_long_events_and_a_second_done_are_harmless(http: httpx.Client, fleet: Fleet) -> None:
    long = {"choices": [{"index": 0, "delta": {"content": "x" * 300_000}, "finish_reason": "stop"}]}
    fleet.fair.then(Step(events=[b": thinking\n\n", b"event: message\n", long, b"data: [DONE]\n\n"]))
    _, events = read_stream(http, model="fair")

    assert len(text_of(events)) == 300_000
    assert events.count("[DONE]") == 1


def test_usage_in_a_chunk_with_choices_is_sent_in_a_chunk_of_its_own(http: httpx.Client, fleet: Fleet) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    whole = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}], "usage": usage}
    fleet.fair.then(Step(events=[whole]), Step(events=[whole]))
    _, with_usage = read_stream(http, model="fair", stream_options={"include_usage": True})
    _, unasked = read_stream(http, model="fair")

    assert (with_usage[-2]["choices"], with_usage[-2]["usage"]) == ([], usage)
    assert all("usage" not in event for event in unasked[:-1])


def test_curl_reads_a_stream(fleet: Fleet) -> None:
    import subprocess

    body = json.dumps({"model": "gpt-4o", "messages": ASK, "stream": True})
    command = ["curl", "-sN", f"{fleet.base_url}/chat/completions", "-H", "content-type: application/json", "-d", body]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert output.endswith("data: [DONE]\n\n")
