from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Fleet, open_fleet
from tests.support.scripted_answers import Step
from tests.support.waiting import wait_until

LARGE = "word [],{}:" * 300_000
ASK: dict[str, Any] = {"model": "fair", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Fleet]:
    """Open a fleet with memory for one large answer and a half."""
    bounds = {"max_answer_bytes": 4_000_000, "max_answers_in_flight_bytes": 5_000_000}
    with open_fleet(tmp_path_factory.mktemp("proxy"), embedder_cache, **bounds) as opened:
        yield opened


@pytest.fixture
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    fleet.fair.script.clear()
    with httpx.Client(base_url=fleet.url, timeout=60) as opened:
        yield opened


def large() -> Step:
    return Step(message={"role": "assistant", "content": LARGE})


def unread(fleet: Fleet) -> socket.socket:
    """Request a large answer and read nothing of it."""
    host, port = httpx.URL(fleet.url).host, httpx.URL(fleet.url).port or 80
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, port))
    body = json.dumps(ASK).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    return client


def test_a_large_response_reaches_the_client_whole(http: httpx.Client, fleet: Fleet) -> None:
    fleet.fair.then(large())

    assert http.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]["content"] == LARGE


def test_an_unread_response_takes_memory_until_its_client_disconnects(http: httpx.Client, fleet: Fleet) -> None:
    fleet.fair.then(large(), *[large()] * 100)
    with unread(fleet) as client:
        assert wait_until(lambda: fleet.fair.history and fleet.fair.last.answered)
        assert client.recv(1)
        full = http.post("/v1/chat/completions", json=ASK)
    small = http.post("/v1/chat/completions", json={**ASK, "model": "good"})

    assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (503, "unavailable", "1")
    assert "max_answers_in_flight_bytes" in full.json()["error"]["message"]
    assert small.status_code == 200
    assert wait_until(lambda: http.post("/v1/chat/completions", json=ASK).status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_too_large_is_a_502_that_names_the_setting(
    http: httpx.Client, fleet: Fleet, stream: bool
) -> None:
    fleet.fair.then(Step(message={"role": "assistant", "content": "x" * 4_100_000}, events=None))
    if stream:
        chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 4_100_000}, "finish_reason": None}]}
        fleet.fair.script.clear()
        fleet.fair.then(Step(events=[chunk]))
    reply = http.post("/v1/chat/completions", json={**ASK, "stream": stream})

    assert (reply.status_code, "max_answer_bytes" in reply.json()["error"]["message"]) == (502, True)
