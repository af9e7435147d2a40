import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import InvalidProfile, MapMismatch
from router_core.profiles import Profile, measure
from router_core.types import Assignment, Doubles
from tests.router_core.makers import a_map, a_profile, an_assignment

NAN = float("nan")


def measured(clusters: tuple[int, ...], scores: list[float], tokens: list[float] | None = None) -> Profile:
    n = len(scores)
    return measure(
        a_map().id,
        3,
        an_assignment(*clusters),
        np.array(scores),
        output_tokens=np.array(tokens or [10.0] * n),
        seconds=np.full(n, 2.0),
    )


def test_unlabelled_prompts_are_left_out_and_not_counted_as_wrong() -> None:
    profile = measured((0, 0, 0), [1.0, NAN, NAN])
    assert profile.error_sums.tolist() == [0.0, 0.0, 0.0]
    assert profile.labels.tolist() == [1.0, 0.0, 0.0]


def test_a_prompt_counts_in_every_cluster_by_its_weight() -> None:
    shared = Assignment(np.array([[0, 2]]), np.array([[0.75, 0.25]], dtype=np.float32))
    profile = measure("m", 3, shared, np.array([0.0]), output_tokens=np.array([8.0]), seconds=np.array([1.0]))
    assert profile.error_sums.tolist() == [0.75, 0.0, 0.25]
    assert profile.token_sums.tolist() == [6.0, 0.0, 2.0]


def test_unlabelled_answers_count_for_lengths() -> None:
    profile = measured((0, 1), [1.0, NAN], [10.0, 500.0])
    assert profile.mean_output_tokens == 255.0
    assert profile.output_tokens()[1] > profile.output_tokens()[0]


def test_tokens_and_seconds_count_independently() -> None:
    three = an_assignment(0, 0, 1)
    tokens, seconds = np.array([10.0, 30.0, NAN]), np.array([NAN, 2.0, 4.0])
    profile = measure("m", 3, three, np.ones(3), output_tokens=tokens, seconds=seconds)
    assert (profile.mean_output_tokens, profile.mean_seconds) == (20.0, 3.0)
    untimed = measure("m", 3, three, np.ones(3), output_tokens=tokens, seconds=np.full(3, NAN))
    assert (untimed.mean_output_tokens, untimed.mean_seconds) == (20.0, None)
    assert np.isnan(Profile.from_json(untimed.to_json()).seconds()).all()


def test_a_profile_written_before_seconds_had_their_own_weight_reads_the_same() -> None:
    profile = measured((0, 1), [1.0, 0.0], [10.0, 30.0])
    document = profile.to_json()
    del document["timed_answers"]
    assert Profile.from_json(document).mean_seconds == profile.mean_seconds == 2.0


def test_a_model_that_never_answered_has_no_mean_length() -> None:
    profile = measured((0,), [NAN], [NAN])
    assert profile.mean_output_tokens is None
    assert np.isnan(profile.output_tokens()).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), min_size=2, max_size=30), st.data())
def test_merging_two_measurements_equals_measuring_at_once(
    graded: list[tuple[int, float]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(graded) - 1))

    def part(rows: list[tuple[int, float]]) -> Profile:
        return measured(tuple(cluster for cluster, _ in rows), [score for _, score in rows])

    whole, merged = part(graded), part(graded[:cut]).merged(part(graded[cut:]))
    assert merged.errors() == pytest.approx(whole.errors())
    assert merged.output_tokens() == pytest.approx(whole.output_tokens())


def test_profiles_of_two_maps_do_not_merge() -> None:
    other = Profile.from_json({"map": "another", "errors": [0.1], "labels": [1.0]})
    with pytest.raises(MapMismatch, match="another"):
        a_profile([0.1, 0.1, 0.1]).merged(other)


def test_a_profile_survives_json_exactly() -> None:
    profile = measured((0, 1, 1, 2), [1.0, 0.3, 0.0, NAN], [3.0, 5.0, 7.0, 9.0])
    again = Profile.from_json(json.loads(json.dumps(profile.to_json())))
    for array in ("error_sums", "labels", "token_sums", "second_sums", "answers", "timed_answers"):
        assert np.array_equal(getattr(again, array), getattr(profile, array))


def with_tools(graded: list[tuple[int, float]], tools: list[bool]) -> Profile:
    unknown = np.full(len(graded), NAN)
    return measure(
        a_map().id,
        3,
        an_assignment(*(cluster for cluster, _ in graded)),
        np.array([score for _, score in graded]),
        output_tokens=unknown,
        seconds=unknown,
        offers_tools=np.array(tools),
    )


def test_labels_of_prompts_with_tools_are_also_summed_apart() -> None:
    profile = with_tools([(0, 1.0), (0, 0.0), (1, 0.25), (2, NAN)], [False, True, True, True])
    assert profile.tool_labels is not None
    assert profile.tool_labels.tolist() == [1.0, 1.0, 0.0]
    assert profile.tool_error_sums is not None
    assert profile.tool_error_sums.tolist() == [1.0, 0.75, 0.0]


def test_labels_of_tools_survive_json_and_merging() -> None:
    first, second = with_tools([(0, 0.0), (1, 1.0)], [True, False]), with_tools([(1, 0.5)], [True])
    merged = first.merged(second).merged(with_tools([(2, 1.0)], [False]))
    again = Profile.from_json(json.loads(json.dumps(merged.to_json())))
    assert again.tool_labels is not None
    assert again.tool_labels.tolist() == [1.0, 1.0, 0.0]
    assert again.tool_error_sums is not None
    assert again.tool_error_sums.tolist() == [1.0, 0.5, 0.0]


def test_a_profile_without_tools_says_nothing_of_them() -> None:
    assert "tool_labels" not in with_tools([(0, 1.0)], [False]).to_json()


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1000)), min_size=1, max_size=8))
def test_rates_written_by_hand_come_back_as_written(rows: list[tuple[float, float]]) -> None:
    errors, labels = [error for error, _ in rows], [label for _, label in rows]
    profile = Profile.from_json({"map": "m", "errors": errors, "labels": labels})
    again = Profile.from_json(json.loads(json.dumps(profile.to_json())))
    assert profile.errors().tolist() == again.errors().tolist() == errors


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"map": ""}, "profile.map"),
        ({"errors": [0.1, 1.2, 0.1]}, "profile.errors"),
        ({"errors": [0.1, -0.2, 0.1]}, "profile.errors"),
        ({"errors": [0.1, NAN, 0.1]}, "profile.errors"),
        ({"errors": [0.1, 0.1]}, "profile.errors"),
        ({"errors": "many"}, "profile.errors"),
        ({"labels": None}, "profile.labels"),
        ({"labels": [[1.0], [1.0], [1.0]]}, "profile.labels"),
        ({"labels": [10**400, 1, 1]}, "profile.labels"),
        ({"mean_output_tokens": -3}, "profile.mean_output_tokens"),
        ({"mean_seconds": 10**400}, "profile.mean_seconds"),
        ({"measured_at": 17}, "profile.measured_at"),
        ({"error_sums": [9.0, 9.0, 9.0]}, "errors must lie in"),
        ({"error_sums": [-0.2, 0.0, 0.0]}, "profile.error_sums"),
        ({"tool_labels": [1.0, 0.0, 0.0]}, "tool_error_sums and tool_labels"),
        ({"tool_labels": [1.0], "tool_error_sums": [1.0]}, "tool_error_sums and tool_labels"),
        ({"tool_labels": [1.0, 0.0, 0.0], "tool_error_sums": [1.5, 0.0, 0.0]}, "errors must lie in"),
        ({"tool_labels": [1.0, 0.0, 0.0], "tool_error_sums": "none"}, "profile.tool_error_sums"),
    ],
)
def test_a_broken_profile_is_refused_with_its_field(change: dict[str, object], field: str) -> None:
    document: dict[str, object] = {"map": "m", "errors": [0.1, 0.1, 0.1], "labels": [1.0, 1.0, 1.0]}
    with pytest.raises(InvalidProfile, match=field):
        Profile.from_json(document | change)


def test_scores_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(InvalidProfile, match="scores"):
        measured((0,), [1.5])


def test_lengths_that_differ_are_refused() -> None:
    short: Doubles = np.array([1.0])
    with pytest.raises(InvalidProfile, match="2 prompts"):
        measure("m", 3, an_assignment(0, 1), short, output_tokens=short, seconds=short)
