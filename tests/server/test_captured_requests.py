"""Send what clients have sent, byte for byte but for texts, and read the answers as they do."""

from __future__ import annotations

import httpx
import pytest

from tests.server.conftest import BOTH_MODES, Fleet
from tests.support.captured_requests import NAMES, read_captured
from tests.support.client_apis import ask
from tests.support.scripted_answers import Step, error_body

pytestmark = [BOTH_MODES, pytest.mark.parametrize("name", NAMES)]


def test_a_captured_request_is_answered(http: httpx.Client, fleet: Fleet, name: str) -> None:
    sent = read_captured(name)
    reply = ask(http, sent.api, sent.body, url=sent.path, headers=sent.headers)

    assert (reply.status, reply.errors, reply.complete) == (200, [], True)
    assert reply.text in ("The fair answer.", "The good answer.")


def test_a_captured_request_that_fails_is_told_so(http: httpx.Client, fleet: Fleet, name: str) -> None:
    sent = read_captured(name)
    for upstream in (fleet.fair, fleet.good):
        upstream.always = Step(status=400, body=error_body("no such thing", "invalid_request_error", None))
    reply = ask(http, sent.api, sent.body, url=sent.path, headers=sent.headers)

    assert (reply.status, reply.errors[0]["error"]["message"]) == (400, "no such thing")
