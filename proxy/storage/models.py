from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from proxy.settings.litellm_params import is_provider_param, stated_address
from proxy.settings.models import ModelConfig, ModelInfo
from proxy.storage.redis import LAST_TIME, InvalidRecord, json_object, number, unix_time
from router_core.errors import InvalidPrice
from router_core.profiles import Profile
from router_core.types import Price, price_field

ForwardMode = Literal["relay", "translate"]


@dataclass(frozen=True)
class ResolvedProvider:
    """What litellm makes of a model's name and address."""

    way: ForwardMode
    """relay: it reads OpenAI's own format at `api_base`. translate: through litellm, in its provider's format."""
    model: str
    """The provider's own name for it."""
    provider: str
    api_base: str | None = None
    """Without a path to chat completions. None where litellm alone knows."""
    key_variable: str | None = None
    """Where a key is looked up that the model's parameters do not state."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Fields of OpenAI's that this provider knows under another name."""
    own_address: bool = False
    """Whether it is reached at its provider's own address: a key of the environment may go there alone."""

    def to_json(self) -> dict[str, Any]:
        stated = {"way": self.way, "model": self.model, "provider": self.provider, "api_base": self.api_base}
        more = {"renames": dict(self.renames), "own_address": self.own_address}
        return {**stated, "key_variable": self.key_variable, **more}

    @classmethod
    def from_json(cls, stored: Any) -> ResolvedProvider:
        """Raises InvalidRecord."""
        if not isinstance(stored, dict) or stored.get("way") not in ("relay", "translate"):
            raise InvalidRecord("not what a provider was resolved to")
        texts = {name: stored.get(name) for name in ("model", "provider", "api_base", "key_variable")}
        renames = stored.get("renames") or {}
        if not all(isinstance(value, str | None) for value in texts.values()) or not isinstance(renames, dict):
            raise InvalidRecord("not what a provider was resolved to")
        if stored["way"] == "relay" and not texts["api_base"]:
            raise InvalidRecord("a model that is relayed needs an address")
        return cls(
            way=stored["way"],
            model=texts["model"] or "",
            provider=texts["provider"] or "",
            api_base=texts["api_base"],
            key_variable=texts["key_variable"],
            renames={str(old): str(new) for old, new in renames.items()},
            own_address=stored.get("own_address") is True,
        )


MAX_SOURCE_CHARS = 60


@dataclass(frozen=True)
class ModelRecord:
    """A registered model: how the provider layer reaches it and what was stated of it."""

    name: str
    litellm_params: Mapping[str, Any] = field(repr=False)
    info: ModelInfo
    source: Literal["config", "admin"]
    created_at: float
    """Unix seconds."""
    resolved: ResolvedProvider | None = None
    """Who serves it, once that was looked up."""

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what decides the answers, so not of the key. A profile measured under another one is not used."""
        deciding = {key: value for key, value in self.litellm_params.items() if key != "api_key"}
        text = json.dumps(deciding, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def address(self) -> str | None:
        """The address that was stated for it."""
        return stated_address(self.litellm_params)

    @cached_property
    def has_body_params(self) -> bool:
        """Whether it has parameters of its own that go into the body."""
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


@dataclass(frozen=True, slots=True)
class CurrentPrice:
    """A price, who stated it, and since when (Unix seconds; None where it came with the configuration or litellm)."""

    price: Price
    source: str
    """admin, external, sync, model_info or litellm."""
    updated_at: float | None = None

    def to_fields(self) -> dict[str, str]:
        stated = {key: repr(float(value)) for key, value in self.price.to_fields().items()}
        return {**stated, "source": self.source, "updated_at": repr(self.updated_at or 0.0)}

    @classmethod
    def from_fields(cls, stored: Mapping[str, str], seen_at: float) -> CurrentPrice:
        """Read the hash, or raise InvalidPrice. `seen_at` stands in for the time that a foreign writer leaves out."""
        price = Price.from_fields(
            {name: _amount(name, text) for name, text in stored.items() if text and price_field(name)}
        )
        updated_at = number(stored.get("updated_at"), LAST_TIME) or seen_at
        return cls(price, (stored.get("source") or "external")[:MAX_SOURCE_CHARS], updated_at)


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
        stored = json_object(text)
        fingerprint, profile, job = stored.get("fingerprint"), stored.get("profile"), stored.get("job")
        if not isinstance(fingerprint, str) or not isinstance(profile, dict) or not isinstance(job, str | None):
            raise InvalidRecord("a stored profile needs `fingerprint` and `profile`, and `job` as an id or null")
        return cls(fingerprint, Profile.from_json(profile), job)


def _amount(name: str, text: str) -> float:
    amount = number(text)
    if amount is None:
        raise InvalidPrice(f"{name} must be a number of USD per token, 0 or more; got {text[:60]!r}")
    return amount
