from __future__ import annotations

from pathlib import Path

import pytest

from proxy.storage.client_keys import AuthRequiredLatch, digest_of
from proxy.storage.redis import CHANGED, MODELS, PRICING, PROFILES, VERSION, Store, StoreUnavailable, price_key
from proxy.storage.registry import ConfiguredModel, ConflictingWrite, ModelExists, UnknownKey, UnknownModel
from router_core.types import Price
from tests.support.makers import a_profile, a_record, a_registry


async def test_each_write_raises_the_version_and_publishes_it(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    async with store.client.pubsub() as pubsub:
        await pubsub.subscribe(CHANGED, PRICING)
        assert await registry.add_model(a_record()) == 1
        assert await registry.update_model(a_record(temperature=1)) == 2
        assert await registry.put_price("small", Price(1e-6, 1e-6)) == 3
        assert await registry.put_profile(a_record(), a_profile()) == 4
        assert await registry.remove_model("small") == 5
        published = [m["data"] async for m in _messages(pubsub, 6)]
    assert published == ["1", "2", "3", "small", "4", "5"]


async def test_a_taken_name_is_refused_and_the_same_record_again_changes_nothing(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "configured")
    await registry.add_model(a_record())
    await registry.add_model(a_record())
    for taken in (a_record(temperature=1), a_record("configured")):
        with pytest.raises(ModelExists, match=taken.name):
            await registry.add_model(taken)
    assert await store.client.hlen(MODELS) == 1


async def test_a_configured_model_can_be_priced_and_profiled_but_not_changed(store: Store, tmp_path: Path) -> None:
    registry, record = a_registry(store, tmp_path, "configured"), a_record("configured", source="config")
    for refused in (registry.update_model(record), registry.remove_model("configured")):
        with pytest.raises(ConfiguredModel):
            await refused
    assert await registry.put_price("configured", Price(1e-6, 1e-6)) == 1
    assert await registry.put_profile(record, a_profile()) == 2


async def test_an_unknown_model_is_refused_and_nothing_changes(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    for refused in (
        registry.update_model(a_record()),
        registry.remove_model("small"),
        registry.put_price("small", Price(1e-6, 1e-6)),
        registry.put_profile(a_record(), a_profile()),
    ):
        with pytest.raises(UnknownModel):
            await refused
    assert await store.client.keys() == []


async def test_removing_a_model_removes_its_profile_and_price(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    await registry.add_model(a_record())
    await registry.put_price("small", Price(1e-6, 1e-6))
    await registry.put_profile(a_record(), a_profile())
    await registry.remove_model("small")
    assert await store.client.keys() == [VERSION]


async def test_a_new_price_replaces_the_whole_price(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    await registry.put_price("small", Price(1e-6, 1e-6, cache_read_input_token_cost=1e-7))
    await registry.put_price("small", Price(2e-6, 2e-6))
    assert "cache_read_input_token_cost" not in await store.client.hgetall(price_key("small"))


@pytest.mark.parametrize(("source", "replaced"), [("admin", False), (None, False), ("sync", True)])
async def test_a_feed_replaces_only_prices_of_a_feed(
    store: Store, tmp_path: Path, source: str | None, replaced: bool
) -> None:
    registry = a_registry(store, tmp_path, "small")
    price = {"input_cost_per_token": "1", "output_cost_per_token": "1"} | ({"source": source} if source else {})
    await store.client.hset(price_key("small"), items=[word for pair in price.items() for word in pair])
    version = await registry.put_price("small", Price(2e-6, 2e-6), "sync")
    assert (version is not None) is replaced


async def test_a_write_to_a_redis_key_of_the_wrong_type_changes_nothing(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path, "small")
    await store.client.set(PROFILES, "not a hash")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await registry.put_profile(a_record(), a_profile())
    assert await store.client.get(PROFILES) == "not a hash"


async def test_a_key_is_shown_once_and_stored_as_a_digest(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    key, secret = await registry.keys.create("team", ("small",))
    assert secret.startswith("ur-")
    assert key.digest == digest_of(secret)
    assert await registry.keys.listed() == (key,)
    assert secret not in str(await store.client.hgetall("uniroute:keys"))
    await registry.keys.revoke(key.id)
    assert [known.revoked for known in await registry.keys.listed()] == [True]
    with pytest.raises(UnknownKey):
        await registry.keys.revoke("nobody")


async def test_without_redis_a_write_fails_and_no_client_key_is_required(tmp_path: Path) -> None:
    store = Store("redis://127.0.0.1:1")
    registry = a_registry(store, tmp_path)
    with pytest.raises(StoreUnavailable, match="could not add a model"):
        await registry.add_model(a_record())
    with pytest.raises(StoreUnavailable):
        await registry.keys.create("team")
    assert not AuthRequiredLatch(tmp_path).closed
    await store.close()


async def _messages(pubsub: object, count: int):  # type: ignore[no-untyped-def]
    while count:
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=60)  # type: ignore[attr-defined]
        if message is not None:
            count -= 1
            yield message


async def test_a_change_of_an_outdated_record_is_refused(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    seen = await registry.add_model(a_record())
    now = await registry.put_price("small", Price(1e-6, 1e-6))
    with pytest.raises(ConflictingWrite):
        await registry.update_model(a_record(temperature=1), as_of=seen)
    assert await registry.update_model(a_record(temperature=1), as_of=now) == seen + 2
