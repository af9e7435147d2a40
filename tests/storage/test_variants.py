"""The efforts of a model as a process sees them: which there are, and what they share with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from proxy.settings.effort import EFFORTS, least_tokens, most_tokens, read_efforts
from proxy.settings.model_config import ModelInfo
from proxy.storage.price_map import bundled_price_map
from proxy.storage.profile_history import history_key
from proxy.storage.records import InvalidRecord, ModelRecord
from proxy.storage.redis import PAUSED, PREVIOUS_PROFILES, PROFILES, Store
from proxy.storage.variants import variants_of
from router_core.types import Price
from tests.support.makers import PRICED, a_profile, a_record, a_registry, started_watcher

NAMES = ("small@low", "small@high")


def thinker(efforts: Any = ("low", "high"), **more: Any) -> ModelRecord:
    return a_record(info={**PRICED, "effort": efforts}, **more)


def efforts_by_litellm(model: str, **info: Any) -> list[Any]:
    record = ModelRecord("m", {"model": model}, ModelInfo(effort="auto", **info), "admin", 0.0)
    return [each.effort for each in variants_of(record, bundled_price_map().find(model))]


@pytest.mark.parametrize(
    ("model", "efforts"),
    [
        ("openai/o3", ["low", "medium", "high"]),
        ("openai/gpt-5", ["minimal", "low", "medium", "high"]),
        ("openai/gpt-5.1", ["none", "low", "medium", "high"]),
        ("anthropic/claude-sonnet-4-5", ["none", 2048, 8192, 16384]),
        ("anthropic/claude-opus-4-6", ["low", "medium", "high"]),
        ("openai/of-my-own", ["low", "medium", "high"]),
    ],
)
def test_auto_takes_the_efforts_that_litellm_knows_of_a_model(model: str, efforts: list[Any]) -> None:
    assert efforts_by_litellm(model) == efforts


def test_auto_is_refused_for_a_model_that_is_not_known_to_reason_unless_it_is_said_to() -> None:
    with pytest.raises(InvalidRecord, match="'openai/gpt-4o-mini' is not known to reason"):
        efforts_by_litellm("openai/gpt-4o-mini")
    assert efforts_by_litellm("openai/gpt-4o-mini", supports_reasoning=True) == ["low", "medium", "high"]


def test_a_model_that_fixes_how_much_it_thinks_has_no_efforts() -> None:
    with pytest.raises(InvalidRecord, match=r"litellm_params\.thinking fixes how much it thinks"):
        variants_of(thinker(thinking={"type": "disabled"}), None)


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        ("auto", "auto"),
        ("high", ("high",)),
        (["high", "none", "low"], ("none", "low", "high")),
        ([16000, "2048"], (2048, 16000)),
        (["high", 2048], (2048, "high")),
    ],
)
def test_efforts_are_read_in_ascending_order(stated: Any, read: Any) -> None:
    assert ModelInfo(effort=stated).effort == read


@pytest.mark.parametrize("stated", [[], ["low", "low"], "much", 5, [True], {"low": 1}, ["low"] * 9])
def test_what_is_no_effort_is_refused(stated: Any) -> None:
    with pytest.raises(ValidationError, match="effort"):
        ModelInfo(effort=stated)


def test_named_efforts_lie_between_budgets_without_a_gap() -> None:
    assert [most_tokens(lower) + 1 for lower in EFFORTS[:-1]] == [least_tokens(upper) for upper in EFFORTS[1:]]
    assert read_efforts(None) is None


def test_an_effort_is_asked_by_its_parameter_and_has_a_fingerprint_of_its_own() -> None:
    low, budget = variants_of(thinker(("low", 4096)), None)
    assert (low.name, low.litellm_params["reasoning_effort"]) == ("small@low", "low")
    assert budget.litellm_params["thinking"] == {"type": "enabled", "budget_tokens": 4096}
    assert len({low.fingerprint, budget.fingerprint, thinker().fingerprint}) == 3


async def test_efforts_share_the_price_of_their_model_and_stay_the_same_objects(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    async with started_watcher(store, tmp_path, thinker(source="config")) as watcher:
        before = watcher.current.models
        await registry.put_price("small", Price(7e-6, 8e-6))
        await watcher.refresh()
        now = watcher.current
        assert [now.prices[name].price.input_cost_per_token for name in NAMES] == [7e-6, 7e-6]
        assert all(now.models[name] is before[name] for name in NAMES)


async def test_a_registered_name_is_never_that_of_an_effort(store: Store, tmp_path: Path) -> None:
    await a_registry(store, tmp_path).add_model(a_record("small@low"))
    async with started_watcher(store, tmp_path, thinker(source="config")) as watcher:
        assert watcher.current.efforts == {"small": ("small@high",)}
        assert watcher.current.models["small@low"].effort is None


async def test_the_profile_of_a_model_serves_until_one_of_its_efforts_has_one(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    record = thinker(source="config")
    async with started_watcher(store, tmp_path, record) as watcher:
        await registry.put_profile(record, a_profile())
        await watcher.refresh()
        assert set(watcher.current.profiles) == {"small"}
        await registry.put_profile(watcher.current.models["small@high"], a_profile())
        await watcher.refresh()
        assert set(watcher.current.profiles) == {"small@high"}
        assert watcher.current.unused_profiles == {}
        assert watcher.current.measured_efforts == {"small": NAMES}


async def test_nothing_is_left_of_the_efforts_of_a_removed_model(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    await registry.add_model(thinker())
    for variant in variants_of(thinker(), None):
        await registry.put_profile(variant, a_profile())
        await registry.pause_model(variant.name, paused=True, effort_of="small")
    await registry.remove_model("small", NAMES)
    left = [await store.client.hlen(key) for key in (PROFILES, PREVIOUS_PROFILES, PAUSED)]
    assert (left, await store.client.exists(*map(history_key, NAMES))) == ([0, 0, 0], 0)


async def test_a_model_whose_efforts_cannot_be_made_any_more_is_asked_as_it_is(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = a_record("small", source="config", info={**PRICED, "effort": "auto"}, model="openai/gpt-4o-mini")
    async with started_watcher(store, tmp_path, record) as watcher:
        assert (watcher.current.efforts, set(watcher.current.models)) == ({}, {"small"})
    assert "is not known to reason" in caplog.text
