from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from proxy.concurrency import cancel_and_wait
from proxy.settings.models import ModelInfo
from proxy.storage.client_keys import AuthRequiredLatch, ClientKey
from proxy.storage.models import CurrentPrice, ModelRecord, StoredProfile
from proxy.storage.price_map import CatalogEntry, PriceMap
from proxy.storage.reader import StateReader, StoredState
from proxy.storage.redis import CHANGED, PRICING, Store, StoreUnavailable
from proxy.storage.traffic_stats import TrafficStats
from router_core.clustering import ClusterMap
from router_core.estimators import POOLED, Estimator
from router_core.pool import CachedEstimator, Candidate, Pool
from router_core.profiles import Profile
from router_core.types import FREE, PRICE_FIELDS, Capabilities, Price

_STATED_ABILITIES = {
    "max_input_tokens": "max_input_tokens",
    "max_output_tokens": "max_output_tokens",
    "tools": "supports_function_calling",
    "parallel_tools": "supports_parallel_function_calling",
    "vision": "supports_vision",
    "video": "supports_video_input",
    "audio_input": "supports_audio_input",
    "audio_output": "supports_audio_output",
    "files": "supports_pdf_input",
    "json_schema": "supports_response_schema",
    "reasoning": "supports_reasoning",
}
"""Field of Capabilities → the field of model_info that states it."""

MOSTLY_WRONG = 0.9
"""A mean error that hardly any model has on prompts and graders that are right."""


@dataclass(frozen=True)
class RoutingSnapshot:
    """Read once per request, replaced whole."""

    version: int
    cluster_map: ClusterMap
    pool: Pool
    models: Mapping[str, ModelRecord]
    prices: Mapping[str, CurrentPrice]
    profiles: Mapping[str, Profile]
    """Those in use: of this map and of the model as it is now. As measured, without live traffic."""
    set_aside: Mapping[str, str]
    """Models whose stored profile is not used, and why."""
    elsewhere: Mapping[str, StoredProfile]
    """Those of them that were measured as they are now, but on another map."""
    keys: Mapping[str, ClientKey]
    """By the digest of each secret, also of one before the last rotation; revoked ones are not here."""
    keys_required: bool

    @property
    def known(self) -> bool:
        """Whether anything was read from the store yet, and so whose keys there are."""
        return self.version >= 0

    @cached_property
    def measuring_doubt(self) -> str | None:
        """What may be wrong with the measuring itself, where no model gets anything right."""
        errors = [profile.mean_error for profile in self.profiles.values()]
        if not errors or min(errors) < MOSTLY_WRONG:
            return None
        return (
            f"every measured model is wrong on nearly all validation prompts (the best has a mean error of"
            f" {min(errors):.2f}): check the graders of the validation set, and what the models answer, with"
            " `uniroute models outcomes`"
        )

    def standing(self, name: str) -> str:
        """ready, foreign_profile, unprofiled or unpriced. Whether it is being profiled is the jobs' to say."""
        if name not in self.profiles:
            return "foreign_profile" if name in self.set_aside else "unprofiled"
        return "ready" if name in self.prices else "unpriced"


@dataclass(frozen=True)
class SnapshotInputs:
    """What a process brings to every state that it builds."""

    cluster_map: ClusterMap
    configured: Mapping[str, ModelRecord]
    catalog: PriceMap
    recipe: Estimator = POOLED
    live: TrafficStats | None = None

    @cached_property
    def error_rates(self) -> CachedEstimator:
        """Of one state after the other: most of them come of a price or a key, and need no new rates."""
        return CachedEstimator(self.cluster_map, self.recipe)


def build_state(stored: StoredState, around: SnapshotInputs, *, keys_latched: bool) -> RoutingSnapshot:
    """Configured models win over stored ones of the same name. Profiles of another map or model are set aside."""
    models = {**stored.models, **around.configured}
    known = {name: around.catalog.find(str(record.litellm_params["model"])) for name, record in models.items()}
    prices = prices_of(models, stored, known)
    profiles = _in_use(models, stored, around.cluster_map)
    unused = {name: stored.profiles[name] for name in models if name in stored.profiles and name not in profiles}
    set_aside = {name: _why_unused(entry, around.cluster_map) for name, entry in unused.items()}
    elsewhere = {name: entry for name, entry in unused.items() if entry.fingerprint == models[name].fingerprint}
    expected = _with_live_traffic(profiles, around.live)
    candidates = [
        Candidate(
            name=name,
            profile=expected.get(name),
            price=prices[name].price if name in prices else None,
            capabilities=capabilities_of(record.info, known[name]),
        )
        for name, record in sorted(models.items())
    ]
    return RoutingSnapshot(
        version=stored.version,
        cluster_map=around.cluster_map,
        pool=Pool.build(candidates, around.cluster_map, around.error_rates),
        models=models,
        prices=prices,
        profiles=profiles,
        set_aside=set_aside,
        elsewhere=elsewhere,
        keys=_by_digest([key for key in stored.keys.values() if not key.revoked]),
        keys_required=keys_latched or stored.keys_exist,
    )


def _by_digest(keys: Collection[ClientKey]) -> dict[str, ClientKey]:
    earlier = {key.previous_digest: key for key in keys if key.previous_digest is not None}
    return earlier | {key.digest: key for key in keys}


def prices_of(
    models: Mapping[str, ModelRecord], stored: StoredState, known: Mapping[str, CatalogEntry | None]
) -> dict[str, CurrentPrice]:
    """The price in force of each model that has one."""
    found = {name: price_of(record.info, stored.prices.get(name), known[name]) for name, record in models.items()}
    return {name: price for name, price in found.items() if price is not None}


def price_of(info: ModelInfo, stored: CurrentPrice | None, known: CatalogEntry | None) -> CurrentPrice | None:
    """The stored price, else the stated one, else litellm's, else None: unknown is never zero."""
    if stored is not None:
        return stored
    if info.free:
        return CurrentPrice(FREE, "model_info")
    stated = info.prices
    if info.input_cost_per_token is not None:
        return CurrentPrice(Price.from_fields(stated), "model_info")
    if known is None or known.price is None:
        return None
    if not stated:
        return CurrentPrice(known.price, "litellm")
    # a statement of tiers is one of all tiers
    listed = known.price.at(0) if any(name not in PRICE_FIELDS for name in stated) else known.price
    return CurrentPrice(Price.from_fields({**replace(listed, tiers=()).to_fields(), **stated}), "model_info")


def capabilities_of(info: ModelInfo, known: CatalogEntry | None) -> Capabilities:
    """What was stated, then what litellm's map knows."""
    stated = {ability: getattr(info, source) for ability, source in _STATED_ABILITIES.items()}
    listed = known.capabilities if known else Capabilities()
    merged = {
        column.name: getattr(listed, column.name) if stated[column.name] is None else stated[column.name]
        for column in fields(Capabilities)
    }
    return Capabilities(**merged)


def _in_use(models: Mapping[str, ModelRecord], stored: StoredState, cluster_map: ClusterMap) -> dict[str, Profile]:
    """Of each model what was measured of it, as it is now, on this map: last, or before the map was changed."""
    found = {}
    for name, record in models.items():
        for entry in (stored.profiles.get(name), stored.earlier.get(name)):
            if entry and entry.fingerprint == record.fingerprint and _is_of(entry.profile, cluster_map):
                found[name] = entry.profile
                break
    return found


def _is_of(profile: Profile, cluster_map: ClusterMap) -> bool:
    return profile.map_id == cluster_map.id and len(profile.labels) == cluster_map.size


def _why_unused(entry: StoredProfile, cluster_map: ClusterMap) -> str:
    if _is_of(entry.profile, cluster_map):
        return "measured before litellm_params were changed; profile the model again"
    return f"measured on cluster map {entry.profile.map_id}, this one is {cluster_map.id}; profile the model again"


def _with_live_traffic(profiles: Mapping[str, Profile], live: TrafficStats | None) -> Mapping[str, Profile]:
    if live is None:
        return profiles
    return {name: live.blended(name, profile) for name, profile in profiles.items()}


log = logging.getLogger("uniroute.state")

POLL_S = 0.5

SETTLE_S = 0.02
"""Messages that come this close together are one change."""

LIVE_REFRESH_S = 5.0

UNUSABLE_S = 5.0

LOG_INTERVAL_S = 60.0


class SnapshotWatcher:
    """One per process. Without Redis the last state stays; before the first reading the door is closed to all."""

    def __init__(
        self,
        store: Store,
        around: SnapshotInputs,
        latch: AuthRequiredLatch,
        on_change: Callable[[RoutingSnapshot], None] = lambda _: None,
    ) -> None:
        """`on_change`: is told of the first state, and of every other as it comes into use."""
        self._store = store
        self._on_change = on_change
        self._around = around
        self._latch = latch
        self._reader = StateReader(store, time.time)
        self.current = self._build()
        on_change(self.current)
        self._following: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()
        self._live_seen = (0, 0.0)
        self._said_away: float | None = None
        self.available = False
        """Whether Redis answered when last asked."""

    @property
    def loaded(self) -> bool:
        """Whether Redis was ever read: what readiness means, whatever Redis does later."""
        return self.current.known

    async def start(self) -> None:
        """Read once and follow from then on. Redis may be away; then the first reading comes when it is back."""
        try:
            await self.refresh()
        except StoreUnavailable as error:
            self._away(error)
        self._following = asyncio.create_task(self._follow(), name="uniroute-state")

    async def stop(self) -> None:
        await cancel_and_wait(self._following)
        self._following = None

    async def refresh(self, *, whole: bool = False) -> None:
        """Swap in what Redis holds now. `whole`: read again even what seems to have this version already.

        Raises:
            StoreUnavailable: the current state stays.
        """
        async with self._refreshing:
            changed = await self._reader.read(self._around.configured, whole=whole or not self.available)
            if not self.available:
                self.available = True
                log.info("the store at %s answers", self._store.name)
            if changed or self._live_moved():
                await self._swap()

    async def wait_for_version(self, version: int) -> None:
        """Return once the current state has what was written as `version`. StoreUnavailable as `refresh`."""
        if self.current.version < version:
            await self.refresh()

    async def _swap(self) -> None:
        """Laid out in a thread: the rates of many models take longer than a request may wait."""
        if self._reader.last.keys and not self._latch.closed:
            self._latch.close()
        live = self._around.live
        self._live_seen = (live.observed if live else 0, time.monotonic())
        self.current = await asyncio.to_thread(self._build)
        self._on_change(self.current)

    def _build(self) -> RoutingSnapshot:
        return build_state(self._reader.last, self._around, keys_latched=self._latch.closed)

    def _live_moved(self) -> bool:
        observed, at = self._live_seen
        live = self._around.live
        return live is not None and live.observed != observed and time.monotonic() - at >= LIVE_REFRESH_S

    async def _follow(self) -> None:
        while True:
            try:
                await self._listen(self._store.client)
            except (StoreUnavailable, RedisError, OSError) as error:
                self._away(error)
                with contextlib.suppress(StoreUnavailable):  # said by _away already
                    await self._store.ensure_running()
                await asyncio.sleep(POLL_S)
            except (ValueError, ArithmeticError) as error:  # it reads well and cannot be laid out
                log.error("what is stored makes no state, the last one stays in use", exc_info=error)
                await asyncio.sleep(UNUSABLE_S)

    async def _listen(self, client: Redis) -> None:
        """Until the messages come from elsewhere."""
        async with client.pubsub() as pubsub:
            await pubsub.subscribe(CHANGED, PRICING)
            told = True
            while not await self._store.primary_moved():
                await self.refresh(whole=told)
                if told := await _message(pubsub, POLL_S):
                    await asyncio.sleep(SETTLE_S)
                    while await _message(pubsub, 0.0):
                        pass

    def _away(self, error: Exception) -> None:
        """Say so once, and as long as nothing was ever read once a minute."""
        waiting = not self.available and self._said_away is not None
        if not waiting or (not self.loaded and time.monotonic() - (self._said_away or 0) >= LOG_INTERVAL_S):
            kept = "the last state stays in use" if self.loaded else "nothing is served until it does"
            log.warning("the store does not answer, %s: %s", kept, error)
            self._said_away = time.monotonic()
        self.available = False


async def _message(pubsub: Any, timeout_s: float) -> bool:
    return await pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s) is not None
