from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import Fleet
from tests.support.proxy_process import model_entry, uniform_profile
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


def addition(fleet: Fleet, name: str, **more: Any) -> dict[str, Any]:
    return {**model_entry(name, fleet.good.url, price=1e-8), "profile": uniform_profile(0.0), **more}


def ask(fleet: Fleet, **body: Any) -> httpx.Response:
    return httpx.post(f"{fleet.base_url}/chat/completions", json={"model": "auto", "messages": ASK, **body}, timeout=60)


@pytest.fixture
def added(fleet: Fleet) -> Iterator[str]:
    name = f"team/new-{uuid.uuid4().hex[:6]}"
    reply = fleet.proxy.admin("POST", "/admin/models", addition(fleet, name))
    assert (reply.status_code, reply.json()) == (201, {"model": name, "job": None}), reply.text
    yield name
    fleet.proxy.admin("DELETE", f"/admin/models/{name}")


def test_an_added_model_takes_the_very_next_request(fleet: Fleet, added: str) -> None:
    reply = ask(fleet)

    assert (reply.headers["x-uniroute-model"], reply.json()["model"]) == (added, added)


def test_its_card_shows_price_state_and_profile_but_no_key(fleet: Fleet, added: str) -> None:
    card = fleet.proxy.admin("GET", f"/admin/models/{added}").json()

    assert (card["model_name"], card["state"], card["source"]) == (added, "ready", "admin")
    assert (card["price"]["input_cost_per_token"], card["price"]["source"]) == (1e-8, "model_info")
    assert set(uniform_profile(0.0)) <= set(card["profile"])
    assert card["litellm_params"]["api_key"] == "os.environ/MODEL_API_KEY"
    assert added in {listed["model_name"] for listed in fleet.proxy.admin("GET", "/admin/models").json()["models"]}


def test_its_last_profiles_are_listed_with_how_each_differs_from_the_one_before(fleet: Fleet, added: str) -> None:
    path = f"/admin/models/{added}/profile"
    assert fleet.proxy.admin("POST", path, uniform_profile(0.5)).status_code == 200
    listed = fleet.proxy.admin("GET", f"{path}s").json()
    newest, first = listed["profiles"]

    assert listed["model"] == added
    assert [newest["source"], newest["recipe"], newest["map"]] == ["upload", "pooled", uniform_profile(0.5)["map"]]
    assert newest["total_labels"] == 50 * len(newest["labels"])
    assert newest["error_low"] < newest["mean_error"] < newest["error_high"]
    assert (newest["change"]["p"], newest["change"]["differs"]) == (pytest.approx(0), True)
    assert (newest["change"]["mean_error"], newest["change"]["same_parameters"]) == (pytest.approx(0.5, abs=0.01), True)
    assert newest["change"]["clusters"][0]["name"]
    assert first["change"] is None
    assert fleet.proxy.admin("GET", "/admin/models/nobody/profiles").status_code == 404


def test_a_model_whose_name_ends_as_an_address_does_is_shown_itself(fleet: Fleet, added: str) -> None:
    name = f"{added}/profiles"
    assert fleet.proxy.admin("POST", "/admin/models", addition(fleet, name)).status_code == 201
    try:
        assert fleet.proxy.admin("GET", f"/admin/models/{name}").json()["model_name"] == name
        assert fleet.proxy.admin("GET", f"/admin/models/{name}/profiles").json()["model"] == name
    finally:
        fleet.proxy.admin("DELETE", f"/admin/models/{name}")
    assert fleet.proxy.admin("GET", f"/admin/models/{name}").json()["model"] == added


def test_a_taken_name_is_refused(fleet: Fleet, added: str) -> None:
    for name in (added, "fair"):
        reply = fleet.proxy.admin("POST", "/admin/models", addition(fleet, name))
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "conflict")


def test_a_price_is_used_by_the_next_request(fleet: Fleet, added: str) -> None:
    price = {"input_cost_per_token": 1.0, "output_cost_per_token": 1.0}
    reply = fleet.proxy.admin("PUT", f"/admin/models/{added}/pricing", price)

    assert (reply.status_code, reply.json()["price"]["source"]) == (200, "admin")
    assert ask(fleet).headers["x-uniroute-model"] == "fair"
    assert fleet.proxy.admin("PUT", f"/admin/models/{added}/pricing", {"input_cost_per_token": 1}).status_code == 400


def test_a_price_of_long_prompts_is_stored_and_shown(fleet: Fleet, added: str) -> None:
    price = {
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 2e-6,
        "input_cost_per_audio_token": 3e-6,
        "input_cost_per_token_above_200k_tokens": 4e-6,
    }
    path = f"/admin/models/{added}/pricing"
    assert fleet.proxy.admin("PUT", path, price).status_code == 200
    stored = fleet.proxy.admin("GET", f"/admin/models/{added}").json()["price"]
    assert {name: stored[name] for name in price} == price
    for wrong in ({"input_cost_per_token_above_200k_tokens": "x"}, {"input_cost_above_200k_tokens": 1.0}):
        refused = fleet.proxy.admin("PUT", path, {**price, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_prices_of_tiers_are_part_of_model_info(fleet: Fleet, added: str) -> None:
    info = {"input_cost_per_token_above_200k_tokens": 4e-6}
    card = fleet.proxy.admin("PATCH", f"/admin/models/{added}", {"model_info": info}).json()
    assert card["model_info"]["input_cost_per_token_above_200k_tokens"] == 4e-6
    price = fleet.proxy.admin("GET", f"/admin/models/{added}").json()["price"]
    assert price["input_cost_per_token_above_200k_tokens"] == 4e-6
    unknown = fleet.proxy.admin("PATCH", f"/admin/models/{added}", {"model_info": {"input_cost_above_200k_tokens": 1}})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "model_info.input_cost_above_200k_tokens")


def test_a_changed_model_loses_its_profile(fleet: Fleet, added: str) -> None:
    patch = {"litellm_params": {"temperature": 0.5}}
    card = fleet.proxy.admin("PATCH", f"/admin/models/{added}", patch).json()

    assert card["state"] == "foreign_profile"
    assert ask(fleet).headers["x-uniroute-model"] == "fair"
    assert ask(fleet, model=added).status_code == 200
    assert fleet.good.last.body["temperature"] == 0.5


def test_a_removed_model_is_gone_at_once(fleet: Fleet, added: str) -> None:
    assert fleet.proxy.admin("DELETE", f"/admin/models/{added}").status_code == 204
    assert fleet.proxy.admin("GET", f"/admin/models/{added}").status_code == 404
    assert ask(fleet).headers["x-uniroute-model"] == "fair"


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_a_model_of_the_configuration_file_cannot_be_changed_over_http(fleet: Fleet, method: str) -> None:
    reply = fleet.proxy.admin(method, "/admin/models/fair", {})

    assert reply.status_code == 409
    assert "configuration file" in reply.json()["error"]["message"]


def test_a_change_without_a_body_is_answered_by_whether_the_model_can_be_changed(fleet: Fleet, added: str) -> None:
    headers = {"authorization": "Bearer admin-key-of-the-tests"}
    found = [httpx.patch(f"{fleet.url}/admin/models/{name}", headers=headers) for name in ("nobody", "fair", added)]

    assert [reply.status_code for reply in found] == [404, 409, 200]


def test_a_refused_addition_stores_nothing(fleet: Fleet) -> None:
    wrong = addition(fleet, "half", profile={"map": "other", "errors": [0.0], "labels": [1.0]})

    assert fleet.proxy.admin("POST", "/admin/models", wrong).status_code == 400
    assert fleet.proxy.admin("GET", "/admin/models/half").status_code == 404


def test_an_unpriced_model_is_not_chosen_and_the_decision_says_why(fleet: Fleet) -> None:
    entry = addition(fleet, "unpriced", model_info={})
    fleet.proxy.admin("POST", "/admin/models", entry)
    try:
        decision = httpx.post(f"{fleet.base_url}/route", json={"model": "auto", "messages": ASK}).json()
        card = fleet.proxy.admin("GET", "/admin/models/unpriced").json()
    finally:
        fleet.proxy.admin("DELETE", "/admin/models/unpriced")

    assert [row["model"] for row in decision["ineligible"]] == ["unpriced"]
    assert "price" in decision["ineligible"][0]["why"]
    assert (card["state"], card["price"]) == ("unpriced", None)


def test_the_admin_side_needs_its_key(fleet: Fleet) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
        reply = httpx.get(f"{fleet.url}/admin/models", headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "path", ["//admin/models", "/admin%2Fmodels", "/v1/../admin/models", "/./admin/models", "/admin"]
)
def test_no_spelling_of_the_path_gets_past_the_admin_key(fleet: Fleet, path: str) -> None:
    reply = httpx.get(fleet.url + path)

    assert reply.status_code in (401, 404)


def test_the_dry_run_predicts_what_then_happens(fleet: Fleet) -> None:
    for body in (
        {"model": "auto"},
        {"model": "gpt-4o", "uniroute": {"lambda": 0}},
        {"model": "good"},
        {"model": "uniroute/cheap"},
        {"model": "auto", "models": ["good"]},
        {"model": "auto", "uniroute": {"max_cost_usd": 1e-12}},
    ):
        predicted = httpx.post(f"{fleet.base_url}/route", json={"messages": ASK, **body})
        reply = ask(fleet, **body)
        if reply.status_code == 200:
            decision = predicted.json()
            assert (decision["model"], decision["reason"]) == (
                reply.json()["model"],
                reply.headers["x-uniroute-reason"],
            )
        else:
            assert (predicted.status_code, predicted.json()) == (reply.status_code, reply.json())


def test_health_and_metrics_show_the_state_and_no_prompt(fleet: Fleet) -> None:
    ask(fleet)
    ready = httpx.get(f"{fleet.url}/readyz").json()

    def metrics() -> str:
        return httpx.get(f"{fleet.url}/metrics").text

    assert (ready["status"], ready["store"]) == ("ready", "up")
    assert ready["state_version"] > 0
    assert wait_until(lambda: 'uniroute_requests_total{ending="complete",model="fair",reason="scored"}' in metrics())
    assert "What is" not in metrics()


def test_request_ids_and_traces_are_passed_on_and_echoed(fleet: Fleet) -> None:
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    sent = {"x-request-id": "mine-1", "traceparent": parent, "tracestate": "vendor=1", "x-secret": "no"}
    sent["x-forwarded-for"] = "1.2.3.4"
    reply = httpx.post(f"{fleet.base_url}/chat/completions", json={"model": "fair", "messages": ASK}, headers=sent)
    seen = fleet.fair.last.headers
    wrong = httpx.get(f"{fleet.url}/healthz", headers={"x-request-id": "a b", "traceparent": "00-0-0-0"})

    assert (reply.headers["x-request-id"], reply.headers["traceparent"]) == ("mine-1", parent)
    assert (seen["x-request-id"], seen["traceparent"]) == ("mine-1", parent)
    assert not {"x-secret", "x-forwarded-for"} & set(seen)
    assert wrong.headers["x-request-id"].startswith("req-")
    assert "traceparent" not in wrong.headers


def test_a_model_of_no_known_provider_is_refused_at_once(fleet: Fleet) -> None:
    entry = addition(fleet, "nobodys")
    entry["litellm_params"] = {"model": "nobodys-model"}
    reply = fleet.proxy.admin("POST", "/admin/models", entry)

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "litellm_params.model")
    assert fleet.proxy.admin("GET", "/admin/models/nobodys").status_code == 404
