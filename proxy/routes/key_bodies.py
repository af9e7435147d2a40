"""What an administrator states of a client key, checked whole before anything is written. No Redis, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from proxy.errors import BadRequest
from proxy.routes.admin_bodies import known_only
from proxy.settings.models import check_model_name
from proxy.storage.client_keys import LIMITS, ClientKey, KeyChange
from proxy.storage.redis import is_unix_time

_PLAIN = ("lambda_default", "lambda_min", "lambda_max")
_EXPIRY = ("expires_at", "expires_in_s")
FIELDS = ("name", "models", "role", *_EXPIRY, *_PLAIN, *LIMITS)
MOST_EXPIRY_S = 100 * 365 * 86_400
MOST_GRACE_S = 30 * 86_400
_LONGEST_NAME = 200


def read_new_key(body: Mapping[str, Any], now: float) -> tuple[str, KeyChange]:
    """The name, and the rest. Raises BadRequest. What a ClientKey refuses is left to it."""
    stated = read_key_change({"name": None, **body}, now)
    expires_at = stated.fields.get("expires_at")
    if expires_at is not None and expires_at <= now:
        given = next(name for name in _EXPIRY if name in body)
        raise BadRequest(f"`{given}` is in the past: the key would open nothing", param=given)
    return stated.fields["name"], stated


def read_key_change(body: Mapping[str, Any], now: float) -> KeyChange:
    """Stated fields replace, null removes; what is not stated stays. `now`: Unix seconds. Raises BadRequest."""
    known_only(body, FIELDS, "")
    fields: dict[str, Any] = {name: body[name] for name in _PLAIN if name in body}
    if "name" in body:
        fields["name"] = _name(body["name"])
    if "models" in body:
        fields["models"] = _models(body["models"])
    if "role" in body:
        fields["role"] = "client" if body["role"] is None else body["role"]
    if any(name in body for name in _EXPIRY):
        fields["expires_at"] = _expiry(body, now)
    return KeyChange(fields, {name: body[name] for name in LIMITS if name in body})


def read_grace(body: Mapping[str, Any]) -> float:
    """Seconds. Raises BadRequest."""
    known_only(body, ("grace_s",), "")
    return _seconds(body.get("grace_s", 0), "grace_s", MOST_GRACE_S)


def shown_key(key: ClientKey) -> dict[str, Any]:
    """All but the digests; the same names as in a body."""
    return {
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "models": None if key.models is None else list(key.models),
        "created_at": _rfc3339_or_none(key.created_at),
        "expires_at": _rfc3339_or_none(key.expires_at),
        "revoked": key.revoked,
        **{name: getattr(key, name) for name in _PLAIN},
        **{name: getattr(key.limits, name) for name in LIMITS},
        "previous_secret_until": _rfc3339_or_none(key.previous_until),
    }


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_NAME or not value.isprintable():
        raise BadRequest(f"`name` must say whose key it is, in 1 to {_LONGEST_NAME} printable characters", param="name")
    return value


def _models(value: Any) -> tuple[str, ...] | None:
    """A model may be added after the key that allows it; a name that no model can have is a slip."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRequest("`models` must be a list of model names with at least one, or null for all", param="models")
    try:
        return tuple(dict.fromkeys(map(check_model_name, value)))
    except ValueError as error:
        raise BadRequest(f"`models`: {error}"[:300], param="models") from None


def _expiry(body: Mapping[str, Any], now: float) -> float | None:
    at, in_s = (body.get(name) for name in _EXPIRY)
    if at is not None and in_s is not None:
        raise BadRequest("state `expires_at` or `expires_in_s`, not both", param="expires_at")
    if in_s is not None:
        return now + _seconds(in_s, "expires_in_s", MOST_EXPIRY_S)
    return None if at is None else _time(at)


def _time(value: Any) -> float:
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
        if at is not None and at.tzinfo is not None and is_unix_time(at.timestamp()):
            return at.timestamp()
    except (ValueError, OverflowError):
        pass
    example = "2027-01-31T00:00:00Z"
    raise BadRequest(
        f"`expires_at` must be an RFC 3339 time with its zone, as {example}; got {value!r}"[:200], param="expires_at"
    )


def _seconds(value: Any, name: str, most: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise BadRequest(f"`{name}` must be seconds from 0 to {most}; got {value!r}"[:200], param=name)
    return float(value)


def _rfc3339_or_none(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (OverflowError, ValueError):  # beyond the year 9999: stored by another program
        return "9999-12-31T23:59:59Z"
