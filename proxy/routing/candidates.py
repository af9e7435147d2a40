from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from types import MappingProxyType

from proxy.errors import (
    BadRequest,
    ContextLengthExceeded,
    Forbidden,
    ModelNotFound,
    NoEligibleModelError,
    NotMeasured,
    ServiceUnavailable,
)
from proxy.routing.affinity import Affinity
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.routing.requirements import requirement_sources, requirements_of
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey, clamp
from proxy.storage.snapshot import RoutingSnapshot
from router_core.eligibility import Eligibility, eligible
from router_core.errors import NoEligibleModel
from router_core.scoring import ScoringParams
from router_core.types import CAPABILITY_NAMES, Requirements


class RoutingMode(Enum):
    SCORED = "auto"
    BEST = "uniroute/best"
    CHEAP = "uniroute/cheap"
    PINNED = ""


ALIASES = {
    "auto": RoutingMode.SCORED,
    "uniroute/auto": RoutingMode.SCORED,
    "uniroute/best": RoutingMode.BEST,
    "uniroute/cheap": RoutingMode.CHEAP,
}

ANY = "*"


def routing_mode(name: str, settings: Settings, state: RoutingSnapshot, key: ClientKey | None) -> RoutingMode:
    """Raises UnknownName, and Forbidden where the key may not use this model."""
    if name in ALIASES:
        return ALIASES[name]
    if name in settings.route_names and name != ANY:
        return RoutingMode.SCORED
    if name in state.models:
        _check_allowed(name, key)
        return RoutingMode.PINNED
    if ANY in settings.route_names:
        return RoutingMode.SCORED
    raise ModelNotFound(f'the model {name[:128]!r} does not exist; use "auto", or one of GET /v1/models', param="model")


def allowed_models(state: RoutingSnapshot, key: ClientKey | None) -> tuple[str, ...]:
    """Every registered name that this key may use, sorted."""
    return tuple(name for name in sorted(state.models) if key is None or key.models is None or name in key.models)


def restrict_candidates(
    options: RoutingOptions, state: RoutingSnapshot, key: ClientKey | None
) -> Collection[str] | None:
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
    names: tuple[str, ...] | None, param: str, state: RoutingSnapshot, key: ClientKey | None
) -> tuple[str, ...] | None:
    for name in names or ():
        if name not in state.models:
            raise ModelNotFound(f"the model {name[:128]!r} of `{param}` does not exist", param=param)
        _check_allowed(name, key)
    return names


def _check_allowed(name: str, key: ClientKey | None) -> None:
    if key is not None and key.models is not None and name not in key.models:
        raise Forbidden(f"this key may not use the model {name!r}", param="model")


LAMBDA_OF_MODE = {RoutingMode.BEST: 0.0, RoutingMode.CHEAP: math.inf}


def cost_weight(request: ChatRequest, way: RoutingMode, settings: Settings, key: ClientKey | None) -> float:
    """What nobody stated is moved within the bounds; what the caller stated is not.

    Raises:
        BadRequest: the request states a λ that its key may not use.
        Forbidden: its name asks for one.
    """
    stated = request.options.lambda_
    if key is not None:
        if not key_allows_mode(way, key):
            asks = "λ = 0" if way is RoutingMode.BEST else "the cheapest model, whatever λ is"
            raise Forbidden(f"{request.model!r} asks for {asks}; for this key λ is {_bounds(key)}", param="model")
        if stated is not None and not _allowed(stated, key):
            raise BadRequest(f"`lambda` is {stated:g}; for this key it is {_bounds(key)}", param="lambda")
    if way is RoutingMode.BEST:
        return 0.0
    return stated if stated is not None else default_for_key(settings.lambda_, key)


def key_allows_mode(way: RoutingMode, key: ClientKey | None) -> bool:
    """Whether the key's bounds leave room for a name that stands for a λ."""
    return key is None or way not in LAMBDA_OF_MODE or _allowed(LAMBDA_OF_MODE[way], key)


def default_for_key(default: float, key: ClientKey | None) -> float:
    if key is None:
        return default
    return clamp(default, key.lambda_min, key.lambda_max) if key.lambda_default is None else key.lambda_default


def _allowed(value: float, key: ClientKey) -> bool:
    return value == clamp(value, key.lambda_min, key.lambda_max)


def _bounds(key: ClientKey) -> str:
    low, high = key.lambda_min or 0.0, key.lambda_max
    return f"{low:g} or more" if high is None else f"from {low:g} to {high:g}"


_SHOWN = 10

_SHOWN_CHARACTERS = 2_000


class IneligibleReasons(Mapping[str, str]):
    """Ruled-out model → why, of those that the caller may use. Worked out when somebody looks: few requests are."""

    def __init__(self, asked: SelectionContext, eligibility: Eligibility | None, *, but: str | None = None) -> None:
        self._asked = asked
        self._eligibility = eligibility
        self._but = but

    @cached_property
    def _reasons(self) -> dict[str, str]:
        why = self._eligibility.reasons if self._eligibility else {}
        usable = set(allowed_models(self._asked.state, self._asked.key)) - {self._but}
        return {name: reason for name, reason in why.items() if name in usable}

    def __getitem__(self, name: str) -> str:
        return self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


def no_candidate_error(asked: SelectionContext, eligibility: Eligibility) -> NoEligibleModelError | ServiceUnavailable:
    pool, needs, allowed = asked.state.pool, asked.needs, asked.allowed
    if not allowed_models(asked.state, asked.key):
        return ServiceUnavailable("no model is registered that this request may use")
    if not _candidates(asked):
        return NoEligibleModelError(
            "`models`, `provider.only` and `provider.ignore` together leave no model", param="provider"
        )
    reasons = _because(asked, eligibility.reasons)
    if not eligible(pool, Requirements(), allowed).rows.size:
        return NotMeasured(f"no model can be chosen yet{reasons}", _of_candidates(asked, eligibility.reasons))
    if eligible(pool, needs, allowed).rows.size:
        return ServiceUnavailable(f"every model that can take this request rests after failures{reasons}")
    if eligible(pool, replace(needs, prompt_tokens=0), allowed).rows.size:
        return ContextLengthExceeded(
            f"the request of about {needs.prompt_tokens} tokens{_and_answer(needs)} fits no model's context window"
            f"{reasons}",
            param="messages",
        )
    return NoEligibleModelError(f"no model can take this request{_which_needs(asked)}{reasons}")


def over_cost_error(asked: SelectionContext, error: NoEligibleModel) -> NoEligibleModelError:
    """Models are able, and none of them within max_cost_usd."""
    return NoEligibleModelError(f"{error}{_because(asked, error.reasons)}", param="uniroute.max_cost_usd")


def _candidates(asked: SelectionContext) -> Collection[str]:
    """Names that this caller and this request allow: no others are spoken of."""
    usable = set(allowed_models(asked.state, asked.key))
    return usable if asked.allowed is None else usable & set(asked.allowed)


def _because(asked: SelectionContext, why: Mapping[str, str]) -> str:
    return listed(_of_candidates(asked, why))


def _of_candidates(asked: SelectionContext, why: Mapping[str, str]) -> dict[str, str]:
    restrict_candidates = _candidates(asked)
    return {name: reason for name, reason in why.items() if name in restrict_candidates}


def listed(reasons: Mapping[str, str]) -> str:
    """(name: reasons; name: reasons; and 90 more), of bounded length."""
    shown: list[str] = []
    length = 0
    for name, reason in reasons.items():
        length += len(name) + len(reason)
        if len(shown) == _SHOWN or length > _SHOWN_CHARACTERS:
            break
        shown.append(f"{name}: {reason}")
    more = f"; and {len(reasons) - len(shown)} more" if len(reasons) > len(shown) else ""
    return f" ({'; '.join(shown)}{more})" if reasons else ""


def _and_answer(needs: Requirements) -> str:
    return "" if needs.max_output_tokens is None else f", and {needs.max_output_tokens} of an answer,"


def _which_needs(asked: SelectionContext) -> str:
    """, which needs to read images (messages[3] has image_url)…"""
    asks = requirement_sources(asked.request.body)
    told = [f"to {words} ({asks[ability]})" for ability, words in CAPABILITY_NAMES.items() if ability in asks]
    return f", which needs a model {', '.join(told)}" if told else ""


EMPTY: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class SelectionContext:
    """One request against one snapshot: what it asks for, and what it may have."""

    request: ChatRequest
    key: ClientKey | None
    state: RoutingSnapshot
    settings: Settings
    way: RoutingMode
    allowed: Collection[str] | None
    needs: Requirements
    terms: ScoringParams
    thread: Affinity
    resting: Mapping[str, float] = field(default_factory=lambda: EMPTY)
    """Models that failed too often lately → seconds until they may be asked again."""
    loading: Collection[str] = ()
    """Models that this process cannot call yet."""


def requirements_for(request: ChatRequest, *, limit_is_cap: bool = False) -> Requirements:
    """What the body needs, at prices within the request's caps."""
    provider = request.options.provider
    caps = (provider.max_input_cost_per_token, provider.max_output_cost_per_token)
    return requirements_of(request.body, request.contents, caps, limit_is_cap=limit_is_cap)


def is_clamped(way: RoutingMode, settings: Settings) -> bool:
    """Whether a limit of an answer above a model's own is lowered to that."""
    return settings.clamp_max_tokens == "on" or (settings.clamp_max_tokens == "auto" and way is not RoutingMode.PINNED)


def scoring_params(
    request: ChatRequest, way: RoutingMode, settings: Settings, key: ClientKey | None, thread: Affinity
) -> ScoringParams:
    """Raises BadRequest or Forbidden where the key's bounds of λ are left."""
    options = request.options
    weight = settings.latency_weight if options.latency_weight is None else options.latency_weight
    return ScoringParams(
        lambda_=cost_weight(request, way, settings, key),
        latency_weight=weight,
        max_cost_usd=options.max_cost_usd,
        cost_unit=settings.cost_unit,
        reference=settings.reference_price,
        cached=thread.cached(settings),
    )
