from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from proxy.storage.usage import cost_usd, parse_usage
from router_core.errors import InvalidInput
from router_core.pricing import TokenUsage, bill_usd, max_price_usd, picousd, reference_usd
from router_core.profiles import Profile
from router_core.types import MAX_PRICE, PRICE_FIELDS, Price

COST = st.floats(0, 1e-2) | st.floats(0, MAX_PRICE) | st.sampled_from([0.0, -0.0, 1e-12, MAX_PRICE])
RATES = st.dictionaries(st.sampled_from(PRICE_FIELDS[2:]), COST)
TIERS = st.dictionaries(
    st.sampled_from([f"{rate}_above_{tokens}_tokens" for rate in PRICE_FIELDS for tokens in ("1", "200k", "272k")]),
    COST,
)
PRICES = st.builds(
    lambda read, out, rates, tiers: Price.from_fields(
        {"input_cost_per_token": read, "output_cost_per_token": out, **rates, **tiers}
    ),
    *(COST, COST, RATES, TIERS),
)
FLAT = PRICES.map(lambda price: replace(price, tiers=()))
TOKENS = st.integers(0, 10**11)
ANY: st.SearchStrategy[object] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just({}) | st.just([])
)
USAGES = st.fixed_dictionaries(
    {"prompt_tokens": TOKENS | ANY, "completion_tokens": TOKENS | ANY},
    optional={
        "prompt_tokens_details": ANY | st.fixed_dictionaries({"cached_tokens": TOKENS | ANY}),
        "completion_tokens_details": ANY | st.fixed_dictionaries({"reasoning_tokens": TOKENS | ANY}),
    },
)
K = 4
SUMS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100), st.floats(0, 5000)), min_size=K, max_size=K)


@given(FLAT, TOKENS, TOKENS, TOKENS)
@settings(deadline=None)
def test_a_bill_is_never_negative_and_more_tokens_never_cost_less(
    price: Price, fresh: int, cached: int, out: int
) -> None:
    bill = bill_usd(price, TokenUsage(fresh, cached, out))

    assert 0 <= bill < float("inf")
    assert picousd(bill) >= 0
    for more in (
        TokenUsage(fresh + 1, cached, out),
        TokenUsage(fresh, cached + 1, out),
        TokenUsage(fresh, cached, out + 1),
    ):
        assert bill_usd(price, more) >= bill
    assert reference_usd(fresh, float(out)) > 0


@given(PRICES, USAGES)
@settings(max_examples=300, deadline=None)
def test_each_token_of_any_usage_is_paid_once(price: Price, usage: dict[str, object]) -> None:
    counts = parse_usage(usage)
    cost = cost_usd(counts, price)
    if counts.prompt_tokens is None or counts.output_tokens is None:
        assert cost is None
        return
    assert cost is not None
    most = max_price_usd(counts.prompt_tokens, counts.output_tokens, price)
    assert 0 <= cost <= most * (1 + 1e-9)


@given(PRICES)
def test_a_price_survives_json(price: Price) -> None:
    assert Price.from_fields(json.loads(json.dumps(price.to_fields()))) == price


@given(st.sampled_from(PRICE_FIELDS), st.floats(MAX_PRICE * 1.01) | st.floats(max_value=-1e-300))
def test_an_absurd_price_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidInput):
        Price.from_fields({"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, name: value})


def profile(rows: list[tuple[float, float, float]]) -> Profile:
    """Build a profile from (error rate, labels, tokens) of each cluster."""
    labels = np.array([label for _, label, _ in rows])
    sums = np.array([error for error, _, _ in rows]) * labels
    tokens = np.array([count for _, _, count in rows]) * labels
    return Profile(map_id="m", error_sums=sums, labels=labels, token_sums=tokens, second_sums=tokens / 100,
                   answers=labels, timed_answers=labels)  # fmt: skip


@given(SUMS, SUMS, SUMS)
@settings(deadline=None)
def test_profiles_merge_in_any_order(
    one: list[tuple[float, float, float]],
    two: list[tuple[float, float, float]],
    three: list[tuple[float, float, float]],
) -> None:
    a, b, c = profile(one), profile(two), profile(three)
    left, right, turned = a.merged(b).merged(c), a.merged(b.merged(c)), c.merged(b).merged(a)

    for other in (right, turned):
        for name in ("error_sums", "labels", "token_sums", "second_sums", "answers", "timed_answers"):
            np.testing.assert_allclose(getattr(left, name), getattr(other, name), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(left.errors(), other.errors(), rtol=1e-9, atol=1e-9)


@given(SUMS)
@settings(deadline=None)
def test_rates_stay_within_bounds_and_survive_json(rows: list[tuple[float, float, float]]) -> None:
    made = profile(rows)
    again = Profile.from_json(json.loads(json.dumps(made.to_json())))

    assert ((made.errors() >= 0) & (made.errors() <= 1)).all()
    assert 0 <= made.mean_error <= 1
    np.testing.assert_array_equal(again.errors(), made.errors())
    np.testing.assert_array_equal(again.output_tokens(), made.output_tokens())


DOCUMENTS = st.fixed_dictionaries(
    {"map": st.just("m") | ANY},
    optional={name: ANY | st.lists(st.floats() | ANY, max_size=3)
              for name in ("errors", "labels", "error_sums", "token_sums", "second_sums", "answers", "timed_answers",
                           "mean_error", "mean_output_tokens", "mean_seconds", "measured_at")},
)  # fmt: skip


@given(DOCUMENTS)
@settings(max_examples=400, deadline=None)
def test_any_profile_document_is_refused_or_gives_rates_within_bounds(document: dict[str, object]) -> None:
    try:
        read = Profile.from_json(document)
    except InvalidInput:
        return
    assume(read.labels.size)
    rates = read.errors()
    assert ((rates >= 0) & (rates <= 1)).all()
    assert json.dumps(read.to_json(), allow_nan=False)
