from __future__ import annotations

from typing import Any

import pytest
from annotated_types import Ge, Le

from proxy.errors import BadRequest
from proxy.server.admin_bodies import (
    ModelPatch,
    NewKey,
    NewModel,
    PriceBody,
    ProfileDocument,
    ProfileRequest,
    Reprofile,
)
from proxy.server.admin_responses import redact_params
from proxy.server.strict_bodies import parse_body
from proxy.settings.schema import ProfileSettings, Settings
from proxy.storage.records import ModelRecord
from router_core.errors import InvalidInput
from router_core.profiles import Profile
from router_core.types import Price
from tests.support.makers import CORNERS, a_profile, a_record

ENVIRON = {"NEW_API_KEY": "secret", "OTHER": "x", "UNIROUTE_ADMIN_KEY": "admin-key"}
SETTINGS = Settings(route_names=("gpt-4o",))
PARAMS: Any = {"model": "openai/new", "api_base": "http://127.0.0.1:9/v1", "api_key": "os.environ/NEW_API_KEY"}


def new_model(params: Any = None, **body: Any) -> NewModel:
    return parse_body(NewModel, {"model_name": "team/new", "litellm_params": {**PARAMS, **(params or {})}, **body})


def new_record(params: Any = None, **body: Any) -> ModelRecord:
    return new_model(params, **body).to_record(SETTINGS, ENVIRON, 1.0)


def new_profile(document: Any) -> Profile:
    profile = new_model(profile=document).profile
    assert isinstance(profile, ProfileDocument)
    return profile.to_profile(CORNERS)


def patched(record: ModelRecord, patch: Any) -> ModelRecord:
    return parse_body(ModelPatch, patch).apply_to(record, Settings(), ENVIRON)


def price(body: Any) -> Price:
    return parse_body(PriceBody, body).to_price()


@pytest.mark.parametrize(
    ("body", "prompts", "max_usd"),
    [
        ({}, 60, 1.0),
        ({"profile": None}, 60, 1.0),
        ({"profile": {"prompts": 5, "max_usd": 0.1}}, 5, 0.1),
        ({"profile": {"max_usd": 0}}, 60, 0.0),
    ],
)
def test_a_model_is_profiled_as_the_settings_say_unless_the_body_says_otherwise(
    body: Any, prompts: int, max_usd: float
) -> None:
    profile = new_model(**body).profile

    assert isinstance(profile, ProfileRequest)
    merged = profile.with_defaults(SETTINGS)
    assert (merged.prompts, merged.max_usd) == (prompts, max_usd)


def test_the_bounds_of_a_profile_request_are_those_of_the_settings() -> None:
    bounds = [kind.model_fields["prompts"].metadata for kind in (ProfileRequest, ProfileSettings)]

    assert [[each for each in found if isinstance(each, Ge | Le)] for found in bounds] == [[Ge(1), Le(1000)]] * 2


def test_a_new_model_is_an_administrators_and_litellms_own_info_is_left_out() -> None:
    record = new_record(model_info={"free": True, "team_id": "t1"})

    assert (record.name, record.source, record.info.free) == ("team/new", "admin", True)
    assert record.info.model_dump(exclude_defaults=True) == {"free": True}


def test_a_measured_profile_is_taken_if_it_is_of_this_map() -> None:
    assert new_profile(a_profile().to_json()).map_id == CORNERS.id
    with pytest.raises(BadRequest, match="measured on map"):
        new_profile(a_profile(map_id="other").to_json())
    with pytest.raises(InvalidInput):
        new_profile({"map": CORNERS.id, "errors": [2.0] * 4, "labels": [1.0] * 4})


@pytest.mark.parametrize("wrap", [lambda profile: profile, lambda profile: {"profile": profile}])
def test_a_profile_is_stated_bare_or_as_a_member(wrap: Any) -> None:
    assert isinstance(parse_body(Reprofile, wrap(a_profile().to_json())).profile, ProfileDocument)
    for wrong in ({"prompts": 0}, {"promts": 1}):
        with pytest.raises(BadRequest) as caught:
            parse_body(Reprofile, wrap(wrong))
        assert caught.value.param == f"profile.{next(iter(wrong))}"


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
def test_a_wrong_body_of_a_new_model_names_its_field(body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        new_record(**body)

    assert caught.value.param == param
    assert "sk-literal" not in caught.value.message


def test_fixed_parameters_of_a_model_are_taken() -> None:
    params = {
        "temperature": 0.2,
        "max_tokens": 5,
        "system": "Be brief.",
        "top_k": 3,
        "extra_headers": {"x-team": "blue"},
    }

    assert new_record(params).litellm_params == {**PARAMS, **params}


def test_a_patch_replaces_the_stated_fields_and_null_removes() -> None:
    record = a_record("new", temperature=0.2, api_key="os.environ/NEW_API_KEY")
    patch: Any = {"litellm_params": {"temperature": None, "top_p": 0.5}, "model_info": {"max_input_tokens": 10}}
    changed = patched(record, patch)

    assert "temperature" not in changed.litellm_params
    assert (changed.litellm_params["top_p"], changed.info.max_input_tokens) == (0.5, 10)
    assert changed.info.input_cost_per_token == record.info.input_cost_per_token


def test_a_new_address_needs_the_key_stated_again() -> None:
    record = a_record("new", api_key="os.environ/NEW_API_KEY")
    moved: Any = {"litellm_params": {"api_base": "http://elsewhere.example/v1"}}
    with pytest.raises(BadRequest, match="state `api_key` again"):
        patched(record, moved)
    moved["litellm_params"]["api_key"] = "os.environ/NEW_API_KEY"

    assert patched(record, moved).litellm_params["api_base"] == "http://elsewhere.example/v1"


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
        patched(record, patch)
        return
    with pytest.raises(BadRequest) as caught:
        patched(record, patch)
    assert caught.value.param == f"litellm_params.{secret}"


def test_the_shown_parameters_hold_no_secret_wherever_it_was_hidden() -> None:
    body = {"a": [{"token": "canary4"}], "max_tokens": 3, "note": "Bearer canary5", "u": "http://a@h?k=canary6"}
    base = "https://me:canary1@h/v1?api-version=1&sig=canary2&team=canary3"
    headers = {"x": "canary7", "y": "os.environ/Y_API_KEY"}
    redacted = redact_params(
        {"model": "openai/x", "api_base": base, "extra_body": body, "headers": headers, "top_p": 1}
    )
    assert "canary" not in str(redacted)
    assert redacted["api_base"] == "https://***@h/v1?api-version=1&sig=***&team=***"
    assert (redacted["extra_body"]["max_tokens"], redacted["headers"]["y"]) == (3, "os.environ/Y_API_KEY")


def test_a_price_needs_input_and_output_alone() -> None:
    whole = {"input_cost_per_token": 1e-6, "output_cost_per_token": 0, "cache_read_input_token_cost": None}

    assert price(whole) == Price(1e-6, 0.0)


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
        price(body)


def test_literal_secrets_are_not_shown() -> None:
    redacted = redact_params(
        {"model": "m", "api_key": "sk-x", "extra_headers": {"a": "sk-y"}, "max_tokens": 5, "aws_secret_access_key": "z"}
    )

    assert redacted == {
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
def test_parameters_that_would_break_every_call_are_refused_at_once(field: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"litellm_params.{field}"):
        new_record({field: value})


NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("expiry", "expires_at"),
    [
        ({}, None),
        ({"expires_in_s": 60}, NOW + 60),
        ({"expires_in_s": None, "expires_at": "2023-11-14T22:13:21Z"}, NOW + 1),
        ({"expires_at": None}, None),
    ],
)
def test_a_new_key_expires_at_a_time_or_after_some_seconds(expiry: Any, expires_at: float | None) -> None:
    change = parse_body(NewKey, {"name": "team", **expiry}).to_change(NOW)

    assert change.fields.get("expires_at") == expires_at
    assert change.fields["name"] == "team"


def test_limits_of_a_new_key_are_kept_apart_and_no_role_is_the_clients() -> None:
    change = parse_body(NewKey, {"name": "t", "role": None, "usd_per_day": 5, "models": ["b", "a", "b"]}).to_change(NOW)

    assert (change.fields["role"], change.fields["models"]) == ("client", ("b", "a"))
    assert change.limits == {"usd_per_day": 5}


def test_an_unknown_field_of_a_key_names_the_closest_one() -> None:
    with pytest.raises(BadRequest, match="did you mean `requests_per_minute`") as caught:
        parse_body(NewKey, {"name": "t", "requests_per_minut": 5})

    assert caught.value.param == "requests_per_minut"
