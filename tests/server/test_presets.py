from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.server.startup import check_named_models
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings, load_settings
from tests.support.keyed_proxy import ASK, KeyedProxy
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream

PRESETS: Any = {
    "quality": {"lambda": 0},
    "only-fair": {"models": ["fair"], "lambda": 0},
    "thrifty": {"max_cost_usd": 1e-4, "lambda": 0},
}
MODEL = {"model_name": "small", "litellm_params": {"model": "openai/small"}}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[KeyedProxy]:
    with ScriptedUpstream() as upstream:
        config = {
            "model_list": [
                model_entry("fair", upstream.url, price=1e-7),
                model_entry("good", upstream.url, price=1e-5),
            ],
            "uniroute": {"profile": {"on_start": False}, "presets": PRESETS},
        }
        folder, environ = tmp_path_factory.mktemp("presets"), {"MODEL_API_KEY": "sk-x"}
        with ProxyProcess(folder, embedder_cache, config, environ) as proxy, KeyedProxy(proxy) as opened:
            proxy.put_profile("fair", 0.3)
            proxy.put_profile("good", 0.1)
            yield opened


def chosen(keyed: KeyedProxy, model: str, *, key: Any = None, **options: Any) -> str:
    body = {"model": model, "messages": ASK, "uniroute": options}
    reply = keyed.call(key or keyed.make(), "POST", "/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    return reply.headers["x-uniroute-model"]


def names(keyed: KeyedProxy, key: Any) -> dict[str, Any]:
    return {entry["id"]: entry for entry in keyed.call(key, "GET", "/v1/models").json()["data"]}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        *[("auto", "fair"), ("uniroute/quality", "good"), ("uniroute/only-fair", "fair"), ("uniroute/thrifty", "fair")],
        ("claude-quality", "good"),
    ],
)
def test_a_preset_decides_as_it_states(keyed: KeyedProxy, model: str, expected: str) -> None:
    assert chosen(keyed, model) == expected


def test_the_requests_own_lambda_comes_before_that_of_a_preset(keyed: KeyedProxy) -> None:
    assert chosen(keyed, "uniroute/quality", **{"lambda": 0.1}) == "fair"


def test_restrictions_of_preset_request_and_key_add_up(keyed: KeyedProxy) -> None:
    body = {"model": "uniroute/only-fair", "messages": ASK}
    none_left = keyed.call(keyed.make(), "POST", "/v1/chat/completions", {**body, "models": ["good"]})

    assert (none_left.status_code, none_left.json()["error"]["code"]) == (400, "no_eligible_model")
    assert "of the preset" in none_left.json()["error"]["message"]
    assert chosen(keyed, "uniroute/quality", max_cost_usd=1e-4) == "fair"
    assert chosen(keyed, "uniroute/quality", key=keyed.make(models=["fair"])) == "fair"


def test_a_preset_outside_of_a_keys_bounds_is_forbidden_and_not_listed(keyed: KeyedProxy) -> None:
    bound = keyed.make(lambda_min=0.05)
    reply = keyed.call(bound, "POST", "/v1/chat/completions", {"model": "uniroute/quality", "messages": ASK})

    assert (reply.status_code, reply.json()["error"]["param"]) == (403, "model")
    assert "uniroute/quality" not in names(keyed, bound)


def test_presets_are_listed_with_what_they_state_and_the_price_of_a_single_model(keyed: KeyedProxy) -> None:
    listed = names(keyed, keyed.make())

    assert set(listed) >= {"uniroute/quality", "uniroute/only-fair"}
    assert listed["uniroute/only-fair"]["description"] == "Chooses a model for each prompt at λ = 0 among fair."
    assert listed["uniroute/only-fair"]["pricing"] == listed["fair"]["pricing"]
    assert "pricing" not in listed["uniroute/quality"]
    assert "uniroute/only-fair" not in names(keyed, keyed.make(models=["good"]))


def test_the_dry_run_explains_a_preset(keyed: KeyedProxy) -> None:
    shown, plain = (
        keyed.call(keyed.make(), "POST", "/v1/route", {"model": model, "messages": ASK}).json()
        for model in ("uniroute/only-fair", "auto")
    )

    assert shown["preset"] == {"lambda": 0, "models": ["fair"], "max_cost_usd": None}
    assert (shown["lambda"], "preset" in plain) == (0, False)


def test_no_model_can_take_the_name_of_a_preset(keyed: KeyedProxy) -> None:
    body = {"model_name": "uniroute/quality", "litellm_params": {"model": "openai/x"}}
    reply = keyed.proxy.admin("POST", "/admin/models", body)
    assert (reply.status_code, "preset" in reply.json()["error"]["message"]) == (400, True)


def test_embeddings_refuse_a_preset(keyed: KeyedProxy) -> None:
    reply = keyed.call(keyed.make(), "POST", "/v1/embeddings", {"model": "uniroute/quality", "input": "x"})
    assert (reply.status_code, "asks for routing" in reply.json()["error"]["message"]) == (400, True)


def test_an_unknown_preset_is_a_404(keyed: KeyedProxy) -> None:
    reply = keyed.call(keyed.make(), "POST", "/v1/chat/completions", {"model": "uniroute/qualit", "messages": ASK})
    assert reply.status_code == 404


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ({"best": {}}, "has a meaning of its own"),
        ({"a b": {}}, "got 'a b'"),
        ({"fast": {}}, "also one of route_names"),
        ({"eco": {"lamda": 1}}, "did you mean '?lambda"),
        ({"eco": {"models": ["auto"]}}, "asks for routing; list models"),
        ({"eco": {"models": []}}, "presets.eco.models"),
        ({"eco": {"lambda": -1}}, "presets.eco.lambda"),
    ],
)
def test_a_preset_that_contradicts_is_refused_at_the_start(tmp_path: Path, presets: Any, message: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model_list": [MODEL], "uniroute": {"presets": presets, "route_names": ["fast"]}}))
    with pytest.raises(SettingsError, match=message):
        load_settings(config, {})


def test_a_misspelt_model_of_a_preset_is_refused_with_the_right_name() -> None:
    settings = Settings.model_validate({"presets": {"eco": {"models": ["smal"]}}})
    with pytest.raises(SettingsError, match=r"presets.eco.models: no model is named 'smal'; did you mean 'small'"):
        check_named_models(settings, ["small"], lambda _: False, complete=True)
