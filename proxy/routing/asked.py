"""One request against one snapshot: what it asks for, what it may have, and how its candidates are weighed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from proxy.routing.cost_weight import cost_weight
from proxy.routing.names import Way
from proxy.routing.request import ChatRequest
from proxy.settings import Settings
from proxy.state.records import ClientKey
from proxy.state.snapshot import RoutingState
from router_core.scoring import Terms
from router_core.types import Needs


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


def terms_of(request: ChatRequest, way: Way, settings: Settings, key: ClientKey | None) -> Terms:
    """Raises BadRequest or Forbidden where the key's bounds of λ are left."""
    options = request.options
    weight = settings.latency_weight if options.latency_weight is None else options.latency_weight
    return Terms(
        lambda_=cost_weight(request, way, settings, key),
        latency_weight=weight,
        max_cost_usd=options.max_cost_usd,
        cost_unit=settings.cost_unit,
        reference=settings.reference_price,
    )
