"""One JSON object that an upstream said, parsed and as it was written. Changes its `model` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from proxy.relay.sse import dump, loads


@dataclass(slots=True)
class Payload:
    """A whole completion, or one chunk of a stream."""

    body: dict[str, Any]
    raw: bytes | None = None
    """As the upstream wrote it. None: no upstream wrote this, or not in a way that every client could read."""

    def named(self, model: str) -> bytes:
        """As JSON, under our name for the model: the upstream's own bytes but for the value of `model`."""
        if self.raw is not None:
            renamed = with_model(self.raw, self.body.get("model"), model)
            if renamed is not None:
                return renamed
        return dump({**self.body, "model": model})


def parsed(data: bytes) -> tuple[Any, bytes | None]:
    """JSON, and its bytes where they may be shown as they are: not where they hold NaN, which is no JSON.

    Raises:
        ValueError: it is not JSON at all, or nested beyond the stack.
    """
    try:
        return orjson.loads(data), data
    except orjson.JSONDecodeError:  # also of half characters and NaN, which models do send
        return loads(data), None


def with_model(raw: bytes, stated: Any, model: str) -> bytes | None:
    """`raw` with another value of its outermost `model`, which is `stated`; None where that cannot be seen at once.

    No object begins in front of the place that is changed, but the outermost: so it is of this one.
    """
    if not isinstance(stated, str):
        return None
    for written in _written(stated):
        place = raw.find(written)
        if place > 0 and raw.find(b"{", 1, place) < 0:
            return raw[:place] + _member(model) + raw[place + len(written) :]
    return None


@lru_cache(maxsize=1024)
def _written(model: str) -> tuple[bytes, ...]:
    """The member as the usual encoders write it."""
    value = orjson.dumps(model)
    return (b'"model":' + value, b'"model": ' + value)


@lru_cache(maxsize=1024)
def _member(model: str) -> bytes:
    return b'"model":' + orjson.dumps(model)
