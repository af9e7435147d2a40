from __future__ import annotations

from typing import Any

import pytest

from proxy.storage.usage import Cost, ObservedTraffic, TokenCounts, cost_of
from proxy.upstream.payload import content_bytes
from router_core.types import Price

PRICE = Price(1e-6, 4e-6)
BROKEN_OFF = ObservedTraffic(prompt_tokens=1000, output_bytes=401)


def test_reported_usage_makes_the_cost() -> None:
    for billed in (True, False):
        cost = cost_of(TokenCounts(10, 0, 5), PRICE, BROKEN_OFF, billed=billed)
        assert cost.usd == pytest.approx(30e-6)
        assert not cost.estimated


def test_a_broken_answer_costs_its_prompt_and_what_was_received() -> None:
    cost = cost_of(TokenCounts(), PRICE, BROKEN_OFF, billed=True)

    assert cost.estimated
    assert cost.usd == pytest.approx(1000e-6 + 101 * 4e-6)


def test_the_part_that_was_reported_is_not_estimated() -> None:
    assert cost_of(TokenCounts(prompt_tokens=10), PRICE, BROKEN_OFF, billed=True).usd == pytest.approx(10e-6 + 404e-6)
    assert cost_of(TokenCounts(output_tokens=5), PRICE, BROKEN_OFF, billed=True).usd == pytest.approx(1020e-6)


def test_a_refused_request_costs_nothing_and_an_unknown_price_stays_unknown() -> None:
    assert cost_of(TokenCounts(), PRICE, BROKEN_OFF, billed=False) == Cost(0.0)
    assert cost_of(TokenCounts(), None, BROKEN_OFF, billed=False) == Cost(0.0)
    assert cost_of(TokenCounts(), None, BROKEN_OFF, billed=True) == Cost(None)


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"choices": [{"delta": {"content": "four"}}]}, 4),
        ({"choices": [{"delta": {"content": "vier für 你"}}]}, 13),
        ({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}, {"delta": {"content": "ab"}}]}, 4),
        ({"choices": [{"message": {"content": "four", "refusal": "no"}}]}, 6),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": '{"a'}}]}}]}, 4),
        ({"choices": [{"delta": {"function_call": {"name": "f", "arguments": "{}"}}}]}, 3),
        ({"choices": [{"delta": {"audio": {"data": "AAAA"}, "images": [{"url": "data:"}]}}]}, 0),
        ({"choices": []}, 0),
        ({"choices": "odd"}, 0),
        ({}, 0),
    ],
)
def test_content_is_counted_in_bytes_of_its_text(body: Any, size: int) -> None:
    assert content_bytes(body) == size
