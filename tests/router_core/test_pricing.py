"""Bills and expectations, checked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import InvalidPrice
from router_core.pricing import PriceColumns, TokenUsage, bill_usd, picousd, reference_usd
from router_core.types import Price

AMOUNTS = st.floats(0, 1e-2)


def test_each_token_is_paid_once_at_its_own_price() -> None:
    price = Price(1e-6, 4e-6, cache_read_input_token_cost=1e-7)
    assert bill_usd(price, TokenUsage(fresh_tokens=100, cached_tokens=900, output_tokens=50)) == pytest.approx(3.9e-4)


def test_cached_tokens_without_a_price_cost_the_input_price() -> None:
    assert bill_usd(Price(1e-6, 0.0), TokenUsage(10, 90, 5)) == pytest.approx(1e-4)


def test_bills_in_picodollars_add_up_exactly() -> None:
    one = bill_usd(Price(1e-7, 4e-7), TokenUsage(fresh_tokens=3, cached_tokens=0, output_tokens=7))
    assert sum(picousd(one) for _ in range(10_000)) == 10_000 * (3 * 100_000 + 7 * 400_000)


def test_cached_tokens_are_expected_at_the_cached_price_of_each_model() -> None:
    """1,000 tokens: all fresh; 800 cached at $1e-7 or at no price of their own; no price at all."""
    prices = [Price(1e-6, 2e-6, cache_read_input_token_cost=1e-7), Price(1e-6, 2e-6), None]
    columns, output = PriceColumns.of(prices), np.full(3, 10.0)
    fresh, cached = columns.expected_usd(1000, output), columns.expected_usd(1000, output, np.full(3, 800.0))
    assert fresh[:2] == pytest.approx([1.02e-3, 1.02e-3])
    assert cached[:2] == pytest.approx([3e-4, 1.02e-3])
    assert math.isnan(cached[2])


@given(AMOUNTS, AMOUNTS, st.none() | AMOUNTS, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5))
def test_what_is_expected_is_what_the_same_tokens_are_billed(
    input_cost: float, output_cost: float, cached_cost: float | None, fresh: int, cached: int, output: int
) -> None:
    price = Price(input_cost, output_cost, cached_cost)
    expected = PriceColumns.of([price]).expected_usd(
        fresh + cached, np.array([float(output)]), np.array([float(cached)])
    )
    assert expected[0] == pytest.approx(bill_usd(price, TokenUsage(fresh, cached, output)))


def test_an_unknown_price_stays_unknown() -> None:
    columns = PriceColumns.of([Price(1e-6, 2e-6), None])
    expected = columns.expected_usd(1000, np.array([10.0, 10.0]))
    assert expected[0] == pytest.approx(1.02e-3)
    assert math.isnan(expected[1])


def test_the_reference_is_two_dollars_fifty_in_and_ten_out_per_million() -> None:
    assert reference_usd(1_000_000, 1_000_000) == pytest.approx(12.5)


def test_the_reference_of_an_empty_request_can_still_be_divided_by() -> None:
    assert reference_usd(0, 0.0) > 0


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_a_price_must_be_a_finite_amount(value: float) -> None:
    with pytest.raises(InvalidPrice, match="output_cost_per_token"):
        Price(1e-6, value)
