from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from proxy.errors import BodyTimeout
from proxy.server.exchange import ASGIExchange, read_body


async def test_a_body_that_stops_in_its_middle_is_given_up() -> None:
    waiting: list[Message] = [{"type": "http.request", "body": b'{"model"', "more_body": True}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()
        raise AssertionError

    exchange = ASGIExchange({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive)
    with pytest.raises(BodyTimeout, match="8 bytes, and then nothing"):
        await read_body(exchange, 1000, read_timeout_s=0.05)


async def test_a_body_that_drips_is_given_up_all_the_same() -> None:
    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b" ", "more_body": True}

    exchange = ASGIExchange({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive)
    with pytest.raises(BodyTimeout):
        await read_body(exchange, 10**9, read_timeout_s=5, total_timeout_s=0.05)
