"""What the model name of a request asks for, and which models it may reach. No scores."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from proxy.errors import Forbidden, UnknownName
from proxy.routing.options import Options
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import RoutingState


class Way(Enum):
    SCORED = "auto"
    BEST = "uniroute/best"
    CHEAP = "uniroute/cheap"
    PINNED = ""


ALIASES = {"auto": Way.SCORED, "uniroute/auto": Way.SCORED, "uniroute/best": Way.BEST, "uniroute/cheap": Way.CHEAP}
ANY = "*"


def way_of(name: str, settings: Settings, state: RoutingState, key: ClientKey | None) -> Way:
    """Raises UnknownName, and Forbidden where the key may not use this model."""
    if name in ALIASES:
        return ALIASES[name]
    if name in settings.route_names and name != ANY:
        return Way.SCORED
    if name in state.models:
        _check_allowed(name, key)
        return Way.PINNED
    if ANY in settings.route_names:
        return Way.SCORED
    raise UnknownName(f'the model {name[:128]!r} does not exist; use "auto", or one of GET /v1/models', param="model")


def usable_models(state: RoutingState, key: ClientKey | None) -> tuple[str, ...]:
    """Every registered name that this key may use, sorted."""
    return tuple(name for name in sorted(state.models) if key is None or key.models is None or name in key.models)


def candidates(options: Options, state: RoutingState, key: ClientKey | None) -> Collection[str] | None:
    """Names that a choice is restricted to, by the key and by each list of the request; None: all.

    Raises:
        UnknownName, Forbidden: of a name asked for. One to be ignored need not exist: then it is no candidate anyway.
    """
    lists = [_asked(options.models, "models", state, key), _asked(options.provider.only, "provider.only", state, key)]
    if key is not None:
        lists.append(key.models)
    restricting = [set(names) for names in lists if names is not None]
    if not options.provider.ignore:
        return set.intersection(*restricting) if restricting else None
    return set.intersection(set(state.models), *restricting) - set(options.provider.ignore)


def _asked(
    names: tuple[str, ...] | None, param: str, state: RoutingState, key: ClientKey | None
) -> tuple[str, ...] | None:
    for name in names or ():
        if name not in state.models:
            raise UnknownName(f"the model {name[:128]!r} of `{param}` does not exist", param=param)
        _check_allowed(name, key)
    return names


def _check_allowed(name: str, key: ClientKey | None) -> None:
    if key is not None and key.models is not None and name not in key.models:
        raise Forbidden(f"this key may not use the model {name!r}", param="model")
