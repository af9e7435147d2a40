from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from proxy.storage.private_files import private_opener
from proxy.storage.records import InvalidRecord, is_unix_time, json_object
from router_core.text import rfc3339

PREFIX = "ur-"

# Finds a secret wherever it was put by mistake.
SECRET = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")


def new_secret() -> str:
    """Return a new secret, which is shown once and never stored."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """Return the digest that is stored and compared. A lone surrogate is hashed like any other garbage."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class AuthRequiredLatch:
    """Remember that a client key was made once: from then on every call needs one.

    It is never cleared: neither revoking the last key nor emptying the store lets calls without a key in again.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "keys-required"

    @property
    def closed(self) -> bool:
        return self._path.exists()

    def close(self) -> None:
        if not self.closed:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._path, "w", opener=private_opener) as file:
                file.write("A client key was made once; calls without one are refused.\n")
                file.flush()
                os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The limits of a client key. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer together."""
    usd_per_day: float | None = None
    """A day and a month begin at midnight UTC."""
    usd_per_month: float | None = None

    @property
    def any(self) -> bool:
        return self != NO_LIMITS

    @property
    def money(self) -> bool:
        return self.usd_per_day is not None or self.usd_per_month is not None


NO_LIMITS = KeyLimits()

Role = Literal["client", "viewer", "admin"]

ROLES: tuple[Role, ...] = get_args(Role)

LIMITS = tuple(column.name for column in fields(KeyLimits))

# The largest limit. Sums of whole picodollars stay exact far beyond it.
MAX_USD = 1e6

MAX_PER_MINUTE = 10**12

# As of a request: times a cost it stays finite.
MAX_LAMBDA = 1e12


# Of a key together with those of a request.
MAX_TAGS = 16

MAX_TAG_CHARS = 64

TAG_RULE = f"at most {MAX_TAGS} texts of 1 to {MAX_TAG_CHARS} printable characters without commas"


def is_tag(value: object) -> bool:
    """Tell whether a text can be a tag, also as one of several in a header."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TAG_CHARS:
        return False
    return value.isprintable() and "," not in value and value == value.strip()


class InvalidKey(InvalidRecord):
    """A field of a key has a value that it cannot have; `param` is the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A client key, checked when it is made: raises InvalidKey. Times are Unix seconds; None is no bound."""

    id: str
    name: str
    digest: str = field(repr=False)
    """SHA-256, hexadecimal."""
    created_at: float
    models: tuple[str, ...] | None = None
    """The models this key may use; None: all."""
    revoked: bool = False
    limits: KeyLimits = NO_LIMITS
    role: Role = "client"
    expires_at: float | None = None
    lambda_default: float | None = None
    """The λ of a request that has none; None: that of the settings, moved within the bounds."""
    lambda_min: float | None = None
    lambda_max: float | None = None
    previous_digest: str | None = field(default=None, repr=False)
    """Of the secret before the last rotation, which is valid until `previous_until`."""
    previous_until: float | None = None
    tags: tuple[str, ...] = ()
    """Noted in the records of its requests, with theirs."""

    def __post_init__(self) -> None:
        for name, (good, must_be) in _FIELDS.items():
            _check(name, getattr(self, name), good, must_be)
        for name, (good, must_be) in _LIMIT_FIELDS.items():
            _check(name, getattr(self.limits, name), good, must_be)
        _check_lambdas(self)
        if (self.previous_digest is None) != (self.previous_until is None):
            raise InvalidKey("`previous_digest` and `previous_until` belong together")

    def matches(self, digest: str, now: float) -> bool:
        """Return whether this is the digest of its secret or, in the grace period of a rotation, of the one before."""
        if hmac.compare_digest(digest, self.digest):
            return True
        if self.previous_digest is None or self.previous_until is None:
            return False
        return hmac.compare_digest(digest, self.previous_digest) and now < self.previous_until

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def public_fields(self) -> dict[str, Any]:
        """Return what may be shown, without digests, under the names that the admin side uses. Times are RFC 3339."""
        return {
            "id": self.id,
            "name": self.name,
            "role": self.role,
            "models": None if self.models is None else list(self.models),
            "tags": list(self.tags),
            "created_at": _rfc3339_or_none(self.created_at),
            "expires_at": _rfc3339_or_none(self.expires_at),
            "revoked": self.revoked,
            "lambda_default": self.lambda_default,
            "lambda_min": self.lambda_min,
            "lambda_max": self.lambda_max,
            **{name: getattr(self.limits, name) for name in LIMITS},
            "previous_secret_until": _rfc3339_or_none(self.previous_until),
        }

    @classmethod
    def from_json(cls, key_id: str, text: str) -> ClientKey:
        """Parse a record, or raise InvalidRecord: an unknown field may be a restriction that is not kept here."""
        stored = json_object(text)
        limits, models, tags = stored.get("limits"), stored.get("models"), stored.get("tags", [])
        if not isinstance(limits, dict | None):
            raise InvalidKey("`limits` must be an object", "limits")
        try:
            given = {
                **stored,
                "id": key_id,
                "name": stored.get("name", ""),
                "models": tuple(models) if isinstance(models, list) else models,
                "tags": tuple(tags) if isinstance(tags, list) else tags,
                "limits": KeyLimits(**(limits or {})),
            }
            return cls(**given)
        except TypeError as error:
            raise InvalidKey(f"its fields are not those of a key: {error}") from error


@dataclass(frozen=True, slots=True)
class KeyChange:
    """New values of some fields of a key and of its limits, by name."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)

    def apply_to(self, key: ClientKey) -> ClientKey:
        """Return the changed key, or raise InvalidKey."""
        return replace(key, **self.fields, limits=replace(key.limits, **self.limits))


def _check(name: str, value: object, good: Callable[[Any], bool], must_be: str) -> None:
    if not good(value):
        shown = "something else" if "digest" in name else f"{value!r}"[:100]
        raise InvalidKey(f"`{name}` must be {must_be}; got {shown}", name)


def _check_lambdas(key: ClientKey) -> None:
    low, high, default = key.lambda_min, key.lambda_max, key.lambda_default
    if low is not None and high is not None and low > high:
        raise InvalidKey(f"`lambda_min` is {low:g}, above `lambda_max`, which is {high:g}", "lambda_min")
    if default is not None and default != clamp(default, low, high):
        bounds = f"{low or 0:g} and {'any' if high is None else format(high, 'g')}"
        raise InvalidKey(f"`lambda_default` is {default:g}, not between {bounds}, the key's bounds", "lambda_default")


def _rfc3339_or_none(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return rfc3339(seconds)
    except (OverflowError, ValueError):  # beyond the year 9999: stored by another program
        return "9999-12-31T23:59:59Z"


def clamp(value: float, low: float | None, high: float | None) -> float:
    """Return the value nearest to `value` between two bounds. None: no bound."""
    raised = value if low is None else max(value, low)
    return raised if high is None else min(raised, high)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.isascii()


def _is_list(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _are_tags(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_TAGS and all(map(is_tag, value))


def _amount_up_to(max_value: float) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= max_value


def _is_count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and 1 <= value <= MAX_PER_MINUTE


def _or_none(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or good(value)


_TIME = (_or_none(is_unix_time), "a time in Unix seconds, or null")

_LAMBDA = (_or_none(_amount_up_to(MAX_LAMBDA)), f"a number from 0 to {MAX_LAMBDA:g}, or null")

_COUNT = (_or_none(_is_count), "a whole number of 1 or more, or null")

_USD = (_or_none(_amount_up_to(MAX_USD)), f"an amount of USD from 0 to {MAX_USD:,.0f}, or null")

_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a text"),
    "digest": (_is_digest, "a digest"),
    "created_at": (is_unix_time, "a time in Unix seconds"),
    "models": (_or_none(_is_list), "a list of model names, or null"),
    "revoked": (lambda value: isinstance(value, bool), "true or false"),
    "role": (lambda value: value in ROLES, f"one of {', '.join(ROLES)}"),
    "expires_at": _TIME,
    "lambda_default": _LAMBDA,
    "lambda_min": _LAMBDA,
    "lambda_max": _LAMBDA,
    "previous_digest": (_or_none(_is_digest), "a digest, or null"),
    "previous_until": _TIME,
    "tags": (_are_tags, TAG_RULE),
}

_LIMIT_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "requests_per_minute": _COUNT,
    "tokens_per_minute": _COUNT,
    "usd_per_day": _USD,
    "usd_per_month": _USD,
}
