"""Bodies of admin calls: refused whole, with the field, or taken whole."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import BadRequest
from proxy.server.admin_schemas import NewModel, ProfileRequest, read_addition, read_patch, read_price, redact_params
from proxy.settings.schema import Settings
from router_core.errors import InvalidInput
from router_core.profiles import Profile
from router_core.types import Price
from tests.support.makers import CORNERS, a_profile, a_record

ENVIRON = {"NEW_API_KEY": "secret", "OTHER": "x", "UNIROUTE_ADMIN_KEY": "admin-key"}
PARAMS: Any = {"model": "openai/new", "api_base": "http://127.0.0.1:9/v1", "api_key": "os.environ/NEW_API_KEY"}


def addition(params: Any = None, **body: Any) -> NewModel:
    whole = {"model_name": "team/new", "litellm_params": {**PARAMS, **(params or {})}, **body}
    return read_addition(whole, Settings(route_names=("gpt-4o",)), ENVIRON, CORNERS, 1.0)


def test_a_model_is_asked_by_default() -> None:
    read = addition(model_info={"free": True, "mode": "chat"})

    assert read.profile == ProfileRequest(60, 1.0)
    assert (read.record.name, read.record.source, read.record.info.free) == ("team/new", "admin", True)
    assert addition(profile={"prompts": 5, "max_usd": 0.1}).profile == ProfileRequest(5, 0.1)


def test_a_ready_profile_is_taken_if_it_is_of_this_map() -> None:
    assert isinstance(addition(profile=a_profile().to_json()).profile, Profile)
    with pytest.raises(BadRequest, match="measured on map"):
        addition(profile=a_profile(map_id="other").to_json())
    with pytest.raises(InvalidInput):
        addition(profile={"map": CORNERS.id, "errors": [2.0] * 4, "labels": [1.0] * 4})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model_name": "auto"}, "model_name"),
        ({"model_name": "gpt-4o"}, "model_name"),
        ({"model_name": "has space"}, "model_name"),
        ({"model_nam": "x"}, "model_nam"),
        ({"model_info": {"input_cost_per_token": -1}}, "model_info.input_cost_per_token"),
        ({"model_info": {"input_cost": 1}}, "model_info.input_cost"),
        ({"model_info": []}, "model_info"),
        ({"profile": {"prompts": 0}}, "profile.prompts"),
        ({"profile": {"promts": 1}}, "profile.promts"),
        ({"params": {"api_key": "sk-literal"}}, "litellm_params.api_key"),
        ({"params": {"api_key": "os.environ/OTHER"}}, "litellm_params.api_key"),
        ({"params": {"api_key": "os.environ/MISSING_API_KEY"}}, "litellm_params.api_key"),
        ({"params": {"api_key": "os.environ/UNIROUTE_ADMIN_KEY"}}, "litellm_params.api_key"),
        ({"params": {"aws_secret_access_key": "literal"}}, "litellm_params.aws_secret_access_key"),
        ({"params": {"extra_headers": {"Authorization": "Bearer x"}}}, "litellm_params.extra_headers.Authorization"),
        ({"params": {"mock_response": "x"}}, "litellm_params.mock_response"),
        ({"params": {"rpm": 5}}, "litellm_params.rpm"),
        ({"params": {"api_bse": "http://h/v1"}}, "litellm_params.api_bse"),
        ({"params": {"ssl_verify": "/nowhere.pem"}}, "litellm_params.ssl_verify"),
        ({"params": {"api_base": "https://h/v1?api-version=1&key=sk-literal"}}, "litellm_params.api_base?key"),
        ({"params": {"api_base": "https://h/v1?x=sk-literal"}}, "litellm_params.api_base?x"),
        ({"params": {"extra_body": {"a": [{"password": "sk-literal"}]}}}, "litellm_params.extra_body.a[0].password"),
        ({"params": {"extra_body": {"url": "https://h?sig=sk-literal"}}}, "litellm_params.extra_body.url?sig"),
        ({"params": {"extra_body": {"note": "Bearer sk-literal"}}}, "litellm_params.extra_body.note"),
        ({"params": {"metadata": {"apiKey": "sk-literal"}}}, "litellm_params.metadata.apiKey"),
        ({"params": {"extra_headers": {"x-team": "sk-literal"}}}, "litellm_params.extra_headers.x-team"),
        ({"params": {"vertex_credentials": {"x": "sk-literal"}}}, "litellm_params.vertex_credentials.x"),
        ({"params": {"api_base": "file:///etc/passwd"}}, "litellm_params.api_base"),
        ({"params": {"api_base": "http://user:pw@host/v1"}}, "litellm_params.api_base"),
        ({"params": {"model": 3}}, None),
    ],
)
def test_a_wrong_addition_names_its_field(body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        addition(**body)

    assert caught.value.param == param
    assert "sk-literal" not in caught.value.message


def test_fixed_parameters_of_an_arm_are_taken() -> None:
    params = {
        "temperature": 0.2,
        "max_tokens": 5,
        "system": "Be brief.",
        "top_k": 3,
        "extra_headers": {"x-team": "blue"},
    }

    assert addition(params=params).record.litellm_params == {**PARAMS, **params}


def test_a_patch_replaces_what_it_states_and_null_removes() -> None:
    record = a_record("new", temperature=0.2, api_key="os.environ/NEW_API_KEY")
    patch: Any = {"litellm_params": {"temperature": None, "top_p": 0.5}, "model_info": {"max_input_tokens": 10}}
    changed = read_patch(patch, record, Settings(), ENVIRON)

    assert "temperature" not in changed.litellm_params
    assert (changed.litellm_params["top_p"], changed.info.max_input_tokens) == (0.5, 10)
    assert changed.info.input_cost_per_token == record.info.input_cost_per_token


def test_a_new_address_needs_the_key_again() -> None:
    record = a_record("new", api_key="os.environ/NEW_API_KEY")
    moved: Any = {"litellm_params": {"api_base": "http://elsewhere.example/v1"}}
    with pytest.raises(BadRequest, match="state `api_key` again"):
        read_patch(moved, record, Settings(), ENVIRON)
    moved["litellm_params"]["api_key"] = "os.environ/NEW_API_KEY"

    assert read_patch(moved, record, Settings(), ENVIRON).litellm_params["api_base"] == "http://elsewhere.example/v1"


@pytest.mark.parametrize(
    ("change", "secret"),
    [
        ({"api_base": "http://127.0.0.1:10/v1"}, "extra_headers"),
        ({"api_base": "https://127.0.0.1:9/v1"}, "extra_headers"),
        ({"api_base": None}, "extra_headers"),
        ({"model": "mistral/new"}, "extra_headers"),
        ({"custom_llm_provider": "mistral"}, "extra_headers"),
        ({"api_base": "http://elsewhere/v1", "extra_headers": {"x": "1"}}, None),
        ({"api_base": "http://127.0.0.1:9/v2"}, None),
        ({"model": "openai/newer"}, None),
        ({"temperature": 1}, None),
    ],
)
def test_a_secret_stays_with_the_provider_and_the_address_it_was_stated_for(change: Any, secret: str | None) -> None:
    headers = {"x-team": "blue", "x-gateway": "os.environ/NEW_API_KEY"}
    record = a_record("new", model="openai/new", api_base="http://127.0.0.1:9/v1", extra_headers=headers)
    patch = {"litellm_params": change}
    if secret is None:
        read_patch(patch, record, Settings(), ENVIRON)
        return
    with pytest.raises(BadRequest) as caught:
        read_patch(patch, record, Settings(), ENVIRON)
    assert caught.value.param == f"litellm_params.{secret}"


def test_what_is_shown_of_a_model_holds_no_secret_however_it_came_there() -> None:
    body = {"a": [{"token": "canary4"}], "max_tokens": 3, "note": "Bearer canary5", "u": "http://a@h?k=canary6"}
    base = "https://me:canary1@h/v1?api-version=1&sig=canary2&team=canary3"
    headers = {"x": "canary7", "y": "os.environ/Y_API_KEY"}
    shown = redact_params({"model": "openai/x", "api_base": base, "extra_body": body, "headers": headers, "top_p": 1})
    assert "canary" not in str(shown)
    assert shown["api_base"] == "https://***@h/v1?api-version=1&sig=***&team=***"
    assert (shown["extra_body"]["max_tokens"], shown["headers"]["y"]) == (3, "os.environ/Y_API_KEY")


def test_a_price_is_whole() -> None:
    whole = {"input_cost_per_token": 1e-6, "output_cost_per_token": 0, "cache_read_input_token_cost": None}

    assert read_price(whole) == Price(1e-6, 0.0)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_cost_per_token": 1e-6},
        {"input_cost_per_token": "1", "output_cost_per_token": 1},
        {"input_cost_per_token": True, "output_cost_per_token": 1},
        {"input_cost_per_token": -1, "output_cost_per_token": 1},
        {"input_cost_per_token": 10**400, "output_cost_per_token": 1},
        {"input_cost_per_token": 1, "output_cost_per_token": 1, "output_price": 1},
    ],
)
def test_a_wrong_price_is_refused(body: Any) -> None:
    with pytest.raises((BadRequest, InvalidInput)):
        read_price(body)


def test_no_secret_is_shown() -> None:
    shown = redact_params(
        {"model": "m", "api_key": "sk-x", "extra_headers": {"a": "sk-y"}, "max_tokens": 5, "aws_secret_access_key": "z"}
    )

    assert shown == {
        "model": "m",
        "api_key": "***",
        "extra_headers": {"a": "***"},
        "max_tokens": 5,
        "aws_secret_access_key": "***",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra_headers", "x"),
        ("extra_headers", {"X-Team": 5}),
        ("extra_headers", {"X-Team": "a\r\nb"}),
        ("extra_body", "x"),
        ("system", 5),
        ("organization", 5),
        ("custom_llm_provider", 5),
        ("api_base", "http://127.0.0.1:9/v1\r\nX: y"),
    ],
)
def test_parameters_that_every_call_would_stumble_over_are_refused_at_once(field: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"litellm_params.{field}"):
        addition({field: value})
