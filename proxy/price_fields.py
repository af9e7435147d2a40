"""LiteLLM's list of tiers, `tiered_pricing`, written as the flat fields that prices are read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router_core.types import PRICE_FIELDS, flat_price_field

TIERED = "tiered_pricing"


def with_flat_tiers(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace `tiered_pricing`, a list of prices each with the `range` of prompt tokens that it is for.

    The first range's price is the model's; a range begins above its lower bound. What is no such list is left alone.
    """
    tiers = _tiers(stated.get(TIERED))
    if not tiers:
        return stated
    rates = {rate for _, tier in tiers for rate in tier}
    flat = {name: value for name, value in stated.items() if name != TIERED}
    for place, (tokens, tier) in enumerate(tiers):
        for rate in rates:
            # no tier is mixed with another: what it leaves out is an ordinary token of its own
            usual = PRICE_FIELDS[1] if rate.startswith("output_") else PRICE_FIELDS[0]
            if (value := tier.get(rate, tier.get(usual))) is not None:
                flat[flat_price_field(rate, tokens if place else None)] = value
    return flat


def _tiers(listed: Any) -> list[tuple[int, dict[str, Any]]]:
    """Lower bound and rates, ascending; none unless every one has a range and an input price."""
    if not isinstance(listed, list):
        return []
    tiers = []
    for tier in listed:
        bounds = tier.get("range") if isinstance(tier, Mapping) else None
        if not isinstance(bounds, list) or not bounds or not _is_bound(bounds[0]) or PRICE_FIELDS[0] not in tier:
            return []
        tiers.append((int(bounds[0]), {rate: tier[rate] for rate in PRICE_FIELDS if rate in tier}))
    return sorted(tiers, key=lambda tier: tier[0])


def _is_bound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 10**12
