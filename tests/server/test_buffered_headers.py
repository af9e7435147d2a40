from __future__ import annotations

from typing import Any

import httpx
import openai

from tests.server.ranked_proxy import ASK, RankedProxy, error_of
from tests.server.test_streaming import read_stream, text_of
from tests.support.scripted_answers import Step, error_body
from tests.support.waiting import wait_until

LIMITS = {"keep_alive_s": 0.2}


def test_a_slow_first_chunk_gets_headers_and_comments_meanwhile(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(delay_s=2.0))
    with asking.stream("POST", "/v1/chat/completions", json=_streamed()) as reply:
        raw = reply.read().decode()

    assert (reply.status_code, reply.headers["x-uniroute-model"]) == (200, "first")
    assert raw.startswith(": keep-alive\n\n")
    assert raw.count(": keep-alive\n\n") >= 2
    assert raw.endswith("data: [DONE]\n\n")


def test_a_fallback_after_the_headers_shows_in_the_body(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(delay_s=0.5, status=500, body=error_body("down", "server_error", None)))
    reply, events = read_stream(asking, model="auto")

    assert reply.headers["x-uniroute-model"] == "first"
    assert {event["model"] for event in events if event != "[DONE]"} == {"second"}
    assert text_of(events) == "The second answer."


def test_a_failure_after_the_headers_is_one_error_event(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(delay_s=0.5, status=500, body=error_body("down", "server_error", None)))
    reply, events = read_stream(asking, model="first")

    assert (reply.status_code, len(events)) == (200, 1)
    assert error_of(events) == "down"


def test_a_disconnect_after_the_headers_stops_the_attempts(asking: httpx.Client, ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(hang=True))
    with asking.stream("POST", "/v1/chat/completions", json=_streamed()) as reply:
        assert next(reply.iter_lines()) == ": keep-alive"
        assert wait_until(lambda: bool(ranked.models[0].history))
    assert ranked.models[0].last.client_left.wait(60)
    assert ranked.request_counts == [1, 0, 0, 0]


def test_the_official_client_ignores_the_comments(ranked: RankedProxy) -> None:
    ranked.models[0].then(Step(delay_s=0.7))
    with openai.OpenAI(base_url=f"{ranked.proxy.url}/v1", api_key="-", max_retries=0) as client:
        stream = client.chat.completions.create(model="auto", messages=ASK, stream=True)
        words = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(words) == "The first answer."


def _streamed(**body: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": ASK, "stream": True, **body}
