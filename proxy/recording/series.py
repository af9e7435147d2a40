"""Counters, histograms and gauges that one event loop writes, and any thread reads. No lock, and no check of labels.

They are exposed just as those of prometheus_client, which take three to ten times as long to be written: a lookup of
the child under a lock, a lock for each value, and a walk over the buckets. What is exposed is the sum over all
processes that share their Values.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.recording.values import Cells, Labels, Series, Values

_written: Callable[[float], str] = floatToGoString


@dataclass
class Total:
    """Of one series, over all processes."""

    numbers: list[float]
    began: float


class Counted(Collector):
    """A counter: `add` what is not negative. Without labels it is there at once."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        values: Values | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._family = (name, text, tuple(labels))
        self._values = values or Values(clock)
        self._cells: dict[Labels, Cells] = {}
        if not labels:
            self._cell(())

    def add(self, labels: Labels, amount: float = 1) -> None:
        cells, at = self._cells.get(labels) or self._cell(labels)
        cells[at] += amount

    def inc(self, amount: float = 1) -> None:
        """As prometheus_client's, where there are no labels."""
        self.add((), amount)

    def labels(self, *labels: str) -> Child:
        """As prometheus_client's: to be incremented."""
        return Child(self, labels)

    def collect(self) -> Iterator[Metric]:
        yield self.family()

    def family(self, known: Collection[str] | None = None) -> CounterMetricFamily:
        """`known`: of the first label, the values to show, also those that were never counted."""
        name, text, labels = self._family
        family = CounterMetricFamily(name, text, labels=labels)
        for value in known or ():
            self._cells.get((value,)) or self._cell((value,))
        for values, total in _totals(self._values.read(name)).items():
            if known is None or values[0] in known:
                family.add_metric(values, total.numbers[0], created=None if known else total.began)
        return family

    def _cell(self, labels: Labels) -> Cells:
        cells = self._cells[labels] = self._values.series("counter", self._family[0], labels)
        return cells


@dataclass(frozen=True)
class Child:
    """A counter with its labels."""

    counter: Counted
    values: Labels

    def inc(self, amount: float = 1) -> None:
        self.counter.add(self.values, amount)


class Distribution(Collector):
    """A histogram. `bounds` ascend; the last bucket, without a bound, is added. Without labels it is there at once."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        *,
        values: Values | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._family = (name, text, tuple(labels))
        self._bounds = tuple(map(float, bounds))
        self._buckets = len(self._bounds) + 1
        self._values = values or Values(clock)
        self._cells: dict[Labels, Cells] = {}
        """The buckets, each without those below it, and then the sum."""
        if not labels:
            self._cell(())

    def observe(self, amount: float, labels: Labels = ()) -> None:
        cells, at = self._cells.get(labels) or self._cell(labels)
        cells[at + bisect_left(self._bounds, amount)] += 1
        cells[at + self._buckets] += amount

    def collect(self) -> Iterator[Metric]:
        name, text, labels = self._family
        family = HistogramMetricFamily(name, text, labels=labels)
        bounds = [_written(bound) for bound in (*self._bounds, float("inf"))]
        for values, total in _totals(self._values.read(name)).items():
            *counts, amount = total.numbers
            family.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), sum_value=amount)
            family.add_sample(f"{name}_created", dict(zip(labels, values, strict=True)), total.began)
        yield family

    def _cell(self, labels: Labels) -> Cells:
        cells = self._cells[labels] = self._values.series("counter", self._family[0], labels, self._buckets + 1)
        return cells


class Level(Collector):
    """A gauge. `combine` makes one number of those of all living processes."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        combine: Callable[[Iterable[float]], float] = sum,
        values: Values | None = None,
    ) -> None:
        self._family = (name, text, tuple(labels))
        self._combine = combine
        self._values = values or Values()
        if not labels:
            self.set(0)

    def set(self, number: float, labels: Labels = ()) -> None:
        cells, at = self._values.series("gauge", self._family[0], labels)
        cells[at] = number

    def collect(self) -> Iterator[Metric]:
        yield self.family()

    def family(self, known: Collection[str] | None = None) -> GaugeMetricFamily:
        """`known`: of the first label, the values to show."""
        name, text, labels = self._family
        found: dict[Labels, list[float]] = {}
        for process in self._values.read(name):
            for values, series in process.items():
                found.setdefault(values, []).extend(n for n in series.numbers if not math.isnan(n))
        family = GaugeMetricFamily(name, text, labels=labels)
        for values, numbers in found.items():
            if numbers and (known is None or values[0] in known):
                family.add_metric(values, self._combine(numbers))
        return family


def _totals(processes: Iterable[Mapping[Labels, Series]]) -> dict[Labels, Total]:
    totals: dict[Labels, Total] = {}
    for process in processes:
        for labels, series in list(process.items()):
            total = totals.get(labels)
            if total is None:
                totals[labels] = Total(series.numbers, series.began)
            else:
                total.numbers = [one + other for one, other in zip(total.numbers, series.numbers, strict=True)]
                total.began = min(total.began, series.began)
    return totals
