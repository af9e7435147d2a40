from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.errors import UpstreamError
from proxy.server.responses import render_error
from proxy.upstream.circuit_breaker import FailureKind, classify_failure
from proxy.upstream.errors import error_from_body, error_from_response, find_error, not_a_completion


def http_error(status: int, body: Any, **headers: str) -> UpstreamError:
    return error_from_response(status, json.dumps(body).encode(), headers, "small")


def rendered(failure: UpstreamError) -> tuple[int, dict[str, Any]]:
    status, body, _ = render_error(failure)
    error = body["error"]
    assert all(error[name] is None or isinstance(error[name], str) for name in ("message", "type", "code"))
    return status, error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([{"error": {"code": 400, "message": "Unknown name", "status": "INVALID_ARGUMENT"}}], "Unknown name"),
        ({"success": False, "errors": [{"code": 5006, "message": "oneOf not met"}], "messages": []}, "oneOf not met"),
        ({"errors": ["first", "second"]}, "first"),
        ({"error": "model not loaded"}, "model not loaded"),
        ({"error": {"message": {"text": 5, "detail": "deep"}}}, "deep"),
        ({"detail": [{"loc": ["body", "x"], "msg": "field required"}]}, "body.x: field required"),
        ({"object": "error", "message": {"detail": [{"loc": ["n"], "msg": "no"}]}}, "n: no"),
        ({"base_resp": {"status_code": 2013, "status_msg": "invalid params"}}, "invalid params"),
        ({"title": "Gone", "detail": "not here", "status": 404}, "not here"),
        ({"Message": "as AWS says it"}, "as AWS says it"),
        ("only a text", "only a text"),
    ],
)
def test_the_first_text_in_an_error_is_its_message(body: Any, words: str) -> None:
    assert rendered(http_error(400, body))[1]["message"] == words


def test_an_error_without_a_message_is_passed_on_shortened() -> None:
    assert rendered(http_error(400, {"fault": 7}))[1]["message"] == 'small answered with status 400: {"fault": 7}'
    assert len(rendered(http_error(400, {"fault": list(range(999))}))[1]["message"]) < 600
    assert rendered(error_from_response(500, b"", {}, "small"))[1]["message"] == "small answered with status 500"


def test_members_beside_a_flat_message_belong_to_the_error() -> None:
    body = {"object": "error", "message": "too warm", "type": "BadRequestError", "param": "temperature", "code": 400}
    _, error = rendered(http_error(400, body))
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "temperature", "400")


@pytest.mark.parametrize("members", [{"code": 429}, {"code": "429"}, {"status": 429}, {"status_code": 429}])
def test_an_error_has_the_status_that_it_states(members: dict[str, Any]) -> None:
    body = {"error": {"message": "slow down", **members}}
    assert (
        http_error(500, body).status
        == error_from_body("x", body).status
        == not_a_completion("small", body).status
        == 429
    )


@pytest.mark.parametrize("members", [{"code": 200}, {"code": 5006}, {"code": True}, {"code": "4290"}, {"status": "x"}])
def test_other_numbers_are_no_status_of_an_error(members: dict[str, Any]) -> None:
    body = {"error": {"message": "no", **members}}
    assert (http_error(418, body).status, error_from_body("x", body).status) == (418, 502)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"type": "rate_limit_error", "message": "no"}}, 429),
        ({"error": {"status": "RESOURCE_EXHAUSTED", "message": "no"}}, 429),
        ({"base_resp": {"status_code": 1002, "status_msg": "rate limit exceeded(RPM)"}}, 429),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, 503),
        ({"error": {"type": "invalid_request_error", "message": "no"}}, 400),
        ({"error": {}}, 502),
    ],
)
def test_an_error_without_a_number_gets_its_status_by_its_name_or_message(body: dict[str, Any], status: int) -> None:
    assert error_from_body("x", find_error(body)).status == status


OVERFLOWS = [
    "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.",
    "Your input exceeds the context window of this model.",
    "the request exceeds the available context size, try increasing it",
    "Context size has been exceeded.",
    "prompt is too long: 210000 tokens > 200000 maximum",
    "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
    "Input is too long for requested model.",
    "Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
    "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
    "Your request exceeded model token limit: 131072",
    "invalid params, context window exceeds limit",
    "the input length exceeds the context length",
    "prompt too long; exceeded max context length by 12 tokens",
    "Range of input length should be [1, 30720]",
    "`inputs` tokens + `max_new_tokens` must be <= 4097",
    "too many tokens: total number of tokens in the prompt cannot exceed 4081",
    "Trying to keep the first 5000 tokens when context the overflows. It has a context length of only 4096 tokens",
]


@pytest.mark.parametrize("words", OVERFLOWS)
def test_a_prompt_beyond_the_context_window_is_status_400_wherever_the_server_says_so(words: str) -> None:
    body = {"error": {"code": 500, "message": words, "type": "server_error"}}
    for failure in (
        http_error(500, body),
        http_error(400, body["error"]),
        error_from_body("x", body),
        error_from_body("x", words),
    ):
        status, error = rendered(failure)
        assert (status, error["code"], failure.retryable) == (400, "context_length_exceeded", True)
        assert classify_failure(failure, 0.0).kind is FailureKind.CALLER_ERROR


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (413, "Request too large on tokens per minute (TPM): Limit 6000, Requested 7000"),
        (400, "too many tokens: 40,000 per minute are allowed"),
        (429, "This would exceed the rate limit of 40,000 input tokens; your prompt is too long"),
        (500, "failed to allocate a KV cache for a context size of 8192"),
        (401, "no context window for this key"),
        (500, "CUDA out of memory"),
    ],
)
def test_other_limits_do_not_count_as_the_context_window(status: int, words: str) -> None:
    failure = http_error(status, {"error": {"message": words}})
    assert (failure.context_exceeded, failure.status) == (False, status)


def test_the_code_for_a_prompt_beyond_the_context_window_is_enough() -> None:
    assert http_error(400, {"error": {"code": "context_length_exceeded", "message": "no"}}).context_exceeded
    assert error_from_body("x", {"error": {"type": "exceed_context_size_error", "message": "no"}}).context_exceeded


@pytest.mark.parametrize(
    "members",
    [
        {"retry_after": 7},
        {"retry_after_seconds": 6.5},
        {"details": [{"@type": "RetryInfo", "retryDelay": "6.07s"}]},
        {"metadata": {"headers": {"Retry-After": "7"}}},
    ],
)
def test_a_wait_stated_in_the_body_counts_if_no_header_states_one(members: dict[str, Any]) -> None:
    body = {"error": {"code": 429, "message": "slow", **members}}
    assert error_from_body("x", body).headers == {"retry-after": "7"}
    assert http_error(429, body, **{"Retry-After": "3"}).headers == {"retry-after": "3"}
    assert classify_failure(error_from_body("x", body), 0.0).wait_s == 7.0


@pytest.mark.parametrize(
    "body",
    [
        *({"error": {}}, {"error": ""}, {"error": []}, {"error": "boom"}, {"choices": [], "error": {"code": 5}}),
        *({"object": "error", "message": "boom"}, {"type": "error"}, {"errors": ["boom"]}, [{"error": {}}]),
        *({"choices": [{"error": {}}]}, {"choices": [{"delta": {}, "finish_reason": "error"}]}),
        *({"base_resp": {"status_code": 1000}}, {"success": False}, {"status": "error"}, {"detail": "boom"}),
    ],
)
def test_every_way_to_report_an_error_is_recognised(body: Any) -> None:
    assert find_error(body) is not None


@pytest.mark.parametrize(
    "body",
    [
        *({"error": None, "choices": []}, {"error": False, "choices": []}, {"errors": [], "choices": []}, {}, [], 5),
        *({"choices": [{"error": None, "finish_reason": "stop"}]}, {"base_resp": {"status_code": 0}}),
        *({"choices": [{"delta": {"content": "error"}}], "detail": "x", "status": "failed"}, {"type": "ping"}),
    ],
)
def test_a_body_that_reports_no_error_is_none(body: Any) -> None:
    assert find_error(body) is None


def test_members_of_a_completion_are_left_out_of_its_error() -> None:
    answer = {
        "choices": [{"message": {"content": "half"}}],
        "usage": {},
        "error": {"message": "gone"},
        "request_id": "r",
    }
    _, body, _ = render_error(not_a_completion("small", answer))
    assert set(body) == {"error", "request_id"}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [], "usage": {"prompt_tokens": 3}, "error": {"message": "gone"}},
        {"choices": [{"delta": {}, "finish_reason": "error"}], "usage": {"prompt_tokens": 3}},
    ],
)
def test_the_usage_of_a_failed_answer_is_kept(answer: dict[str, Any]) -> None:
    body: Any = not_a_completion("small", answer).body
    assert body["usage"] == {"prompt_tokens": 3}


def test_the_message_of_a_long_error_within_a_success_is_kept() -> None:
    body = {"error": {"message": "gone", "code": 503}, "more": ["x"] * 9999}
    assert not_a_completion("small", body).body == {"error": {"message": "gone", "code": 503}}
