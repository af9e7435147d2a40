from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from proxy.server.ratelimit import BucketState, adjust, refill, take, time_to_full, wait_s
from proxy.storage.redis import load_script
from proxy.storage.valkey import EmbeddedValkey

Take = Callable[[BucketState, float, float, float], BucketState | None]
BUCKET = load_script("proxy.server", "bucket")
DATE = load_script("proxy.server", "date")
_TAKE = f"""{BUCKET}
local used, at, per_minute, amount, now = unpack(ARGV)
local level = limits_leaked(tonumber(used), tonumber(at), tonumber(per_minute), tonumber(now))
if not limits_has(level, tonumber(per_minute), tonumber(amount)) then return '' end
return string.format('%.17g', level + tonumber(amount))
"""


FULL = BucketState()


@dataclass(frozen=True)
class Case:
    says: str
    per_minute: float
    steps: tuple[tuple[float, float, bool], ...]
    """(time, amount, granted)"""
    level: BucketState = FULL


TABLE = (
    Case("a minute's worth at once", 3, ((0, 1, True), (0, 1, True), (0, 1, True), (0, 1, False))),
    Case(
        "refilled continuously", 60, ((0, 60, True), (0.5, 1, False), (1.0, 1, True), (1.5, 1, False), (2.0, 1, True))
    ),
    Case("never more than full", 60, ((0, 60, True), (3600, 61, False), (3600, 60, True), (3600, 1, False))),
    Case("refused takes nothing", 60, ((0, 50, True), (0, 20, False), (0, 10, True))),
    Case("more than a minute's worth never", 10, ((0, 11, False), (600, 11, False))),
    Case("debt is paid first", 60, ((0, 1, False), (60, 1, False), (61, 1, True), (61, 1, False)), BucketState(120, 0)),
    Case("a clock that went back refills nothing", 60, ((100, 60, True), (40, 1, False), (41, 1, True))),
    Case("nothing where nothing is allowed", 0, ((0, 1, False), (600, 1, False))),
)


@pytest.fixture(scope="module")
def lua(valkey: EmbeddedValkey) -> Iterator[Take]:
    with redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as client:
        script = client.register_script(_TAKE)

        def take(level: BucketState, per_minute: float, amount: float, now: float) -> BucketState | None:
            used: Any = script(args=[repr(n) for n in (level.used, level.at, per_minute, amount, now)])
            return BucketState(float(used), now) if used else None

        yield take


def run(take: Take, case: Case) -> list[bool]:
    level, granted = case.level, []
    for now, amount, _ in case.steps:
        after = take(level, case.per_minute, amount, now)
        granted.append(after is not None)
        level = after or refill(level, case.per_minute, now)
    return granted


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.says)
def test_a_bucket_in_the_process_grants_what_fits(case: Case) -> None:
    assert run(take, case) == [granted for _, _, granted in case.steps]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.says)
def test_a_bucket_in_the_store_grants_what_fits(case: Case, lua: Take) -> None:
    assert run(lua, case) == [granted for _, _, granted in case.steps]


AMOUNTS = st.floats(0, 1e9, allow_nan=False)
TIMES = st.floats(0, 4e9, allow_nan=False)


@given(used=AMOUNTS, at=TIMES, per_minute=AMOUNTS, amount=AMOUNTS, now=TIMES)
def test_buckets_in_the_process_and_in_the_store_agree_to_the_last_bit(
    lua: Take, used: float, at: float, per_minute: float, amount: float, now: float
) -> None:
    assert lua(BucketState(used, at), per_minute, amount, now) == take(BucketState(used, at), per_minute, amount, now)


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 300)), min_size=1, max_size=60),
)
def test_in_no_window_more_is_taken_than_a_full_bucket_and_its_refill(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    level, now, grants = BucketState(), 0.0, []
    for waited, amount in steps:
        now += waited
        if (after := take(level, per_minute, amount, now)) is not None:
            level = after
            grants.append((now, amount))
    for first, (begin, _) in enumerate(grants):
        for last in range(first, len(grants)):
            in_window = sum(amount for _, amount in grants[first : last + 1])
            assert in_window <= per_minute + (grants[last][0] - begin) * per_minute / 60 + 1e-6


@given(per_minute=st.integers(1, 1000), taken_=st.integers(0, 1000), real=st.integers(0, 5000))
def test_an_adjusted_bucket_is_as_if_the_real_amount_had_been_taken(per_minute: int, taken_: int, real: int) -> None:
    level = adjust(BucketState(taken_, 5.0), per_minute, real - taken_, 5.0)

    assert level == BucketState(real, 5.0)
    assert adjust(level, per_minute, -2 * real, 6.0).used == 0


def test_the_stated_wait_is_enough_and_not_too_long() -> None:
    assert (wait_s(60, 1, 60), wait_s(59.5, 1, 60), wait_s(10, 1, 60)) == (1.0, 0.5, 0.0)
    assert time_to_full(30, 60) == 30.0
    assert wait_s(0, 1, 0) == time_to_full(0, 0) == 60.0


@given(seconds=st.integers(0, 4_102_444_800))
def test_the_dates_of_the_store_are_those_of_the_calendar(valkey: EmbeddedValkey, seconds: int) -> None:
    with redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as client:
        date = client.eval(f"{DATE} return limits_date(tonumber(ARGV[1]))", 0, str(seconds))

    assert date == datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
