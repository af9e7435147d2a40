"""One request against one snapshot: what it asks for, what it may have, and how its candidates are weighed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from proxy.routing.cost_weight import cost_weight
from proxy.routing.features import needs_of
from proxy.routing.names import Way
from proxy.routing.request import ChatRequest
from proxy.routing.thread import Thread
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import RoutingState
from router_core.scoring import Terms
from router_core.types import Needs

NOBODY: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Asked:
    """One request against one snapshot: what it asks for, and what it may have."""

    request: ChatRequest
    key: ClientKey | None
    state: RoutingState
    settings: Settings
    way: Way
    allowed: Collection[str] | None
    needs: Needs
    terms: Terms
    thread: Thread
    resting: Mapping[str, float] = field(default_factory=lambda: NOBODY)
    """Models that failed too often lately → seconds until they may be asked again."""
    loading: Collection[str] = ()
    """Models that this process cannot call yet."""


def needs_within(request: ChatRequest, *, limit_is_cap: bool = False) -> Needs:
    """What the body needs, at prices within the request's caps."""
    provider = request.options.provider
    caps = (provider.max_input_cost_per_token, provider.max_output_cost_per_token)
    return needs_of(request.body, request.contents, caps, limit_is_cap=limit_is_cap)


def is_clamped(way: Way, settings: Settings) -> bool:
    """Whether a limit of an answer above a model's own is lowered to that."""
    return settings.clamp_max_tokens == "on" or (settings.clamp_max_tokens == "auto" and way is not Way.PINNED)


def terms_of(request: ChatRequest, way: Way, settings: Settings, key: ClientKey | None, thread: Thread) -> Terms:
    """Raises BadRequest or Forbidden where the key's bounds of λ are left."""
    options = request.options
    weight = settings.latency_weight if options.latency_weight is None else options.latency_weight
    return Terms(
        lambda_=cost_weight(request, way, settings, key),
        latency_weight=weight,
        max_cost_usd=options.max_cost_usd,
        cost_unit=settings.cost_unit,
        reference=settings.reference_price,
        cached=thread.cached(settings),
    )
