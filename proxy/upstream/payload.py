"""One JSON object that an upstream said, parsed and as it was written. Changes its `model` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from proxy.relay.sse import dump, loads
from proxy.upstream.model_member import with_model


@dataclass(slots=True)
class Payload:
    """A whole completion, or one chunk of a stream."""

    body: dict[str, Any]
    raw: bytes | None = None
    """As the upstream wrote it. None: no upstream wrote this, or not in a way that every client could read."""

    def named(self, model: str) -> bytes:
        """As JSON, under our name for the model: the upstream's own bytes but for the value of `model`."""
        if self.raw is not None:
            renamed = with_model(self.raw, self.body, model)
            if renamed is not None:
                return renamed
        return dump({**self._exact(), "model": model})

    def without(self, name: str) -> Payload:
        """All but this member."""
        return Payload({each: value for each, value in self._exact().items() if each != name})

    def _exact(self) -> dict[str, Any]:
        return self.body if self.raw is None else exactly(self.raw, self.body)


def parsed(data: bytes) -> tuple[Any, bytes | None]:
    """JSON, and its bytes where they may be shown as they are: not where they hold NaN, which is no JSON.

    Raises:
        ValueError: it is not JSON at all, or nested beyond the stack.
    """
    try:
        return orjson.loads(data), data
    except orjson.JSONDecodeError:  # also of half characters and NaN, which models do send
        return loads(data), None


def exact(data: bytes) -> tuple[Any, None]:
    """As `parsed`, every number as it was written, for what is to be written again. Raises ValueError."""
    return loads(data), None


def exactly(data: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """What is to be written again. orjson, which made `body` of it, rounds whole numbers beyond 64 bits."""
    try:
        read: dict[str, Any] = loads(data)
    except ValueError:  # nested deeper than this parser follows
        return body
    return read
