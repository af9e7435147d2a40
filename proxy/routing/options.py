"""What a caller may ask of the routing itself: the header `lambda`, the body's `uniroute`, OpenRouter's extras."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from proxy.errors import BadRequest
from proxy.routing.provider import NO_PROVIDER, Provider, read_provider
from proxy.routing.sessions import LONGEST_ID, SESSION_HEADERS, inherited_session, is_session_id
from proxy.settings.schema import NOTHING_STATED, StatedTimeouts

LAMBDA_HEADERS = ("lambda", "x-uniroute-lambda")
KNOWN = ("lambda", "models", "max_cost_usd", "latency_weight", "session", "fallbacks", "timeouts")
TIMEOUTS = tuple(column.name for column in fields(StatedTimeouts))
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHOWN = 60
MOST = 1e12
"""Of λ, dollars and dollars per second: what is beyond is a mistake, and costs reckoned with it would be infinite."""


@dataclass(frozen=True)
class Options:
    """None: not stated, the settings decide."""

    lambda_: float | None = None
    models: tuple[str, ...] | None = None
    """The only candidates."""
    max_cost_usd: float | None = None
    latency_weight: float | None = None
    session: str | None = field(default=None, repr=False)
    """Ours, or the first that the client's own headers and fields name."""
    fallbacks: bool | None = None
    timeouts: StatedTimeouts = NOTHING_STATED
    provider: Provider = NO_PROVIDER


NOTHING_ASKED = Options()
READ_HEADERS = (*LAMBDA_HEADERS, *SESSION_HEADERS)
"""The names of the headers that are read here."""
_READ_FIELDS = frozenset({"uniroute", "models", "provider", "prompt_cache_key", "metadata"})


def read_options(body: Mapping[str, Any], headers: Sequence[tuple[str, str]]) -> Options:
    """The body wins over the header. Raises BadRequest naming the field."""
    if _READ_FIELDS.isdisjoint(body) and not any(name in READ_HEADERS for name, _ in headers):
        return NOTHING_ASKED
    stated = body.get("uniroute", {})
    if not isinstance(stated, dict):
        raise BadRequest("`uniroute` must be an object", param="uniroute")
    for name in stated:
        if name not in KNOWN:
            raise BadRequest(f"`uniroute.{name[:_SHOWN]}` is not an option{_nearest(name)}", param="uniroute")
    from_header = _header_lambda(headers)
    own = _amount(stated, "lambda")
    provider = read_provider(body)
    return Options(
        lambda_=from_header if own is None else own,
        models=_models(body, stated),
        max_cost_usd=_amount(stated, "max_cost_usd"),
        latency_weight=_amount(stated, "latency_weight"),
        session=_session(stated) or inherited_session(body, headers),
        fallbacks=_fallbacks(stated, provider),
        provider=provider,
        timeouts=_timeouts(stated),
    )


def _nearest(name: str, known: Sequence[str] = KNOWN) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"


def _header_lambda(headers: Sequence[tuple[str, str]]) -> float | None:
    values = [(name, value) for name, value in headers if name in LAMBDA_HEADERS]
    if not values:
        return None
    name, text = values[0]
    if len(values) > 1:
        raise BadRequest("the header `lambda` is given more than once", param=name)
    if not _NUMBER.fullmatch(text.strip(" \t")):
        raise BadRequest(_not_an_amount(f"the header `{name}`", text), param=name)
    return _checked(float(text), f"the header `{name}`", name, text)


def _amount(stated: Mapping[str, Any], name: str, path: str = "uniroute") -> float | None:
    value = stated.get(name)
    if value is None:
        return None
    label, param = f"`{path}.{name}`", f"{path}.{name}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(_not_an_amount(label, value), param=param)
    try:
        return _checked(float(value), label, param, value)
    except OverflowError:
        raise BadRequest(_not_an_amount(label, "a number of too many digits"), param=param) from None


def _checked(number: float, label: str, param: str, shown: object) -> float:
    if not 0 <= number <= MOST:  # also of NaN
        raise BadRequest(_not_an_amount(label, shown), param=param)
    return number + 0.0  # -0.0 becomes 0.0


def _not_an_amount(label: str, shown: object) -> str:
    return f"{label} must be a finite number from 0 to {MOST:g}; got {str(shown)[:_SHOWN]!r}"


def _models(body: Mapping[str, Any], stated: Mapping[str, Any]) -> tuple[str, ...] | None:
    param, value = ("uniroute.models", stated["models"]) if "models" in stated else ("models", body.get("models"))
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise BadRequest(f"`{param}` must be a list of model names with at least one", param=param)
    return tuple(dict.fromkeys(value))


def _session(stated: Mapping[str, Any]) -> str | None:
    value = stated.get("session")
    if value is None:
        return None
    if not isinstance(value, str) or not is_session_id(value):
        message = f"`uniroute.session` must be a text of 1 to {LONGEST_ID} characters"
        raise BadRequest(message, param="uniroute.session")
    return value


def _fallbacks(stated: Mapping[str, Any], provider: Provider) -> bool | None:
    own = stated.get("fallbacks")
    if not isinstance(own, bool | None):
        raise BadRequest("`uniroute.fallbacks` must be true or false", param="uniroute.fallbacks")
    return provider.allow_fallbacks if own is None else own


def _timeouts(stated: Mapping[str, Any]) -> StatedTimeouts:
    path, value = "uniroute.timeouts", stated.get("timeouts")
    if value is None:
        return NOTHING_STATED
    if not isinstance(value, dict):
        raise BadRequest(f"`{path}` must be an object of seconds", param=path)
    for name in value:
        if name not in TIMEOUTS:
            raise BadRequest(f"`{path}.{name[:_SHOWN]}` is not known{_nearest(name, TIMEOUTS)}", param=path)
    seconds = {name: _amount(value, name, path) for name in TIMEOUTS}
    for name, amount in seconds.items():
        if amount == 0:
            raise BadRequest(f"`{path}.{name}` must be more than 0 seconds", param=f"{path}.{name}")
    return StatedTimeouts(**seconds)
