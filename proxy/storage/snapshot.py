from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
from redis.asyncio import Redis
from redis.exceptions import RedisError

from proxy.concurrency import BackgroundTasks
from proxy.settings.effort import least_tokens
from proxy.settings.model_config import EMBEDDING, ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.client_keys import AuthRequiredLatch, ClientKey
from proxy.storage.controls import LambdaOverride, Pause, why_paused
from proxy.storage.feedback import ObservedProfiles
from proxy.storage.price_map import PriceMap, PriceMapEntry
from proxy.storage.records import CurrentPrice, InvalidRecord, ModelRecord, StoredProfile, WarnOnce
from proxy.storage.redis import CHANGED, PRICING, Availability, Store, StoreUnavailable
from proxy.storage.state_reader import StateReader, StoredState
from proxy.storage.variants import Variants, variants_of
from router_core.clustering import ClusterMap
from router_core.estimators import POOLED, Estimator
from router_core.pool import CachedEstimator, Candidate, Pool
from router_core.profiles import Profile
from router_core.types import FREE, PRICE_FIELDS, Capabilities, Doubles, Floats, Indices, Price

# Answers of one model after which an answer counts half.
HALF_LIFE = 200.0

# The weight of all validation answers of a profile together, in live answers: they are shorter than real ones.
PRIOR_ANSWERS = 20.0

# Answers of one model that are added up together, unless the sums are read before.
BATCH_SIZE = 128

_TOKENS, _SECONDS, _WEIGHT = range(3)

# Cluster ids, their weights, tokens, seconds.
_Answer = tuple[Any, Any, float, float]


class TrafficStats:
    """Lengths and durations of live answers, by model and cluster, as sums that decay with each answer.

    `observe` is called on the event loop, `blend_into` in the thread that builds a snapshot.
    """

    def __init__(self, clusters: int, half_life: float = HALF_LIFE) -> None:
        self._clusters = clusters
        self._keep = 0.5 ** (1.0 / half_life)
        self._lock = Lock()
        self._sums: dict[str, Doubles] = {}
        # Not in the sums yet: adding many at once takes a tenth of the time.
        self._new: dict[str, list[_Answer]] = {}
        # Answers ever observed, by which the snapshot watcher sees whether there are new ones.
        self.observed = 0

    def observe(
        self,
        model: str,
        cluster_ids: Sequence[int] | Indices,
        weights: Sequence[float] | Floats,
        tokens: float | None,
        seconds: float,
    ) -> None:
        """Count one answer of `model` to a prompt with these cluster weights; nothing if its tokens are unknown.

        Arrays are kept for a while, and must not be written to.
        """
        if tokens is None:
            return
        with self._lock:
            answers = self._new.setdefault(model, [])
            answers.append((cluster_ids, weights, tokens, seconds))
            self.observed += 1
            if len(answers) >= BATCH_SIZE:
                self._count(model)

    def blend_into(self, model: str, profile: Profile) -> Profile:
        """Return the profile with live answers added to its tokens and seconds; errors and labels stay as measured."""
        with self._lock:
            self._count(model)
            sums = self._sums.get(model)
            if sums is None:
                return profile
            sums = sums.copy()
        prior = _prior(profile.answers)
        timed_prior = _prior(profile.timed_answers)
        return replace(
            profile,
            token_sums=cast(Doubles, prior * profile.token_sums + sums[_TOKENS]),
            second_sums=cast(Doubles, timed_prior * profile.second_sums + sums[_SECONDS]),
            answers=cast(Doubles, prior * profile.answers + sums[_WEIGHT]),
            timed_answers=cast(Doubles, timed_prior * profile.timed_answers + sums[_WEIGHT]),
        )

    def mixes(self) -> dict[str, Doubles]:
        """Return how the latest answers of each model that has answered spread over the clusters, as (K,) sums."""
        with self._lock:
            for model in list(self._new):
                self._count(model)
            return {model: sums[_WEIGHT].copy() for model, sums in self._sums.items()}

    def forget(self, model: str) -> None:
        """Forget the answers of a model that was removed or changed."""
        with self._lock:
            self._sums.pop(model, None)
            self._new.pop(model, None)

    def _count(self, model: str) -> None:
        """Add the new answers to the sums: each takes a little from all before it."""
        answers = self._new.pop(model, None)
        if not answers:
            return
        ids, weights, tokens, seconds = zip(*answers, strict=True)
        kept = self._keep ** np.arange(len(answers) - 1, -1, -1.0)
        counted = np.array([tokens, seconds, np.ones(len(answers))]) * kept
        shares, places = np.concatenate(weights), np.concatenate(ids)
        sums = self._sums.setdefault(model, np.zeros((3, self._clusters)))
        sums *= self._keep ** len(answers)
        for row, amounts in zip(sums, np.repeat(counted, [len(each) for each in ids], axis=1), strict=True):
            row += np.bincount(places, weights=amounts * shares, minlength=self._clusters)


def _prior(answers: Doubles) -> float:
    """Return the weight of one validation answer: all together weigh no more than PRIOR_ANSWERS."""
    return min(1.0, PRIOR_ANSWERS / max(float(answers.sum()), 1e-9))


# Field of Capabilities → the field of model_info that states it.
_STATED_CAPABILITIES = {
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

# A mean error that hardly any model has on prompts and graders that are right.
MOSTLY_WRONG = 0.9


@dataclass(frozen=True)
class RoutingSnapshot:
    """What requests are routed by. Each request reads it once; a change replaces it whole."""

    version: int
    cluster_map: ClusterMap
    pool: Pool
    models: Mapping[str, ModelRecord]
    prices: Mapping[str, CurrentPrice]
    profiles: Mapping[str, Profile]
    """Those in use: of this map and of the model as it is now. As measured, without live traffic."""
    unused_profiles: Mapping[str, str]
    """Model → why its stored profile is not used."""
    profiles_of_other_maps: Mapping[str, StoredProfile]
    """Those of them that were measured on the model as it is now, but on another map."""
    keys: Mapping[str, ClientKey]
    """By the digest of each secret, also of a secret before the last rotation; without revoked keys."""
    keys_required: bool
    embeddings: Mapping[str, Capabilities] = field(default_factory=dict)
    """The models that are asked for embeddings. They are not in the pool."""
    paused: Mapping[str, Pause] = field(default_factory=dict)
    """Models that are left out of traffic."""
    efforts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Registered model → the names of its efforts, ascending. They are among `models`, as the model itself is."""
    lambda_override: LambdaOverride | None = None
    """The default λ that was set while the server runs."""
    selection_terms: dict[tuple[str, str | None], Any] = field(default_factory=dict, repr=False, compare=False)
    """Kept for `routing`, by the name of a model and the id of a key."""
    kept_bounds: dict[int, frozenset[str]] = field(default_factory=dict, repr=False, compare=False)
    """Kept by `efforts_beyond`."""

    def default_lambda(self, settings: Settings) -> float:
        """Return the λ of requests for which nothing else states one."""
        return settings.lambda_ if self.lambda_override is None else self.lambda_override.value

    @property
    def is_loaded(self) -> bool:
        """Return whether anything was read from the store yet, so that it is known which keys there are."""
        return self.version >= 0

    @cached_property
    def measuring_doubt(self) -> str | None:
        """Say what may be wrong with profiling itself, if no model gets anything right."""
        errors = [profile.mean_error for profile in self.profiles.values()]
        if not errors or min(errors) < MOSTLY_WRONG:
            return None
        return (
            f"every measured model is wrong on nearly all validation prompts (the best has a mean error of"
            f" {min(errors):.2f}): check the graders of the validation set, and what the models answer, with"
            " `uniroute models outcomes`"
        )

    @cached_property
    def registered(self) -> frozenset[str]:
        """The names of the models, without their efforts: each has one circuit."""
        return frozenset(name for name, record in self.models.items() if record.base is None)

    @cached_property
    def measured_efforts(self) -> Mapping[str, tuple[str, ...]]:
        """The models of which an effort is measured, each with its efforts: these answer in the model's place."""
        return {name: each for name, each in self.efforts.items() if any(effort in self.profiles for effort in each)}

    def with_efforts(self, names: Collection[str]) -> Collection[str]:
        """Return the names of models, and of their efforts."""
        if not self.efforts or self.efforts.keys().isdisjoint(names):
            return names
        return {*names, *(effort for name in names for effort in self.efforts.get(name, ()))}

    def measured_records(self, name: str) -> tuple[ModelRecord, ...]:
        """Return what one job measures: a model, or its efforts."""
        return tuple(self.models[each] for each in self.efforts.get(name, (name,)))

    def efforts_beyond(self, tokens: int) -> frozenset[str]:
        """Return the efforts that think more than so many tokens allow; of each model one is left, the smallest."""
        found = self.kept_bounds.get(tokens)
        if found is None:
            above = [
                name
                for names in self.efforts.values()
                for place, name in enumerate(names)
                if place and (effort := self.models[name].effort) is not None and least_tokens(effort) > tokens
            ]
            if len(self.kept_bounds) >= MAX_KEPT_BOUNDS:
                self.kept_bounds.clear()
            found = self.kept_bounds[tokens] = frozenset(above)
        return found

    def model_state(self, name: str) -> str:
        """Return ready, foreign_profile, unprofiled or unpriced. The jobs say whether it is being profiled.

        A model with efforts is in the state of the one that is most ready, for that one answers in its place.
        """
        if name in self.efforts:
            states = {self.model_state(effort) for effort in self.efforts[name]}
            return next(each for each in ("ready", "unpriced", "foreign_profile", "unprofiled") if each in states)
        if name not in self.profiles and name not in self.embeddings:
            return "foreign_profile" if name in self.unused_profiles else "unprofiled"
        return "ready" if name in self.prices else "unpriced"


class ModelFacts(NamedTuple):
    """What the configuration and LiteLLM's map say of a model."""

    unstored_price: CurrentPrice | None
    capabilities: Capabilities
    embeds: bool


# Of one snapshot: callers may state any number of tokens.
MAX_KEPT_BOUNDS = 1000


@dataclass(frozen=True)
class SnapshotInputs:
    """What a process brings to every snapshot that it builds."""

    cluster_map: ClusterMap
    configured: Mapping[str, ModelRecord]
    price_map: PriceMap
    recipe: Estimator = POOLED
    traffic_stats: TrafficStats | None = None
    observed: ObservedProfiles | None = None
    """Errors of live answers that count beside the measured ones. None: only measured ones count."""

    @cached_property
    def error_rates(self) -> CachedEstimator:
        """Cache the rates from one snapshot to the next: most change a price or a key, and need no new rates."""
        return CachedEstimator(self.cluster_map, self.recipe)

    def facts_of(self, models: Mapping[str, ModelRecord]) -> Mapping[str, ModelFacts]:
        """Return the facts of these models. Those of the last call are kept: few models change between two."""
        earlier = self._known.copy()
        self._known.clear()
        for name, record in models.items():
            known = earlier.get(name)
            self._known[name] = known if known is not None and known[0] is record else (record, self._facts(record))
        return {name: facts for name, (_, facts) in self._known.items()}

    @cached_property
    def _known(self) -> dict[str, tuple[ModelRecord, ModelFacts]]:
        return {}

    def _facts(self, record: ModelRecord) -> ModelFacts:
        listed, info = self.price_map.find(str(record.litellm_params["model"])), record.info
        return ModelFacts(unstored_price(info, listed), capabilities_of(info, listed), embeds(info, listed))

    @cached_property
    def variants(self) -> Variants:
        return Variants()


def build_state(stored: StoredState, inputs: SnapshotInputs, *, keys_latched: bool) -> RoutingSnapshot:
    """Build a snapshot. Configured models win over stored ones of the same name."""
    registered = {**stored.models, **inputs.configured}
    efforts = _efforts(registered, inputs)
    models = {**registered, **{each.name: each for records in efforts.values() for each in records}}
    facts = inputs.facts_of(models)
    prices = prices_of(models, stored, {name: each.unstored_price for name, each in facts.items()})
    profiles = {
        name: profile for name, profile in _in_use(models, stored, inputs.cluster_map).items() if not facts[name].embeds
    }
    unused = {name: stored.profiles[name] for name in models if name in stored.profiles and name not in profiles}
    for name, records in efforts.items():
        if any(each.name in profiles for each in records):  # they answer in the model's place
            profiles.pop(name, None)
    expected = profiles
    if (traffic_stats := inputs.traffic_stats) is not None:
        expected = {name: traffic_stats.blend_into(name, profile) for name, profile in profiles.items()}
    if inputs.observed is not None:
        expected = {name: inputs.observed.blend_into(models[name], each) for name, each in expected.items()}
    candidates = [
        Candidate(
            name=name,
            profile=expected.get(name),
            price=prices[name].price if name in prices else None,
            capabilities=facts[name].capabilities,
            excluded=next((why_paused(each) for each in _paused_by(models[name]) if each in stored.paused), None),
            effort=_place_of(models[name], efforts),
        )
        for name in sorted(models)
        if not facts[name].embeds
    ]
    embeddings = {name: each.capabilities for name, each in facts.items() if each.embeds}
    return RoutingSnapshot(
        version=stored.version,
        cluster_map=inputs.cluster_map,
        pool=Pool.build(candidates, inputs.cluster_map, inputs.error_rates),
        models=models,
        prices=prices,
        profiles=profiles,
        unused_profiles={name: _why_unused(entry, inputs.cluster_map) for name, entry in unused.items()},
        profiles_of_other_maps={
            name: entry for name, entry in unused.items() if entry.fingerprint == models[name].fingerprint
        },
        keys=_by_digest([key for key in stored.keys.values() if not key.revoked]),
        keys_required=keys_latched or stored.keys_exist,
        embeddings=embeddings,
        paused={
            name: stored.paused[each]
            for name, record in models.items()
            for each in _paused_by(record)
            if each in stored.paused
        },
        efforts={name: tuple(each.name for each in records) for name, records in efforts.items()},
        lambda_override=stored.lambda_override,
    )


def _efforts(registered: Mapping[str, ModelRecord], inputs: SnapshotInputs) -> dict[str, tuple[ModelRecord, ...]]:
    """Return the efforts of each model that has any. A model that can have none now is asked as it is."""
    found = {}
    for name, record in registered.items():
        if record.info.effort is None:
            continue
        try:
            listed = inputs.price_map.find(str(record.litellm_params["model"]))
            if variants := inputs.variants.of(record, listed, registered):
                found[name] = variants
        except InvalidRecord as error:
            _warn_once(name, error)
    return found


def _place_of(record: ModelRecord, efforts: Mapping[str, Sequence[ModelRecord]]) -> tuple[str, int] | None:
    """Return the model that this is an effort of, and its place among the efforts; None: it is none."""
    return None if record.base is None else (record.base, efforts[record.base].index(record))


def _paused_by(record: ModelRecord) -> Collection[str]:
    """Return the names whose pause leaves this one out: an effort pauses with its model, or alone."""
    return dict.fromkeys((record.registered_name, record.name))


def embeds(info: ModelInfo, listed: PriceMapEntry | None) -> bool:
    """Return whether a model is asked for embeddings, and not for chat completions."""
    mode = listed.mode if info.mode is None and listed is not None else info.mode
    return mode == EMBEDDING


def _by_digest(keys: Collection[ClientKey]) -> dict[str, ClientKey]:
    rotated = {key.previous_digest: key for key in keys if key.previous_digest is not None}
    return rotated | {key.digest: key for key in keys}


def prices_of(
    models: Mapping[str, ModelRecord], stored: StoredState, unstored: Mapping[str, CurrentPrice | None]
) -> dict[str, CurrentPrice]:
    """Return the current price of each model that has one: the stored price comes first."""
    found = {name: stored.prices.get(record.registered_name) or unstored[name] for name, record in models.items()}
    return {name: price for name, price in found.items() if price is not None}


def unstored_price(info: ModelInfo, listed: PriceMapEntry | None) -> CurrentPrice | None:
    """Return the price while none is stored: the configured one, else litellm's, else None: unknown is never zero."""
    if info.free:
        return CurrentPrice(FREE, "model_info")
    stated = info.prices
    if info.input_cost_per_token is not None:
        return CurrentPrice(Price.from_fields(stated), "model_info")
    if listed is None or listed.price is None:
        return None
    if not stated:
        return CurrentPrice(listed.price, "litellm")
    # Who states tiers states all of them.
    base = listed.price.at(0) if any(name not in PRICE_FIELDS for name in stated) else listed.price
    return CurrentPrice(Price.from_fields({**replace(base, tiers=()).to_fields(), **stated}), "model_info")


def capabilities_of(info: ModelInfo, listed: PriceMapEntry | None) -> Capabilities:
    """Return what the configuration states, and else what litellm's map knows."""
    stated = {name: getattr(info, source) for name, source in _STATED_CAPABILITIES.items()}
    known = listed.capabilities if listed else Capabilities()
    merged = {
        column.name: getattr(known, column.name) if stated[column.name] is None else stated[column.name]
        for column in fields(Capabilities)
    }
    return Capabilities(**merged)


def _in_use(models: Mapping[str, ModelRecord], stored: StoredState, cluster_map: ClusterMap) -> dict[str, Profile]:
    """Return the profiles of models as they are now, on this map: the last, or that from before the map changed."""
    found = {}
    for name, record in models.items():
        for entry in (stored.profiles.get(name), stored.previous_profiles.get(name)):
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


log = logging.getLogger("uniroute.state")

_warn_once = WarnOnce(log, "a model's efforts are not made, and it is asked as it is")

POLL_INTERVAL_S = 0.5

# Messages that come this close together are one change.
MESSAGE_INTERVAL_S = 0.02

LIVE_REFRESH_S = 5.0

# After a state that cannot be built into a snapshot.
UNUSABLE_INTERVAL_S = 5.0

LOG_INTERVAL_S = 60.0


class SnapshotWatcher:
    """Keep the current snapshot up to date with Redis.

    Without Redis the last snapshot stays; before the first reading the keys are unknown and nothing is served.
    """

    def __init__(
        self,
        store: Store,
        inputs: SnapshotInputs,
        latch: AuthRequiredLatch,
        on_change: Callable[[RoutingSnapshot], None] = lambda _: None,
    ) -> None:
        """`on_change`: is called with the first snapshot, and with every other as it comes into use."""
        self._store = store
        self._on_change = on_change
        self._inputs = inputs
        self._latch = latch
        self._reader = StateReader(store, time.time)
        # Another one than the reader's last after a build that failed, which is tried again.
        self._built_from = self._reader.last
        self.current = self._build()
        on_change(self.current)
        self._tasks = BackgroundTasks()
        self._refreshing = asyncio.Lock()
        self._live_seen = ((0, 0), 0.0)
        self._availability = Availability(log, back=f"the store at {store.name} answers", known=False)

    @property
    def available(self) -> bool:
        """Return whether Redis answered when last asked."""
        return self._availability.available

    @property
    def loaded(self) -> bool:
        """Return whether Redis was ever read. It stays true when Redis goes away, and makes the process ready."""
        return self.current.is_loaded

    def embeds(self, record: ModelRecord) -> bool:
        """Return whether a model that may not be registered yet is asked for embeddings."""
        return embeds(record.info, self._inputs.price_map.find(str(record.litellm_params["model"])))

    def variants_of(self, record: ModelRecord) -> tuple[ModelRecord, ...]:
        """Return the efforts of a model that may not be registered yet. Raises InvalidRecord."""
        return variants_of(record, self._inputs.price_map.find(str(record.litellm_params["model"])))

    async def start(self) -> None:
        """Read once, and watch from then on. If Redis is away, the first reading comes when it is back."""
        try:
            await self.refresh()
        except StoreUnavailable as error:
            self._mark_unavailable(error)
        self._tasks.start("uniroute-state", self._watch)

    async def stop(self) -> None:
        await self._tasks.close()

    async def refresh(self, *, whole: bool = False) -> None:
        """Swap in what Redis holds now. `whole`: read even what seems to have the same version.

        Raises:
            StoreUnavailable: the current snapshot stays.
        """
        async with self._refreshing:
            await self._reader.read(self._inputs.configured, whole=whole or not self.available)
            self._availability.mark_available()
            if self._reader.last is not self._built_from or self._traffic_has_moved():
                await self._swap()

    async def wait_for_version(self, version: int) -> None:
        """Return once the current snapshot has the change of this version. Raise StoreUnavailable as `refresh` does."""
        if self.current.version < version:
            await self.refresh()

    async def _swap(self) -> None:
        """Build in a thread: the rates of many models take longer than a request may wait."""
        if self._reader.last.keys and not self._latch.closed:
            self._latch.close()
        self._live_seen = (self._live_changes(), time.monotonic())
        stored = self._reader.last
        self.current = await asyncio.to_thread(self._build)
        self._built_from = stored
        self._on_change(self.current)

    def _build(self) -> RoutingSnapshot:
        return build_state(self._reader.last, self._inputs, keys_latched=self._latch.closed)

    def _traffic_has_moved(self) -> bool:
        changes, at = self._live_seen
        return self._live_changes() != changes and time.monotonic() - at >= LIVE_REFRESH_S

    def _live_changes(self) -> tuple[int, int]:
        """Return numbers that have moved where a snapshot that is built now has other lengths or errors."""
        stats, observed = self._inputs.traffic_stats, self._inputs.observed
        return stats.observed if stats else 0, observed.changes if observed else 0

    async def _watch(self) -> None:
        while True:
            try:
                await self._listen(self._store.client)
            except (StoreUnavailable, RedisError, OSError) as error:
                self._mark_unavailable(error)
                with contextlib.suppress(StoreUnavailable):  # it is logged already
                    await self._store.ensure_running()
                await asyncio.sleep(POLL_INTERVAL_S)
            except (ValueError, ArithmeticError) as error:  # it can be read, and not be built into a snapshot
                log.error("what is stored makes no state, the last one stays in use", exc_info=error)
                await asyncio.sleep(UNUSABLE_INTERVAL_S)

    async def _listen(self, client: Redis) -> None:
        """Refresh at every message, until the messages come from another server."""
        async with client.pubsub() as pubsub:
            async with self._store.operation("listen for changes"):
                await pubsub.subscribe(CHANGED, PRICING)
            received = True
            while not await self._store.primary_moved():
                await self.refresh(whole=received)
                if received := await _message(pubsub, POLL_INTERVAL_S):
                    await asyncio.sleep(MESSAGE_INTERVAL_S)
                    while await _message(pubsub, 0.0):
                        pass

    def _mark_unavailable(self, error: Exception) -> None:
        """Log it once, and once a minute while nothing was ever read."""
        kept = "the last state stays in use" if self.loaded else "nothing is served until it does"
        self._availability.mark_unavailable(
            f"the store does not answer, {kept}: {error}",
            log_interval_s=math.inf if self.loaded else LOG_INTERVAL_S,
        )


async def _message(pubsub: Any, timeout_s: float) -> bool:
    return await pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s) is not None
