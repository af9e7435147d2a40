from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.observability.conftest import Observed
from tests.support.client_apis import API_NAMES, PATHS, QUESTION, APIName
from tests.support.native_answers import MESSAGE, RESPONSE
from tests.support.otlp_receiver import CLIENT, ERROR, SERVER
from tests.support.proxy_process import ADMIN_KEY
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
UNSAMPLED = f"00-{'12' * 16}-{'cd' * 8}-00"
EVERY_API = pytest.mark.parametrize("api", API_NAMES)


@EVERY_API
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_one_below_it_for_its_attempt(
    observed: Observed, api: APIName, stream: bool
) -> None:
    server, attempts, _ = observed.traced(api, stream=stream)
    assert (server.kind, server.name, server.status) == (SERVER, f"POST {PATHS[api]}", 0)
    (attempt,) = attempts
    assert (attempt.kind, attempt.name, attempt.status) == (CLIENT, "chat fair-upstream", 0)
    assert server.start <= attempt.start <= attempt.end <= server.end
    said = attempt.attributes
    assert {name: said[name] for name in said if name.startswith("gen_ai.")}.items() >= {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "fair-upstream",
        "gen_ai.response.id": "chatcmpl-scripted",
        "gen_ai.response.model": "fair-upstream",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 3,
    }.items()
    assert said.get("gen_ai.request.stream") == (True if stream else None)
    assert (said["server.address"], said["server.port"]) == ("127.0.0.1", observed.fair.port)
    if stream:
        assert attempt.start < attempt.events["uniroute.first_byte"] <= attempt.events["uniroute.first_content"]
        assert attempt.events["uniroute.first_content"] <= attempt.end
        assert 0 < said["gen_ai.response.time_to_first_chunk"] < (attempt.end - attempt.start) / 1e9 + 0.1


@EVERY_API
def test_the_span_of_a_request_tells_the_decision(observed: Observed, api: APIName) -> None:
    server, _, reply = observed.traced(api, headers={"x-uniroute-tags": "team-a,nightly"})
    said = server.attributes
    assert said["uniroute.decision"] == reply.headers["x-uniroute-decision"]
    assert (said["uniroute.model"], said["uniroute.reason"], said["uniroute.ending"]) == ("fair", "scored", "complete")
    assert (said["uniroute.api"], said["uniroute.lambda"], said["uniroute.attempts"]) == (api, 0.1, 1)
    assert said["uniroute.expected_error"] == pytest.approx(0.3, abs=0.01)
    assert 0 < said["uniroute.expected_cost_usd"] < 1e-3
    assert 0 < said["uniroute.cost_usd"] < said["uniroute.saved_usd"]
    assert said["uniroute.tags"] == ["team-a", "nightly"]
    assert "uniroute.key.id" not in said
    assert (said["http.route"], said["http.response.status_code"]) == (PATHS[api], 200)
    operation = "text_completion" if api == "completions" else "chat"
    assert (said["gen_ai.operation.name"], said["gen_ai.request.model"]) == (operation, "auto")
    # Of a model's call alone: who sums over spans would count them twice.
    assert not [name for name in said if name.startswith("gen_ai.usage.")]


def test_each_attempt_of_a_fallback_is_a_span_and_the_failed_one_says_why(observed: Observed) -> None:
    observed.fair.then(Step(status=503))
    server, (failed, answered), _ = observed.traced()
    assert (failed.name, failed.status, failed.attributes["error.type"]) == ("chat fair-upstream", ERROR, "503")
    assert failed.message == "fair answered with status 503"
    assert failed.attributes["uniroute.ending"] == "failed"
    assert (answered.name, answered.status, answered.attributes["uniroute.attempt"]) == ("chat good-upstream", 0, 2)
    assert failed.end <= answered.start
    assert (server.status, server.attributes["uniroute.reason"], server.attributes["uniroute.attempts"]) == (
        *(0, "fallback"),
        2,
    )


def test_a_request_that_every_model_fails_is_an_error(observed: Observed) -> None:
    observed.fair.then(Step(status=500))
    observed.good.then(Step(status=429))
    server, attempts, reply = observed.traced()
    assert reply.status == 429
    assert [each.attributes["error.type"] for each in attempts] == ["500", "429"]
    assert (server.status, server.attributes["error.type"]) == (ERROR, "failed")
    assert (server.attributes["http.response.status_code"], server.attributes["uniroute.ending"]) == (429, "failed")


def test_a_stream_that_breaks_after_its_content_is_an_error(observed: Observed) -> None:
    observed.fair.then(Step(cut_after=2))
    server, (attempt,), _ = observed.traced(stream=True)
    assert (attempt.status, attempt.attributes["error.type"]) == (ERROR, "broken")
    assert (server.status, server.attributes["uniroute.ending"]) == (ERROR, "broken")
    assert server.attributes["http.response.status_code"] == 200


def test_an_empty_answer_is_an_attempt_that_failed(observed: Observed) -> None:
    observed.fair.then(Step(message={"role": "assistant", "content": ""}))
    _, attempts, _ = observed.traced()
    assert [each.attributes.get("error.type") for each in attempts] == ["empty", None]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"model": 5}, {}, 400),
        ({"model": "auto", "messages": [{"role": "user", "content": "hi"}]}, {"content-type": "text/plain"}, 415),
    ],
)
def test_a_request_that_is_refused_is_a_span_without_attempts(
    observed: Observed, body: dict[str, object], headers: dict[str, str], status: int
) -> None:
    sent = {"x-request-id": f"refused-{status}", **headers}
    reply = httpx.post(f"{observed.proxy.url}/v1/chat/completions", json=body, headers=sent, timeout=60)
    server, attempts = observed.receiver.wait_for_trace(f"refused-{status}")
    assert reply.status_code == server.attributes["http.response.status_code"]
    assert (attempts, server.status) == ([], 0)
    assert "uniroute.decision" not in server.attributes


@pytest.mark.parametrize(("api", "answer"), [("messages", MESSAGE), ("responses", RESPONSE)])
def test_a_model_that_speaks_the_clients_own_api_is_traced_too(
    observed: Observed, api: APIName, answer: dict[str, Any]
) -> None:
    observed.fair.skill_by_path[PATHS[api]] = answer
    _, (attempt,), reply = observed.traced(api, model="native", headers={"traceparent": PARENT})
    assert observed.fair.last.path == PATHS[api]
    assert observed.fair.last.headers["traceparent"].split("-")[2] == attempt.id
    assert attempt.attributes["gen_ai.response.id"] == answer["id"]
    assert attempt.attributes["gen_ai.usage.output_tokens"] == reply.output_tokens


def test_embeddings_are_traced(observed: Observed) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    usage = {"prompt_tokens": 7, "total_tokens": 7}
    observed.fair.then(Step(body={"object": "list", "data": data, "model": "theirs", "usage": usage}))
    body, headers = {"model": "vectors", "input": "hi"}, {"x-request-id": "vectors-1"}
    httpx.post(f"{observed.proxy.url}/v1/embeddings", json=body, headers=headers, timeout=60)
    server, (attempt,) = observed.receiver.wait_for_trace("vectors-1")
    assert (server.name, attempt.name) == ("POST /v1/embeddings", "embeddings vectors-upstream")
    assert attempt.attributes["gen_ai.usage.input_tokens"] == 7
    assert server.attributes["gen_ai.operation.name"] == attempt.attributes["gen_ai.operation.name"] == "embeddings"


def test_a_trace_goes_on_from_the_caller_and_to_the_model(observed: Observed) -> None:
    observed.fair.then(Step(status=500))
    headers = {"traceparent": PARENT, "tracestate": "vendor=1,other=2"}
    server, attempts, reply = observed.traced(headers=headers)
    assert (server.trace_id, server.parent, server.state) == ("ab" * 16, "cd" * 8, "vendor=1,other=2")
    for attempt, upstream in zip(attempts, (observed.fair, observed.good), strict=True):
        sent = upstream.last.headers
        assert sent["traceparent"] == f"00-{'ab' * 16}-{attempt.id}-01"
        assert sent["tracestate"] == "vendor=1,other=2"
    # What the caller sent comes back to it.
    assert reply.headers["traceparent"] == PARENT


def test_a_caller_who_samples_nothing_is_not_traced_and_its_trace_goes_on(observed: Observed) -> None:
    observed.ask(headers={"traceparent": UNSAMPLED})
    continued = observed.fair.last.headers["traceparent"]
    assert re.fullmatch(rf"00-{'12' * 16}-[0-9a-f]{{16}}-00", continued)
    assert continued != UNSAMPLED
    observed.traced()  # what was sent before has arrived
    assert observed.receiver.trace("12" * 16) == []


@pytest.mark.parametrize("parent", ["", "00-zz-11-01", f"00-{'0' * 32}-{'cd' * 8}-01"])
def test_a_trace_that_no_caller_has_begun_begins_here(observed: Observed, parent: str) -> None:
    server, (attempt,), _ = observed.traced(headers={"traceparent": parent, "tracestate": "vendor=1"})
    assert (server.parent, server.state) == ("", "")
    assert re.fullmatch(r"[0-9a-f]{32}", server.trace_id)
    assert observed.fair.last.headers["traceparent"] == f"00-{server.trace_id}-{attempt.id}-01"
    assert "tracestate" not in observed.fair.last.headers


def test_what_a_request_asks_for_is_in_the_span_of_its_attempt(observed: Observed) -> None:
    wishes: Any = {"temperature": 0.5, "top_p": 1, "seed": 7, "stop": ["END"], "n": 1, "presence_penalty": 0.1}
    more: Any = {
        "max_completion_tokens": 55,
        "response_format": {"type": "json_object"},
        "uniroute": {"session": "talk-1"},
    }
    server, (attempt,), _ = observed.traced(**wishes, **more)
    expected = {
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ["END"],
        "gen_ai.request.presence_penalty": 0.1,
        "gen_ai.request.max_tokens": 55,
        "gen_ai.output.type": "json",
        "gen_ai.conversation.id": "talk-1",
    }
    assert expected.items() <= attempt.attributes.items()
    assert "gen_ai.request.choice.count" not in attempt.attributes
    assert server.attributes["gen_ai.conversation.id"] == "talk-1"


def test_no_word_of_a_prompt_or_an_answer_is_in_a_span(observed: Observed) -> None:
    for stream in (False, True):
        server, attempts, reply = observed.traced(stream=stream)
        assert reply.text == "The fair answer."
        told = json.dumps([dict(each.attributes) for each in (server, *attempts)])
        assert QUESTION not in told
        assert "fair answer" not in told


@pytest.mark.parametrize("stream", [False, True])
def test_what_no_protobuf_can_hold_ends_no_export(observed: Observed, stream: bool) -> None:
    """A model that answers with half a character, and a client that calls itself what is no UTF-8."""
    observed.fair.then(Step(extra={"id": "half \ud800"}))
    body = {"model": "auto", "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
    headers = {b"x-request-id": b"half-%d" % stream, b"user-agent": b"caf\xe9"}
    httpx.post(f"{observed.proxy.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    server, (attempt,) = observed.receiver.wait_for_trace(f"half-{stream:d}")
    assert attempt.attributes["gen_ai.response.id"] == "half ?"
    assert server.attributes["user_agent.original"] == "caf\xe9"


def test_the_log_line_of_a_request_names_its_trace(observed: Observed) -> None:
    request_id, _ = observed.ask()
    server, _ = observed.receiver.wait_for_trace(request_id)
    assert wait_until(lambda: f"trace_id={server.trace_id} span_id={server.id}\n" in observed.proxy.log)


def test_only_what_asks_a_model_is_traced(observed: Observed) -> None:
    before = len(observed.receiver.spans)
    httpx.get(f"{observed.proxy.url}/v1/models", timeout=60)
    httpx.get(f"{observed.proxy.url}/healthz", timeout=60)
    observed.proxy.admin("GET", "/admin/models")
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
    httpx.post(f"{observed.proxy.url}/v1/route", json=body, timeout=60)
    observed.traced()
    assert len(observed.receiver.spans) == before + 2


def test_exports_are_counted_in_the_metrics(observed: Observed) -> None:
    observed.traced()

    def shown() -> str:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.get(f"{observed.proxy.url}/metrics", headers=headers, timeout=60).text

    assert wait_until(lambda: 'uniroute_otel_exports_total{outcome="sent",signal="traces"}' in shown())
    assert 'outcome="failed"' not in shown()
