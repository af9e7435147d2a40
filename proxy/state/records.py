"""What is stored of a model, its price and a client key, as types and as JSON. No Redis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from proxy.settings import ModelEntry, ModelInfo
from proxy.state.key_limits import NO_LIMITS, KeyLimits
from router_core.errors import InvalidInput, InvalidPrice
from router_core.profiles import Profile
from router_core.types import Price

PRICE_FIELDS = tuple(column.name for column in fields(Price))


class InvalidRecord(InvalidInput):
    """A stored entry that is not what we write; the message says what is wrong with it."""


@dataclass(frozen=True)
class ModelRecord:
    """A registered model: how the provider layer reaches it and what was stated of it."""

    name: str
    litellm_params: Mapping[str, Any] = field(repr=False)
    info: ModelInfo
    source: Literal["config", "admin"]
    created_at: float
    """Unix seconds."""

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what decides the answers, so not of the key. A profile measured under another one is not used."""
        deciding = {key: value for key, value in self.litellm_params.items() if key != "api_key"}
        text = json.dumps(deciding, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def of_entry(cls, entry: ModelEntry, source: Literal["config", "admin"], created_at: float) -> ModelRecord:
        return cls(entry.model_name, entry.litellm_params, entry.model_info, source, created_at)

    def to_json(self) -> str:
        stored = {
            "litellm_params": dict(self.litellm_params),
            "model_info": self.info.model_dump(exclude_defaults=True),
            "created_at": self.created_at,
        }
        return json.dumps(stored, sort_keys=True)

    @classmethod
    def from_json(cls, name: str, text: str) -> ModelRecord:
        stored = _object(text)
        try:
            entry = ModelEntry.model_validate(
                {
                    "model_name": name,
                    "litellm_params": stored.get("litellm_params"),
                    "model_info": stored.get("model_info") or {},
                }
            )
        except ValidationError as error:
            raise InvalidRecord(f"not a model: {error.errors()[0]['msg']}") from error
        return cls.of_entry(entry, "admin", _time(stored.get("created_at")))


@dataclass(frozen=True, slots=True)
class LivePrice:
    """A price, who stated it, and since when (Unix seconds; None where it came with the configuration or litellm)."""

    price: Price
    source: str
    """admin, external, sync, model_info or litellm."""
    updated_at: float | None = None

    def to_fields(self) -> dict[str, str]:
        stated = {key: repr(float(value)) for key, value in asdict(self.price).items() if value is not None}
        return {**stated, "source": self.source, "updated_at": repr(self.updated_at or 0.0)}

    @classmethod
    def from_fields(cls, stored: Mapping[str, str], seen_at: float) -> LivePrice:
        """Read the hash, or raise InvalidPrice. `seen_at` stands in for the time that a foreign writer leaves out."""
        amounts = {name: _amount(name, stored[name]) for name in PRICE_FIELDS if stored.get(name)}
        try:
            price = Price(**amounts)
        except TypeError as error:
            raise InvalidPrice("a price needs both input_cost_per_token and output_cost_per_token") from error
        try:
            updated_at = _time(float(stored.get("updated_at") or seen_at))
        except (ValueError, InvalidRecord):
            updated_at = seen_at
        return cls(price, stored.get("source") or "external", updated_at)


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile and the fingerprint of the model that it was measured on."""

    fingerprint: str
    profile: Profile
    job: str | None = None
    """The job that measured it. None: it was handed over."""

    def to_json(self) -> str:
        stored = {"fingerprint": self.fingerprint, "profile": self.profile.to_json(), "job": self.job}
        return json.dumps(stored)

    @classmethod
    def from_json(cls, text: str) -> StoredProfile:
        stored = _object(text)
        fingerprint, profile, job = stored.get("fingerprint"), stored.get("profile"), stored.get("job")
        if not isinstance(fingerprint, str) or not isinstance(profile, dict) or not isinstance(job, str | None):
            raise InvalidRecord("a stored profile needs `fingerprint` and `profile`, and `job` as an id or null")
        return cls(fingerprint, Profile.from_json(profile), job)


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A client key as it is stored: its digest, never the key."""

    id: str
    name: str
    digest: str
    """SHA-256, hexadecimal."""
    created_at: float
    models: tuple[str, ...] | None = None
    """The models this key may use; None: all."""
    revoked: bool = False
    limits: KeyLimits = NO_LIMITS

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, key_id: str, text: str) -> ClientKey:
        stored = _object(text)
        models, revoked, digest = stored.get("models"), stored.get("revoked", False), stored.get("digest")
        if not isinstance(digest, str) or not isinstance(revoked, bool):
            raise InvalidRecord("a key needs its digest, and `revoked` as true or false")
        if not (models is None or (isinstance(models, list) and all(isinstance(name, str) for name in models))):
            raise InvalidRecord("a key's models must be a list of names or null")
        allowed = None if models is None else tuple(models)
        created_at, limits = _time(stored.get("created_at")), _limits(stored.get("limits"))
        return cls(key_id, str(stored.get("name", "")), digest, created_at, allowed, revoked, limits)


def _object(text: str) -> dict[str, Any]:
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise InvalidRecord(f"must be a JSON object; got {type(stored).__name__}")
    return stored


def _limits(stored: object) -> KeyLimits:
    try:
        return NO_LIMITS if stored is None else KeyLimits(**stored)  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidRecord(f"a key's limits cannot be read: {error}") from error


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise InvalidRecord(f"a time must be Unix seconds; got {value!r}")
    return float(value)


def _amount(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidPrice(f"{name} must be a number of USD per token; got {text!r}") from error
