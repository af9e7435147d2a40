from __future__ import annotations

import math
from enum import Enum

from proxy.errors import BadRequest, Forbidden
from proxy.routing.chat_request import ChatRequest
from proxy.settings.schema import Preset
from proxy.storage.client_keys import ClientKey, clamp


class RoutingMode(Enum):
    """How a request is routed, as the name of its model says."""

    SCORED = "auto"
    BEST = "uniroute/best"
    CHEAP = "uniroute/cheap"
    # The name of a registered model.
    PINNED = ""


# Names that ask for routing, however the server is configured.
ALIASES = {
    "auto": RoutingMode.SCORED,
    "uniroute/auto": RoutingMode.SCORED,
    "uniroute/best": RoutingMode.BEST,
    "uniroute/cheap": RoutingMode.CHEAP,
}

# The end of the scale that a mode stands for: a key whose bounds exclude it may not use the mode.
LAMBDA_OF_MODE = {RoutingMode.BEST: 0.0, RoutingMode.CHEAP: math.inf}


def cost_weight(
    request: ChatRequest, mode: RoutingMode, default: float, key: ClientKey | None, preset: Preset | None = None
) -> float:
    """Return λ: as the caller stated it, or the preset, or else the default, moved within the key's bounds.

    Args:
        default: of the deployment (`RoutingSnapshot.default_lambda`).

    Raises:
        BadRequest: the request states a λ that its key may not use.
        Forbidden: the name of the model asks for one.
    """
    stated = request.options.lambda_
    if key is not None:
        if not key_allows_mode(mode, key):
            asks = "λ = 0" if mode is RoutingMode.BEST else "the cheapest model, whatever λ is"
            raise Forbidden(f"{request.model!r} asks for {asks}; for this key λ is {_bounds(key)}", param="model")
        if preset is not None and not key_allows_preset(preset, key):
            message = f"{request.model!r} asks for λ = {preset.lambda_:g}; for this key λ is {_bounds(key)}"
            raise Forbidden(message, param="model")
        if stated is not None and not _is_within(stated, key):
            raise BadRequest(f"`lambda` is {stated:g}; for this key it is {_bounds(key)}", param="lambda")
    if mode is RoutingMode.BEST:
        return 0.0
    if stated is None and preset is not None and preset.lambda_ is not None:
        return preset.lambda_
    return stated if stated is not None else default_for_key(default, key)


def key_allows_mode(mode: RoutingMode, key: ClientKey | None) -> bool:
    """Whether the key's bounds leave room for a name that stands for a λ."""
    return key is None or mode not in LAMBDA_OF_MODE or _is_within(LAMBDA_OF_MODE[mode], key)


def key_allows_preset(preset: Preset | None, key: ClientKey | None) -> bool:
    """Whether the λ that a preset states is within the key's bounds."""
    return key is None or preset is None or preset.lambda_ is None or _is_within(preset.lambda_, key)


def default_for_key(default: float, key: ClientKey | None) -> float:
    """Return the λ of requests that state none: the key's own, or else `default` within the key's bounds."""
    if key is None:
        return default
    return clamp(default, key.lambda_min, key.lambda_max) if key.lambda_default is None else key.lambda_default


def _is_within(value: float, key: ClientKey) -> bool:
    return value == clamp(value, key.lambda_min, key.lambda_max)


def _bounds(key: ClientKey) -> str:
    low, high = key.lambda_min or 0.0, key.lambda_max
    return f"{low:g} or more" if high is None else f"from {low:g} to {high:g}"
