"""A reasoning model with efforts: each is measured and chosen for itself, and none goes beyond what a caller states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from router_core.artifact import builtin_map
from tests.support.client_apis import PATHS, APIName, body_of
from tests.support.native_answers import MESSAGE, RESPONSE
from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_answers import CLAUDE, Json, Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

EASY, HARD = "What is the capital of France?", "Write a Python function that sorts a list of numbers in place."
NATIVE = ("messages", "responses")
TOKENS = {"low": 50, "medium": 400, "high": 2000}


@dataclass
class Setting:
    """One proxy: "thinker" has three efforts in chat completions, "native" two in all APIs, and "plain" has none."""

    proxy: ProxyProcess
    thinker: ScriptedUpstream
    native: ScriptedUpstream

    def ask(self, api: APIName = "chat", text: str = EASY, **more: Any) -> httpx.Response:
        reply = httpx.post(self.proxy.url + PATHS[api], json=body_of(api, text, **more), timeout=60)
        assert reply.status_code == 200, reply.text
        return reply

    def model_for(self, text: str = EASY, **more: Any) -> str:
        return self.ask(text=text, **more).headers["x-uniroute-model"]

    def decision(self, **more: Any) -> Json:
        found: Json = httpx.post(f"{self.proxy.url}/v1/route", json=body_of("chat", EASY) | more, timeout=60).json()
        return found

    def card(self, name: str) -> Json:
        found: Json = self.proxy.admin("GET", f"/admin/models/{name}").json()
        return found


def put_rates(proxy: ProxyProcess, name: str, usual: float, elsewhere: tuple[float, list[int]], tokens: float) -> None:
    """Hand over a profile: the usual rate, and another one in some clusters."""
    cluster_map = builtin_map()
    rate, clusters = elsewhere
    errors = [rate if number in clusters else usual for number in range(cluster_map.size)]
    document = {"map": cluster_map.id, "errors": errors, "labels": [50.0] * cluster_map.size}
    reply = proxy.admin("POST", f"/admin/models/{name}/profile", {**document, "mean_output_tokens": tokens})
    assert reply.status_code == 200, reply.text


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Setting]:
    with ScriptedUpstream(lambda _: "Thought over.") as thinker, ScriptedUpstream() as native:
        config = {
            "model_list": [
                model_entry("thinker", thinker.url, price=1e-6, effort=["low", "medium", "high"]),
                model_entry(
                    "native", native.url, price=1e-4, effort=["high", "low"], api=["chat", "messages", "responses"]
                ),
            ],
            "uniroute": {"profile": {"on_start": False}, "breaker": NO_COOLDOWN},
        }
        folder = tmp_path_factory.mktemp("efforts")
        with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-model"}) as proxy:
            setting = Setting(proxy, thinker, native)
            for effort, tokens in TOKENS.items():
                proxy.put_profile(f"thinker@{effort}", 0.5, output_tokens=tokens)
            hard = [each["id"] for each in setting.decision(messages=[{"role": "user", "content": HARD}])["clusters"]]
            for effort, rate in (("low", 0.9), ("medium", 0.5), ("high", 0.1)):
                put_rates(proxy, f"thinker@{effort}", 0.05, (rate, hard), TOKENS[effort])
            for effort in ("low", "high"):
                proxy.put_profile(f"native@{effort}", 0.6, output_tokens=TOKENS[effort])
            yield setting


@pytest.fixture
def setting(started: Setting) -> Setting:
    started.thinker.reset()
    started.native.reset()
    started.native.skill_by_path = {"/v1/messages": MESSAGE, "/v1/responses": RESPONSE}
    return started


@pytest.mark.parametrize("model", ["auto", "thinker"])
def test_an_easy_prompt_gets_little_effort_and_a_hard_one_much(setting: Setting, model: str) -> None:
    assert setting.model_for(EASY, model=model) == "thinker@low"
    assert setting.thinker.last.body["reasoning_effort"] == "low"
    assert setting.model_for(HARD, model=model) == "thinker@high"
    assert setting.thinker.last.body["reasoning_effort"] == "high"


def test_the_choice_shows_model_and_effort(setting: Setting) -> None:
    decision = setting.decision()
    reply = setting.ask()
    assert (decision["model"], decision["effort"]) == ("thinker@low", "low")
    assert reply.json()["model"] == "thinker@low"
    assert "thinker" not in {each["model"] for each in decision["ineligible"]}


def test_an_effort_costs_what_its_own_answers_do(setting: Setting) -> None:
    costs = {each["model"]: each["expected_cost_usd"] for each in setting.decision()["candidates"]}
    assert 2 * costs["thinker@low"] < costs["thinker@medium"] < costs["thinker@high"] / 2


STATED: list[tuple[APIName, Json]] = [
    ("chat", {"reasoning_effort": "medium"}),
    ("chat", {"reasoning": {"effort": "medium"}}),
    ("responses", {"reasoning": {"effort": "medium"}}),
    ("messages", {"thinking": {"type": "enabled", "budget_tokens": 5000}, "max_tokens": 8000}),
    ("messages", {"output_config": {"effort": "medium"}}),
]


@pytest.mark.parametrize(("api", "stated"), STATED)
def test_no_effort_above_the_callers_own_is_asked_for_in_any_api(setting: Setting, api: APIName, stated: Json) -> None:
    reply = setting.ask(api, HARD, model="thinker", **stated)
    assert reply.headers["x-uniroute-model"] == "thinker@medium"
    assert setting.thinker.last.body["reasoning_effort"] == "medium"
    assert not {"thinking", "reasoning"} & setting.thinker.last.body.keys()


@pytest.mark.parametrize("effort", ["LOW", 5, [], {}])
def test_an_effort_that_is_not_known_is_the_fields_error_in_the_responses_api(setting: Setting, effort: Any) -> None:
    body = body_of("responses", model="thinker", reasoning={"effort": effort})
    reply = httpx.post(setting.proxy.url + PATHS["responses"], json=body, timeout=60)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "reasoning.effort")


def test_the_reason_for_which_an_effort_is_ruled_out_is_shown(setting: Setting) -> None:
    ruled_out = {each["model"]: each["why"] for each in setting.decision(reasoning_effort="low")["ineligible"]}
    assert ruled_out == dict.fromkeys(
        ("native@high", "thinker@high", "thinker@medium"), "thinks more than the effort that the request states"
    )


def test_a_bound_below_every_effort_leaves_the_smallest(setting: Setting) -> None:
    assert setting.model_for(HARD, model="thinker", reasoning_effort="none") == "thinker@low"


def test_a_bound_never_makes_a_model_think_more(setting: Setting) -> None:
    assert setting.model_for(EASY, model="thinker", reasoning_effort="high") == "thinker@low"


def test_an_effort_that_is_named_answers_and_goes_no_further_than_the_callers_own(setting: Setting) -> None:
    assert setting.model_for(EASY, model="thinker@high") == "thinker@high"
    assert setting.model_for(EASY, model="thinker@high", reasoning_effort="medium") == "thinker@medium"


def test_an_upstream_of_the_clients_own_api_is_told_the_effort_in_it(setting: Setting) -> None:
    setting.ask("messages", model="native@low", thinking={"type": "enabled", "budget_tokens": 9000}, max_tokens=9999)
    told = setting.native.last
    assert (told.path, told.body["output_config"]) == ("/v1/messages", {"effort": "low"})
    assert told.body["thinking"] == {"type": "adaptive"}
    setting.ask("responses", model="native@low", reasoning={"effort": "high", "summary": "auto"})
    told = setting.native.last
    assert (told.path, told.body["reasoning"]) == ("/v1/responses", {"effort": "low", "summary": "auto"})


def test_an_effort_that_fails_is_not_followed_by_another_of_the_same_model(setting: Setting) -> None:
    setting.thinker.always = Step(status=500)
    assert setting.model_for(EASY, model="auto").startswith("native@")
    assert len(setting.thinker.history) == 1


def test_a_named_model_falls_back_to_others_only_if_the_request_says_so(setting: Setting) -> None:
    setting.thinker.always = Step(status=500)
    body = body_of("chat", EASY, model="thinker")
    assert httpx.post(f"{setting.proxy.url}/v1/chat/completions", json=body, timeout=60).status_code == 500
    assert setting.model_for(EASY, model="thinker", uniroute={"fallbacks": True}).startswith("native@")


def test_a_model_and_its_efforts_are_listed(setting: Setting) -> None:
    listed = {each["id"] for each in httpx.get(f"{setting.proxy.url}/v1/models").json()["data"]}
    assert {"thinker", "thinker@low", "thinker@medium", "thinker@high"} <= listed
    assert setting.card("thinker")["efforts"] == ["thinker@low", "thinker@medium", "thinker@high"]
    card = setting.card("thinker@low")
    assert (card["effort"], card["effort_of"], card["state"]) == ("low", "thinker", "ready")


def test_a_list_of_models_means_their_efforts_too(setting: Setting) -> None:
    assert setting.model_for(EASY, models=["native"]).startswith("native@")
    assert setting.model_for(EASY, models=["thinker@high", "native@low"]) == "thinker@high"
    assert setting.model_for(EASY, provider={"ignore": ["thinker"]}).startswith("native@")


def test_a_pause_of_the_model_pauses_its_efforts_and_one_of_an_effort_that_alone(setting: Setting) -> None:
    try:
        setting.proxy.admin("PATCH", "/admin/models/thinker@low", {"paused": True})
        assert setting.model_for(EASY) == "thinker@medium"
        setting.proxy.admin("PATCH", "/admin/models/thinker", {"paused": True})
        assert setting.model_for(EASY).startswith("native@")
    finally:
        for name in ("thinker@low", "thinker"):
            setting.proxy.admin("PATCH", f"/admin/models/{name}", {"paused": False})
    assert setting.model_for(EASY) == "thinker@low"


def test_price_and_place_of_an_effort_are_its_models(setting: Setting) -> None:
    price = {"input_cost_per_token": 2e-6, "output_cost_per_token": 8e-6}
    refused = setting.proxy.admin("PUT", "/admin/models/thinker@low/pricing", price)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert setting.proxy.admin("DELETE", "/admin/models/thinker@low").status_code == 409
    assert setting.card("thinker@low")["price"] == setting.card("thinker")["price"]


def test_an_added_model_is_measured_at_all_efforts_by_one_job_for_half_the_price(setting: Setting) -> None:
    with ScriptedUpstream() as upstream:
        upstream.skill_of_body = lambda body: "I do not know." + " hm" * TOKENS[body["reasoning_effort"]]
        entry = {**model_entry("added", upstream.url, effort="auto"), "profile": {"prompts": 40, "max_usd": 5}}
        reply = setting.proxy.admin("POST", "/admin/models", entry)
        assert reply.status_code == 202, reply.text
        try:
            assert wait_until(lambda: setting.card("added")["state"] == "ready", 120)
            job = setting.card("added@high")["job"]
            cards = {effort: setting.card(f"added@{effort}") for effort in TOKENS}
            outcomes = setting.proxy.admin("GET", f"/admin/jobs/{job['id']}/outcomes").json()["outcomes"]
        finally:
            removed = setting.proxy.admin("DELETE", "/admin/models/added")
        gone = setting.proxy.admin("GET", "/admin/models/added@low")

    assert (job["id"], job["done"], job["total"]) == (reply.json()["job"], 60, 60)
    asked = Counter(each.body["reasoning_effort"] for each in upstream.history)
    assert asked == {"low": 20, "medium": 20, "high": 20}
    assert (len(outcomes), len({line["id"] for line in outcomes})) == (60, 40)
    lengths = [cards[effort]["profile"]["mean_output_tokens"] for effort in TOKENS]
    assert lengths == sorted(lengths)
    assert [cards[effort]["state"] for effort in TOKENS] == ["ready"] * 3
    assert (removed.status_code, gone.status_code) == (204, 404)


def test_a_model_that_is_measured_answers_by_its_efforts_and_before_that_as_it_is(setting: Setting) -> None:
    with ScriptedUpstream() as upstream:
        upstream.always = Step(hang=True)
        setting.proxy.admin("POST", "/admin/models", model_entry("new", upstream.url, effort=["low", "high"]))
        try:
            assert wait_until(lambda: bool(upstream.history))
            upstream.always = None
            assert setting.model_for(EASY, model="new", reasoning_effort="medium") == "new"
            assert upstream.last.body["reasoning_effort"] == "medium"
        finally:
            setting.proxy.admin("DELETE", "/admin/models/new")


@pytest.mark.parametrize(
    ("entry", "status", "param"),
    [
        ({"litellm_params": {"model": "openai/gpt-4o-mini"}, "effort": "auto"}, 400, "model_info.effort"),
        ({"supports_reasoning": False, "effort": ["low"]}, 400, "model_info"),
        ({"effort": ["lots"]}, 400, "model_info.effort"),
        ({"effort": [100]}, 400, "model_info.effort"),
        ({"mode": "embedding", "effort": "auto"}, 400, "model_info.effort"),
    ],
)
def test_efforts_that_a_model_cannot_have_are_refused(setting: Setting, entry: Json, status: int, param: str) -> None:
    params = entry.pop("litellm_params", {"model": "openai/own", "api_base": setting.thinker.url})
    prices = {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6}
    body = {"model_name": "odd", "litellm_params": params, "model_info": {**prices, **entry}}
    refused = setting.proxy.admin("POST", "/admin/models", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)


def test_names_with_an_at_sign_stay_models_of_their_own(setting: Setting) -> None:
    plain = model_entry("own@low", setting.thinker.url)
    added = setting.proxy.admin("POST", "/admin/models", plain)
    try:
        assert added.status_code == 202
        clash = setting.proxy.admin("POST", "/admin/models", model_entry("own", setting.thinker.url, effort=["low"]))
        taken = setting.proxy.admin("POST", "/admin/models", model_entry("thinker@low", setting.thinker.url))
        assert setting.card("own@low")["effort_of"] is None
    finally:
        setting.proxy.admin("DELETE", "/admin/models/own@low")
    assert (clash.status_code, taken.status_code) == (409, 409)
    assert "'own@low' exists" in clash.json()["error"]["message"]


def test_efforts_outlive_a_restart_and_what_was_stored_of_them(tmp_path: Path, embedder_cache: Path) -> None:
    config = {"model_list": [], "uniroute": {"profile": {"on_start": False}}}
    with ScriptedUpstream(lambda _: "Thought over.") as upstream:
        entry = model_entry("kept", upstream.url, effort=["low", "high"])
        with ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "sk-model"}) as proxy:
            added = proxy.admin("POST", "/admin/models", {**entry, "profile": {"prompts": 1}})
            assert added.status_code == 202
            proxy.put_profile("kept@low", 0.3)
            proxy.put_profile("kept@high", 0.1)
        with ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "sk-model"}) as proxy:
            reply = httpx.post(
                f"{proxy.url}/v1/chat/completions", json=body_of("chat", EASY, uniroute={"lambda": 0}), timeout=60
            )
            card = proxy.admin("GET", "/admin/models/kept").json()
            proxy.admin("PATCH", "/admin/models/kept", {"model_info": {"effort": None}})
            left = proxy.admin("GET", "/admin/models/kept@low")
    assert (reply.headers["x-uniroute-model"], upstream.last.body["reasoning_effort"]) == ("kept@high", "high")
    assert (card["efforts"], card["model_info"]["effort"]) == (["kept@low", "kept@high"], ["low", "high"])
    assert left.status_code == 404


def test_claude_is_told_a_budget_by_litellm_as_well(tmp_path: Path, embedder_cache: Path) -> None:
    with ScriptedUpstream() as upstream:
        upstream.always = Step(body=CLAUDE)
        entry = {
            "model_name": "claude",
            "litellm_params": {
                "model": "anthropic/claude-sonnet-4-5",
                "api_base": upstream.url.removesuffix("/v1"),
                "api_key": "os.environ/MODEL_API_KEY",
            },
            "model_info": {"effort": "auto", "forward": "translate"},
        }
        config = {"model_list": [entry], "uniroute": {"profile": {"on_start": False}}}
        told = []
        with ProxyProcess(tmp_path, embedder_cache, config, {"MODEL_API_KEY": "sk-model"}) as proxy:
            for name in ("claude@none", "claude@2048", "claude@16384"):
                body = body_of("chat", EASY, model=name, max_tokens=4000, temperature=0.5)
                reply = httpx.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=120)
                assert reply.status_code == 200, reply.text
                told.append((upstream.last.body.get("thinking"), upstream.last.body.get("temperature")))
    assert told == [
        (None, 0.5),
        ({"type": "enabled", "budget_tokens": 2048}, None),
        ({"type": "enabled", "budget_tokens": 2000}, None),
    ]
