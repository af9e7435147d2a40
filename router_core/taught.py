"""What clusters that known models have taught have in common. The kinds: response.py, learned_map.py."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol

from numpy.typing import NDArray

from router_core.types import Assignment, Doubles, Floats


class TaughtClusters(Protocol):
    """K clusters of prompts, read off the embedding. A dataclass of arrays and `top`."""

    @property
    def top(self) -> int:
        """How many clusters share a prompt."""

    @property
    def size(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def assign(self, vectors: Floats) -> Assignment:
        """The `top` clusters of each row of `vectors`, (n, d)."""

    def likeness(self) -> Doubles:
        """(K, K) how alike two clusters are before anything is measured, 1 on the diagonal."""


def array_names(kind: type[Any]) -> tuple[str, ...]:
    """The fields of a kind that are arrays."""
    return tuple(field.name for field in fields(kind) if field.name != "top")


def arrays_of(clusters: TaughtClusters) -> dict[str, NDArray[Any]]:
    return {name: getattr(clusters, name) for name in array_names(type(clusters))}
