from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.storage.profile_history import (
    MAX_PROFILES,
    ProfileChange,
    ProfileEntry,
    changes_of,
    entries_to_json,
    history_key,
    read_history,
)
from proxy.storage.redis import PROFILES, VERSION, Store, StoreUnavailable
from router_core.errors import InvalidInput
from tests.support.makers import CORNERS, a_profile, a_record, a_registry
from tests.support.makers import PAST_PROFILE as ENTRY


def an_entry(*rates: float, labels: float = 25.0, **more: Any) -> ProfileEntry:
    """Return an entry with these error rates, one a cluster."""
    counts = np.full(len(rates), labels)
    return replace(ProfileEntry(1.0, "job", "m", "f", np.array(rates) * counts, counts), **more)


async def test_each_profile_that_is_handed_over_joins_the_history_of_its_model(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record(), a_profile((0.1,) * 4), "pooled")
    await registry.put_profile(a_record(), a_profile((0.3,) * 4), "raw")
    newest, first = await read_history(store, "small")

    assert [newest.mean_error, first.mean_error] == pytest.approx([6.5 / 21, 2.5 / 21])
    assert (first.source, first.recipe, first.job, first.map_id) == ("upload", "pooled", None, CORNERS.id)
    assert (newest.total_labels, newest.mean_output_tokens, newest.mean_seconds) == (20, 50, 1)
    assert newest.fingerprint == a_record().fingerprint
    assert newest.interval[0] < newest.mean_error < newest.interval[1]


async def test_a_model_that_is_added_without_a_profile_has_none(store: Store, tmp_path: Path) -> None:
    await a_registry(store, tmp_path).add_model(a_record())
    assert await read_history(store, "small") == []


async def test_only_the_last_profiles_are_kept_and_they_go_with_the_model(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record())
    for number in range(MAX_PROFILES + 3):
        await registry.put_profile(a_record(), a_profile((number / 100,) * 4))
    kept = await read_history(store, "small")
    assert len(kept) == MAX_PROFILES
    assert kept[0].error_sums[0] == pytest.approx(5 * (MAX_PROFILES + 2) / 100)
    await registry.remove_model("small")
    assert await store.client.keys() == [VERSION]


async def test_a_model_of_a_name_that_a_configuration_had_begins_with_no_history(store: Store, tmp_path: Path) -> None:
    await a_registry(store, tmp_path, "small").put_profile(a_record(source="config"), a_profile())
    await a_registry(store, tmp_path).add_model(a_record())
    assert await read_history(store, "small") == []


async def test_the_profile_and_its_entry_are_written_together_or_not_at_all(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    await store.client.set(PROFILES, "not a hash")
    with pytest.raises(StoreUnavailable):
        await registry.put_profile(a_record(), a_profile())
    assert await read_history(store, "small") == []
    await store.client.delete(PROFILES)
    await store.client.set(history_key("small"), "not a list")
    await registry.put_profile(a_record(), a_profile())
    assert len(await read_history(store, "small")) == 1


@pytest.mark.parametrize(
    "odd",
    [
        *("", "null", "[]", "{}"),
        *(
            {**ENTRY, "source": "thin air"},
            {**ENTRY, "labels": [1.0]},
            {**ENTRY, "labels": "x", "error_sums": "x"},
        ),
        *(
            {**ENTRY, "error_sums": [9.0, 9.0]},
            {**ENTRY, "stored_at": None},
            {**ENTRY, "labels": [float("inf"), 1.0]},
        ),
        *({**ENTRY, "job": 5}, {**ENTRY, "labels": [True, None]}),
    ],
    ids=str,
)
async def test_an_odd_entry_is_left_out(store: Store, odd: Any) -> None:
    text = odd if isinstance(odd, str) else json.dumps(odd)
    good = an_entry(0.5, 0.25)
    await store.client.rpush(history_key("small"), good.to_text(), text)
    with pytest.raises(InvalidInput):
        ProfileEntry.from_text(text)
    assert [each.to_text() for each in await read_history(store, "small")] == [good.to_text()]


def test_what_is_written_is_read() -> None:
    text = json.dumps(ENTRY)
    assert json.loads(ProfileEntry.from_text(text).to_text()) == ENTRY
    unknown = an_entry(1 / 3, 0.0, labels=3.0)
    assert json.loads(unknown.to_text())["error_sums"] == [1.0, 0.0]


def test_a_change_is_judged_by_the_test_that_feedback_is_judged_by() -> None:
    worse, alike = an_entry(0.5, 0.5), an_entry(0.22, 0.18)
    before = an_entry(0.1, 0.1)
    change = ProfileChange.between(before, worse)
    # pooled rate 0.3 of 50 and 50 labels: z = 0.4 / sqrt(0.3 · 0.7 · 2 / 50) = 4.36
    assert change.p == pytest.approx(1.28e-5, rel=0.02)
    assert change.differs is True
    assert change.mean_error == pytest.approx(worse.mean_error - before.mean_error)
    assert ProfileChange.between(before, alike).differs is False
    few = ProfileChange.between(an_entry(0.0, 0.0, labels=9), an_entry(1.0, 1.0, labels=9))
    assert (few.p, few.differs) == (None, None)


def test_the_clusters_that_changed_most_are_named_and_those_without_labels_are_not() -> None:
    before = an_entry(0.1, 0.1, 0.1, 0.1, labels=40)
    after = an_entry(0.1, 0.8, 0.3, 0.1, labels=40)
    after.labels[3], after.error_sums[3] = 0.0, 0.0
    change = ProfileChange.between(before, after)
    assert [each.cluster for each in change.clusters][:2] == [1, 2]
    assert 3 not in [each.cluster for each in change.clusters]
    assert change.clusters[0].change > 0.6
    assert (change.clusters[0].labels_before, change.clusters[0].labels) == (40, 40)
    other_map = ProfileChange.between(replace(before, map_id="other"), after)
    assert (other_map.same_map, list(other_map.clusters)) == (False, [])
    assert other_map.p == change.p
    assert ProfileChange.between(replace(before, fingerprint="g"), after).same_parameters is False


def test_each_entry_is_compared_with_the_one_before_it_and_clusters_have_the_names_of_their_map() -> None:
    entries = [an_entry(0.5, 0.1, labels=40), an_entry(0.1, 0.1, labels=40), an_entry(0.1, 0.1, map_id="other")]
    first, second, oldest = changes_of(entries)
    assert (oldest, changes_of([])) == (None, [])
    assert first is not None
    assert second is not None
    assert (first.same_map, second.same_map) == (True, False)
    shown = entries_to_json(entries, "m", ("maths", "poems"))
    assert [each["name"] for each in shown[0]["change"]["clusters"]] == ["maths", "poems"]
    assert shown[2]["change"] is None
    assert [each["name"] for each in entries_to_json(entries, "n", ("a", "b"))[0]["change"]["clusters"]] == [None, None]


async def test_profiles_that_are_stored_at_once_all_join_the_history(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    many = [registry.put_profile(a_record(), a_profile((number / 10,) * 4)) for number in range(10)]
    await asyncio.gather(*many)
    rates = sorted(round(float(each.error_sums[0]) / 5, 3) for each in await read_history(store, "small"))
    assert rates == [number / 10 for number in range(10)]
