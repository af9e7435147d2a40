"""Where counters and gauges keep their numbers: in this process, or in memory that its workers share.

Workers write 64-bit floats to files in shared memory, one file each, and whoever is scraped adds them up: what a worker
has counted outlives it. A worker that is started takes over the files of one that has died, and counts on.

    FOLDER/0.index   a line of JSON for each series: [kind, metric, labels, first cell, cells, began at]
    FOLDER/0.values  the cells, in segments of SEGMENT_BYTES
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, Union

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.server.log_handler import lines_dropped
from proxy.upstream.health import HealthRegistry

log = logging.getLogger("uniroute.metrics")

SEGMENT_BYTES = 2**16

SEGMENT_CELLS = SEGMENT_BYTES // 8

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  a folder of our own is made in it

PREFIX = "uniroute-metrics-"

YOUNG_S = 60.0

Labels = tuple[str, ...]

Kind = Literal["counter", "gauge"]

Segment = Union["memoryview[float]", list[float]]

Cells = tuple[Segment, int]
"""Where the first of a series' cells is."""


@dataclass(frozen=True)
class Series:
    kind: Kind
    began: float
    """Unix seconds."""
    cells: Cells
    count: int

    @property
    def numbers(self) -> list[float]:
        segment, at = self.cells
        return list(segment[at : at + self.count])

    def set(self, number: float) -> None:
        segment, at = self.cells
        for cell in range(at, at + self.count):
            segment[cell] = number


class Values:
    """Of this process alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._segments: list[Segment] = []
        self._free = 0
        self._series: dict[str, dict[Labels, Series]] = {}

    def series(self, kind: Kind, metric: str, labels: Labels, count: int = 1) -> Cells:
        """The cells of a series, made where it is new: zeros."""
        found = self._series.setdefault(metric, {}).get(labels)
        if found is None:
            first = self._reserved(count)
            found = Series(kind, self._clock(), self._cells(first), count)
            self._keep(metric, labels, first, found)
            self._series[metric][labels] = found
        return found.cells

    def read(self, metric: str) -> Iterator[Mapping[Labels, Series]]:
        """Of each process that counts: a gauge of those alone that live, a counter of all."""
        yield self._series.get(metric, {})

    def refresh(self) -> None:
        """Find out what others have: once, before several metrics are read."""

    def _reserved(self, count: int) -> int:
        """The first of so many cells, which no segment's end parts."""
        if self._free % SEGMENT_CELLS + count > SEGMENT_CELLS:
            self._free += SEGMENT_CELLS - self._free % SEGMENT_CELLS
        first, self._free = self._free, self._free + count
        while len(self._segments) * SEGMENT_CELLS < self._free:
            self._segments.append(self._new_segment())
        return first

    def _cells(self, first: int) -> Cells:
        return self._segments[first // SEGMENT_CELLS], first % SEGMENT_CELLS

    def _new_segment(self) -> Segment:
        return [0.0] * SEGMENT_CELLS  # which is written faster than bytes are

    def _keep(self, metric: str, labels: Labels, first: int, series: Series) -> None:
        """Where others find it."""


class SharedValues(Values):
    """Of a worker, in a folder where others read them."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises OSError."""
        super().__init__(clock)
        self._folder = folder
        self._others: dict[Path, _Others] = {}
        self._require_active: set[Path] = set()
        self._path, self._index = _taken(folder)
        self._values = os.open(self._path.with_suffix(".values"), os.O_RDWR | os.O_CREAT, 0o600)
        self._take_over()

    def read(self, metric: str) -> Iterator[Mapping[Labels, Series]]:
        yield from super().read(metric)
        for path, others in self._others.items():
            found = others.series.get(metric, {})
            alive = path in self._require_active
            yield {labels: series for labels, series in found.items() if alive or series.kind == "counter"}

    def refresh(self) -> None:
        for path in self._folder.glob("*.index"):
            if path != self._path:
                self._others.setdefault(path, _Others(path)).refresh()
        self._require_active = {path for path in self._others if _is_held(path)}

    def _take_over(self) -> None:
        left = _Others(self._path)
        left.refresh()
        os.ftruncate(self._index, left.read_bytes)  # a line that was not written whole
        for _ in range(os.fstat(self._values).st_size // SEGMENT_BYTES):
            self._segments.append(self._mapped(len(self._segments)))
        for metric, found in left.series.items():
            for labels, series in found.items():
                first = left.firsts[metric, labels]
                ours = Series(series.kind, series.began, self._cells(first), series.count)
                self._series.setdefault(metric, {})[labels] = ours
                self._free = max(self._free, first + series.count)
                if ours.kind == "gauge":  # of a process that is no more; not a number: nothing is known yet
                    ours.set(math.nan)

    def _new_segment(self) -> Segment:
        """Of this process alone where there is no more room: the file is full, or its folder gone."""
        number = len(self._segments)
        try:
            # zeros, not a hole: a page for which there is no room would end the process when it is written to
            os.pwrite(self._values, bytes(SEGMENT_BYTES), number * SEGMENT_BYTES)
            return self._mapped(number)
        except OSError as error:
            log.warning("further metrics of this worker are seen by itself alone: %s", error)
            return super()._new_segment()

    def _mapped(self, number: int) -> Segment:
        return memoryview(mmap.mmap(self._values, SEGMENT_BYTES, offset=number * SEGMENT_BYTES)).cast("d")

    def _keep(self, metric: str, labels: Labels, first: int, series: Series) -> None:
        line = json.dumps([series.kind, metric, labels, first, series.count, series.began])
        try:
            os.write(self._index, f"{line}\n".encode())
        except OSError as error:
            log.warning("a series of %s is seen by this worker alone: %s", metric, error)


class _Others:
    """What another process writes, or has left: read on from where it was read to last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._segments: list[Segment] = []
        self.read_bytes = 0
        self.series: dict[str, dict[Labels, Series]] = {}
        self.firsts: dict[tuple[str, Labels], int] = {}

    def refresh(self) -> None:
        with self._path.open("rb") as index:
            index.seek(self.read_bytes)
            new = index.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.splitlines():
            kind, metric, labels, first, count, began = json.loads(line)
            known = Series(kind, began, self._cells(first), count)
            self.series.setdefault(metric, {})[tuple(labels)] = known
            self.firsts[metric, tuple(labels)] = first

    def _cells(self, first: int) -> Cells:
        number = first // SEGMENT_CELLS
        if number >= len(self._segments):
            with self._path.with_suffix(".values").open("rb") as values:
                for missing in range(len(self._segments), number + 1):
                    offset = missing * SEGMENT_BYTES
                    mapped = mmap.mmap(values.fileno(), SEGMENT_BYTES, offset=offset, access=mmap.ACCESS_READ)
                    self._segments.append(memoryview(mapped).cast("d"))
        return self._segments[number], first % SEGMENT_CELLS


@contextmanager
def shared_folder() -> Iterator[Path | None]:
    """A folder for the numbers of several workers. None where there cannot be one: each then counts for itself."""
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for left in base.glob(f"{PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        log.warning("/metrics of each worker shows what it has counted itself: %s", error)
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Left by a supervisor that was killed, and none that is about to take its first file."""
    try:
        found = folder.stat()
    except OSError:
        return False
    ours, old = found.st_uid == os.getuid(), time.time() - found.st_mtime > YOUNG_S
    return ours and old and not any(_is_held(path) for path in folder.glob("*.index"))


def open_values(folder: Path | None) -> Values:
    """Those of a worker whose supervisor has made `folder`, else of a process that is alone."""
    if folder is not None:
        try:
            return SharedValues(folder)
        except OSError as error:
            log.warning("the metrics of this worker are seen by itself alone: %s", error)
    return Values()


def _taken(folder: Path) -> tuple[Path, int]:
    """The first index that no living process holds, held from now on."""
    number = 0
    while True:
        path = folder / f"{number}.index"
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            number += 1
        else:
            return path, file


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# Counters, histograms and gauges that one event loop writes, and any thread reads. No lock, and no check of labels.
#
# They are exposed just as those of prometheus_client, which take three to ten times as long to be written: a lookup of
# the child under a lock, a lock for each value, and a walk over the buckets. What is exposed is the sum over all
# processes that share their Values.

_written: Callable[[float], str] = floatToGoString


@dataclass
class Total:
    """Of one series, over all processes."""

    numbers: list[float]
    began: float


class FastCounter(Collector):
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

    counter: FastCounter
    values: Labels

    def inc(self, amount: float = 1) -> None:
        self.counter.add(self.values, amount)


class FastHistogram(Collector):
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


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_OVERHEAD = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One registry per app, so that two apps in a process do not share counts. Workers share `values`."""

    def __init__(self, values: Values | None = None) -> None:
        self.registry = CollectorRegistry()
        self.values = values or Values()
        self._looking: list[Callable[[], None]] = []
        self.requests = self._counter("requests", "Requests by who answered, why and how it ended", "reason", "ending")
        self.attempts_failed = self._counter("upstream_failures", "Upstream attempts that failed", "status")
        self.tokens = self._counter("tokens", "Tokens that upstreams reported", "kind")
        self.cost = self._counter("cost_usd", "Cost at the live price")
        self.degraded = self._total("degraded", "Requests routed without looking at the prompt")
        self.usage_dropped = self._total("usage_dropped", "Usage records dropped: neither Redis nor the disk took them")
        self.usage_journal = self._gauge("usage_journal_bytes", "Usage journals on disk")
        self.conversations_moved = self._total(
            "conversations_moved", "Tool loops and reasoning that had to leave the model that produced them"
        )
        self.conversations_missed = self._total("conversations_missed", "Conversations that Redis could not recall")
        self.conversations_dropped = self._total(
            "conversations_dropped", "Conversations forgotten while Redis was away"
        )
        self.limited = self._total("limited", "Requests refused by a limit of their key", "limit")
        self.limits_unchecked = self._total(
            "limits_unchecked", "Requests of limited keys while Redis did not answer: local, refused or open", "outcome"
        )
        self.errors = self._total("errors", "Responses that were errors, by status", "status")
        self.in_flight = 0
        self._in_flight = self._gauge("in_flight", "Chat requests being served")
        self.tasks = self._gauge("tasks", "asyncio tasks")
        self.state_version = self._gauge(
            "state_version", "Version of the routing state in use; of several workers the oldest", combine=min
        )
        self.store_available = self._gauge(
            "store_available", "1 while the store answers; of several workers, each of them", combine=min
        )
        self.overhead = self._histogram(
            "overhead_seconds", "From the request's arrival to the upstream call", _OVERHEAD
        )
        self.first_token = self._histogram("time_to_first_chunk_seconds", "Until the first content", _SECONDS, "model")
        self.seconds = self._histogram("request_seconds", "Until the end", _SECONDS, "model")
        self._lines_dropped = self._total("log_lines_dropped", "Log lines dropped: nobody read standard error")
        self._lines_told = 0
        self.registry.register(worker_deaths(self.values))
        self.look_at(self._look)

    def look_at(self, look: Callable[[], None]) -> None:
        """Have `look` write down what is only known by looking: before each scrape, and now and then for others'."""
        self._looking.append(look)

    def look(self) -> None:
        for look in self._looking:
            look()

    def expose(self) -> bytes:
        self.look()
        self.values.refresh()
        return generate_latest(self.registry)

    def _look(self) -> None:
        self._in_flight.set(self.in_flight)
        dropped = lines_dropped()
        self._lines_dropped.inc(max(0, dropped - self._lines_told))
        self._lines_told = dropped

    def _total(self, name: str, text: str, *labels: str) -> FastCounter:
        counter = FastCounter(f"uniroute_{name}", text, labels, values=self.values)
        self.registry.register(counter)
        return counter

    def _counter(self, name: str, text: str, *labels: str) -> FastCounter:
        """Of a model, first of all; written with every request."""
        return self._total(name, text, "model", *labels)

    def _gauge(self, name: str, text: str, combine: Callable[[Iterable[float]], float] = sum) -> Level:
        gauge = Level(f"uniroute_{name}", text, combine=combine, values=self.values)
        self.registry.register(gauge)
        return gauge

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> FastHistogram:
        histogram = FastHistogram(f"uniroute_{name}", text, labels, buckets, values=self.values)
        self.registry.register(histogram)
        return histogram


def worker_deaths(values: Values) -> FastCounter:
    """Counted by the supervisor, shown by the workers."""
    text = "Worker processes that died and were started again, by signal, status, or that they gave no sign of life"
    return FastCounter("uniroute_worker_deaths", text, ["cause"], values=values)


class HealthCollector(Collector):
    """Labels are registered models alone, so that the series of a removed one are gone."""

    def __init__(
        self, health: HealthRegistry, known: Callable[[], Collection[str]], values: Values | None = None
    ) -> None:
        """`values`: those that workers share."""
        values = values or Values()
        self._health = health
        self._known = known
        self._resting = Level(
            "uniroute_model_resting",
            "1 while the model is not asked; of several workers, by any of them",
            ["model"],
            combine=max,
            values=values,
        )
        self._opened = FastCounter(
            "uniroute_breaker_opened", "Times that a process found a model failing", ["model"], values=values
        )
        self._counted: dict[str, int] = {}

    def look(self) -> None:
        resting, opened = self._health.cooling_down(), self._health.open_counts()
        for model in self._known():
            self._resting.set(float(model in resting), (model,))
            more = opened.get(model, 0) - self._counted.get(model, 0)
            if more > 0:
                self._opened.add((model,), more)
        self._counted = opened

    def collect(self) -> Iterator[Metric]:
        self.look()
        known = sorted(self._known())
        yield self._resting.family(known)
        yield self._opened.family(known)
