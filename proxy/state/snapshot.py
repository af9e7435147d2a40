"""RoutingState: everything a request needs to know, immutable, built from configuration and stored entries. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

from proxy.settings.models import ModelInfo
from proxy.state.catalog import Catalog, CatalogEntry
from proxy.state.client_keys import ClientKey
from proxy.state.live import LiveExpectations
from proxy.state.records import LivePrice, ModelRecord, StoredProfile
from proxy.state.stored import Stored
from router_core.clustering import ClusterMap
from router_core.error_rates import ErrorRates
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.recipes import POOLED, Recipe
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
class RoutingState:
    """Read once per request, replaced whole."""

    version: int
    cluster_map: ClusterMap
    pool: Pool
    models: Mapping[str, ModelRecord]
    prices: Mapping[str, LivePrice]
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
class Surroundings:
    """What a process brings to every state that it builds."""

    cluster_map: ClusterMap
    configured: Mapping[str, ModelRecord]
    catalog: Catalog
    recipe: Recipe = POOLED
    live: LiveExpectations | None = None

    @cached_property
    def error_rates(self) -> ErrorRates:
        """Of one state after the other: most of them come of a price or a key, and need no new rates."""
        return ErrorRates(self.cluster_map, self.recipe)


def build_state(stored: Stored, around: Surroundings, *, keys_latched: bool) -> RoutingState:
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
    return RoutingState(
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
    models: Mapping[str, ModelRecord], stored: Stored, known: Mapping[str, CatalogEntry | None]
) -> dict[str, LivePrice]:
    """The price in force of each model that has one."""
    found = {name: price_of(record.info, stored.prices.get(name), known[name]) for name, record in models.items()}
    return {name: price for name, price in found.items() if price is not None}


def price_of(info: ModelInfo, stored: LivePrice | None, known: CatalogEntry | None) -> LivePrice | None:
    """The stored price, else the stated one, else litellm's, else None: unknown is never zero."""
    if stored is not None:
        return stored
    if info.free:
        return LivePrice(FREE, "model_info")
    stated = info.prices
    if info.input_cost_per_token is not None:
        return LivePrice(Price.of(stated), "model_info")
    if known is None or known.price is None:
        return None
    if not stated:
        return LivePrice(known.price, "litellm")
    # a statement of tiers is one of all tiers
    listed = known.price.at(0) if any(name not in PRICE_FIELDS for name in stated) else known.price
    return LivePrice(Price.of({**replace(listed, above=()).stated(), **stated}), "model_info")


def capabilities_of(info: ModelInfo, known: CatalogEntry | None) -> Capabilities:
    """What was stated, then what litellm's map knows."""
    stated = {ability: getattr(info, source) for ability, source in _STATED_ABILITIES.items()}
    listed = known.capabilities if known else Capabilities()
    merged = {
        column.name: getattr(listed, column.name) if stated[column.name] is None else stated[column.name]
        for column in fields(Capabilities)
    }
    return Capabilities(**merged)


def _in_use(models: Mapping[str, ModelRecord], stored: Stored, cluster_map: ClusterMap) -> dict[str, Profile]:
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


def _with_live_traffic(profiles: Mapping[str, Profile], live: LiveExpectations | None) -> Mapping[str, Profile]:
    if live is None:
        return profiles
    return {name: live.blended(name, profile) for name, profile in profiles.items()}
