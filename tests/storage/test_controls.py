from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import proxy
from proxy.settings.schema import Settings
from proxy.storage.audit_log import Actor, AuditTrail
from proxy.storage.controls import LambdaOverride, Pause
from proxy.storage.redis import PAUSED, SETTINGS, VERSION, Store
from proxy.storage.registry import UnknownModel
from router_core.errors import InvalidInput
from tests.support.makers import a_profile, a_record, a_registry, started_watcher
from tests.support.waiting import until

CONFIGURED = Settings.model_validate({"lambda": 0.1})
ADMIN = Actor("k1", "req-1")


async def test_every_process_uses_the_lambda_that_was_set_and_one_that_starts_later_too(
    store: Store, second_store: Store, tmp_path: Path
) -> None:
    registry = a_registry(store, tmp_path).as_actor(ADMIN)
    async with started_watcher(store, tmp_path) as one, started_watcher(second_store, tmp_path) as two:
        assert two.current.default_lambda(CONFIGURED) == 0.1
        await registry.set_lambda(0.7)
        await until(lambda: one.current.default_lambda(CONFIGURED) == two.current.default_lambda(CONFIGURED) == 0.7)
        assert two.current.lambda_override
        assert two.current.lambda_override.who == "k1"
    async with started_watcher(store, tmp_path) as later:
        assert later.current.default_lambda(CONFIGURED) == 0.7
        await registry.reset_settings()
        await until(lambda: later.current.default_lambda(CONFIGURED) == 0.1)


async def test_every_process_pauses_a_model_of_either_origin_until_it_goes_on(
    store: Store, second_store: Store, tmp_path: Path
) -> None:
    configured = a_record("configured", source="config")
    registry = a_registry(store, tmp_path, "configured").as_actor(ADMIN)
    async with (
        started_watcher(store, tmp_path, configured) as one,
        started_watcher(second_store, tmp_path, configured) as two,
    ):
        await registry.add_model(a_record("added"), a_profile())
        await registry.put_profile(configured, a_profile())
        for name in ("configured", "added"):
            await registry.pause_model(name, paused=True)
        await until(lambda: set(one.current.paused) == set(two.current.paused) == {"configured", "added"})
        assert two.current.pool.routable_rows.size == 0
        await registry.pause_model("added", paused=False)
        await until(lambda: set(two.current.paused) == {"configured"})
        assert [two.current.pool.names[row] for row in two.current.pool.routable_rows] == ["added"]
    async with started_watcher(store, tmp_path, configured) as later:
        assert set(later.current.paused) == {"configured"}


async def test_each_change_is_one_version_and_one_audit_line_and_none_where_nothing_changes(
    store: Store, tmp_path: Path
) -> None:
    registry, trail = a_registry(store, tmp_path, "small").as_actor(ADMIN), AuditTrail(store, ADMIN)
    changes: list[Any] = [
        registry.set_lambda(0.25),
        registry.pause_model("small", paused=True),
        registry.pause_model("small", paused=True),
        registry.pause_model("small", paused=False),
        registry.pause_model("small", paused=False),
        registry.reset_settings(),
        registry.reset_settings(),
    ]
    assert [await change for change in changes] == [1, 2, 2, 3, 3, 4, 4]
    written = [(line["action"], line["target"]) for line in await trail.latest(10)]
    assert written == [
        *(("settings.reset", ""), ("models.resume", "small"), ("models.pause", "small")),
        ("settings.change", "lambda=0.25"),
    ]


async def test_a_pause_goes_with_its_model_and_no_new_model_begins_paused(store: Store, tmp_path: Path) -> None:
    registry = a_registry(store, tmp_path)
    with pytest.raises(UnknownModel):
        await registry.pause_model("small", paused=True)
    await registry.add_model(a_record())
    await registry.pause_model("small", paused=True)
    await registry.remove_model("small")
    assert await store.client.keys() == [VERSION]
    await a_registry(store, tmp_path, "small").pause_model("small", paused=True)  # as one of a configuration
    await registry.add_model(a_record())
    assert not await store.client.exists(PAUSED)
    await registry.pause_model("small", paused=True)
    await registry.add_model(a_record())  # the same again
    assert await store.client.hexists(PAUSED, "small")


ODD = ("", "null", "[]", "{}", '{"value": -1, "at": 1}', '{"value": 1}', '{"value": 1, "at": 1, "who": 5}')
ODD_NUMBERS = ('{"value": NaN, "at": 1}', '{"value": 1e999, "at": 1}', '{"value": true, "at": 1}')


@pytest.mark.parametrize("odd", [*ODD, *ODD_NUMBERS])
async def test_an_odd_entry_leaves_what_was_set_before(store: Store, tmp_path: Path, odd: str) -> None:
    registry = a_registry(store, tmp_path, "small")
    record = a_record(source="config")
    async with started_watcher(store, tmp_path, record) as watcher:
        await registry.set_lambda(0.7)
        await registry.pause_model("small", paused=True)
        await watcher.refresh()
        await store.client.hset(SETTINGS, "lambda", odd)
        await store.client.hset(SETTINGS, "of a later version", odd)
        await store.client.hset(PAUSED, "small", odd)
        await watcher.refresh(whole=True)
        assert watcher.current.default_lambda(CONFIGURED) == 0.7
        assert ("small" in watcher.current.paused) is True
        await store.client.delete(SETTINGS, PAUSED)
        await asyncio.gather(store.client.set(SETTINGS, "x"), store.client.set(PAUSED, "x"))
        await watcher.refresh(whole=True)
        assert (watcher.current.default_lambda(CONFIGURED), set(watcher.current.paused)) == (0.7, {"small"})


@pytest.mark.parametrize("odd", [*ODD, *ODD_NUMBERS])
def test_what_is_no_lambda_is_refused_by_its_reader(odd: str) -> None:
    with pytest.raises(InvalidInput):
        LambdaOverride.from_json(odd)


def test_what_is_written_is_read() -> None:
    override, pause = LambdaOverride(0.25, 1_700_000_000.5, "root"), Pause(1_700_000_000.5)
    assert LambdaOverride.from_json(override.to_json()) == override
    assert Pause.from_json(pause.to_json()) == pause
    assert json.loads(pause.to_json()) == {"at": 1_700_000_000.5, "who": None}
    assert pause.since == "2023-11-14T22:13:20Z"


def test_only_the_snapshot_decides_whether_the_lambda_of_the_configuration_is_in_force() -> None:
    package = Path(proxy.__file__).parent
    reading = {path.stem for path in package.rglob("*.py") if "settings.lambda_" in path.read_text("utf-8")}
    # the others show it beside the one that is in force
    assert reading == {"snapshot", "admin_responses", "curve_views", "app"}
