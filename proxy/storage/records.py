from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal

import orjson
from pydantic import ValidationError

from proxy.settings.effort import Effort
from proxy.settings.litellm_params import is_provider_param, stated_address
from proxy.settings.model_config import ModelConfig, ModelInfo
from router_core.errors import InvalidInput, InvalidPrice
from router_core.profiles import Profile
from router_core.text import plain
from router_core.types import Price, price_field

# A profile of a map of a thousand clusters has some 200,000.
MAX_CHARS: Final = 4_000_000

MAX_DEPTH: Final = 100

# Found wherever JSON text has half a surrogate pair, a number that becomes infinite, or one of more than 64 bits.
_MAY_BE_UNSENDABLE = re.compile(r"\\u|\d{19}|[eE]\+?\d{3}", re.ASCII)


class InvalidRecord(InvalidInput):
    """A stored entry is not one that UniRoute writes; the message says what is wrong with it."""


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object, all of which can be encoded as JSON again.

    Raises:
        InvalidRecord: it is no JSON object, is too long or too deep, or has a value that cannot be encoded.
    """
    if len(text) > MAX_CHARS:
        raise InvalidRecord(f"has {len(text)} characters; {MAX_CHARS} are read at most")
    try:
        stored = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise InvalidRecord(f"must be a JSON object; got {type(stored).__name__}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(stored, MAX_DEPTH):
        raise InvalidRecord(f"is nested deeper than {MAX_DEPTH} levels")
    if _MAY_BE_UNSENDABLE.search(text):
        _check_can_be_sent(stored)
    return stored


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_deeper(value: object, levels: int) -> bool:
    """Look level by level: recursion would fail on the very values that this is to find."""
    level = [value]
    for _ in range(levels):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inner(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _inner(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _check_can_be_sent(stored: object) -> None:
    """Raise InvalidRecord for a value that can be sent neither to an upstream nor to an administrator."""
    try:
        json.dumps(stored, allow_nan=False)
        orjson.dumps(stored)
    except (ValueError, TypeError) as error:
        raise InvalidRecord(f"holds what no JSON can be sent with: {error}") from error


# Lua and JSON's readers have no larger numbers that are exact.
MAX_INTEGER: Final = 2**53 - 1

# Unix seconds. A later time is a mistake.
MAX_UNIX_TIME: Final = math.nextafter(1e11, 0)

_NUMERAL = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,4})?", re.ASCII)


def number(value: object, max_value: float = 1e15) -> float | None:
    """Return a number from 0 to `max_value`, given as a number or as text; None if it is something else."""
    if isinstance(value, str) and len(value) < 100 and _NUMERAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= max_value:
        return None
    return float(value)


def whole_number(value: object, max_value: int = MAX_INTEGER) -> int | None:
    """Return a whole number from 0 to `max_value`, given as a number or as text; None if it is something else."""
    found = number(value, max_value)
    return int(found) if found is not None and found.is_integer() else None


def is_unix_time(value: object) -> bool:
    return not isinstance(value, str) and number(value, MAX_UNIX_TIME) is not None


def unix_time(value: Any) -> float:
    """Return a time in Unix seconds, or raise InvalidRecord."""
    if not is_unix_time(value):
        raise InvalidRecord(f"a time must be Unix seconds; got {value!r}"[:200])
    return float(value)


MAX_WARNINGS: Final = 1000

MAX_WARNING_CHARS: Final = 300


class WarnOnce:
    """Log a warning of each invalid value once, however often it is read, and of MAX_WARNINGS values at most."""

    def __init__(self, log: logging.Logger, prefix: str = "stored entry skipped") -> None:
        self._log = log
        self._prefix = prefix
        self._warned: set[str] = set()

    def __call__(self, where: str, what: object) -> None:
        warning = plain(f"{where}: {what}", lines=False)[:MAX_WARNING_CHARS]
        if warning not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(warning)
            self._log.warning("%s: %s", self._prefix, warning)


ForwardMode = Literal["relay", "translate"]


@dataclass(frozen=True)
class ResolvedProvider:
    """Which provider serves a model and how it is called, as litellm resolves its name and address."""

    mode: ForwardMode
    """relay: the provider reads OpenAI's format at `api_base`. translate: litellm writes the provider's format."""
    model: str
    """The provider's own name for the model."""
    provider: str
    api_base: str | None = None
    """Without the path of chat completions. None: only litellm knows it."""
    key_variable: str | None = None
    """The environment variable of the key, if the model's parameters state none."""
    param_aliases: Mapping[str, str] = field(default_factory=dict)
    """OpenAI's name of a field → the provider's name of it."""
    own_address: bool = False
    """Whether requests go to the provider's own address. The environment's key is sent to no other."""

    def to_json(self) -> dict[str, Any]:
        stated = {"way": self.mode, "model": self.model, "provider": self.provider, "api_base": self.api_base}
        more = {"renames": dict(self.param_aliases), "own_address": self.own_address}
        return {**stated, "key_variable": self.key_variable, **more}

    @classmethod
    def from_json(cls, stored: Any) -> ResolvedProvider:
        """Parse what is stored, or raise InvalidRecord."""
        if not isinstance(stored, dict) or stored.get("way") not in ("relay", "translate"):
            raise InvalidRecord("not what a provider was resolved to")
        texts = {name: stored.get(name) for name in ("model", "provider", "api_base", "key_variable")}
        aliases = stored.get("renames") or {}
        if not all(isinstance(value, str | None) for value in texts.values()) or not isinstance(aliases, dict):
            raise InvalidRecord("not what a provider was resolved to")
        if stored["way"] == "relay" and not texts["api_base"]:
            raise InvalidRecord("a model that is relayed needs an address")
        return cls(
            mode=stored["way"],
            model=texts["model"] or "",
            provider=texts["provider"] or "",
            api_base=texts["api_base"],
            key_variable=texts["key_variable"],
            param_aliases={str(openai): str(theirs) for openai, theirs in aliases.items()},
            own_address=stored.get("own_address") is True,
        )


@dataclass(frozen=True)
class ModelRecord:
    """A registered model: the parameters of its calls, and what is configured about it."""

    name: str
    litellm_params: Mapping[str, Any] = field(repr=False)
    info: ModelInfo
    source: Literal["config", "admin"]
    created_at: float
    """Unix seconds."""
    resolved: ResolvedProvider | None = None
    """Its provider; None: not resolved yet."""
    base: str | None = None
    """The registered model of which this is an effort; None: it is registered itself."""
    effort: Effort | None = None
    """None: it is asked at no effort of ours."""

    @property
    def registered_name(self) -> str:
        """Return the name under which it is registered, and under which its address has a circuit, slots and price."""
        return self.base or self.name

    @cached_property
    def fingerprint(self) -> str:
        """Return a digest of the parameters that decide the answers. A profile with another fingerprint is not used."""
        deciding = {key: value for key, value in self.litellm_params.items() if key != "api_key"}
        text = json.dumps(deciding, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def address(self) -> str | None:
        """Return the address that its parameters state."""
        return stated_address(self.litellm_params)

    @cached_property
    def has_body_params(self) -> bool:
        """Whether any of its parameters go into the body of each request."""
        return any(name != "model" and not is_provider_param(name) for name in self.litellm_params)

    @classmethod
    def of_entry(cls, entry: ModelConfig, source: Literal["config", "admin"], created_at: float) -> ModelRecord:
        return cls(entry.model_name, entry.litellm_params, entry.model_info, source, created_at)

    def to_json(self) -> str:
        stored = {
            "litellm_params": dict(self.litellm_params),
            "model_info": self.info.model_dump(exclude_defaults=True),
            "created_at": self.created_at,
            **({"resolved": self.resolved.to_json()} if self.resolved else {}),
        }
        return json.dumps(stored, sort_keys=True)

    @classmethod
    def from_json(cls, name: str, text: str) -> ModelRecord:
        stored = json_object(text)
        try:
            entry = ModelConfig.model_validate(
                {
                    "model_name": name,
                    "litellm_params": stored.get("litellm_params"),
                    "model_info": stored.get("model_info") or {},
                }
            )
        except ValidationError as error:
            raise InvalidRecord(f"not a model: {error.errors()[0]['msg']}") from error
        resolved = ResolvedProvider.from_json(stored["resolved"]) if stored.get("resolved") else None
        return replace(cls.of_entry(entry, "admin", unix_time(stored.get("created_at"))), resolved=resolved)


MAX_SOURCE_CHARS = 60


@dataclass(frozen=True, slots=True)
class CurrentPrice:
    """The price of a model now, and where it comes from."""

    price: Price
    source: str
    """admin, external, sync, model_info or litellm."""
    updated_at: float | None = None
    """Unix seconds; None: it comes from the configuration or from litellm."""

    def to_fields(self) -> dict[str, str]:
        stated = {key: repr(float(value)) for key, value in self.price.to_fields().items()}
        return {**stated, "source": self.source, "updated_at": repr(self.updated_at or 0.0)}

    @classmethod
    def from_fields(cls, stored: Mapping[str, str], seen_at: float) -> CurrentPrice:
        """Parse the stored hash, or raise InvalidPrice. `seen_at` is used if its writer left out the time."""
        price = Price.from_fields(
            {name: _amount(name, text) for name, text in stored.items() if text and price_field(name)}
        )
        updated_at = number(stored.get("updated_at"), MAX_UNIX_TIME) or seen_at
        return cls(price, (stored.get("source") or "external")[:MAX_SOURCE_CHARS], updated_at)


def _amount(name: str, text: str) -> float:
    amount = number(text)
    if amount is None:
        raise InvalidPrice(f"{name} must be a number of USD per token, 0 or more; got {text[:60]!r}")
    return amount


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile, and the fingerprint of the model on which it was measured."""

    fingerprint: str
    profile: Profile
    job: str | None = None
    """The job that measured it. None: it was uploaded."""

    def to_json(self) -> str:
        stored = {"fingerprint": self.fingerprint, "profile": self.profile.to_json(), "job": self.job}
        return json.dumps(stored)

    @classmethod
    def from_json(cls, text: str) -> StoredProfile:
        stored = json_object(text)
        fingerprint, profile, job = stored.get("fingerprint"), stored.get("profile"), stored.get("job")
        if not isinstance(fingerprint, str) or not isinstance(profile, dict) or not isinstance(job, str | None):
            raise InvalidRecord("a stored profile needs `fingerprint` and `profile`, and `job` as an id or null")
        return cls(fingerprint, Profile.from_json(profile), job)
