"""What /metrics shows of requests, and that no client can make a series of its own."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.deploy.monitoring import described
from tests.server.conftest import Fleet
from tests.support.proxy_process import ADMIN_KEY, uniform_profile
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until

ROOT_KEY = {"authorization": f"Bearer {ADMIN_KEY}"}
SAMPLE = re.compile(r"^(\w+)(\{.*\})? (\S+)$")
NAMES_PER_ROUND, ROUNDS = 49, 210


def samples(fleet: Fleet) -> dict[str, float]:
    """Return the value of each series by its name and labels as they are written."""
    text = httpx.get(f"{fleet.url}/metrics", headers=ROOT_KEY, timeout=60).text
    found = (SAMPLE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
    return {f"{each[1]}{each[2] or ''}": float(each[3]) for each in found if each}


def more(fleet: Fleet, before: Mapping[str, float], series: str) -> float:
    """Return by how much a counter has grown. It may count an answer after its client has it."""
    return samples(fleet).get(series, 0.0) - before.get(series, 0.0)


def chat(fleet: Fleet, model: str = "auto", **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "What is 2 + 2?"}], **more}
    return httpx.post(f"{fleet.url}/v1/chat/completions", json=body, timeout=60)


class Client:
    """One connection that stays open."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> int:
        sent = {"content-type": "application/json", **(headers or {})}
        self._connection.request(method, path, None if body is None else json.dumps(body), sent)
        reply = self._connection.getresponse()
        reply.read()
        return reply.status


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    opened = Client(fleet.url)
    yield opened
    opened._connection.close()


def one_round(client: Client, name: Callable[[], str]) -> list[int]:
    """Send names of all kinds that a client can make up, NAMES_PER_ROUND of them."""
    names = [name() for _ in range(NAMES_PER_ROUND)]
    given = iter(names)
    messages = [{"role": "user", "content": "hi", "name": next(given)}]
    tags = {"x-uniroute-tags": ",".join(next(given) for _ in range(16))}
    headers = {
        **tags,
        **{f"x-{next(given)}": next(given) for _ in range(5)},
        "x-request-id": next(given),
        "x-session-id": next(given),
        "user-agent": next(given),
        "x-uniroute-hops": next(given),
        "tracestate": f"{next(given)}=1",
    }
    metadata = {"tags": [next(given) for _ in range(8)], next(given): next(given)}
    body = {"model": next(given), "messages": messages, "user": next(given), "metadata": metadata}
    statuses = [
        client.call("POST", "/v1/chat/completions", body, headers),
        client.call("POST", f"/v1/{next(given)}", {}),
        client.call(next(given).upper(), "/v1/models"),
        client.call("GET", f"/v1/models/{next(given)}"),
        client.call("POST", "/v1/embeddings", {"model": f"embed/{next(given)}", "input": "hi"}),
        client.call("POST", "/v1/feedback", {"decision": next(given), "score": 1, "source": "s"}),
    ]
    assert list(given) == []
    return statuses


def test_ten_thousand_made_up_names_make_no_series(fleet: Fleet, client: Client) -> None:
    numbers = count()
    expected = one_round(client, lambda: f"made-up-{next(numbers)}")
    httpx.get(f"{fleet.url}/v1/models", headers={"authorization": "Bearer sk-made-up"}, timeout=60)
    before = set(samples(fleet))
    assert expected == [200, 404, 400, 200, 400, 404]
    for _ in range(ROUNDS):
        assert one_round(client, lambda: f"made-up-{next(numbers)}") == expected
    assert next(numbers) > 10_000
    assert set(samples(fleet)) == before
    assert not [series for series in before if "made-up" in series]


def test_an_answer_is_counted_by_model_and_api(fleet: Fleet) -> None:
    before = samples(fleet)
    assert chat(fleet).headers["x-uniroute-model"] == "fair"
    message = {"model": "auto", "max_tokens": 5, "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
    httpx.post(f"{fleet.url}/v1/messages", json=message, timeout=60)
    assert wait_until(lambda: more(fleet, before, 'uniroute_api_requests_total{api="chat"}') == 1)
    assert wait_until(lambda: more(fleet, before, 'uniroute_api_requests_total{api="messages"}') == 1)
    assert wait_until(lambda: more(fleet, before, 'uniroute_upstream_attempts_total{model="fair"}') == 2)
    assert wait_until(lambda: more(fleet, before, 'uniroute_cost_usd_total{model="fair"}') > 0)


def test_savings_are_counted_of_recorded_answers(fleet: Fleet) -> None:
    """So many are recorded in a second that a flood of others leaves no room for this one: it is asked for again."""
    series = 'uniroute_compared_cost_usd_total{model="fair"}'
    before = samples(fleet)
    assert wait_until(lambda: chat(fleet).is_success and samples(fleet).get(series, 0.0) > before.get(series, 0.0))
    after = samples(fleet)
    spent = after[series] - before.get(series, 0.0)
    # The baseline is the model that is best on average, "good", whose tokens cost a hundred times as much.
    baseline = 'uniroute_baseline_cost_usd_total{model="fair"}'
    assert after[baseline] - before.get(baseline, 0.0) == pytest.approx(100 * spent)


def test_an_attempt_that_failed_is_one_of_the_attempts(fleet: Fleet) -> None:
    before = samples(fleet)
    fleet.fair.then(Step(status=500))
    assert chat(fleet).headers["x-uniroute-reason"] == "fallback"
    for series in (
        'uniroute_upstream_attempts_total{model="fair"}',
        'uniroute_upstream_failures_total{model="fair",status="500"}',
        'uniroute_upstream_attempts_total{model="good"}',
    ):
        assert wait_until(lambda series=series: more(fleet, before, series) == 1), series


def test_models_are_shown_with_what_was_measured_until_they_are_removed(fleet: Fleet) -> None:
    entry = {"model_name": "shown", "litellm_params": {"model": "openai/x", "api_base": fleet.fair.url}}
    body = {**entry, "model_info": {"free": True}, "profile": uniform_profile(0.25)}
    assert fleet.proxy.admin("POST", "/admin/models", body).status_code == 201
    try:
        assert wait_until(lambda: samples(fleet).get('uniroute_model_ready{model="shown"}') == 1)
        found = samples(fleet)
        assert found['uniroute_model_mean_error{model="shown"}'] == pytest.approx(0.25, abs=0.01)
        assert found['uniroute_model_paused{model="shown"}'] == 0
        assert found['uniroute_model_in_flight{model="shown"}'] == found['uniroute_model_queued{model="shown"}'] == 0
        assert 'uniroute_model_price_timestamp_seconds{model="shown"}' not in found  # the price is configured
        price = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}
        assert fleet.proxy.admin("PUT", "/admin/models/shown/pricing", price).status_code == 200
        written = 'uniroute_model_price_timestamp_seconds{model="shown"}'
        assert wait_until(lambda: samples(fleet).get(written, 0) > 1_700_000_000)
        assert fleet.proxy.admin("PATCH", "/admin/models/shown", {"paused": True}).status_code == 200
        assert wait_until(lambda: samples(fleet)['uniroute_model_paused{model="shown"}'] == 1)
    finally:
        assert fleet.proxy.admin("DELETE", "/admin/models/shown").status_code == 204
    assert wait_until(lambda: not [series for series in samples(fleet) if '"shown"' in series])


def test_feedback_is_counted_by_what_became_of_it(fleet: Fleet) -> None:
    before = samples(fleet)
    decision = chat(fleet).headers["x-uniroute-decision"]
    for score in (1, None):
        said = {"decision": decision, "score": score}
        assert httpx.post(f"{fleet.url}/v1/feedback", json=said, timeout=60).status_code == 200
    for outcome in ("counted", "withdrawn"):
        series = f'uniroute_feedback_total{{outcome="{outcome}"}}'
        assert wait_until(lambda series=series: more(fleet, before, series) == 1), outcome


def test_what_a_server_shows_is_what_the_documentation_lists(fleet: Fleet) -> None:
    text = httpx.get(f"{fleet.url}/metrics", headers=ROOT_KEY, timeout=60).text
    shown = set(re.findall(r"^# TYPE (\w+) (?:counter|gauge|histogram)$", text, re.MULTILINE))
    counters = {f"{each.name}_total" for each in described() if each.kind == "counter"}
    listed = counters | {each.name for each in described() if each.kind != "counter"}
    assert {name for name in shown if not name.endswith("_created")} == listed


def test_the_process_and_its_version_are_shown(fleet: Fleet) -> None:
    found = samples(fleet)
    assert found['uniroute_build_info{version="0.1.0"}'] == 1
    assert found["process_cpu_seconds_total"] > 0
    assert found["process_resident_memory_bytes"] > 1e7
    assert found["uniroute_jobs_running"] == 0


def test_the_lambda_in_force_is_shown(fleet: Fleet) -> None:
    configured = samples(fleet)["uniroute_lambda"]
    assert fleet.proxy.admin("PUT", "/admin/settings", {"lambda": 0.125}).status_code == 200
    try:
        assert wait_until(lambda: samples(fleet)["uniroute_lambda"] == 0.125)
    finally:
        assert fleet.proxy.admin("DELETE", "/admin/settings").is_success
    assert wait_until(lambda: samples(fleet)["uniroute_lambda"] == configured)
