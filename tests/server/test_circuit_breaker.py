from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from proxy.storage.usage_writer import STREAM
from proxy.storage.valkey import socket_path
from tests.server.conftest import Fleet, open_fleet
from tests.support.scripted_answers import Step, error_body
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]
DOWN = Step(status=500, body=error_body("down", "server_error", None))
BREAKER: Any = {"failures": 3, "cooldown_s": 1.0, "longest_cooldown_s": 30}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    info = {"max_parallel_requests": 1, "max_queued_requests": 0}
    folder = tmp_path_factory.mktemp("breaker")
    with open_fleet(folder, embedder_cache, breaker=BREAKER, queue_wait_s=5, info=info) as fleet:
        yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """Close both circuits, whatever the test before has done."""
    for upstream in (started.fair, started.good):
        upstream.script.clear()
        upstream.always = None
    assert wait_until(lambda: recovered(started))
    for upstream in (started.fair, started.good):
        upstream.history.clear()
    return started


def recovered(fleet: Fleet) -> bool:
    """Close a circuit by a success after the cooldown. Healthy models get no request, which would dilute failures."""
    for name, state in zip(("fair", "good"), states(fleet), strict=True):
        if state != "well":
            ask(fleet, name)
    return states(fleet) == ["well", "well"]


def ask(fleet: Fleet, model: str = "auto", **body: Any) -> httpx.Response:
    body = {"model": model, "messages": ASK, **body}
    return httpx.post(f"{fleet.base_url}/chat/completions", json=body, timeout=60)


def states(fleet: Fleet) -> list[str]:
    return [card["health"]["state"] for card in fleet.proxy.admin("GET", "/admin/models").json()["models"]]


def bring_down(fleet: Fleet, *names: str) -> None:
    for name in names:
        getattr(fleet, name).always = DOWN
        assert wait_until(lambda name=name: ask(fleet, name).is_success or state_of(fleet, name) == "resting")


def ask_until(fleet: Fleet, wanted: Callable[[httpx.Response], bool], **body: Any) -> httpx.Response:
    """Return the first wanted response, with `fair` down before each request: its cooldown may be over."""
    replies: list[httpx.Response] = []

    def is_wanted() -> bool:
        bring_down(fleet, "fair")
        fleet.fair.always = None
        fleet.fair.history.clear()
        replies.append(ask(fleet, **body))
        return wanted(replies[-1])

    assert wait_until(is_wanted), replies[-1].headers
    return replies[-1]


def limited(name: str, fleet: Fleet) -> bool:
    """Tell whether a request by name has just got a rate limit with a Retry-After of four seconds."""
    step = Step(status=429, headers={"retry-after": "4"}, body=error_body("slow", "rate_limit", None))
    getattr(fleet, name).then(step)
    reply = ask(fleet, name)
    return (reply.status_code, reply.headers.get("retry-after")) == (429, "4")


def state_of(fleet: Fleet, name: str) -> str:
    return str(fleet.proxy.admin("GET", f"/admin/models/{name}").json()["health"]["state"])


def test_a_model_that_keeps_failing_gets_no_more_requests(fleet: Fleet) -> None:
    reply = ask_until(fleet, lambda reply: fleet.fair.history == [])

    assert (reply.headers["x-uniroute-model"], reply.headers["x-uniroute-reason"]) == ("good", "only_candidate")


def test_a_dry_run_says_which_model_is_in_cooldown(fleet: Fleet) -> None:
    def says_so() -> bool:
        bring_down(fleet, "fair")
        decision = httpx.post(f"{fleet.base_url}/route", json={"model": "auto", "messages": ASK}).json()
        return bool(decision["ineligible"] == [{"model": "fair", "why": "resting after failures"}])

    assert wait_until(says_so)


def test_after_its_cooldown_a_model_is_probed_with_a_real_request(fleet: Fleet) -> None:
    bring_down(fleet, "fair")
    fleet.fair.always = None

    assert wait_until(lambda: ask(fleet).headers["x-uniroute-model"] == "fair")
    assert state_of(fleet, "fair") == "well"


@pytest.mark.parametrize("stream", [False, True])
def test_when_all_are_in_cooldown_the_first_to_recover_is_tried(fleet: Fleet, stream: bool) -> None:
    def degraded(reply: httpx.Response) -> bool:
        """Tell whether the response is degraded. Otherwise `good` may have recovered, and its cooldown begins again."""
        return reply.headers["x-uniroute-reason"] == "degraded" or not limited("good", fleet)

    assert limited("good", fleet)
    reply = ask_until(fleet, degraded, stream=stream)

    assert (reply.status_code, reply.headers["x-uniroute-model"]) == (200, "fair")
    profile = fleet.proxy.admin("PATCH", "/admin/models/good", {}).status_code
    assert profile == 409  # configured: it recovers by itself
    assert ask(fleet, "good").status_code == 200  # named, so asked


def test_the_retry_after_of_an_upstream_sets_the_cooldown(fleet: Fleet) -> None:
    assert limited("fair", fleet)

    assert wait_until(lambda: limited("fair", fleet) and state_of(fleet, "fair") == "resting")
    assert wait_until(lambda: limited("fair", fleet) and ask(fleet).headers["x-uniroute-model"] == "good")


def test_a_timeout_that_the_caller_shortened_does_not_count_against_the_model(fleet: Fleet) -> None:
    fleet.fair.always = Step(hang=True)
    for _ in range(5):
        assert ask(fleet, "fair", uniroute={"timeouts": {"first_token_s": 0.05}}).status_code == 504
    assert state_of(fleet, "fair") == "well"


def test_a_prompt_too_long_reported_with_status_200_starts_no_cooldown(fleet: Fleet) -> None:
    too_long = {"error": {"code": 400, "message": "the request exceeds the available context size"}}
    for step in [Step(body=too_long), Step(events=[too_long])] * 3:
        fleet.fair.then(step)
        assert ask(fleet, "fair", stream=step.events is not None).status_code == 400
    assert states(fleet) == ["well", "well"]


def test_a_rate_limit_reported_within_a_stream_starts_a_cooldown(fleet: Fleet) -> None:
    metrics = {"error": {"code": 429, "message": "Rate limit exceeded"}}
    fleet.fair.then(Step(headers={"retry-after": "2"}, events=[metrics]))
    reply = ask(fleet, "fair", stream=True)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
    assert states(fleet) == ["resting", "well"]


def test_connections_lost_after_a_complete_response_start_no_cooldown(fleet: Fleet) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
    for _ in range(BREAKER["failures"]):
        fleet.fair.then(Step(events=[chunk], cut_after=1))
        assert ask(fleet, "fair", stream=True).text.endswith("data: [DONE]\n\n")
    assert states(fleet) == ["well", "well"]


def test_a_model_at_capacity_sends_the_next_request_to_the_next_candidate(fleet: Fleet) -> None:
    fleet.fair.then(Step(delay_s=1.0))
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, fleet)
        assert wait_until(lambda: bool(fleet.fair.history))
        second = ask(fleet)
        assert (second.headers["x-uniroute-model"], second.headers["x-uniroute-reason"]) == ("good", "fallback")
        assert first.result().headers["x-uniroute-model"] == "fair"


@pytest.mark.parametrize("stream", [False, True])
def test_when_all_are_at_capacity_the_response_has_retry_after(fleet: Fleet, stream: bool) -> None:
    fleet.fair.then(Step(hang=True))
    fleet.good.then(Step(hang=True))
    limit = {"timeouts": {"first_token_s": 1.5}}
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(ask, fleet, name, uniroute=limit) for name in ("fair", "good")]
        assert wait_until(lambda: bool(fleet.fair.history and fleet.good.history))
        reply = ask(fleet, stream=stream)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "model_busy")
        assert int(reply.headers["retry-after"]) >= 1
        assert [answer.result().status_code for answer in waiting] == [504, 504]


def test_a_client_that_disconnects_frees_its_slot(fleet: Fleet) -> None:
    fleet.fair.then(Step(message={"content": "word " * 100}, drip_s=0.05))
    body = {"model": "fair", "messages": ASK, "stream": True}
    with httpx.stream("POST", f"{fleet.base_url}/chat/completions", json=body) as reply:
        assert next(reply.iter_lines())
    assert wait_until(lambda: ask(fleet, "fair").status_code == 200)


def test_waiting_for_a_slot_counts_towards_the_request_timeout(fleet: Fleet) -> None:
    """`fair` is busy for longer than the request may take: a model without an attempt gets no failure and no cost."""
    fleet.fair.then(Step(hang=True))
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, fleet, "fair", uniroute={"timeouts": {"first_token_s": 2}})
        assert wait_until(lambda: bool(fleet.fair.history))
        reply = ask(fleet, "fair", uniroute={"timeouts": {"total_s": 0.3}})
        assert reply.status_code == 429
        assert first.result().status_code == 504
    assert len(fleet.fair.history) == 1
    assert states(fleet) == ["well", "well"]
    assert wait_until(lambda: record_of(fleet, reply) is not None)
    record = record_of(fleet, reply)
    assert record
    assert (record["ending"], record["cost_usd"], record["estimated"]) == ("busy", 0.0, False)


def test_each_stream_without_content_counts_as_one_failure(tmp_path: Path, embedder_cache: Path) -> None:
    """Its headers have arrived: the timeout ends the wait for content, not the call."""
    breaker = {**BREAKER, "cooldown_s": 30}
    with open_fleet(tmp_path, embedder_cache, breaker=breaker, info={"first_token_timeout_s": 0.3}) as fleet:
        fleet.fair.always = Step(message={"content": "late"}, drip_s=30)
        for _ in range(BREAKER["failures"]):
            assert state_of(fleet, "fair") == "well"
            assert ask(fleet, "fair", stream=True).status_code == 504
        assert state_of(fleet, "fair") == "resting"
        failures = 'uniroute_upstream_failures_total{model="fair",status="timeout"} 3.0\n'
        assert wait_until(lambda: failures in httpx.get(f"{fleet.url}/metrics").text)


def record_of(fleet: Fleet, reply: httpx.Response) -> dict[str, Any] | None:
    with Redis(unix_socket_path=str(socket_path(fleet.proxy.folder / "valkey")), decode_responses=True) as client:
        found: Any = client.xrevrange(STREAM, count=20)
    records = [json.loads(fields["record"]) for _, fields in found]
    return next((one for one in records if one["decision"] == reply.headers["x-uniroute-decision"]), None)
