"""The default λ and pauses, set on one of two servers over one Valkey, and used by both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.support.proxy_process import NO_COOLDOWN, ProxyProcess, model_entry
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.valkey import ValkeyServer
from tests.support.waiting import wait_until

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


@dataclass(frozen=True)
class Pair:
    """Hold two servers. At the λ of the configuration "fair" is chosen, at 0 "good"."""

    one: ProxyProcess
    two: ProxyProcess
    fair: ScriptedUpstream
    good: ScriptedUpstream
    start_another: Any

    def route(self, proxy: ProxyProcess) -> dict[str, Any]:
        return dict(proxy.admin("POST", "/v1/route", {"model": "auto", "messages": ASK}).json())

    def ask(self, model: str = "auto", **body: Any) -> httpx.Response:
        """Ask with the admin key: client keys may have been made by another test."""
        return self.one.admin("POST", "/v1/chat/completions", {"model": model, "messages": ASK, **body})

    def pause(self, name: str, paused: Any) -> httpx.Response:
        return self.one.admin("PATCH", f"/admin/models/{name}", {"paused": paused})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("controls")
    with (
        ValkeyServer(folder / "valkey") as valkey,
        ScriptedUpstream(lambda _: "fair") as fair,
        ScriptedUpstream(lambda _: "good") as good,
    ):
        vectors = {"mode": "embedding", "input_cost_per_token": 1e-8}
        config = {
            "model_list": [
                model_entry("fair", fair.url, price=1e-7),
                model_entry("good", good.url, price=1e-5),
                {**model_entry("vectors", good.url), "model_info": vectors},
            ],
            "uniroute": {
                "lambda": 0.1,
                "presets": {"eco": {"lambda": 5.0}, "plain": {}},
                "profile": {"on_start": False},
                "breaker": NO_COOLDOWN,
            },
        }
        environ = {"MODEL_API_KEY": "sk-x", "UNIROUTE_REDIS_URL": valkey.url}

        def another(name: str) -> ProxyProcess:
            return ProxyProcess(folder / name, embedder_cache, config, environ)

        with another("one") as one, another("two") as two:
            one.put_profile("fair", 0.3)
            one.put_profile("good", 0.1)
            assert wait_until(lambda: two.admin("GET", "/admin/models/good").json()["state"] == "ready")
            yield Pair(one, two, fair, good, another)


@pytest.fixture
def pair(both: Pair) -> Iterator[Pair]:
    yield both
    both.one.admin("DELETE", "/admin/settings")
    for name in ("fair", "good", "vectors"):
        both.pause(name, False)
    version = both.one.admin("GET", "/admin/settings").json()["state_version"]
    assert wait_until(lambda: both.two.admin("GET", "/admin/settings").json()["state_version"] >= version)
    for upstream in (both.fair, both.good):
        upstream.reset()


def test_a_lambda_that_is_set_is_used_at_once_here_and_soon_elsewhere(pair: Pair) -> None:
    assert (pair.route(pair.one)["model"], pair.route(pair.two)["model"]) == ("fair", "fair")
    reply = pair.one.admin("PUT", "/admin/settings", {"lambda": 0})

    assert reply.status_code == 200
    assert (pair.route(pair.one)["model"], pair.route(pair.one)["lambda"]) == ("good", 0.0)
    assert wait_until(lambda: pair.route(pair.two)["lambda"] == 0.0)
    assert pair.ask().headers["x-uniroute-model"] == "good"
    assert pair.one.admin("DELETE", "/admin/settings").status_code == 200
    assert pair.ask().headers["x-uniroute-model"] == "fair"


def test_both_values_are_told_and_who_set_it_when(pair: Pair) -> None:
    before = pair.one.admin("GET", "/admin/settings").json()
    set_ = pair.one.admin("PUT", "/admin/settings", {"lambda": 0.25}).json()
    stated = set_["lambda"]

    assert before["lambda"] == {"value": 0.1, "source": "config", "configured": 0.1, "set_at": None, "set_by": None}
    assert (stated["value"], stated["source"], stated["configured"], stated["set_by"]) == (0.25, "admin", 0.1, "root")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stated["set_at"])
    assert set_["state_version"] > before["state_version"]
    assert pair.one.admin("GET", "/admin/settings").json() == set_
    assert pair.one.admin("DELETE", "/admin/settings").json()["lambda"] == before["lambda"]


def test_whatever_states_a_lambda_of_its_own_wins_over_it(pair: Pair) -> None:
    pair.one.admin("PUT", "/admin/settings", {"lambda": 3.0})
    key = pair.one.admin("POST", "/admin/keys", {"name": "own", "lambda_default": 0.6, "role": "client"}).json()
    bounded = pair.one.admin("POST", "/admin/keys", {"name": "bounded", "lambda_max": 0.5}).json()

    def used(model: str = "auto", key: Any = None, header: str | None = None, stated: float | None = None) -> float:
        secret = (key or unbounded)["key"]
        headers = {"authorization": f"Bearer {secret}", **({"lambda": header} if header else {})}
        body = {"model": model, "messages": ASK, "uniroute": {"lambda": stated}}
        return float(httpx.post(f"{pair.one.url}/v1/route", json=body, headers=headers, timeout=60).json()["lambda"])

    unbounded = pair.one.admin("POST", "/admin/keys", {"name": "team"}).json()
    assert used() == 3.0
    assert used(header="0.2") == 0.2
    assert used(stated=0.4) == 0.4
    assert used("uniroute/eco") == 5.0
    assert used("uniroute/plain") == 3.0
    assert used("uniroute/best") == 0.0
    assert (used(key=key), used(key=bounded)) == (0.6, 0.5)


def test_the_decision_is_kept_with_the_lambda_that_it_was_made_by(pair: Pair) -> None:
    pair.one.admin("PUT", "/admin/settings", {"lambda": 0.03125})
    path = f"/admin/decisions/{pair.ask().headers['x-uniroute-decision']}"
    assert wait_until(lambda: pair.one.admin("GET", path).status_code == 200)
    assert pair.one.admin("GET", path).json()["lambda"] == 0.03125


@pytest.mark.parametrize(
    "value", [None, -0.1, True, "0.2", [0.2], 1e13, float("nan"), float("inf")], ids=lambda value: str(value)
)
def test_what_is_no_lambda_is_refused_and_changes_nothing(pair: Pair, value: Any) -> None:
    headers = {"authorization": "Bearer admin-key-of-the-tests", "content-type": "application/json"}
    text = f'{{"lambda": {str(value).lower() if value is None or value is True else value!r}}}'
    text = text.replace("'", '"').replace("none", "null").replace(": nan", ": NaN").replace(": inf", ": Infinity")
    reply = httpx.put(f"{pair.one.url}/admin/settings", content=text, headers=headers)

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "lambda" or "NaN" in text or "Infinity" in text
    assert pair.one.admin("GET", "/admin/settings").json()["lambda"]["source"] == "config"


def test_an_empty_body_and_an_unknown_setting_are_refused_by_name(pair: Pair) -> None:
    empty = pair.one.admin("PUT", "/admin/settings", {})
    unknown = pair.one.admin("PUT", "/admin/settings", {"lamda": 1})

    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "lambda")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "lamda")
    assert "did you mean `lambda`?" in unknown.json()["error"]["message"]


def test_a_viewer_reads_the_settings_and_sets_none_and_a_client_sees_nothing(pair: Pair) -> None:
    found = {}
    for role in ("viewer", "client", "admin"):
        made = pair.one.admin("POST", "/admin/keys", {"name": role, "role": role}).json()
        headers = {"authorization": f"Bearer {made['key']}"}
        found[role] = [
            httpx.request(method, f"{pair.one.url}{path}", json=body, headers=headers, timeout=60).status_code
            for method, path, body in (
                ("GET", "/admin/settings", None),
                ("PUT", "/admin/settings", {"lambda": 1}),
                ("DELETE", "/admin/settings", None),
                ("PATCH", "/admin/models/fair", {"paused": True}),
                ("PATCH", "/admin/models/fair", {"paused": False}),
            )
        ]

    assert found == {"viewer": [200, 403, 403, 403, 403], "client": [403] * 5, "admin": [200] * 5}


def test_a_paused_model_of_the_configuration_takes_no_traffic_until_it_goes_on(pair: Pair) -> None:
    card = pair.pause("fair", True).json()

    assert (card["paused"], card["paused_by"], card["state"]) == (True, "root", "ready")
    assert {pair.ask().headers["x-uniroute-model"] for _ in range(3)} == {"good"}
    assert pair.fair.history == []
    listed = {each["model_name"]: each["paused"] for each in pair.one.admin("GET", "/admin/models").json()["models"]}
    assert listed == {"fair": True, "good": False, "vectors": False}

    assert wait_until(lambda: pair.route(pair.two)["model"] == "good")
    assert pair.route(pair.two)["ineligible"] == [
        {"model": "fair", "why": 'paused; PATCH /admin/models/fair with {"paused": false} lets it go on'}
    ]
    assert pair.pause("fair", False).json()["paused"] is False
    assert pair.ask().headers["x-uniroute-model"] == "fair"


def test_asked_by_name_it_answers_503_in_the_shape_of_each_api(pair: Pair) -> None:
    pair.pause("fair", True)
    reply = pair.ask("fair")
    dry = pair.one.admin("POST", "/v1/route", {"model": "fair", "messages": ASK})
    fallen_back = pair.ask("fair", uniroute={"fallbacks": True})
    with (
        anthropic.Anthropic(base_url=pair.one.url, api_key="admin-key-of-the-tests", max_retries=0) as claude,
        pytest.raises(anthropic.APIStatusError) as refused,
    ):
        claude.messages.create(model="fair", max_tokens=5, messages=ASK)

    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"], error["param"]) == (
        *(503, "model_paused"),
        *("server_error", "model"),
    )
    assert 'PATCH /admin/models/fair with {"paused": false}' in error["message"]
    assert (reply.headers["x-should-retry"], dry.status_code, dry.json()) == ("false", 503, reply.json())
    assert (fallen_back.json()["model"], fallen_back.headers["x-uniroute-reason"]) == ("good", "fallback")
    assert (refused.value.status_code, "is paused" in refused.value.message) == (529, True)
    assert pair.fair.history == []


def test_all_paused_is_said_so_and_embeddings_are_paused_too(pair: Pair) -> None:
    for name in ("fair", "good", "vectors"):
        pair.pause(name, True)
    chat = pair.ask()
    vectors = pair.one.admin("POST", "/v1/embeddings", {"model": "vectors", "input": "x"})

    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "model_paused")
    assert "every model that this request may use is paused" in chat.json()["error"]["message"]
    assert (vectors.status_code, vectors.json()["error"]["code"]) == (503, "model_paused")
    pair.pause("good", False)
    assert pair.ask().headers["x-uniroute-model"] == "good"


def test_a_request_under_way_ends_as_it_would(pair: Pair) -> None:
    pair.fair.then(Step(drip_s=0.05))
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(lambda: pair.ask(stream=True))
        assert wait_until(lambda: pair.fair.history)
        pair.pause("fair", True)
        ended = answer.result()

    assert ended.status_code == 200
    assert "[DONE]" in ended.text
    assert pair.ask().headers["x-uniroute-model"] == "good"


def test_a_fallback_of_a_request_under_way_is_not_asked_if_it_was_paused_meanwhile(pair: Pair) -> None:
    pair.fair.then(Step(status=500, delay_s=0.4))
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(lambda: pair.ask())
        assert wait_until(lambda: pair.fair.history)
        pair.pause("good", True)
        failed = answer.result()

    assert failed.status_code == 500
    assert pair.good.history == []


def test_a_paused_model_is_listed_to_clients_and_lends_its_abilities_to_no_name(pair: Pair) -> None:
    def listed() -> dict[str, Any]:
        return {entry["id"]: entry for entry in pair.one.admin("GET", "/v1/models").json()["data"]}

    assert "paused" not in listed()["fair"]
    pair.pause("fair", True)
    entry = listed()["fair"]

    assert (entry["paused"], "paused" in entry["description"]) == (True, True)
    assert "paused" not in listed()["good"]


def test_pauses_and_changes_are_in_the_trail_with_who_made_them(pair: Pair) -> None:
    made = pair.one.admin("POST", "/admin/keys", {"name": "ops", "role": "admin"}).json()
    headers = {"authorization": f"Bearer {made['key']}", "x-request-id": "req-controls"}
    for method, path, body in (
        ("PUT", "/admin/settings", {"lambda": 0.5}),
        ("DELETE", "/admin/settings", None),
        ("PATCH", "/admin/models/fair", {"paused": True}),
        ("PATCH", "/admin/models/fair", {"paused": False}),
    ):
        assert httpx.request(method, pair.one.url + path, json=body, headers=headers).status_code == 200
    entries = pair.one.admin("GET", "/admin/audit?limit=4").json()["entries"]

    assert [(entry["who"], entry["action"], entry["target"]) for entry in entries] == [
        (made["id"], "models.resume", "fair"),
        (made["id"], "models.pause", "fair"),
        (made["id"], "settings.reset", ""),
        (made["id"], "settings.change", "lambda=0.5"),
    ]
    found = re.compile(r"^.* request=req-controls.*$", re.MULTILINE)
    assert wait_until(lambda: len(found.findall(pair.one.log)) >= 4)
    lines = found.findall(pair.one.log)
    assert [re.search(r"action=(\S+) target=(\S+)", line)[0] for line in lines] == [  # type: ignore[index]
        *("action=settings.change target=lambda%3D0.5", "action=settings.reset target=-"),
        *("action=models.pause target=fair", "action=models.resume target=fair"),
    ]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"paused": 1}, 400, "paused"),
        ({"paused": None}, 400, "paused"),
        ({"paused": True, "model_info": {}}, 400, "paused"),
        ({"model_info": {}}, 409, None),
    ],
)
def test_only_its_pause_can_be_changed_of_a_model_of_the_configuration(
    pair: Pair, body: Any, status: int, param: str | None
) -> None:
    reply = pair.one.admin("PATCH", "/admin/models/fair", body)

    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert pair.one.admin("GET", "/admin/models/fair").json()["paused"] is False


def test_both_outlive_a_restart_and_a_server_says_at_its_start_whose_lambda_holds(pair: Pair) -> None:
    pair.one.admin("PUT", "/admin/settings", {"lambda": 0.75})
    pair.pause("good", True)
    with pair.start_another("three") as three:
        assert three.admin("GET", "/admin/settings").json()["lambda"]["value"] == 0.75
        assert three.admin("GET", "/admin/models/good").json()["paused"] is True
        decision = three.admin("POST", "/v1/route", {"model": "auto", "messages": ASK}).json()
        assert (decision["model"], decision["lambda"]) == ("fair", 0.75)
        line = re.compile(r"λ is 0\.75, set by root at \S+; the 0\.1 of the configuration")
        assert wait_until(lambda: line.search(three.log))
