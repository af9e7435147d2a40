from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from proxy.errors import APIError, ClientDisconnected, RateLimited, UpstreamError
from proxy.server.responses import ERROR_ANSWERS, HANDLED_EXCEPTIONS, error_response, render_error
from proxy.storage.client_keys import InvalidKey
from proxy.storage.redis import StoreUnavailable
from proxy.storage.registry import KeyInactive, RegistryError, UnknownKey
from router_core.errors import InvalidProfile, RouterCoreError


def below(kind: type[Exception]) -> Iterator[type[Exception]]:
    for each in kind.__subclasses__():
        yield each
        yield from below(each)


@pytest.mark.parametrize("root", [APIError, RegistryError])
def test_every_exception_that_a_request_can_end_with_has_a_response(root: type[Exception]) -> None:
    kinds = [kind for kind in below(root) if kind.__module__.startswith("proxy.")]

    assert kinds
    assert [kind.__name__ for kind in kinds if not any(listed in ERROR_ANSWERS for listed in kind.__mro__)] == []


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (UnknownKey("no client key has the id 'x'"), 404, "key_not_found", None),
        (KeyInactive("revoked"), 409, "conflict", None),
        (StoreUnavailable("away"), 503, "unavailable", None),
        (InvalidProfile("`labels` must be positive"), 400, None, None),
        (InvalidKey("`role` must be one of client, viewer, admin", "role"), 400, None, "role"),
    ],
)
def test_an_error_is_rendered_as_openai_writes_it(
    error: Exception, status: int, code: str | None, param: str | None
) -> None:
    rendered, body, headers = render_error(error)

    assert isinstance(error, HANDLED_EXCEPTIONS)
    assert (rendered, headers) == (status, {})
    assert body["error"] == {**body["error"], "message": str(error), "code": code, "param": param}


def test_headers_of_an_error_go_with_its_response() -> None:
    response = error_response(RateLimited("too many requests", headers={"retry-after": "3"}))

    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert json.loads(bytes(response.body))["error"]["code"] == "rate_limit_exceeded"


def test_a_model_that_did_not_answer_is_a_bad_gateway_and_a_client_that_left_gets_nothing() -> None:
    assert error_response(UpstreamError("no answer")).status_code == 502
    assert error_response(ClientDisconnected("gone")).status_code == 499


def test_the_cores_errors_reach_a_client_only_where_its_body_is_to_blame() -> None:
    named = {kind for kind in ERROR_ANSWERS if issubclass(kind, RouterCoreError)}

    assert {kind.__name__ for kind in named} == {"InvalidInput", "MapMismatch"}
