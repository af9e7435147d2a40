from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from proxy.storage.decisions import FEEDBACK
from proxy.storage.feedback import (
    OBSERVED,
    FeedbackLimits,
    FeedbackStore,
    Labels,
    ObservedErrors,
    ObservedProfiles,
    comparison,
    owner_of,
    two_proportion_p,
)
from proxy.storage.redis import Store
from tests.support.makers import CORNERS, a_profile, a_record

DAY_S = 86_400
LIMITS = FeedbackLimits(half_life_s=7 * DAY_S, labels_per_key=3, calls_per_minute=1000, ttl_s=3600)
RECORD = a_record("small")
OWNER = owner_of(CORNERS.id, RECORD.fingerprint)
SAID = {"score": 0.25, "source": "tests", "at": 1.0}


def labels(score: float = 0.25, *, owner: str = OWNER, **clusters: float) -> Labels:
    weights = {int(name[1:]): weight for name, weight in clusters.items()} or {0: 0.75, 2: 0.25}
    return Labels(owner, 1 - score, weights)


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
        return found.labels.round(3).tolist(), found.error_sums.round(3).tolist()

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


def observed(count: float, wrong: float) -> ObservedErrors:
    return ObservedErrors(np.array([count, 0, 0, 0]), np.array([wrong, 0, 0, 0]))


def test_measured_and_observed_are_compared_in_the_same_mix_of_clusters() -> None:
    found = comparison(a_profile((0.1, 0.9, 0.9, 0.9)), observed(30, 3))

    assert (found["measured_mean_error"], found["mean_error"]) == pytest.approx((0.1, 0.1))
    assert (found["p"], found["differs"]) == (pytest.approx(1), False)
    assert found["clusters"] == [{"id": 0, "labels": 30, "error": 0.1, "measured_error": 0.1}]


def test_they_part_when_chance_does_not_explain_it_and_not_on_few_labels() -> None:
    profile = a_profile((0.1,) * 4)
    assert comparison(profile, observed(300, 240))["differs"] is True
    assert comparison(profile, observed(19, 19))["differs"] is None


@pytest.mark.parametrize(
    ("rates", "p"),
    [((0.5, 100, 0.5, 100), 1.0), ((0.6, 100, 0.5, 100), 0.1552), ((0.0, 10, 0.0, 10), 1.0), ((1, 50, 0.5, 50), 0.0)],
)
def test_the_p_value_is_that_of_the_pooled_z_test(rates: tuple[float, float, float, float], p: float) -> None:
    assert two_proportion_p(*rates) == pytest.approx(p, abs=2e-4)
