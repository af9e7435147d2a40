import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import InvalidPrice
from router_core.pricing import RATES, PriceColumns, TokenUsage, bill_usd, max_price_usd, picousd, reference_usd
from router_core.types import PRICE_FIELDS, Price

AMOUNTS = st.floats(0, 1e-2)
LONG = Price.from_fields(
    {
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 1e-5,
        "cache_read_input_token_cost": 1e-7,
        "input_cost_per_token_above_200k_tokens": 2e-6,
        "cache_read_input_token_cost_above_200k_tokens": 2e-7,
        "output_cost_per_token_above_272k_tokens": 3e-5,
    }
)
EVERY_RATE = Price(
    *(1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6, 7e-6, 8e-6, 9e-6, 10e-6, 11e-6),
)


def test_each_token_is_paid_once_at_its_own_price() -> None:
    price = Price(1e-6, 4e-6, cache_read_input_token_cost=1e-7)
    assert bill_usd(price, TokenUsage(fresh_tokens=100, cached_tokens=900, output_tokens=50)) == pytest.approx(3.9e-4)


def test_cached_tokens_without_a_price_cost_the_input_price() -> None:
    assert bill_usd(Price(1e-6, 0.0), TokenUsage(10, 90, 5)) == pytest.approx(1e-4)


def test_costs_in_picodollars_add_up_exactly() -> None:
    one = bill_usd(Price(1e-7, 4e-7), TokenUsage(fresh_tokens=3, cached_tokens=0, output_tokens=7))
    assert sum(picousd(one) for _ in range(10_000)) == 10_000 * (3 * 100_000 + 7 * 400_000)


def test_cached_tokens_are_expected_at_the_cached_price_of_each_model() -> None:
    """1,000 tokens: all fresh; 800 cached at $1e-7 or at no price of their own; no price at all."""
    prices = [Price(1e-6, 2e-6, cache_read_input_token_cost=1e-7), Price(1e-6, 2e-6), None]
    columns, output = PriceColumns.from_prices(prices), np.full(3, 10.0)
    fresh, cached = columns.expected_usd(1000, output), columns.expected_usd(1000, output, np.full(3, 800.0))
    assert fresh[:2] == pytest.approx([1.02e-3, 1.02e-3])
    assert cached[:2] == pytest.approx([3e-4, 1.02e-3])
    assert math.isnan(cached[2])


@given(AMOUNTS, AMOUNTS, st.none() | AMOUNTS, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5))
def test_the_expected_cost_equals_the_bill_of_the_same_tokens(
    input_cost: float, output_cost: float, cached_cost: float | None, fresh: int, cached: int, output: int
) -> None:
    price = Price(input_cost, output_cost, cached_cost)
    expected = PriceColumns.from_prices([price]).expected_usd(
        fresh + cached, np.array([float(output)]), np.array([float(cached)])
    )
    assert expected[0] == pytest.approx(bill_usd(price, TokenUsage(fresh, cached, output)))


def test_an_unknown_price_stays_unknown() -> None:
    columns = PriceColumns.from_prices([Price(1e-6, 2e-6), None])
    expected = columns.expected_usd(1000, np.array([10.0, 10.0]))
    assert expected[0] == pytest.approx(1.02e-3)
    assert math.isnan(expected[1])


def test_the_reference_is_two_dollars_fifty_in_and_ten_out_per_million() -> None:
    assert reference_usd(1_000_000, 1_000_000) == pytest.approx(12.5)


def test_the_reference_cost_of_an_empty_request_is_not_zero() -> None:
    assert reference_usd(0, 0.0) > 0


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_a_price_must_be_a_finite_amount(value: float) -> None:
    with pytest.raises(InvalidPrice, match="output_cost_per_token"):
        Price(1e-6, value)


def test_a_long_prompt_is_billed_whole_at_the_price_of_its_tier() -> None:
    """200,000 tokens are not above 200,000; what a tier does not state stays as below; cached ones count as well."""
    for usage, picodollars in (
        (TokenUsage(200_000, 0, 1000), 200_000 * 1_000_000 + 1000 * 10_000_000),
        (TokenUsage(1, 200_000, 1000), 2_000_000 + 200_000 * 200_000 + 1000 * 10_000_000),
        (TokenUsage(272_001, 0, 1000), 272_001 * 2_000_000 + 1000 * 30_000_000),
    ):
        assert picousd(bill_usd(LONG, usage)) == picodollars


@pytest.mark.parametrize(
    ("bucket", "micro"),
    [
        *(("fresh_tokens", 1), ("output_tokens", 2), ("cached_tokens", 3), ("written_tokens", 4)),
        *(("written_1h_tokens", 5), ("audio_input_tokens", 6), ("cached_audio_tokens", 7), ("image_input_tokens", 8)),
        *(("reasoning_tokens", 9), ("audio_output_tokens", 10), ("image_output_tokens", 11)),
    ],
)
def test_each_bucket_has_its_own_price(bucket: str, micro: int) -> None:
    usage = TokenUsage(**{"fresh_tokens": 0, "cached_tokens": 0, "output_tokens": 0, bucket: 1000})
    assert picousd(bill_usd(EVERY_RATE, usage)) == micro * 10**9


def test_a_bucket_without_a_price_of_its_own_costs_the_next_that_is_stated() -> None:
    plain = {"fresh_tokens": 0, "cached_tokens": 0, "output_tokens": 0}
    bills = {bucket: bill_usd(Price(1.0, 2.0), TokenUsage(**{**plain, bucket: 1})) for bucket in RATES}
    answers = {"output_tokens", "reasoning_tokens", "audio_output_tokens", "image_output_tokens"}
    assert bills == {bucket: 2.0 if bucket in answers else 1.0 for bucket in RATES}
    hourly = TokenUsage(**{**plain, "written_1h_tokens": 1})
    assert bill_usd(Price(1.0, 2.0, cache_creation_input_token_cost=1.25), hourly) == 1.25


def test_a_price_is_written_as_it_was_read() -> None:
    fields = LONG.to_fields()
    assert Price.from_fields(fields) == LONG
    assert fields["output_cost_per_token_above_272k_tokens"] == 3e-5
    assert set(fields) == {
        *("input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost"),
        *("input_cost_per_token_above_200k_tokens", "cache_read_input_token_cost_above_200k_tokens"),
        "output_cost_per_token_above_272k_tokens",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"input_cost_per_token": 1e-6},
        {"input_cost_per_token_above_200k_tokens": 1e-6, "output_cost_per_token": 1e-6},
        {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6, "output_cost_per_token_above_2k_tokens": -1},
        {
            "input_cost_per_token": 0,
            "output_cost_per_token": 0,
            "input_cost_per_token_above_2k_tokens": 1,
            "input_cost_per_token_above_2000_tokens": 2,
        },
        {
            "input_cost_per_token": 0,
            "output_cost_per_token": 0,
            **{f"input_cost_per_token_above_{tokens}k_tokens": 1 for tokens in range(33)},
        },
    ],
)
def test_incomplete_and_contradictory_prices_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidPrice, match=r"price|output_cost_per_token|stated twice"):
        Price.from_fields(fields)


def test_expected_costs_follow_the_tier_of_the_prompt() -> None:
    """One prompt or many at once; a model without tiers, and one without a price, keep theirs."""
    columns = PriceColumns.from_prices([LONG, Price(1e-6, 1e-5), None])
    output = np.full(3, 1000.0)
    lengths = np.array([200_000, 200_001, 272_001])
    together = columns.expected_usd(lengths[:, None], np.full((3, 3), 1000.0), np.array([1000.0, 0.0, 0.0]))
    assert together[:, 0] == pytest.approx([0.2091, 0.408202, 0.572202])
    assert together[:, 1] == pytest.approx([0.21, 0.210001, 0.282001])
    for row, length in zip(together, lengths.tolist(), strict=True):
        one = columns.expected_usd(length, output, np.array([1000.0, 0.0, 0.0]))
        assert row[:2] == pytest.approx(one[:2])
        assert math.isnan(one[2])
    assert columns.select(np.array([1, 0])).expected_usd(200_001, output[:2])[1] == pytest.approx(0.410002)


def test_the_maximum_cost_is_that_of_the_most_expensive_buckets_and_tier() -> None:
    assert max_price_usd(100, 10, EVERY_RATE) == pytest.approx(100 * 8e-6 + 10 * 11e-6)
    text_alone = max_price_usd(100, 10, EVERY_RATE, audio_input=False, audio_output=False, images=False)
    assert text_alone == pytest.approx(100 * 5e-6 + 10 * 9e-6)
    assert max_price_usd(272_001, 10, LONG) == pytest.approx(272_001 * 2e-6 + 10 * 3e-5)
    assert max_price_usd(200_000, 10, LONG) == pytest.approx(0.2 + 1e-4)


@given(st.lists(AMOUNTS, min_size=11, max_size=11), st.lists(st.integers(0, 10**6), min_size=11, max_size=11))
def test_no_cost_is_above_the_maximum(rates: list[float], counts: list[int]) -> None:
    fields = dict(zip(PRICE_FIELDS, rates, strict=True))
    price = Price.from_fields(fields | {f"{name}_above_1000k_tokens": 2 * rate for name, rate in fields.items()})
    usage = TokenUsage(*counts)
    most = max_price_usd(usage.prompt_tokens, sum(counts) - usage.prompt_tokens, price)
    assert bill_usd(price, usage) <= most * (1 + 1e-9)
