"""Names of models in an order, each looked up when somebody asks for it: most requests ask for one of a thousand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import overload

from router_core.types import Indices


class Names(Sequence[str]):
    """A tuple of names that is not there yet. It equals that tuple."""

    @cached_property
    def whole(self) -> tuple[str, ...]:
        return self._made()

    @abstractmethod
    def _made(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _one(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        return self.whole[place] if isinstance(place, slice) else self._one(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __contains__(self, name: object) -> bool:
        return name in self.whole

    def __eq__(self, other: object) -> bool:
        return self.whole == tuple(other) if isinstance(other, tuple | Names) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.whole)

    def __repr__(self) -> str:
        return repr(self.whole)


class NamesOfRows(Names):
    """Those of `rows`, in their order."""

    def __init__(self, names: tuple[str, ...], rows: Indices) -> None:
        self._names = names
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _one(self, place: int) -> str:
        return self._names[int(self._rows[place])]

    def _made(self) -> tuple[str, ...]:
        return tuple(map(self._names.__getitem__, self._rows.tolist()))


class Ranking(Names):
    """The first is known; the others are put in order when one of them is wanted."""

    def __init__(self, first: str, length: int, ordered: Callable[[], tuple[str, ...]]) -> None:
        self._first = first
        self._length = length
        self._ordered = ordered

    def __len__(self) -> int:
        return self._length

    def _one(self, place: int) -> str:
        return self._first if place == 0 else self.whole[place]

    def __iter__(self) -> Iterator[str]:
        yield self._first
        if self._length > 1:
            yield from self.whole[1:]

    def _made(self) -> tuple[str, ...]:
        return self._ordered()
