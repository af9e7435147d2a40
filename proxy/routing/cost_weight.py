"""λ of one request: stated, the key's or the settings', within the key's bounds. Decides no model."""

from __future__ import annotations

import math

from proxy.errors import BadRequest, Forbidden
from proxy.routing.names import Way
from proxy.routing.request import ChatRequest
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey, within

_ASKED_BY_NAME = {Way.BEST: 0.0, Way.CHEAP: math.inf}


def cost_weight(request: ChatRequest, way: Way, settings: Settings, key: ClientKey | None) -> float:
    """What nobody stated is moved within the bounds; what the caller stated is not.

    Raises:
        BadRequest: the request states a λ that its key may not use.
        Forbidden: its name asks for one.
    """
    stated = request.options.lambda_
    if key is not None:
        if not may_ask(way, key):
            asks = "λ = 0" if way is Way.BEST else "the cheapest model, whatever λ is"
            raise Forbidden(f"{request.model!r} asks for {asks}; for this key λ is {_bounds(key)}", param="model")
        if stated is not None and not _allowed(stated, key):
            raise BadRequest(f"`lambda` is {stated:g}; for this key it is {_bounds(key)}", param="lambda")
    if way is Way.BEST:
        return 0.0
    return stated if stated is not None else _unstated(settings.lambda_, key)


def may_ask(way: Way, key: ClientKey | None) -> bool:
    """Whether the key's bounds leave room for a name that stands for a λ."""
    return key is None or way not in _ASKED_BY_NAME or _allowed(_ASKED_BY_NAME[way], key)


def _unstated(default: float, key: ClientKey | None) -> float:
    if key is None:
        return default
    return within(default, key.lambda_min, key.lambda_max) if key.lambda_default is None else key.lambda_default


def _allowed(value: float, key: ClientKey) -> bool:
    return value == within(value, key.lambda_min, key.lambda_max)


def _bounds(key: ClientKey) -> str:
    low, high = key.lambda_min or 0.0, key.lambda_max
    return f"{low:g} or more" if high is None else f"from {low:g} to {high:g}"
