from __future__ import annotations

import pytest

from proxy.upstream.circuit_breaker import MAX_RETRY_AFTER_S, parse_retry_after, retry_after_headers

NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"Retry-After": " 0.5 "}, 0.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Fri, 15 Jan 2027 08:01:30 GMT"}, 90.0),
        ({"retry-after": "Fri, 15 Jan 2027 09:01:30 +0100"}, 90.0),
        ({"retry-after": "9" * 90}, MAX_RETRY_AFTER_S),
        ({"retry-after-ms": "9" * 90}, MAX_RETRY_AFTER_S),
        ({"retry-after": "Fri, 15 Jan 2038 08:00:00 GMT"}, MAX_RETRY_AFTER_S),
        ({"retry-after": "3600.5"}, MAX_RETRY_AFTER_S),
    ],
)
def test_seconds_milliseconds_and_dates_are_read(headers: dict[str, str], seconds: float) -> None:
    assert parse_retry_after(headers, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-3", "+3", "nan", "inf", "1e9", "soon", "7,5", "７", "9" * 101, "\x00"),
        *("Fri, 15 Jan 2027 07:59:59 GMT", "Fri, 99 Jan 2027 08:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 +2359"),
    ],
)
def test_nothing_negative_past_or_garbled_is(text: str) -> None:
    assert parse_retry_after({"retry-after": text}, NOW) is None
    assert parse_retry_after({}, NOW) is None


@pytest.mark.parametrize(
    ("received", "sent"),
    [
        ({"retry-after": "7"}, {"retry-after": "7"}),
        ({"Retry-After": "0.2"}, {"retry-after": "1"}),
        ({"retry-after": "9" * 90}, {"retry-after": "3600"}),
        ({"retry-after": "Fri, 15 Jan 2027 08:01:30 GMT"}, {"retry-after": "90"}),
        ({"retry-after": "Fri, 15 Jan 2999 08:00:00 GMT"}, {"retry-after": "3600"}),
        ({"retry-after-ms": "250", "retry-after": "7"}, {"retry-after": "1", "retry-after-ms": "250"}),
        ({"retry-after-ms": "9" * 90}, {"retry-after": "3600", "retry-after-ms": "3600000"}),
        *(({"retry-after": text}, {}) for text in ("", "-7", "nan", "inf", "1e9", "0", "soon", "9" * 101)),
        ({"x-request-id": "1"}, {"x-request-id": "1"}),
    ],
)
def test_a_client_gets_the_wait_that_the_circuit_breaker_uses(received: dict[str, str], sent: dict[str, str]) -> None:
    assert retry_after_headers(received, NOW) == sent
