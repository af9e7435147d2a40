from __future__ import annotations

import json
import resource
from typing import Any

import pytest

from proxy.errors import BadRequest, FieldNotAllowed
from proxy.json_text import MAX_DEPTH
from proxy.routing.chat_request import ChatRequest, ProviderPreferences, parse_chat, parse_object
from proxy.settings.litellm_params import COMMON_FIELDS, is_control_field

ASK: Any = [{"role": "user", "content": "hi"}]


def parsed(headers: list[tuple[str, str]] | None = None, /, **body: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "auto", "messages": ASK, **body}).encode(), headers or [])


def test_the_body_is_kept_without_our_own_fields() -> None:
    request = parsed(top_k=1, metadata={"a": "b"}, uniroute={"session": "s"}, models=["a"], route="x", provider={})

    assert request.body == {"model": "auto", "messages": ASK, "top_k": 1, "metadata": {"a": "b"}}


def test_the_bytes_are_kept_as_they_came() -> None:
    raw = b' {"model" : "auto", "messages": [{"role": "user", "content": "\\u0068i"}]} '

    assert parse_chat(b"\xef\xbb\xbf" + raw, []).raw == raw


def test_the_bytes_are_not_kept_where_some_of_them_are_ours() -> None:
    assert parse_chat(b'{"model": "auto", "uniroute": {}, "messages": [{"role": "user"}]}', []).raw is None


def test_usage_is_asked_for_only_by_include_usage() -> None:
    assert parsed(stream=True, stream_options={"include_usage": True}).include_usage
    assert not parsed(stream=True, stream_options={"include_usage": False}).include_usage
    assert not parsed(stream=True, stream_options=None).include_usage


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"models": "a"}, "models"),
        ({"uniroute": []}, "uniroute"),
        ({"uniroute": {"models": []}}, "uniroute.models"),
        ({"uniroute": {"session": "x" * 256}}, "uniroute.session"),
        ({"uniroute": {"fallbacks": 1}}, "uniroute.fallbacks"),
        ({"uniroute": {"lambda": "0.1"}}, "uniroute.lambda"),
        ({"uniroute": {"lambda": True}}, "uniroute.lambda"),
        ({"uniroute": {"lambda": -1}}, "uniroute.lambda"),
        ({"uniroute": {"max_cost_usd": 10**400}}, "uniroute.max_cost_usd"),
        ({"provider": []}, "provider"),
        ({"provider": {"allow_fallbacks": "no"}}, "provider.allow_fallbacks"),
        ({"provider": {"only": "small"}}, "provider.only"),
        ({"provider": {"ignore": [3]}}, "provider.ignore"),
        ({"provider": {"max_price": 3}}, "provider.max_price"),
        ({"provider": {"max_price": {"input": 3}}}, "provider.max_price"),
        ({"provider": {"max_price": {"prompt": -1}}}, "provider.max_price.prompt"),
        ({"provider": {"max_price": {"prompt": True}}}, "provider.max_price.prompt"),
        ({"provider": {"max_price": {"prompt": 10**400}}}, "provider.max_price.prompt"),
        ({"provider": {"max_price": {"completion": "1,5"}}}, "provider.max_price.completion"),
        ({"provider": {"max_price": {"completion": "٣"}}}, "provider.max_price.completion"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parsed(**body)

    assert caught.value.param == param


def test_openrouters_provider_is_read_as_far_as_it_means_something_here() -> None:
    preferences = {
        "only": ["a", "a"],
        "ignore": ["b"],
        "sort": "price",
        "max_price": {"prompt": 2, "completion": "1.5"},
    }
    read = parsed(provider=preferences).options.provider

    assert (read.only, read.ignore) == (("a",), ("b",))
    assert (read.max_input_cost_per_token, read.max_output_cost_per_token) == (2e-6, 1.5e-6)
    assert (
        parsed(provider={"max_price": {"prompt": None, "request": 1, "image": 2}}).options.provider
        == ProviderPreferences()
    )
    assert parsed(provider=None).options.provider == ProviderPreferences()


@pytest.mark.parametrize("name", ["lambda", "x-uniroute-lambda"])
@pytest.mark.parametrize(("text", "value"), [("0.4", 0.4), ("0", 0.0), ("-0", 0.0), ("1e-3", 0.001), (".5", 0.5)])
def test_lambda_is_read_from_either_header(name: str, text: str, value: float) -> None:
    lambda_ = parsed([(name, text)]).options.lambda_

    assert lambda_ == value
    assert str(lambda_) == str(value)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "inf",
        "-1",
        "0,5",
        "1e309",
        "",
        "０.５",
        "٠.٥",
        "0x1",
        "1_0",
        "0.1 0.2",
        "0.1\x00",
        "--1",
        "1e",
        "Infinity",
    ],
)
def test_a_wrong_lambda_is_refused_naming_the_header(text: str) -> None:
    with pytest.raises(BadRequest, match="lambda") as caught:
        parsed([("lambda", text)])

    assert caught.value.param == "lambda"


@pytest.mark.parametrize("second", ["lambda", "x-uniroute-lambda"])
def test_a_repeated_lambda_is_refused(second: str) -> None:
    with pytest.raises(BadRequest, match="more than once"):
        parsed([("lambda", "0.1"), (second, "0.1")])


def test_the_body_wins_over_the_header() -> None:
    assert parsed([("lambda", "0.9")], uniroute={"lambda": 0}).options.lambda_ == 0.0


def test_openrouters_extras_have_a_meaning() -> None:
    options = parsed(models=["a", "b", "a"], provider={"allow_fallbacks": False}).options

    assert (options.models, options.fallbacks) == (("a", "b"), False)


@pytest.mark.parametrize(
    "path",
    ["api_base", "API_KEY", "headers", "litellm_params", "mock_response", "aws_region_name", "vertex_project",
     "_skip_mcp_handler", "num_retries", "no-log", "extra_body.api_base", "extra_body.deep.er.base_url",
     "metadata.api_key", "metadata.deep.headers"],
)  # fmt: skip
def test_a_control_field_is_refused_wherever_it_reaches_the_provider_layer(path: str) -> None:
    first, *rest = path.split(".")
    value: Any = "http://evil.example"
    for name in reversed(rest):
        value = [{name: value}] if name == "er" else {name: value}
    with pytest.raises(FieldNotAllowed) as caught:
        parsed(**{first: value})

    assert caught.value.param == path


def test_no_field_that_is_taken_for_usual_is_a_control_field() -> None:
    assert [name for name in COMMON_FIELDS if is_control_field(name) or name != name.strip().lower()] == []


def test_content_may_use_every_word() -> None:
    schema = {"type": "object", "properties": {"api_key": {"type": "string"}, "headers": {"type": "object"}}}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi", "api_key": "x"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        "guided_json": schema,
        "metadata": {"client_id": "1", "prompt_id": "p", "cache_key": "c", "tenant_id": "t"},
    }

    assert parsed(**body).body == {"model": "auto", **body}


def test_depth_is_bounded_and_not_by_the_stack() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"1" + b"}" * levels

    assert parse_object(nested(MAX_DEPTH - 1))
    for levels in (MAX_DEPTH + 1, 900, 200_000):
        with pytest.raises(BadRequest, match="nested deeper"):
            parse_object(nested(levels))


@pytest.mark.parametrize("flood", [b"{},", b'"",', b"[],", b"1,"])
def test_millions_of_values_are_refused_before_they_are_made(flood: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRequest, match="more than 300000 values"):
        parse_object(b'{"a":[' + flood * 3_000_000 + b"1]}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000  # KiB; parsed they take more


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[]", b"1", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}'])
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_object(raw)


@pytest.mark.parametrize("n", [0, -1, 129, 10**9, 1.5, "2", True])
def test_a_number_of_answers_that_no_server_gives_is_refused(n: Any) -> None:
    with pytest.raises(BadRequest, match="`n` must be a whole number from 1 to 128"):
        parse_chat(json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hi"}], "n": n}).encode(), [])
