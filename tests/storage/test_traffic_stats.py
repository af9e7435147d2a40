from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.storage.snapshot import BATCH_SIZE, TrafficStats
from tests.support.makers import a_profile


def test_without_traffic_the_profile_is_as_measured() -> None:
    profile = a_profile()
    assert TrafficStats(4).blend_into("small", profile) is profile


def test_longer_live_answers_take_over_in_their_cluster() -> None:
    live, profile = TrafficStats(4), a_profile()
    for _ in range(200):
        live.observe("small", [0], [1.0], tokens=900, seconds=9.0)
    blended = live.blend_into("small", profile)
    assert blended.output_tokens()[0] > 800
    assert blended.seconds()[0] > 8
    assert blended.output_tokens()[3] < 500
    assert blended.errors().tolist() == profile.errors().tolist()
    assert live.blend_into("other", profile) is profile


def test_an_old_answer_counts_half_after_the_half_life() -> None:
    live = TrafficStats(1, half_life=10)
    profile = a_profile([0.5])
    live.observe("m", [0], [1.0], tokens=1000, seconds=0)
    for _ in range(10):
        live.observe("m", [0], [1.0], tokens=0, seconds=0)
    added = live.blend_into("m", profile).token_sums - profile.token_sums
    np.testing.assert_allclose(added, [500.0])


def test_an_answer_without_a_token_count_is_ignored() -> None:
    live = TrafficStats(4)
    live.observe("m", [0], [1.0], tokens=None, seconds=1.0)
    assert live.observed == 0


ANSWERS = st.tuples(
    st.sampled_from([([0], [1.0]), ([2, 1], [0.75, 0.25]), ([3, 0, 1], [0.5, 0.25, 0.25])]),
    st.integers(0, 10_000),
    st.floats(0, 600),
    st.booleans(),
)


@given(st.lists(ANSWERS, max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_batch_of_answers_adds_up_to_the_same_as_one_by_one(answers: list[tuple]) -> None:  # type: ignore[type-arg]
    live, profile, keep = TrafficStats(4, half_life=10), a_profile(), 0.5**0.1
    sums = np.zeros((3, 4))
    for (ids, weights), tokens, seconds, read_between in answers:
        live.observe("m", np.array(ids), np.array(weights, dtype=np.float32), tokens, seconds)
        sums *= keep
        sums[:, ids] += np.outer((tokens, seconds, 1.0), weights)
        if read_between:
            live.blend_into("m", profile)
    blended = live.blend_into("m", profile)
    np.testing.assert_allclose(blended.token_sums - profile.token_sums, sums[0], atol=1e-6)
    np.testing.assert_allclose(blended.second_sums - profile.second_sums, sums[1], atol=1e-6)
    np.testing.assert_allclose(blended.answers - profile.answers, sums[2], atol=1e-9)


def test_answers_do_not_accumulate_if_they_are_never_read() -> None:
    live = TrafficStats(4)
    for _ in range(3 * BATCH_SIZE):
        live.observe("m", [0], [1.0], tokens=5, seconds=1.0)
        assert len(live._new.get("m", [])) < BATCH_SIZE


@pytest.mark.parametrize("answers", [1, BATCH_SIZE])
def test_a_model_that_was_forgotten_has_no_answers(answers: int) -> None:
    live, profile = TrafficStats(4), a_profile()
    for _ in range(answers):
        live.observe("m", [0], [1.0], tokens=5, seconds=1.0)
    live.forget("m")
    assert live.blend_into("m", profile) is profile
