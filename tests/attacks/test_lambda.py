from __future__ import annotations

import pytest

from tests.attacks.conftest import Attacked
from tests.support.raw_http import Answer, send

BODY = b'{"model":"auto","messages":[{"role":"user","content":"hi"}]}'


def ask(attacked: Attacked, *lines: bytes) -> Answer:
    head = [b"POST /v1/route HTTP/1.1", b"host: localhost", b"content-length: %d" % len(BODY), *lines]
    (answer,) = send(attacked.address, b"\r\n".join(head) + b"\r\n\r\n" + BODY)
    return answer


@pytest.mark.parametrize("name", [b"lambda", b"x-uniroute-lambda", b"Lambda"])
@pytest.mark.parametrize(
    "value",
    [
        b"NaN", b"nan", b"inf", b"-inf", b"Infinity", b"1e309", b"-1", b"-0.1", b"-1e-400x", b"0,5", b"1.000,5", b"",
        "０.５".encode(), "٠٫٥".encode(), "½".encode(), "०.५".encode(), "0.5\u200b".encode(), b"\xbd",
        b"  ", b"0x1", b"0b1", b"1_0",
        b"0.1 0.2", b"0.1;", b"0.1, 0.2", b"--1", b"+-1", b"1e", b"e5", b".", b"true", b"null", b"0.1#", b"'0.1'",
        b"1e99999999999", b"1e13", b"1e308", b"9" * 400, b"0.1\x0b", b"{{1}}", b"__import__('os')", b"1/2",
    ],
)  # fmt: skip
def test_an_invalid_lambda_is_refused_and_named(attacked: Attacked, name: bytes, value: bytes) -> None:
    answer = ask(attacked, name + b": " + value)

    assert answer.status == 400
    assert answer.json()["error"]["param"] in (name.decode().lower(), None)


@pytest.mark.parametrize("value", [b"0.4\rlambda: 9", b"0.4\nlambda: 9", b"0.4\x00", b"0\r\n .4"])
def test_a_lambda_cannot_hide_a_second_header(attacked: Attacked, value: bytes) -> None:
    answer = ask(attacked, b"lambda: " + value)

    assert (answer.status, answer.code) == (400, "invalid_http_request")


@pytest.mark.parametrize(
    "lines",
    [
        (b"lambda: 0.1", b"lambda: 0.1"),
        (b"lambda: 0.1", b"Lambda: 9"),
        (b"lambda: 0.1", b"x-uniroute-lambda: 0.1"),
        (b"x-uniroute-lambda: 0.1", b"x-uniroute-lambda: 9"),
        (b"lambda:", b"lambda: 0.1"),
    ],
)
def test_a_lambda_given_twice_is_refused(attacked: Attacked, lines: tuple[bytes, ...]) -> None:
    answer = ask(attacked, *lines)

    assert (answer.status, "more than once" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("value", "meant"),
    [(b"0", 0.0), (b"-0", 0.0), (b"-0.0", 0.0), (b"+1", 1.0), (b"1e-3", 0.001), (b"1e-999", 0.0), (b"\t0.5 \t", 0.5),
     (b"1e12", 1e12), (b"00.5", 0.5), (b"1.", 1.0)],
)  # fmt: skip
def test_a_valid_lambda_is_accepted(attacked: Attacked, value: bytes, meant: float) -> None:
    answer = ask(attacked, b"lambda: " + value)

    assert answer.status == 200
    assert str(answer.json()["lambda"]) == str(meant)
