from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import pytest

from proxy.storage import state_reader
from proxy.storage.redis import KEYS, MODELS, PRICING, PROFILES, VERSION, Store, price_key
from proxy.storage.snapshot import TrafficStats
from proxy.storage.state_reader import StateReader
from proxy.storage.valkey import EmbeddedValkey
from router_core.profiles import Profile
from router_core.types import Price
from tests.support.makers import CORNERS, a_profile, a_record, a_registry, snapshot_inputs, started_watcher
from tests.support.waiting import until


async def price(store: Store, name: str, per_input: str) -> None:
    await store.client.hset(price_key(name), "input_cost_per_token", per_input)
    await store.client.hset(price_key(name), "output_cost_per_token", "2e-6")


async def test_every_process_sees_a_model_its_profile_and_its_price_within_a_second(
    store: Store, second_store: Store, tmp_path: Path
) -> None:
    registry = a_registry(store, tmp_path)
    async with started_watcher(store, tmp_path) as one, started_watcher(second_store, tmp_path) as two:
        await registry.add_model(a_record())
        await registry.put_profile(a_record(), a_profile())
        version = await registry.put_price("small", Price(1e-7, 2e-7))
        await until(lambda: one.current.version == two.current.version == version)
        for watcher in (one, two):
            assert watcher.current.model_state("small") == "ready"
            assert watcher.current.prices["small"].price == Price(1e-7, 2e-7)
            assert watcher.current.pool.names == ("small",)


@pytest.mark.parametrize("published", [True, False])
async def test_a_foreign_price_counts_within_a_second_published_or_not(
    store: Store, tmp_path: Path, published: bool
) -> None:
    async with started_watcher(store, tmp_path, a_record(source="config")) as watcher:
        assert watcher.current.prices["small"].source == "model_info"
        await price(store, "small", "7e-6")
        if published:
            await store.client.publish(PRICING, "small")
        await until(lambda: watcher.current.prices["small"].source == "external")
        assert watcher.current.prices["small"].price.input_cost_per_token == 7e-6


async def test_of_many_models_each_price_is_found_by_itself_and_none_is_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_reader, "POLLED_MODELS", 3)
    names, reader = [f"model-{number}" for number in range(8)], StateReader(store, time.time)
    await price(store, "model-0", "1e-6")
    await reader.read(names, whole=True)
    for name in names[1:]:
        await price(store, name, "7e-6")
    await store.client.delete(price_key("model-3"))

    found = []
    for _ in range(4):
        await reader.read(names)
        found.append(reader.last)

    assert found[0] is not found[1] is not found[2] is found[3]
    assert sorted(reader.last.prices) == [name for name in names if name != "model-3"]
    await reader.read(names[:2], whole=True)
    assert sorted(reader.last.prices) == names[:2]


async def test_of_the_entries_of_a_hash_only_those_that_changed_are_parsed_again(store: Store, tmp_path: Path) -> None:
    registry, reader = a_registry(store, tmp_path), StateReader(store, time.time)
    for name in ("small", "large"):
        await registry.add_model(a_record(name))
        await registry.put_profile(a_record(name), a_profile())
    await reader.read([])
    before = reader.last
    await reader.read([], whole=True)
    assert reader.last is before
    await registry.put_profile(a_record("large"), a_profile((0.4, 0.3, 0.2, 0.1)))
    await reader.read([])

    assert reader.last.profiles["small"] is before.profiles["small"]
    assert reader.last.profiles["large"] is not before.profiles["large"]


def test_what_is_known_of_a_model_is_kept_until_the_model_changes() -> None:
    inputs = snapshot_inputs()
    one, other = a_record("small"), a_record("large")
    first = inputs.facts_of({"small": one, "large": other})
    changed = a_record("large", info={"supports_vision": True})
    second = inputs.facts_of({"small": one, "large": changed})

    assert second["small"] is first["small"]
    assert (first["large"].capabilities.vision, second["large"].capabilities.vision) == (None, True)
    assert list(inputs.facts_of({"small": one})) == ["small"]


@pytest.mark.parametrize("broken", ["nan", "-1", "free", ""])
async def test_a_broken_price_leaves_the_last_good_one(store: Store, tmp_path: Path, broken: str) -> None:
    async with started_watcher(store, tmp_path, a_record(source="config")) as watcher:
        await price(store, "small", "7e-6")
        await watcher.refresh()
        await price(store, "small", broken)
        await watcher.refresh()
        assert watcher.current.prices["small"].price.input_cost_per_token == 7e-6
        await store.client.delete(price_key("small"))
        await watcher.refresh()
        assert watcher.current.prices["small"].source == "model_info"


async def test_a_broken_price_without_a_good_one_before_falls_back_to_the_next_source_and_never_to_zero(
    store: Store, tmp_path: Path
) -> None:
    known = a_record("known", source="config", info={}, model="openai/gpt-4o")
    unknown = a_record("unknown", source="config", info={})
    await price(store, "known", "nan")
    await price(store, "unknown", "-3")
    async with started_watcher(store, tmp_path, known, unknown) as watcher:
        assert watcher.current.prices["known"].source == "litellm"
        assert "unknown" not in watcher.current.prices


async def test_an_unknown_price_is_not_free(store: Store, tmp_path: Path) -> None:
    free, unknown = (a_record(n, source="config", info=i) for n, i in (("free", {"free": True}), ("unknown", {})))
    async with started_watcher(store, tmp_path, free, unknown) as watcher:
        assert watcher.current.prices["free"].price == Price(0, 0)
        assert watcher.current.pool.candidates["unknown"].price is None


async def test_a_profile_of_another_map_or_of_a_changed_model_is_not_used(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    for name in ("foreign", "changed"):
        await registry.add_model(a_record(name))
    await registry.put_profile(a_record("foreign"), a_profile(map_id="another"))
    await registry.put_profile(a_record("changed", temperature=2), a_profile())
    async with started_watcher(store, tmp_path) as watcher:
        assert watcher.current.model_state("foreign") == "foreign_profile"
        assert "another" in watcher.current.unused_profiles["foreign"]
        assert "litellm_params" in watcher.current.unused_profiles["changed"]
        assert watcher.current.profiles == {}


@pytest.mark.parametrize("key", [VERSION, MODELS, PROFILES, KEYS, price_key("small")])
async def test_a_redis_key_of_the_wrong_type_keeps_the_last_reading_and_is_logged_once(
    store: Store, tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record())
    await registry.put_profile(a_record(), a_profile())
    await registry.keys.create("team")
    await registry.put_price("small", Price(1e-6, 2e-6))
    async with started_watcher(store, tmp_path) as watcher:
        before = watcher.current
        await store.client.delete(key)
        await store.client.rpush(key, "not what you expect")
        with caplog.at_level(logging.WARNING, "uniroute.state"):
            await watcher.refresh(whole=True)
            await watcher.refresh(whole=True)
        assert watcher.current.models == before.models
        assert watcher.current.model_state("small") == "ready"
        assert watcher.current.keys == before.keys
        assert watcher.current.prices == before.prices
        assert len([r for r in caplog.records if r.getMessage().startswith(f"stored entry skipped: {key}")]) == 1


async def test_a_broken_entry_is_skipped_and_the_others_are_read(store: Store, tmp_path: Path) -> None:
    await a_registry(store, tmp_path).add_model(a_record())
    await store.client.hset(MODELS, mapping={"broken": "{", "nameless": "{}"})
    await store.client.hset(PROFILES, "small", '{"fingerprint": "x", "profile": {"map": "m", "labels": "?"}}')
    await store.client.hset(KEYS, "k", "[]")
    async with started_watcher(store, tmp_path) as watcher:
        assert set(watcher.current.models) == {"small"}
        assert watcher.current.keys_required
        assert not watcher.current.keys


async def test_a_configured_model_wins_over_a_stored_one_of_its_name(store: Store, tmp_path: Path) -> None:
    await a_registry(store, tmp_path).add_model(a_record(temperature=1))
    configured = a_record(source="config")
    async with started_watcher(store, tmp_path, configured) as watcher:
        assert watcher.current.models["small"] == configured


async def test_keys_stay_required_after_all_are_revoked_or_the_store_is_emptied(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    async with started_watcher(store, tmp_path / "other-machine") as elsewhere:
        assert not elsewhere.current.keys_required
        key, _ = await registry.keys.create("team")
        await until(lambda: key.digest in elsewhere.current.keys)
        await registry.keys.revoke(key.id)
        await until(lambda: key.digest not in elsewhere.current.keys)
        assert elsewhere.current.keys_required
        await store.client.flushall()
        await elsewhere.refresh()
        assert elsewhere.current.keys_required
    async with started_watcher(store, tmp_path / "other-machine") as restarted:
        assert restarted.current.keys_required


async def test_an_emptied_store_with_the_same_version_is_noticed(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record("first"))
    async with started_watcher(store, tmp_path) as watcher:
        await store.client.flushall()
        await registry.add_model(a_record("second"))
        await until(lambda: set(watcher.current.models) == {"second"})


async def test_without_redis_the_last_snapshot_stays_until_redis_is_back(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    await asyncio.to_thread(server.ensure)
    store = Store(f"unix://{server.socket_path}")
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record())
    async with started_watcher(store, tmp_path) as watcher:
        await asyncio.to_thread(server.stop)
        await until(lambda: not watcher.available)
        assert set(watcher.current.models) == {"small"}
        await asyncio.to_thread(server.ensure)
        await until(lambda: watcher.available)
        version = await registry.add_model(a_record("second"))
        await until(lambda: watcher.current.version == version)
    await store.close()
    await asyncio.to_thread(server.stop)


async def test_before_the_first_reading_a_key_is_required_and_configured_models_are_known(tmp_path: Path) -> None:
    nowhere = Store("redis://127.0.0.1:1")
    async with started_watcher(nowhere, tmp_path, a_record(source="config")) as watcher:
        assert not watcher.loaded
        assert watcher.current.keys_required
        assert set(watcher.current.models) == {"small"}
    await nowhere.close()


async def test_live_traffic_changes_the_pool_but_not_the_profile(store: Store, tmp_path: Path) -> None:
    live = TrafficStats(CORNERS.size)
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record())
    await registry.put_profile(a_record(), a_profile())
    async with started_watcher(store, tmp_path, traffic_stats=live) as watcher:
        for _ in range(300):
            live.observe("small", [0, 1], [0.5, 0.5], tokens=900, seconds=9.0)
        await registry.put_price("small", Price(1e-6, 1e-6))
        await watcher.refresh()
        assert watcher.current.pool.output_tokens[0, 0] > 700
        assert watcher.current.profiles["small"].output_tokens()[0] == 50


class BrokenOnce(TrafficStats):
    """Fail to lay out figures the first time."""

    calls = 0

    def blend_into(self, model: str, profile: Profile) -> Profile:
        self.calls += 1
        if self.calls == 1:
            raise OverflowError("int too large to convert")
        return profile


async def test_a_state_that_makes_no_snapshot_does_not_stop_the_watcher(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("proxy.storage.snapshot.UNUSABLE_INTERVAL_S", 0.05)
    registry, live = a_registry(store, tmp_path, "small"), BrokenOnce(4)
    async with started_watcher(store, tmp_path, a_record(source="config"), traffic_stats=live) as watcher:
        await registry.put_profile(a_record(), a_profile())
        await until(lambda: watcher.current.model_state("small") == "ready")
    assert live.calls > 1
    assert "the last one stays in use" in caplog.text
