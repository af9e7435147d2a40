from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proxy.storage.decisions import FEEDBACK
from proxy.storage.feedback import (
    HOURS_KEPT,
    MAX_SOURCE_FIELDS,
    OBSERVED,
    SOURCES,
    FeedbackLimits,
    FeedbackStore,
    HourlyLabels,
    Labels,
    Observed,
    ObservedErrors,
    ObservedProfiles,
    SourceVolume,
    comparison,
    owner_of,
    parse_hours,
    parse_sources,
    two_proportion_p,
)
from proxy.storage.redis import Store
from router_core.text import rfc3339
from tests.support.makers import CORNERS, a_profile, a_record

DAY_S = 86_400
LIMITS = FeedbackLimits(half_life_s=7 * DAY_S, labels_per_key=3, calls_per_minute=1000, ttl_s=3600)
RECORD = a_record("small")
OWNER = owner_of(CORNERS.id, RECORD.fingerprint)
SAID = {"score": 0.25, "source": "tests", "at": 1.0}


NOW = int(time.time() // 3600)


def labels(
    score: float = 0.25, *, owner: str = OWNER, expected: float = 0.5, hour: int = 0, **clusters: float
) -> Labels:
    """`hour`: of the answer; 0 is this one."""
    weights = {int(name[1:]): weight for name, weight in clusters.items()} or {0: 0.75, 2: 0.25}
    return Labels(owner, 1 - score, weights, expected, NOW + hour)


class Ledger:
    """Feedback of one model, and what is observed of it."""

    def __init__(self, store: Store, limits: FeedbackLimits = LIMITS) -> None:
        self.client = store.client
        self.store = FeedbackStore(store, limits)

    async def give(self, decision: str, made: Labels | None, *, key: str = "k", taken_back: bool = False) -> float:
        counted = await self.store.give(decision, "small", key, None if taken_back else SAID, made)
        assert counted is not None
        return counted

    async def observed(self) -> tuple[list[float], list[float]]:
        found = await self.store.observed(RECORD, CORNERS.id, CORNERS.size)
        if found is None:
            return [], []
        return found.errors.labels.round(3).tolist(), found.errors.error_sums.round(3).tolist()

    async def hourly(self) -> list[tuple[int, list[float]]]:
        """Labels, errors and expected errors by hour, of now: 0 is this hour."""
        found = await self.store.observed(RECORD, CORNERS.id, CORNERS.size)
        hours = found.hourly if found else HourlyLabels()
        columns = zip(hours.labels, hours.error_sums, hours.expected_sums, strict=True)
        return [(hour - NOW, [round(each, 3) for each in row]) for hour, row in zip(hours.hours, columns, strict=True)]

    async def age(self, seconds: float) -> None:
        """Let all labels grow older."""
        since: Any = await self.client.hget(f"{OBSERVED}:small", "since")
        await self.client.hset(f"{OBSERVED}:small", "since", str(float(since) - seconds))


async def test_a_score_counts_as_labels_of_the_clusters_of_its_prompt(store: Store) -> None:
    ledger = Ledger(store)
    assert await ledger.give("dec-1", labels(0.2)) == 1
    assert await ledger.observed() == ([0.75, 0, 0.25, 0], [0.6, 0, 0.2, 0])


async def test_the_last_word_counts_and_can_be_taken_back(store: Store) -> None:
    ledger = Ledger(store)
    await ledger.give("dec-1", labels(0.0))
    await ledger.give("dec-1", labels(1.0))
    assert await ledger.observed() == ([0.75, 0, 0.25, 0], [0, 0, 0, 0])

    await ledger.give("dec-1", None, taken_back=True)
    assert await ledger.observed() == ([], [])
    assert await store.client.hget(FEEDBACK, "dec-1") is None


async def test_labels_decay_and_an_old_one_is_taken_back_exactly(store: Store) -> None:
    ledger = Ledger(store)
    await ledger.give("dec-1", labels(0.0, c0=1.0))
    await ledger.age(7 * DAY_S)
    await store.client.hset(FEEDBACK, "dec-1", (await aged(store, "dec-1", 7 * DAY_S)))
    assert await ledger.observed() == ([0.5, 0, 0, 0], [0.5, 0, 0, 0])

    await ledger.give("dec-2", labels(1.0, c0=1.0))
    assert await ledger.observed() == ([1.5, 0, 0, 0], [0.5, 0, 0, 0])
    await ledger.give("dec-1", None, taken_back=True)
    assert await ledger.observed() == ([1.0, 0, 0, 0], [0, 0, 0, 0])


async def aged(store: Store, decision: str, seconds: float) -> str:
    said: Any = json.loads(str(await store.client.hget(FEEDBACK, decision)))
    return json.dumps({**said, "since": said["since"] - seconds})


async def test_labels_of_long_ago_are_written_anew_and_stay_what_they_were(store: Store) -> None:
    ledger = Ledger(store)
    await ledger.give("dec-1", labels(0.0, c0=1.0))
    await ledger.age(31 * 7 * DAY_S)
    await ledger.give("dec-2", labels(0.0, c1=1.0))
    written: Any = await store.client.hgetall(f"{OBSERVED}:small")

    assert await ledger.observed() == ([0, 1, 0, 0], [0, 1, 0, 0])
    assert float(written["n:1"]) == 1


async def test_one_key_moves_a_cluster_by_a_bounded_number_of_labels(store: Store) -> None:
    ledger = Ledger(store)
    counted = [await ledger.give(f"dec-{number}", labels(0.0, c0=1.0)) for number in range(5)]
    assert counted == [1, 1, 1, 0, 0]
    assert await ledger.observed() == ([3, 0, 0, 0], [3, 0, 0, 0])

    assert await ledger.give("dec-9", labels(1.0, c0=1.0), key="other") == 1
    await ledger.give("dec-0", None, taken_back=True)
    assert await ledger.give("dec-7", labels(1.0, c0=1.0)) == 1  # there is room again
    assert await ledger.observed() == ([4, 0, 0, 0], [2, 0, 0, 0])


async def test_a_key_may_call_so_often_in_a_minute(store: Store) -> None:
    ledger = FeedbackStore(store, FeedbackLimits(DAY_S, 3, 2, 60))
    given = [await ledger.give(f"dec-{n}", "small", "k", SAID, None) for n in range(3)]
    assert given == [0, 0, None]
    assert await ledger.give("dec-1", "small", "other", SAID, None) == 0


async def test_labels_of_other_parameters_or_another_map_are_forgotten(store: Store) -> None:
    ledger = Ledger(store)
    await ledger.give("dec-1", labels(0.0, owner="map other"))
    assert await ledger.observed() == ([], [])
    await ledger.give("dec-2", labels(1.0))
    await ledger.give("dec-1", None, taken_back=True)
    assert await ledger.observed() == ([0.75, 0, 0.25, 0], [0, 0, 0, 0])


async def test_odd_values_in_redis_count_as_nothing(store: Store) -> None:
    for field, value in (("n:9", "1"), ("n:0", "x"), ("x:1", "1"), ("since", "nan"), ("half_life", "0")):
        await store.client.delete(f"{OBSERVED}:small")
        await Ledger(store).give(f"dec-{field}", labels(0.0))
        await store.client.hset(f"{OBSERVED}:small", field, value)
        assert await Ledger(store).observed() == ([], [])


async def test_every_process_reads_what_was_observed_and_notes_a_change_once(store: Store) -> None:
    profiles = ObservedProfiles(store)
    await profiles.refresh(["small"])
    assert profiles.changes == 0

    await Ledger(store).give("dec-1", labels(0.0, c0=1.0))
    await profiles.refresh(["small"])
    await profiles.refresh(["small"])
    blended = profiles.blend_into(RECORD, a_profile())

    assert profiles.changes == 1
    assert blended.labels.round(4).tolist() == [6, 5, 5, 5]
    assert blended.errors()[0] == pytest.approx((0.1 * 5 + 1) / 6, abs=1e-4)
    assert blended.errors()[1:].tolist() == pytest.approx([0.2, 0.3, 0.4])


def observed(count: float, wrong: float, *more: tuple[float, float], expected: float = 0.1) -> Observed:
    """Labels of one cluster and the errors among them; `more` are those of the hours after the first."""
    hours = [(count, wrong), *more]
    counts, errors = (np.array(column, dtype=float) for column in zip(*hours, strict=True))
    rows = tuple(range(NOW - len(hours) + 1, NOW + 1))
    whole = [np.array([column.sum(), 0, 0, 0]) for column in (counts, errors)]
    return Observed(ObservedErrors(*whole), HourlyLabels(rows, counts, errors, expected * counts))


def test_measured_and_observed_are_compared_by_what_was_expected_of_the_same_answers() -> None:
    found = comparison(a_profile((0.1, 0.9, 0.9, 0.9)), observed(30, 3))
    (cluster,) = found["clusters"]

    assert (found["measured_mean_error"], found["mean_error"]) == pytest.approx((0.1, 0.1))
    assert found["mean_error_low"] < 0.1 < found["mean_error_high"]
    assert found["measured_mean_error_low"] < 0.1 < found["measured_mean_error_high"]
    assert (found["labels"], found["measured_labels"]) == (30, 5)
    assert (found["p"], found["differs"], found["change"]) == (pytest.approx(1), False, None)
    assert (cluster["id"], cluster["labels"], cluster["error"]) == (0, 30, 0.1)
    assert (cluster["measured_labels"], cluster["measured_error"]) == (5, 0.1)
    assert cluster["error_low"] < 0.1 < cluster["error_high"] < cluster["measured_error_high"]


def test_they_part_when_chance_does_not_explain_it_and_not_on_few_labels() -> None:
    profile = a_profile((0.1,) * 4)
    assert comparison(profile, observed(300, 240))["differs"] is True
    assert comparison(profile, observed(19, 19))["differs"] is None


def test_a_model_that_becomes_worse_is_told_by_the_hour_and_compared_from_then_on() -> None:
    found = comparison(a_profile((0.1,) * 4), observed(40, 4, (40, 5), (40, 3), (40, 20)))
    change = found["change"]

    assert change["worse"] is True
    assert change["since"] == found["since"] == rfc3339(NOW * 3600)
    assert (change["before"]["labels"], change["after"]["labels"], found["labels"]) == (120, 40, 40)
    assert (change["before"]["mean_error"], change["after"]["mean_error"]) == (0.1, 0.5)
    assert change["statistic"] > change["threshold"]


def test_labels_of_before_a_model_was_measured_say_nothing_of_it_as_measured() -> None:
    worse_before = observed(40, 30, (40, 30), (40, 4), (40, 4))
    measured = replace(a_profile((0.1,) * 4), measured_at=rfc3339((NOW - 2) * 3600 + 60))
    found = comparison(measured, worse_before)

    assert (found["labels"], found["differs"], found["change"]) == (80, False, None)
    assert comparison(a_profile((0.1,) * 4), worse_before)["change"]["worse"] is False


async def test_labels_are_kept_by_the_hour_of_the_answer_beside_what_was_expected(store: Store) -> None:
    ledger = Ledger(store)
    await ledger.give("dec-1", labels(0.0, hour=-3, expected=0.2))
    await ledger.give("dec-2", labels(1.0, hour=-3, expected=0.4))
    await ledger.give("dec-3", labels(0.5, expected=0.1))
    assert await ledger.hourly() == [(-3, [2, 1, 0.6]), (0, [1, 0.5, 0.1])]

    await ledger.give("dec-2", labels(0.0, hour=-3, expected=0.4))
    await ledger.give("dec-3", None, taken_back=True)
    assert await ledger.hourly() == [(-3, [2, 2, 0.6])]
    await ledger.give("dec-9", labels(owner="map other"))
    assert await ledger.hourly() == []


async def test_hours_of_long_ago_are_dropped_and_not_counted(store: Store) -> None:
    ledger = Ledger(store)
    await store.client.hset(f"{OBSERVED}:small:hours", f"n:{NOW - HOURS_KEPT}", "1")
    await ledger.give("dec-1", labels())
    await store.client.hset(f"{OBSERVED}:small:hours", f"n:{NOW - HOURS_KEPT}", "1")
    await ledger.give("dec-2", labels(hour=-HOURS_KEPT))
    assert (await ledger.hourly())[-1][1][0] == 1
    await ledger.give("dec-3", labels(hour=-1))
    assert [hour for hour, _ in await ledger.hourly()] == [-1, 0]


async def test_a_label_counts_by_the_hour_as_much_as_the_keys_bound_lets_it(store: Store) -> None:
    ledger = Ledger(store)
    for number in range(5):
        await ledger.give(f"dec-{number}", labels(0.0, c0=1.0))
    assert (await ledger.hourly())[0][1][:2] == [3, 3]
    await ledger.give("dec-4", None, taken_back=True)
    assert (await ledger.hourly())[0][1][:2] == [3, 3]


async def test_the_volume_of_feedback_is_counted_by_source_and_taken_back(store: Store) -> None:
    feedback = FeedbackStore(store, LIMITS)

    async def say(decision: str, score: float | None, source: str | None) -> None:
        said = None if score is None else {"score": score, "source": source, "at": 1.0}
        await feedback.give(decision, "small", "k", said, None)

    await say("dec-1", 1.0, "thumbs: up")
    await say("dec-2", 0.5, "thumbs: up")
    await say("dec-3", 0.0, None)
    volumes = await feedback.sources()
    assert [(each.source, each.decisions, each.mean_score) for each in volumes] == [
        ("thumbs: up", 2, 0.75),
        ("(none)", 1, 0),
    ]

    await say("dec-2", 1.0, "judge")
    await say("dec-1", None, None)
    assert [(each.source, each.decisions) for each in await feedback.sources()] == [("(none)", 1), ("judge", 1)]


async def test_made_up_sources_are_counted_together_once_there_are_many(store: Store) -> None:
    await store.client.hset(SOURCES, mapping={f"n:{NOW // 24}:{number}": 1 for number in range(MAX_SOURCE_FIELDS)})
    feedback = FeedbackStore(store, LIMITS)
    await feedback.give("dec-1", "small", "k", {"score": 1.0, "source": "one more", "at": 1.0}, None)
    assert await store.client.hexists(SOURCES, f"n:{NOW // 24}:(others)")
    assert not await store.client.hexists(SOURCES, f"n:{NOW // 24}:one more")


def test_sources_of_long_ago_and_odd_fields_are_left_out() -> None:
    stored = {"n:10:old": "1", "n:20:new": "2", "s:20:new": "1", "n:x:y": "1", "q:20:new": "1", "n:20:odd": "nan"}
    assert parse_sources(stored, 20) == [SourceVolume("new", 2, 0.5, 20)]


@pytest.mark.parametrize("odd", [{"n:x": "1"}, {"q:1": "1"}, {"n:1": "x"}, {"n:1": "inf"}])
def test_odd_hours_in_redis_count_as_none(odd: dict[str, str]) -> None:
    assert parse_hours({"for": OWNER, "n:5": "1", **odd}, OWNER).hours == ()
    assert parse_hours({"for": OWNER, "n:5": "1"}, OWNER).hours == (5,)


@pytest.mark.parametrize(
    ("rates", "p"),
    [((0.5, 100, 0.5, 100), 1.0), ((0.6, 100, 0.5, 100), 0.1552), ((0.0, 10, 0.0, 10), 1.0), ((1, 50, 0.5, 50), 0.0)],
)
def test_the_p_value_is_that_of_the_pooled_z_test(rates: tuple[float, float, float, float], p: float) -> None:
    assert two_proportion_p(*rates) == pytest.approx(p, abs=2e-4)
