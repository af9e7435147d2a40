from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import CANARY, Fleet
from tests.support.scripted_answers import Step, error_body

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstreams_status_and_message_are_passed_on(
    client: openai.OpenAI, fleet: Fleet, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    fleet.fair.then(Step(status=status, body=error_body("their words", "their_type", "their_code")))
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="fair", messages=ASK, stream=stream)

    error = dict(caught.value.body)  # type: ignore[call-overload]
    assert error.pop("message").endswith("their words")
    assert error == {"type": "their_type", "param": None, "code": "their_code"}
    assert caught.value.response.headers["x-uniroute-model"] == "fair"
    assert len(fleet.fair.history) == 1


def test_retry_after_is_kept_and_a_numeric_code_becomes_text(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(Step(status=429, headers={"retry-after": "7"}, body={"error": {"message": "slow", "code": 1302}}))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="fair", messages=ASK)

    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.code == "1302"


def test_a_plain_text_error_is_put_into_openais_shape(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(Step(status=413, body=b"<html>too big</html>"))
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="fair", messages=ASK)

    assert caught.value.status_code == 413
    assert caught.value.body == {
        "message": "<html>too big</html>",
        "type": "upstream_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_status_200_with_an_error_body_is_an_error(client: openai.OpenAI, fleet: Fleet, stream: bool) -> None:
    fleet.fair.then(Step(body=error_body("no", "their_type", "no_quota")))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="fair", messages=ASK, stream=stream)

    assert caught.value.status_code == 502
    assert caught.value.code == "no_quota"


def test_a_redirect_is_not_followed(client: openai.OpenAI, fleet: Fleet) -> None:
    fleet.fair.then(Step(status=307, headers={"location": f"{fleet.good.url}/chat/completions"}, body=b""))
    with pytest.raises(openai.InternalServerError, match="redirect"):
        client.chat.completions.create(model="fair", messages=ASK)

    assert fleet.good.history == []


def test_an_unknown_routing_option_is_refused_with_the_nearest_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean `max_cost_usd`"):
        client.chat.completions.create(model="auto", messages=ASK, extra_body={"uniroute": {"max_cost": 1}})


def test_a_wrong_lambda_is_refused_and_named(client: openai.OpenAI, fleet: Fleet) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="auto", messages=ASK, extra_headers={"lambda": "0,5"})

    assert caught.value.param == "lambda"
    assert fleet.fair.history == fleet.good.history == []


@pytest.mark.parametrize("field", ["api_base", "extra_headers", "mock_response", "aws_secret_access_key", "fallbacks"])
def test_a_control_field_is_refused_and_named(client: openai.OpenAI, fleet: Fleet, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fair", messages=ASK, extra_body={field: "http://evil.example"})

    assert (caught.value.param, caught.value.code) == (field, "field_not_allowed")
    assert fleet.fair.history == []


def test_a_request_without_an_eligible_model_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="auto", messages=ASK, extra_body={"uniroute": {"max_cost_usd": 1e-12}})

    assert caught.value.code == "no_eligible_model"
    assert "fair" in caught.value.message


def test_an_unknown_model_among_the_candidates_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="auto", messages=ASK, extra_body={"uniroute": {"models": ["nobody"]}})

    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v2/chat/completions", 404)],
)
def test_every_error_is_json(http: httpx.Client, method: str, path: str, status: int) -> None:
    reply = http.request(method, str(http.base_url).rstrip("/") + path, content=b"{}")

    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"model": "auto", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"model": "auto", "messages": ' + b"[" * 2000 + b"]" * 2000 + b"}", {}, 400),
        (b'{"model": "auto", "max_tokens": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"model": "auto", "temperature": 1e999, "messages": [{}]}', {}, 400),
        (b'{"model": "auto", "temperature": NaN, "messages": [{}]}', {}, 400),
        (b"[]", {}, 400),
        (b"{}", {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-type": "multipart/form-data; boundary=x"}, 415),
        (b"\x1f\x8b", {"content-encoding": "gzip"}, 415),
        (b" " * 1_000_001, {}, 413),
    ],
)
def test_bad_bodies_are_refused_before_anything_else(
    http: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    sent = {"content-type": "application/json", **headers}
    reply = http.post("/v1/chat/completions", content=content, headers=sent)

    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_a_byte_order_mark_is_accepted(http: httpx.Client) -> None:
    body = b'\xef\xbb\xbf{"model": "fair", "messages": [{"role": "user", "content": "hi"}]}'
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    assert reply.json()["model"] == "fair"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ""}],
        [{"role": "assistant", "content": "hm"}],
        [{"role": "user", "content": 7}],
        [{"role": 3, "content": [None, 1, {"type": ["x"]}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "\u200b"}],
        [{}],
    ],
)
def test_odd_messages_are_routed_not_refused(http: httpx.Client, messages: Any) -> None:
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": messages})

    assert reply.status_code == 200


def test_the_provider_key_is_sent_to_the_upstream_only(http: httpx.Client, fleet: Fleet) -> None:
    fleet.fair.then(Step(status=500, body=b"boom"))
    failed = http.post("/v1/chat/completions", json={"model": "fair", "messages": ASK})
    seen = [failed.text, str(failed.headers), fleet.proxy.log, fleet.proxy.admin("GET", "/admin/models/fair").text]
    metrics = http.get("/metrics").text

    assert not any(CANARY in text for text in (*seen, metrics))
    assert "What is 2 + 2?" not in fleet.proxy.log + metrics
