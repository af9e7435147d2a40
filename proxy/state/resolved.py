"""Who serves a model and in whose format, as the provider layer said once. Asks nobody, holds no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.state.stored_json import InvalidRecord

Way = Literal["relay", "translate"]


@dataclass(frozen=True)
class Resolved:
    """What litellm makes of a model's name and address."""

    way: Way
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
    def from_json(cls, stored: Any) -> Resolved:
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
