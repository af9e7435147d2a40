from __future__ import annotations

from itertools import product

import pytest

from proxy.storage.usage import ObservedTraffic, TokenCounts, cost_of, parse_usage, plausible_usage
from router_core.pricing import picousd
from router_core.types import Price
from tests.support.usage_reports import CASES, PARTIAL_REPORTS, PRICES, REPORTS, picodollars

ANSWERED = ObservedTraffic(prompt_tokens=4, output_bytes=400, unreported_bytes=0)


@pytest.mark.parametrize(("case", "price"), list(product(CASES, PRICES)), ids=str)
def test_reported_usage_is_billed_to_the_picodollar(case: tuple[str, str], price: str) -> None:
    use, vendor = case
    cost = cost_of(parse_usage(REPORTS[use][vendor]), Price.from_fields(PRICES[price]), ANSWERED, billed=True)
    assert cost.usd is not None
    assert (picousd(cost.usd), cost.estimated) == (picodollars(use, price), False)


@pytest.mark.parametrize("report", PARTIAL_REPORTS)
def test_received_content_is_billed_however_the_answer_ended(report: str) -> None:
    reports, expected = PARTIAL_REPORTS[report]
    counts, reported_bytes = TokenCounts(), 0
    for place, usage in enumerate(reports):
        read = parse_usage(usage)
        if read.prompt_tokens or read.output_tokens:
            counts, reported_bytes = read.after(counts), 40 * (place + 1)
    received = ObservedTraffic(prompt_tokens=4, output_bytes=120, unreported_bytes=120 - reported_bytes)
    cost = cost_of(plausible_usage(counts, received), Price.from_fields(PRICES["flat"]), received, billed=True)
    assert cost.usd is not None
    assert picousd(cost.usd) == expected


def test_zeros_beside_content_without_text_are_no_report() -> None:
    sound = ObservedTraffic(prompt_tokens=4, output_bytes=0, unreported_bytes=0, has_content=True)
    assert plausible_usage(TokenCounts(0, 0, 0, 0), sound) == TokenCounts(None, 0, None, 0)


def test_an_empty_answer_has_no_tokens() -> None:
    nothing = ObservedTraffic(prompt_tokens=4, output_bytes=0, unreported_bytes=0)
    assert plausible_usage(TokenCounts(1000, 0, 0, 0), nothing) == TokenCounts(1000, 0, 0, 0)


def test_an_unknown_price_is_never_zero() -> None:
    assert cost_of(parse_usage(REPORTS["plain"]["openai"]), None, ANSWERED, billed=True).usd is None
