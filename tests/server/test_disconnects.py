from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.server.conftest import BOTH_MODES, Fleet
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.waiting import wait_until

pytestmark = BOTH_MODES

ASK: Any = [{"role": "user", "content": "What is 2 + 2?"}]


@contextlib.contextmanager
def raw_call(fleet: Fleet, **body: Any) -> Iterator[socket.socket]:
    """Send a request on a bare socket, so that leaving is exactly one close."""
    parts = urlsplit(fleet.url)
    content = json.dumps({"model": "fair", "messages": ASK, **body}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def was_left(upstream: ScriptedUpstream) -> bool:
    """Tell whether the proxy left the last request before its answer was complete."""
    return upstream.last.client_left.wait(120)


def test_a_disconnect_in_the_middle_of_a_stream_closes_the_upstream(fleet: Fleet) -> None:
    fleet.fair.then(Step(message={"content": "word " * 1000}, drip_s=0.02))
    with raw_call(fleet, stream=True) as connection:
        while b'"content":' not in connection.recv(65536):
            pass
    assert was_left(fleet.fair)
    assert wait_until(lambda: "ending=client_gone" in fleet.proxy.log)


def test_a_disconnect_before_the_first_byte_closes_the_upstream(fleet: Fleet) -> None:
    fleet.fair.then(Step(hang=True))
    with raw_call(fleet, stream=True):
        assert wait_until(lambda: bool(fleet.fair.history))
    assert was_left(fleet.fair)


def test_a_disconnect_without_a_stream_closes_the_upstream(fleet: Fleet) -> None:
    fleet.fair.then(Step(hang=True))
    with raw_call(fleet):
        assert wait_until(lambda: bool(fleet.fair.history))
    assert was_left(fleet.fair)


def test_a_disconnect_between_two_chunks_closes_the_upstream(fleet: Fleet) -> None:
    fleet.fair.then(Step(message={"content": "one two"}, drip_s=600))
    with raw_call(fleet, stream=True):
        assert wait_until(lambda: bool(fleet.fair.history))
    assert was_left(fleet.fair)


def test_after_a_disconnect_other_requests_are_answered_and_none_is_in_flight(fleet: Fleet) -> None:
    fleet.fair.then(Step(hang=True))
    with raw_call(fleet):
        assert wait_until(lambda: bool(fleet.fair.history))
    body = {"model": "fair", "messages": ASK}

    assert httpx.post(f"{fleet.base_url}/chat/completions", json=body, timeout=60).status_code == 200
    assert wait_until(lambda: "uniroute_in_flight 0.0" in httpx.get(f"{fleet.url}/metrics").text)


def test_a_client_that_closes_its_sending_side_alone_counts_as_one_that_left(fleet: Fleet) -> None:
    fleet.fair.then(Step(hang=True))
    with raw_call(fleet) as connection:
        assert wait_until(lambda: bool(fleet.fair.history))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536) == b""
    assert was_left(fleet.fair)
