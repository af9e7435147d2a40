from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from proxy.storage.audit_log import AUDIT, Actor, AuditedScript, AuditTrail
from proxy.storage.client_keys import SECRET, AuthRequiredLatch, ClientKey, InvalidKey, KeyChange, KeyLimits, digest_of
from proxy.storage.redis import KEYS, Store, StoreUnavailable
from proxy.storage.registry import KeyInactive, KeyRegistry, Registry, UnknownKey
from router_core.types import Price
from tests.support.makers import a_profile, a_record, a_registry, started_watcher
from tests.support.waiting import until

ANN = Actor("k-ann", "req-1")


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def some_keys(store: Store, folder: Path, clock: Clock) -> KeyRegistry:
    return KeyRegistry(AuditedScript(store), AuthRequiredLatch(folder), clock)


def audited(store: Store, folder: Path, *configured: str) -> Registry:
    return a_registry(store, folder, *configured).as_actor(ANN)


async def lines(store: Store) -> list[dict[str, Any]]:
    """Return the audit lines, oldest first."""
    return list(reversed(await AuditTrail(store, ANN).latest(1000)))


async def everything(store: Store) -> str:
    dumped = [await store.client.hgetall(KEYS), await store.client.xrange(AUDIT)]
    return json.dumps(dumped)


async def test_a_key_is_stored_with_all_its_terms_and_never_with_its_secret(store: Store, tmp_path: Path) -> None:
    keys = audited(store, tmp_path).keys
    terms = KeyChange({"role": "viewer", "lambda_min": 0.1, "expires_at": 2e9}, {"usd_per_day": 2.5})
    key, secret = await keys.create("team", ("small",), terms)
    assert SECRET.fullmatch(secret)
    assert AuthRequiredLatch(tmp_path).closed
    assert await keys.find(key.id) == key
    assert (key.role, key.lambda_min, key.expires_at, key.models) == ("viewer", 0.1, 2e9, ("small",))
    assert key.limits == KeyLimits(usd_per_day=2.5)
    _, rotated = await keys.rotate(key.id, 60)
    kept = await everything(store)
    assert not {secret, rotated} & set(SECRET.findall(kept))
    assert SECRET.search(kept) is None


async def test_an_invalid_key_stores_nothing_and_requires_no_key(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidKey):
        await audited(store, tmp_path).keys.create("team", None, KeyChange({"lambda_min": 2.0, "lambda_max": 1.0}))
    assert await store.client.keys() == []
    assert not AuthRequiredLatch(tmp_path).closed


async def test_a_rotation_ends_the_old_secret_at_once_or_after_its_grace_period(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    keys = some_keys(store, tmp_path, clock)
    made, first = await keys.create("team")
    graced, second = await keys.rotate(made.id, 60)
    assert [graced.matches(digest_of(secret), clock.now) for secret in (first, second)] == [True, True]
    assert [graced.matches(digest_of(secret), clock.now + 60) for secret in (first, second)] == [False, True]
    abrupt, third = await keys.rotate(made.id)
    assert [abrupt.matches(digest_of(secret), clock.now) for secret in (first, second, third)] == [
        *(False, False, True)
    ]
    assert (abrupt.previous_digest, abrupt.previous_until) == (None, None)  # so that no clock set back revives it
    assert (abrupt.id, abrupt.name, abrupt.created_at) == (made.id, "team", made.created_at)


async def test_a_second_rotation_ends_the_grace_period_of_the_first(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    keys = some_keys(store, tmp_path, clock)
    made, first = await keys.create("team")
    _, second = await keys.rotate(made.id, 600)
    twice, _ = await keys.rotate(made.id, 600)
    assert [twice.matches(digest_of(secret), clock.now) for secret in (first, second)] == [False, True]


async def test_concurrent_changes_are_all_kept(store: Store, second_store: Store, tmp_path: Path) -> None:
    here, there = a_registry(store, tmp_path).keys, a_registry(second_store, tmp_path).keys
    key, secret = await here.create("team")
    await asyncio.gather(
        here.change(key.id, KeyChange(limits={"requests_per_minute": 7})),
        there.change(key.id, KeyChange(limits={"usd_per_day": 1.0})),
        here.change(key.id, KeyChange({"lambda_max": 0.5})),
        there.change(key.id, KeyChange({"models": ("small",)})),
        here.change(key.id, KeyChange({"role": "viewer"})),
        there.rotate(key.id, 60),
        here.change(key.id, KeyChange({"expires_at": 2e9})),
    )
    kept = await there.find(key.id)
    assert kept.limits == KeyLimits(requests_per_minute=7, usd_per_day=1.0)
    assert (kept.lambda_max, kept.models, kept.role, kept.expires_at) == (0.5, ("small",), "viewer", 2e9)
    assert kept.previous_digest == digest_of(secret)


async def test_a_concurrent_change_does_not_undo_a_revocation(store: Store, tmp_path: Path) -> None:
    keys = a_registry(store, tmp_path).keys
    for _ in range(10):
        key, _ = await keys.create("team")
        changes = [keys.change(key.id, KeyChange({"lambda_max": 0.5})), keys.rotate(key.id, 60)]
        await asyncio.gather(keys.revoke(key.id), *changes, return_exceptions=True)
        assert (await keys.find(key.id)).revoked


async def test_a_revoked_key_stays_revoked(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    keys = some_keys(store, tmp_path, clock)
    expired, _ = await keys.create("short", None, KeyChange({"expires_at": clock.now + 10}))
    revoked, _ = await keys.create("gone")
    assert await keys.revoke(revoked.id) == await keys.revoke(revoked.id)
    clock.now += 10
    for refused in (
        keys.change(revoked.id, KeyChange({"role": "admin"})),
        keys.rotate(revoked.id),
        keys.rotate(expired.id, 60),
    ):
        with pytest.raises(KeyInactive):
            await refused
    await keys.change(expired.id, KeyChange({"expires_at": clock.now + 10}))
    assert (await keys.rotate(expired.id))[0].id == expired.id


async def test_an_unknown_key_is_refused_and_nothing_changes(store: Store, tmp_path: Path) -> None:
    keys = audited(store, tmp_path).keys
    for refused in (keys.find("k"), keys.change("k", KeyChange()), keys.rotate("k"), keys.revoke("k")):
        with pytest.raises(UnknownKey, match="'k'"):
            await refused
    assert await store.client.keys() == []


async def test_an_unreadable_key_record_is_not_valid_even_if_it_once_was(store: Store, tmp_path: Path) -> None:
    keys = a_registry(store, tmp_path).keys
    key, _ = await keys.create("team")
    other, _ = await keys.create("other")
    async with started_watcher(store, tmp_path) as holder:
        assert {key.digest, other.digest} == holder.current.keys.keys()
        for broken in ("{", key.to_json().replace('"client"', '"root"'), key.to_json().replace("null", '"x"', 1)):
            await store.client.hset(KEYS, key.id, broken)
            await holder.refresh(whole=True)
            assert {other.digest} == holder.current.keys.keys()
            assert holder.current.keys_required
    assert await keys.listed() == (other,)
    with pytest.raises(UnknownKey, match="cannot be read"):
        await keys.change(key.id, KeyChange())


async def test_both_secrets_of_a_rotated_key_are_found_by_every_process(store: Store, tmp_path: Path) -> None:
    keys = a_registry(store, tmp_path).keys
    async with started_watcher(store, tmp_path) as holder:
        made, first = await keys.create("team")
        rotated, second = await keys.rotate(made.id, 60)
        await until(lambda: digest_of(second) in holder.current.keys)
        assert holder.current.keys[digest_of(first)] == rotated
        await keys.revoke(made.id)
        await until(lambda: not holder.current.keys)


async def test_a_write_whose_reply_was_lost_can_be_repeated(store: Store, tmp_path: Path) -> None:
    keys = audited(store, tmp_path).keys
    key = ClientKey("k", "team", "0a", 1.0)
    changed = ClientKey("k", "team", "0a", 1.0, ("small",))
    for before, after in (("", key), (key.to_json(), changed)):
        first = await keys._put("store a key", before, after, "keys.create")
        assert await keys._put("store a key", before, after, "keys.create") == first
    assert len(await lines(store)) == 2


async def test_every_write_of_an_actor_has_an_audit_line_and_the_service_leaves_none(
    store: Store, tmp_path: Path
) -> None:
    registry = audited(store, tmp_path)
    key, _ = await registry.keys.create("team")
    await registry.keys.change(key.id, KeyChange({"role": "admin"}))
    await registry.keys.rotate(key.id, 5)
    await registry.keys.revoke(key.id)
    await registry.add_model(a_record())
    await registry.update_model(a_record(temperature=1))
    await registry.put_price("small", Price(1e-6, 1e-6))
    await registry.put_profile(a_record(), a_profile())
    await registry.remove_model("small")
    seen = await lines(store)
    assert [(line["action"], line["target"]) for line in seen] == [
        *((f"keys.{action}", key.id) for action in ("create", "change", "rotate", "revoke")),
        *((f"models.{action}", "small") for action in ("add", "change", "price", "profile", "remove")),
    ]
    assert {(line["who"], line["request"], line["outcome"]) for line in seen} == {("k-ann", "req-1", "done")}

    await a_registry(store, tmp_path, "small").put_price("small", Price(1e-6, 1e-6), "sync")
    assert len(await lines(store)) == len(seen)


async def test_a_change_whose_audit_line_cannot_be_written_is_not_made(store: Store, tmp_path: Path) -> None:
    registry = audited(store, tmp_path)
    key, _ = await registry.keys.create("team")
    await registry.add_model(a_record())
    await store.client.set("kept", "1")
    await store.client.rename("kept", AUDIT)
    for refused in (
        registry.keys.revoke(key.id),
        registry.keys.create("more"),
        registry.remove_model("small"),
        registry.put_price("small", Price(1e-6, 1e-6)),
        registry.put_profile(a_record(), a_profile()),
        registry.update_model(a_record(temperature=1)),
        registry.add_model(a_record("second")),
    ):
        with pytest.raises(StoreUnavailable):
            await refused
    assert await registry.keys.listed() == (key,)
    async with started_watcher(store, tmp_path) as holder:
        assert holder.current.models == {"small": a_record()}
        assert holder.current.profiles == {}


async def test_the_audit_log_keeps_the_last_lines_and_marks_foreign_ones(store: Store, tmp_path: Path) -> None:
    registry = audited(store, tmp_path, "small")
    async with store.client.pipeline(transaction=False) as pipe:
        for _ in range(10_000):
            pipe.xadd(AUDIT, {"line": "not ours"})
        await pipe.execute()
    await registry.put_price("small", Price(1e-6, 1e-6))
    assert await store.client.xlen(AUDIT) == 10_000
    await AuditTrail(store, ANN).record("jobs.cancel", "j1")
    assert await store.client.xlen(AUDIT) == 10_000
    newest, second, third = await AuditTrail(store, ANN).latest(3)
    assert (newest["action"], second["action"], third["who"]) == ("jobs.cancel", "models.price", "?")
    assert newest["at"].endswith("Z")


async def test_an_audit_line_that_cannot_be_stored_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = Store("redis://127.0.0.1:1")
    await AuditTrail(nowhere, ANN).record("jobs.cancel", "j1")
    await nowhere.close()
    assert "jobs.cancel is in this log alone" in caplog.text
