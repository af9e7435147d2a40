"""What asks a model is served on our own connections, or under ASGI. Both ways must answer with the same bytes.

A path without /v1 is served under ASGI, the same with it is not.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.server.conftest import Fleet
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"model": "auto", "messages": QUESTION}
MESSAGES = {"model": "auto", "max_tokens": 20, "messages": QUESTION}
ANTHROPIC = {"anthropic-version": "2023-06-01"}


@dataclass(frozen=True)
class Case:
    path: str = "/chat/completions"
    body: Any = field(default_factory=lambda: CHAT)
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    pieces: int = 1

    def request(self, prefix: str) -> bytes:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        headers = {"host": "localhost", "content-type": "application/json", "connection": "close", **self.headers}
        if self.chunked:
            headers["transfer-encoding"] = "chunked"
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])) + b"0\r\n\r\n"
        else:
            headers.setdefault("content-length", str(len(body)))
        lines = [
            f"POST {prefix}{self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join((*lines, "", "")).encode() + body


CASES = {
    "whole": Case(),
    "stream": Case(body={**CHAT, "stream": True}),
    "stream with usage": Case(body={**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    "ids of the client": Case(
        headers={"x-request-id": "mine-1", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    ),
    "lambda": Case(headers={"lambda": "0"}),
    "bad lambda": Case(headers={"lambda": "nan"}),
    "repeated lambda": Case(headers={"lambda": "1\r\nlambda: 2"}),
    "metadata": Case(headers={"x-uniroute-metadata": "1"}),
    "no JSON": Case(body=b'{"model": '),
    "no body": Case(body=b""),
    "unknown model": Case(body={"model": 7, "messages": QUESTION}),
    "control field": Case(body={**CHAT, "api_base": "http://127.0.0.1:1"}),
    "content type": Case(headers={"content-type": "text/plain"}),
    "other JSON type": Case(headers={"content-type": "application/vnd.x+json; charset=utf-8"}),
    "compressed": Case(headers={"content-encoding": "gzip"}),
    "too large as stated": Case(headers={"content-length": "9999999"}, body=b""),
    "too large": Case(body=b" " * 1_000_001, chunked=True),
    "chunked": Case(chunked=True),
    "in pieces": Case(pieces=5),
    "large": Case(body={**CHAT, "messages": [{"role": "user", "content": "x" * 300_000}]}, pieces=3),
    "other host": Case(headers={"host": "example.org"}),
    "other origin": Case(headers={"origin": "http://example.org"}),
    "loop": Case(headers={"x-uniroute-hops": "a, b, c, d"}),
    "messages": Case("/messages", MESSAGES, ANTHROPIC),
    "messages stream": Case("/messages", {**MESSAGES, "stream": True}, ANTHROPIC),
    "messages error": Case("/messages", {"model": "auto"}, ANTHROPIC),
    "messages beta": Case("/messages?beta=true", MESSAGES, ANTHROPIC),
    "responses": Case("/responses", {"model": "auto", "input": "Hi", "store": False}),
    "responses stream": Case("/responses", {"model": "auto", "input": "Hi", "stream": True, "store": False}),
    "responses error": Case("/responses", {"model": "auto", "input": 7}),
    "completions": Case("/completions", {"model": "auto", "prompt": "Hi"}),
    "embeddings error": Case("/embeddings", {"model": "auto", "input": "Hi"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_ways_give_the_same_bytes(fleet: Fleet, case: Case) -> None:
    own, under_asgi = (normalized(answer(fleet, case, prefix)) for prefix in ("/v1", ""))

    assert own == under_asgi
    assert own[0].startswith("HTTP/1.1 ")


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_the_next_requests_of_a_connection_are_answered_in_order(fleet: Fleet, prefix: str) -> None:
    """They are sent at once, before the first is answered."""
    requests = [
        Case(headers={"connection": "keep-alive", "x-request-id": "r1"}),
        Case(body={**CHAT, "stream": True}, headers={"connection": "keep-alive", "x-request-id": "r2"}),
        Case(headers={"connection": "keep-alive", "x-request-id": "r3"}, body=b"{"),
        Case("/messages", MESSAGES, {**ANTHROPIC, "x-request-id": "r4"}),
    ]
    raw = exchange(fleet, [b"".join(case.request(prefix) for case in requests)])

    assert re.findall(rb"\r\nx-request-id: (r\d)", raw) == [b"r1", b"r2", b"r3", b"r4"]
    assert re.findall(rb"HTTP/1.1 (\d+)", raw) == [b"200", b"200", b"400", b"200"]


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(fleet: Fleet, prefix: str, stream: bool) -> None:
    fleet.fair.then(Step(hang=True))
    with socket.create_connection(address_of(fleet), timeout=60) as connection:
        connection.sendall(Case(body={**CHAT, "stream": stream}).request(prefix))
        assert wait_until(lambda: bool(fleet.fair.history))
    assert fleet.fair.last.client_left.wait(60)


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_a_body_that_stops_halfway_holds_up_no_other_connection(fleet: Fleet, prefix: str) -> None:
    half = Case().request(prefix)[:-5]
    with socket.create_connection(address_of(fleet), timeout=60) as connection:
        connection.sendall(half)
        assert normalized(answer(fleet, Case(), prefix))[0] == "HTTP/1.1 200 OK"
        connection.sendall(Case().request(prefix)[-5:])
        assert b"200 OK" in connection.recv(65536)


def address_of(fleet: Fleet) -> tuple[str, int]:
    return "127.0.0.1", int(fleet.url.rpartition(":")[2])


def answer(fleet: Fleet, case: Case, prefix: str) -> bytes:
    request = case.request(prefix)
    step = -(-len(request) // case.pieces)
    return exchange(fleet, [request[start : start + step] for start in range(0, len(request), step)])


def exchange(fleet: Fleet, pieces: Sequence[bytes]) -> bytes:
    """Send the pieces, and return all that comes until the server closes the connection."""
    received = b""
    with socket.create_connection(address_of(fleet), timeout=60) as connection, suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            if len(pieces) > 1:
                time.sleep(0.02)
        while piece := connection.recv(65536):
            received += piece
    return received


def normalized(raw: bytes) -> tuple[str, list[str], str]:
    """Return the status line, the headers in order of their names, and the body, without what differs by chance."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").split("\r\n")
    masked = [re.sub(r"^(date|x-uniroute-overhead-ms): .*", r"\1: ?", line) for line in headers]
    if "transfer-encoding: chunked" in headers:
        body = unchunked(body)
    return status, sorted(map(without_ids, masked)), without_ids(body.decode())


def unchunked(body: bytes) -> bytes:
    """Join the chunks, whose number depends on how the upstream's bytes happen to arrive."""
    joined = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        piece, end, body = body[: int(size, 16)], body[int(size, 16) :][:2], body[int(size, 16) + 2 :]
        assert end == b"\r\n"
        joined += piece
        if not piece:
            assert body == b""
            return joined


def without_ids(text: str) -> str:
    text = re.sub(r"[0-9a-f]{24,}", "?", text)
    return re.sub(r'"(created|created_at|completed_at)": ?[0-9.]+', r'"\1": ?', text)
