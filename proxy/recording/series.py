"""Counters and histograms that one event loop writes, and any thread reads. No lock, and no check of labels.

They are exposed just as those of prometheus_client, which take three to ten times as long to be written: a lookup of
the child under a lock, a lock for each value, and a walk over the buckets.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


_written: Callable[[float], str] = floatToGoString


class Counted(Collector):
    """A counter: `add` what is not negative."""

    def __init__(self, name: str, text: str, labels: Sequence[str], *, clock: Callable[[], float] = time.time) -> None:
        self._family = (name, text, tuple(labels))
        self._clock = clock
        self._sums: dict[Labels, float] = {}
        self._created: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        before = self._sums.get(labels)
        if before is None:
            before, self._created[labels] = 0, self._clock()
        self._sums[labels] = before + amount

    def collect(self) -> Iterator[Metric]:
        name, text, labels = self._family
        family = CounterMetricFamily(name, text, labels=labels)
        for values, amount in list(self._sums.items()):
            family.add_metric(values, amount, created=self._created[values])
        yield family


class Distribution(Collector):
    """A histogram. `bounds` ascend; the last bucket, without a bound, is added. Without labels it is there at once."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._family = (name, text, tuple(labels))
        self._bounds = tuple(map(float, bounds))
        self._clock = clock
        self._children: dict[Labels, _Child] = {}
        if not labels:
            self._child(())

    def observe(self, amount: float, labels: Labels = ()) -> None:
        child = self._children.get(labels) or self._child(labels)
        child.counts[bisect_left(self._bounds, amount)] += 1
        child.sum += amount

    def collect(self) -> Iterator[Metric]:
        name, text, labels = self._family
        family = HistogramMetricFamily(name, text, labels=labels)
        bounds = [_written(bound) for bound in (*self._bounds, float("inf"))]
        for values, child in list(self._children.items()):
            family.add_metric(values, list(zip(bounds, accumulate(child.counts), strict=True)), sum_value=child.sum)
            family.add_sample(f"{name}_created", dict(zip(labels, values, strict=True)), child.created)
        yield family

    def _child(self, labels: Labels) -> _Child:
        child = self._children[labels] = _Child(len(self._bounds) + 1, self._clock())
        return child


class _Child:
    __slots__ = ("counts", "created", "sum")

    def __init__(self, buckets: int, created: float) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0
        self.created = created
