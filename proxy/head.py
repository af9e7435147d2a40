"""The headers of one request, looked up by name. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.types import Scope

HEAD = "uniroute.head"


class Headers(Protocol):
    """Starlette's, or ours, which costs less."""

    def getlist(self, key: str, /) -> list[str]:
        """Every value, in order."""


class Head:
    """Names are in lower case, as ASGI has them."""

    __slots__ = ("_by_name", "_raw", "_repeats")

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = raw
        self._by_name = dict(raw)
        self._repeats = len(self._by_name) != len(raw)

    def getlist(self, key: str, /) -> list[str]:
        name = key.encode()
        if self._repeats:
            return [value.decode("latin-1") for other, value in self._raw if other == name]
        value = self._by_name.get(name)
        return [] if value is None else [value.decode("latin-1")]

    def pairs(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Those of `names` that were sent, repeated ones repeated."""
        return [(name, value) for name in names if name.encode() in self._by_name for value in self.getlist(name)]


def head_of(scope: Scope) -> Head:
    """Put together once per request."""
    head: Head | None = scope.get(HEAD)
    if head is None:
        head = scope[HEAD] = Head(scope["headers"])
    return head
