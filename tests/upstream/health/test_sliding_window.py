from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.circuit_breaker import BUCKETS, SlidingWindow

ENDINGS = st.lists(st.tuples(st.floats(0, 40), st.booleans()), max_size=60)


@given(ENDINGS, st.floats(0, 100))
def test_counts_are_those_of_the_last_buckets(endings: list[tuple[float, bool]], pause: float) -> None:
    window, now, seen = SlidingWindow(30.0), 1000.0, []
    for gap, failed in endings:
        now += gap
        window.add(now, failed=failed)
        seen.append((now, failed))
    now += pause
    bucket_s = 30.0 / BUCKETS
    recent = [failed for at, failed in seen if at // bucket_s > now // bucket_s - BUCKETS]
    assert window.counts(now) == (len(recent), sum(recent))


def test_what_is_older_than_the_window_is_forgotten_and_what_is_younger_than_14_fifteenths_is_not() -> None:
    window = SlidingWindow(30.0)
    window.add(0.0, failed=True)
    assert window.counts(27.9) == (1, 1)
    assert window.counts(30.0) == (0, 0)


def test_a_clock_that_runs_backwards_breaks_nothing() -> None:
    window = SlidingWindow(30.0)
    window.add(100.0, failed=True)
    window.add(50.0, failed=True)
    assert window.counts(40.0) == (2, 2)
