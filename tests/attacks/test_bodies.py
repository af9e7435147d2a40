from __future__ import annotations

import gzip
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.conftest import ADMIN, ASK, MAX_BODY_BYTES, Attacked
from tests.support.client_apis import PATHS as CLIENT_API_PATHS

JSON = {"content-type": "application/json"}
PATHS = (
    *CLIENT_API_PATHS.values(),
    "/v1/messages/count_tokens",
    "/v1/responses/input_tokens",
    "/v1/embeddings",
    "/v1/route",
    "/admin/models",
)
START = b'{"model": "fair", "messages": [{"role": "user", "content": "hi"}], '
MIB = 2**20
BOMB = gzip.compress(b" " * 50 * MIB, mtime=0)


def post(http: httpx.Client, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    return http.post(path, content=content, headers={**ADMIN, **JSON, **(headers or {})})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"{}{}", "not JSON"), (b"{'a': 1}", "not JSON"), (b"\x00", "not JSON"),
        (b"null", "JSON object"), (b"[]", "JSON object"), (b'"x"', "JSON object"), (b"1", "JSON object"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"), (b'{"a": "\xed\xa0\x80"}', "UTF-8"), (b'{"a": "\xc0\xaf"}', "UTF-8"),
        (b'{"a": "\xf5\x80\x80\x80"}', "UTF-8"), (b'{"a": "\xe2\x82"}', "UTF-8"), (b'{"\xff": 1}', "UTF-8"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}', "not JSON"), (b'{"a": "\x01"}', "not JSON"),
        (b"{" + b'"a":1,' * 9, "not JSON"),
        (b'{"a": "\\ud800"}', "half a character"), (b'{"\\udfff": 1}', "half a character"),
        (b'{"a": ["\\ud83d", "\\ude00"]}', "half a character"),
        (b'{"a": NaN}', "NaN"), (b'{"a": Infinity}', "Infinity"), (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e309}', "too large"), (b'{"a": [-1e999]}', "too large"), (b'{"a": ' + b"9" * 10**5 + b"}", "digits"),
        (b'{"a": 0x1}', "not JSON"), (b'{"a": 01}', "not JSON"), (b'{"a": +1}', "not JSON"), (b'{"a": .5}', "not JSON"),
        (b"[" * 10**5, "nested deeper"), (b'{"a":' * 10**5, "nested deeper"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested deeper"),
        (b'{"a": [' + b"0," * 320_000 + b"0]}", "values"), (b'{"a": [' + b"[]," * 320_000 + b"0]}", "values"),
        (b'{"a": 1, "a": 1}', "twice"), (b'{"b": [{"a": 1, "\\u0061": 2}]}', "twice"),
    ],
)  # fmt: skip
def test_what_is_not_one_json_object_is_refused_everywhere(
    http: httpx.Client, path: str, content: bytes, says: str
) -> None:
    reply = post(http, path, content)

    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        b'"model": "good"}', b'"messages": []}', b'"\\u006dodel": "good"}', b'"stream": false, "stream": true}',
        b'"max_tokens": 1, "max_tokens": 9}', b'"tools": [{"type": "function", "type": "mcp"}]}',
        b'"uniroute": {"lambda": 0, "lambda": 9}}',
    ],
)  # fmt: skip
def test_a_json_key_given_twice_reaches_no_model(http: httpx.Client, attacked: Attacked, more: bytes) -> None:
    reply = post(http, "/v1/chat/completions", START + more)

    assert (reply.status_code, "twice" in reply.json()["error"]["message"]) == (400, True)
    assert attacked.fair.history == attacked.good.history == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "text/json"},
        {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "application/jsonp"},
        {"content-type": ""}, {"content-type": "application/json, text/plain"}, {"content-encoding": "gzip"},
        {"content-encoding": "br"}, {"content-encoding": "deflate"}, {"content-encoding": "gzip, identity"},
        {"content-encoding": "identity, gzip"}, {"content-encoding": "x"},
    ],
)  # fmt: skip
def test_other_content_types_are_not_read(http: httpx.Client, path: str, headers: dict[str, str]) -> None:
    assert post(http, path, BOMB, headers).status_code == 415


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_too_large_is_refused_by_its_content_length_only(http: httpx.Client, path: str) -> None:
    assert post(http, path, b" " * (MAX_BODY_BYTES + 1)).status_code == 413


def memory(pid: int) -> int:
    """Return the peak resident memory in bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("framing", ["content-length: 209715200", "transfer-encoding: chunked"])
@pytest.mark.parametrize("path", PATHS)
def test_two_hundred_megabytes_are_not_buffered(attacked: Attacked, path: str, framing: str) -> None:
    before = memory(attacked.server.pid)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {ADMIN['authorization']}\r\n{framing}\r\n\r\n"
    piece = b" " * MIB if "length" in framing else b"100000\r\n" + b" " * MIB + b"\r\n"
    with socket.create_connection(attacked.address, timeout=60) as connection:
        with suppress(ConnectionError):
            connection.sendall(head.encode())
            for _ in range(200):
                connection.sendall(piece)
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert memory(attacked.server.pid) - before < 20 * MIB


WRONG: list[Any] = [None, True, 0, -1, 1.5, 10**400, "", "x", [], [None], {}, {"a": None}, [[]], {"": {}}]
ODD: list[Any] = ["x", -1, 10**400, [None], {"a": {}}, True]
FIELDS = (
    *("model", "messages", "stream", "stream_options", "tools", "functions", "tool_choice", "response_format", "n"),
    *("max_tokens", "max_completion_tokens", "modalities", "audio", "temperature", "top_p", "stop", "logit_bias"),
    *("metadata", "user", "seed", "logprobs", "top_logprobs", "reasoning_effort", "parallel_tool_calls", "prediction"),
    *("models", "provider", "route", "uniroute", "extra_body", "prompt_cache_key", "thinking", "web_search_options"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_any_type_is_routed_or_refused(http: httpx.Client, attacked: Attacked, field: str) -> None:
    for value in WRONG:
        body = {"model": "auto", "messages": ASK, field: value}
        reply = post(http, "/v1/route", json.dumps(body).encode())
        assert reply.status_code in (200, 400, 404), (value, reply.text)
        assert reply.status_code == 200 or reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "field", ["lambda", "models", "max_cost_usd", "latency_weight", "session", "fallbacks", "none"]
)
def test_an_option_of_any_type_is_accepted_or_named(http: httpx.Client, field: str) -> None:
    for value in WRONG:
        body = {"model": "auto", "messages": ASK, "uniroute": {field: value}}
        reply = post(http, "/v1/route", json.dumps(body).encode())
        assert reply.status_code in (200, 400, 404), (value, reply.text)
        assert reply.status_code == 200 or reply.json()["error"]["param"] in (
            f"uniroute.{field}",
            "uniroute",
            "models",
            None,
        )


@pytest.mark.parametrize("field", ["model_name", "litellm_params", "model_info", "profile"])
def test_an_addition_of_any_type_is_refused(http: httpx.Client, field: str) -> None:
    good = {
        "model_name": "new",
        "litellm_params": {"model": "openai/x"},
        "model_info": {"free": True},
        "profile": {"prompts": 0},
    }
    by_default: list[Any] = [None, {}] if field == "profile" else []
    for value in (value for value in WRONG if value not in by_default):
        reply = post(http, "/admin/models", json.dumps({**good, field: value}).encode())
        assert reply.status_code == 400, (value, reply.text)
        assert reply.json()["error"]["message"]


@pytest.mark.parametrize("call", [("PATCH", "/admin/models/fair"), ("PUT", "/admin/models/fair/pricing"),
                                  ("POST", "/admin/models/fair/profile")])  # fmt: skip
def test_other_admin_bodies_of_any_type_are_refused(http: httpx.Client, call: tuple[str, str]) -> None:
    prices = ("input_cost_per_token", "output_cost_per_token")
    profiles = ("prompts", "max_usd", "map", "errors", "error_sums", "labels", "profile", "mean_output_tokens")
    for name in ("litellm_params", "model_info", *prices, *profiles):
        for value in ODD:
            reply = http.request(*call, content=json.dumps({name: value}).encode(), headers={**ADMIN, **JSON})
            assert reply.status_code in (400, 409), (name, value, reply.text)
