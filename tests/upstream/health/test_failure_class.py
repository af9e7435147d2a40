"""The table of what a failure says of its model, row by row."""

from __future__ import annotations

import pytest

from proxy.errors import UpstreamError
from proxy.upstream.circuit_breaker import FailureKind, classify_failure
from tests.upstream.health.makers import a_failure

WEIGHTS = {
    FailureKind.TRANSIENT: [408, 429, 500, 501, 502, 503, 504, 529, 599],
    FailureKind.OPENS_AT_ONCE: [401, 402],
    FailureKind.OPENS_UNLESS_HEALTHY: [403, 404, 405, 410],
    FailureKind.CALLER_ERROR: [400, 409, 413, 415, 422, 425, 451],
}
ROWS = [(status, weight) for weight, statuses in WEIGHTS.items() for status in statuses]


@pytest.mark.parametrize(("status", "weight"), ROWS)
def test_each_status_has_its_kind_of_failure(status: int, weight: FailureKind) -> None:
    verdict = classify_failure(a_failure(status), 0.0)
    assert (verdict.kind, verdict.why, verdict.wait_s) == (weight, f"status {status}", None)


@pytest.mark.parametrize("timed_out", [True, False])
def test_no_response_is_transient(timed_out: bool) -> None:
    verdict = classify_failure(UpstreamError("x", timed_out=timed_out), 0.0)
    assert verdict.kind is FailureKind.TRANSIENT
    assert ("time" in verdict.why) is timed_out


@pytest.mark.parametrize(("status", "honoured"), [(429, True), (503, True), (529, True), (500, False), (400, False)])
def test_a_wait_is_honoured_for_the_statuses_that_may_state_one(status: int, honoured: bool) -> None:
    verdict = classify_failure(a_failure(status, headers={"retry-after": "9"}), 0.0)
    assert verdict.wait_s == (9.0 if honoured else None)
    assert (verdict.kind is FailureKind.OPENS_AT_ONCE) is honoured


def test_a_garbled_wait_leaves_what_the_status_says() -> None:
    assert classify_failure(a_failure(429, headers={"retry-after": "-5"}), 0.0).kind is FailureKind.TRANSIENT


def test_a_request_that_was_refused_before_it_was_sent_says_nothing_of_the_model() -> None:
    assert classify_failure(a_failure(400, body=None, retryable=True), 0.0).kind is FailureKind.NOT_SENT
