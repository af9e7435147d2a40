"""What administrators set while the server runs: the default λ, and pauses of models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Self

from proxy.storage.client_keys import MAX_LAMBDA
from proxy.storage.records import InvalidRecord, json_object, number, unix_time
from router_core.text import rfc3339

# Field of the hash of settings.
LAMBDA: Final = "lambda"


@dataclass(frozen=True, slots=True)
class Pause:
    """Since when a model is left out of traffic, and by whom."""

    at: float
    """Unix seconds."""
    who: str | None = None
    """The id of an actor."""

    @property
    def since(self) -> str:
        return rfc3339(self.at)

    def to_json(self) -> str:
        return json.dumps({"at": self.at, "who": self.who})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse what is stored, or raise InvalidRecord."""
        return cls(*_when_and_who(json_object(text)))


def why_paused(name: str) -> str:
    """Say that a model is paused, and what lets it go on."""
    return f'paused; PATCH /admin/models/{name} with {{"paused": false}} lets it go on'


@dataclass(frozen=True, slots=True)
class LambdaOverride:
    """A default λ in place of the configuration's."""

    value: float
    at: float
    """Unix seconds."""
    who: str | None = None
    """The id of an actor."""

    @property
    def since(self) -> str:
        return rfc3339(self.at)

    def to_json(self) -> str:
        return json.dumps({"value": self.value, "at": self.at, "who": self.who})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse what is stored, or raise InvalidRecord."""
        stored = json_object(text)
        value = number(stored.get("value"), MAX_LAMBDA)
        if value is None:
            raise InvalidRecord(f"λ must be a number from 0 to {MAX_LAMBDA:g}")
        return cls(value, *_when_and_who(stored))


def _when_and_who(stored: dict[str, Any]) -> tuple[float, str | None]:
    at, who = unix_time(stored.get("at")), stored.get("who")
    if not isinstance(who, str | None):
        raise InvalidRecord("who set it must be an id or null")
    return at, who
