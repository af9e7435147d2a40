"""Live traffic moves expected tokens and seconds, and nothing else."""

from __future__ import annotations

import numpy as np

from proxy.state.live import LiveExpectations
from tests.support.makers import a_profile


def test_without_traffic_the_profile_is_as_measured() -> None:
    profile = a_profile()
    assert LiveExpectations(4).blended("small", profile) is profile


def test_longer_real_answers_take_over_in_their_cluster() -> None:
    live, profile = LiveExpectations(4), a_profile()
    for _ in range(200):
        live.observe("small", [0], [1.0], tokens=900, seconds=9.0)
    blended = live.blended("small", profile)
    assert blended.output_tokens()[0] > 800
    assert blended.seconds()[0] > 8
    assert blended.output_tokens()[3] < 500
    assert blended.errors().tolist() == profile.errors().tolist()
    assert live.blended("other", profile) is profile


def test_an_old_answer_counts_half_after_the_half_life() -> None:
    live = LiveExpectations(1, half_life=10)
    profile = a_profile([0.5])
    live.observe("m", [0], [1.0], tokens=1000, seconds=0)
    for _ in range(10):
        live.observe("m", [0], [1.0], tokens=0, seconds=0)
    added = live.blended("m", profile).token_sums - profile.token_sums
    np.testing.assert_allclose(added, [500.0])


def test_an_answer_without_a_token_count_is_left_out() -> None:
    live = LiveExpectations(4)
    live.observe("m", [0], [1.0], tokens=None, seconds=1.0)
    assert live.observed == 0
