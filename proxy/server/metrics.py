"""Prometheus metrics whose numbers are kept in this process, or in memory that workers share.

Workers write 64-bit floats to files in shared memory, one file each, and the worker that is scraped adds them up: what
a worker has counted outlives it. A worker that is started takes over the files of one that has died, and counts on.

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
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.server.log_handler import lines_dropped

if TYPE_CHECKING:
    from proxy.storage.snapshot import RoutingSnapshot
    from proxy.upstream.concurrency_limit import ConcurrencyLimiter
    from proxy.upstream.health import HealthRegistry

log = logging.getLogger("uniroute.metrics")

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_QUEUE_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_OVERHEAD_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The metrics of one app, in a registry of its own. Workers share `values`."""

    def __init__(self, values: Values | None = None) -> None:
        self.registry = CollectorRegistry()
        self.values = values or Values()
        # All that /metrics shows.
        self.every: list[FastMetric] = []
        self._refresh_callbacks: list[Callable[[], None]] = []
        self.requests = self._counter("requests", "Requests by who answered, why and how it ended", "reason", "ending")
        self.requests_by_api = self._total("api_requests", "Requests by the API that the client speaks", "api")
        self.attempts = self._counter("upstream_attempts", "Upstream attempts")
        self.attempts_failed = self._counter("upstream_failures", "Upstream attempts that failed", "status")
        self.tokens = self._counter("tokens", "Tokens that upstreams reported", "kind")
        self.cost = self._counter("cost_usd", "Cost at the live price")
        self.baseline_cost = self._counter(
            "baseline_cost_usd", "What recorded answers would have cost without routing, where that is known"
        )
        self.compared_cost = self._counter(
            "compared_cost_usd", "What the requests of uniroute_baseline_cost_usd_total have cost"
        )
        self.novel_prompts = self._total("novel_prompts", "Routed prompts that are far from all clusters of the map")
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
        self.decisions_skipped = self._total(
            "decisions_skipped", "Decisions that were not recorded, since they came faster than max_decisions_per_s"
        )
        self.responses_dropped = self._total(
            "responses_dropped", "Responses that were not kept: too large, or Redis was away"
        )
        self.limited = self._total("limited", "Requests refused by a limit of their key", "limit")
        self.limits_unchecked = self._total(
            "limits_unchecked", "Requests of limited keys while Redis did not answer: local, refused or open", "outcome"
        )
        self.errors = self._total("errors", "Responses that were errors, by status", "status")
        self.feedback = self._total(
            "feedback", "Calls of POST /v1/feedback: counted, uncounted, withdrawn or refused", "outcome"
        )
        self.queue_seconds = self._histogram(
            "queue_seconds", "Waits for a slot of a model, of requests that had to wait", _QUEUE_BOUNDS, "model"
        )
        self.at_capacity = self._counter("at_capacity", "Times that a model was passed over: no slot, or none in time")
        self.default_lambda = self._gauge("lambda", "λ of requests that state none", combine=max)
        self.jobs_running = self._gauge("jobs_running", "Profiling jobs that run")
        self.otel_exports = self._total(
            "otel_exports", "Exports to the OpenTelemetry collector: sent, or failed", "signal", "outcome"
        )
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
            "overhead_seconds", "From the request's arrival to the upstream call", _OVERHEAD_BOUNDS
        )
        self.first_token = self._histogram("time_to_first_chunk_seconds", "Until the first content", _SECONDS, "model")
        self.seconds = self._histogram("request_seconds", "Until the end", _SECONDS, "model")
        self._lines_dropped = self._total("log_lines_dropped", "Log lines dropped: nobody read standard error")
        self._lines_reported = 0
        # What the supervisor has counted, who alone writes it.
        self.registry.register(worker_deaths(self.values))
        # Under the names of prometheus_client's own, which would show one of several workers.
        self._cpu = FastCounter("process_cpu_seconds", "CPU seconds, of all workers", values=self.values)
        self._memory = FastGauge("process_resident_memory_bytes", "Resident memory, of all workers", values=self.values)
        self._cpu_reported = 0.0
        build = FastGauge("uniroute_build_info", "1, with the version", ["version"], combine=max, values=self.values)
        build.set(1, (version("uniroute"),))
        for each in (self._cpu, self._memory, build):
            self._add(each)
        self.on_refresh(self._refresh_own)

    def register(self, collector: PartsCollector) -> None:
        """Show the metrics of a collector too."""
        self.registry.register(collector)
        self.every += collector.parts
        self.on_refresh(collector.refresh)

    def on_refresh(self, callback: Callable[[], None]) -> None:
        """Add a callback that sets gauges. It runs at each `refresh`."""
        self._refresh_callbacks.append(callback)

    def refresh(self) -> None:
        """Set the gauges: before each scrape, and now and then for the scrapes of other workers."""
        for callback in self._refresh_callbacks:
            callback()

    def expose(self) -> bytes:
        self.refresh()
        self.values.refresh()
        return generate_latest(self.registry)

    def _refresh_own(self) -> None:
        self._in_flight.set(self.in_flight)
        dropped = lines_dropped()
        self._lines_dropped.inc(max(0, dropped - self._lines_reported))
        self._lines_reported = dropped
        spent_s = time.process_time()
        self._cpu.inc(spent_s - self._cpu_reported)
        self._cpu_reported = spent_s
        self._memory.set(_resident_bytes())

    def _total(self, name: str, text: str, *labels: str) -> FastCounter:
        counter = FastCounter(f"uniroute_{name}", text, labels, values=self.values)
        self._add(counter)
        return counter

    def _counter(self, name: str, text: str, *labels: str) -> FastCounter:
        """Make a counter whose first label is the model."""
        return self._total(name, text, "model", *labels)

    def _gauge(self, name: str, text: str, combine: Callable[[Iterable[float]], float] = sum) -> FastGauge:
        gauge = FastGauge(f"uniroute_{name}", text, combine=combine, values=self.values)
        self._add(gauge)
        return gauge

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> FastHistogram:
        histogram = FastHistogram(f"uniroute_{name}", text, labels, buckets, values=self.values)
        self._add(histogram)
        return histogram

    def _add(self, metric: FastMetric) -> None:
        self.registry.register(metric)
        self.every.append(metric)


def _resident_bytes() -> float:
    """Return the resident memory of this process; not a number where the system does not say."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return math.nan


def worker_deaths(values: Values) -> FastCounter:
    """Make the counter that the supervisor writes and the workers show."""
    text = "Worker processes that died and were started again, by signal, status, or that they gave no sign of life"
    return FastCounter("uniroute_worker_deaths", text, ["cause"], values=values)


class PartsCollector(Collector):
    """Show several metrics of which something else knows the numbers."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[FastMetric]: ...

    @abstractmethod
    def refresh(self) -> None:
        """Set the numbers of this process."""


class HealthCollector(PartsCollector):
    """Show the health of registered models. The series of a removed one are gone."""

    def __init__(
        self, health: HealthRegistry, known: Callable[[], Collection[str]], values: Values | None = None
    ) -> None:
        """`values`: those that workers share."""
        values = values or Values()
        self._health = health
        self._known = known
        self._unavailable = FastGauge(
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

    @property
    def parts(self) -> Sequence[FastMetric]:
        return self._unavailable, self._opened

    def refresh(self) -> None:
        self._unavailable.keep(self._known())
        unavailable, opened = self._health.cooling_down(), self._health.open_counts()
        for model in self._known():
            self._unavailable.set(float(model in unavailable), (model,))
            more = opened.get(model, 0) - self._counted.get(model, 0)
            if more > 0:
                self._opened.add((model,), more)
        self._counted = opened

    def collect(self) -> Iterator[Metric]:
        self.refresh()
        known = sorted(self._known())
        yield self._unavailable.family(known)
        yield self._opened.family(known)


class ModelCollector(PartsCollector):
    """Show what is known of registered models, and how busy they are. The series of a removed one are gone."""

    def __init__(
        self, snapshot: Callable[[], RoutingSnapshot], limiter: ConcurrencyLimiter, values: Values | None = None
    ) -> None:
        """`values`: those that workers share."""
        values = values or Values()
        self._snapshot = snapshot
        self._limiter = limiter

        def gauge(name: str, text: str, combine: Callable[[Iterable[float]], float]) -> FastGauge:
            return FastGauge(f"uniroute_model_{name}", text, ["model"], combine=combine, values=values)

        self._gauges = {
            "ready": gauge("ready", "1 if the model has a profile and a price; of several workers, in all", min),
            "paused": gauge("paused", "1 while an administrator has paused the model; of several workers, in any", max),
            "error": gauge("mean_error", "Mean error that was measured on the validation prompts", max),
            "profile": gauge("profile_timestamp_seconds", "When the profile was measured, in Unix seconds", max),
            "price": gauge("price_timestamp_seconds", "When the price was written, in Unix seconds, if it was", max),
            "in_flight": gauge("in_flight", "Requests that the model is answering", sum),
            "queued": gauge("queued", "Requests that wait for a slot of the model", sum),
        }

    @property
    def parts(self) -> Sequence[FastMetric]:
        return tuple(self._gauges.values())

    def refresh(self) -> None:
        snapshot, loads = self._snapshot(), self._limiter.loads()
        for part in self._gauges.values():
            part.keep(snapshot.models)
        for name in snapshot.models:
            profile, price, labels = snapshot.profiles.get(name), snapshot.prices.get(name), (name,)
            in_flight, queued = loads.get(name, (0, 0))
            for gauge, number in (
                ("ready", float(snapshot.model_state(name) == "ready")),
                ("paused", float(name in snapshot.paused)),
                ("error", math.nan if profile is None else profile.mean_error),
                ("profile", math.nan if profile is None else _unix_seconds(profile.measured_at)),
                ("price", math.nan if price is None else price.updated_at or math.nan),
                ("in_flight", float(in_flight)),
                ("queued", float(queued)),
            ):
                self._gauges[gauge].set(number, labels)

    def collect(self) -> Iterator[Metric]:
        self.refresh()
        known = sorted(self._snapshot().models)
        for gauge in self._gauges.values():
            yield gauge.family(known)


def _unix_seconds(measured_at: str | None) -> float:
    try:
        return math.nan if measured_at is None else datetime.fromisoformat(measured_at).timestamp()
    except (ValueError, OverflowError):
        return math.nan


# The metrics below are written by one event loop and read by any thread, without locks and checks of labels. They are
# exposed just as those of prometheus_client, which take three to ten times as long to write: a lookup of the child
# under a lock, a lock for each value, and a walk over the buckets. What is exposed is the sum over all processes that
# share values.

_format_float: Callable[[float], str] = floatToGoString


@dataclass(frozen=True)
class Description:
    """What a metric is called. Its numbers are in the order of `labels`."""

    name: str
    text: str
    labels: Labels
    kind: Literal["counter", "gauge", "histogram"]
    bounds: tuple[float, ...] = ()


@dataclass
class Total:
    """The sum of one series over all processes."""

    numbers: list[float]
    began: float


class FastCounter(Collector):
    """Count what is added, which is never negative. Without labels, the series is there at once."""

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

    @property
    def description(self) -> Description:
        return Description(*self._family, "counter")

    def own(self) -> Mapping[Labels, Series]:
        """Return what this process has counted."""
        return self._values.own(self._family[0])

    def add(self, labels: Labels, amount: float = 1) -> None:
        cells, at = self._cells.get(labels) or self._cell(labels)
        cells[at] += amount

    def inc(self, amount: float = 1) -> None:
        """Increment a counter without labels, as prometheus_client's."""
        self.add((), amount)

    def labels(self, *labels: str) -> Child:
        """Return the counter with these labels, as prometheus_client's."""
        return Child(self, labels)

    def collect(self) -> Iterator[Metric]:
        yield self.family()

    def family(self, known: Collection[str] | None = None) -> CounterMetricFamily:
        """Return the metric. `known`: values of the first label to show alone, even if they were never counted."""
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
    """A counter with its labels, to be incremented."""

    counter: FastCounter
    values: Labels

    def inc(self, amount: float = 1) -> None:
        self.counter.add(self.values, amount)


class FastHistogram(Collector):
    """Count amounts in buckets with ascending bounds; the last bucket has none.

    Without labels, the series is there at once.
    """

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
        # The buckets, each without those below it, and then the sum.
        self._cells: dict[Labels, Cells] = {}
        if not labels:
            self._cell(())

    @property
    def description(self) -> Description:
        return Description(*self._family, "histogram", self._bounds)

    def own(self) -> Mapping[Labels, Series]:
        """Return what this process has counted."""
        return self._values.own(self._family[0])

    def observe(self, amount: float, labels: Labels = ()) -> None:
        cells, at = self._cells.get(labels) or self._cell(labels)
        cells[at + bisect_left(self._bounds, amount)] += 1
        cells[at + self._buckets] += amount

    def collect(self) -> Iterator[Metric]:
        name, text, labels = self._family
        family = HistogramMetricFamily(name, text, labels=labels)
        bounds = [_format_float(bound) for bound in (*self._bounds, float("inf"))]
        for values, total in _totals(self._values.read(name)).items():
            *counts, amount = total.numbers
            family.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), sum_value=amount)
            family.add_sample(f"{name}_created", dict(zip(labels, values, strict=True)), total.began)
        yield family

    def _cell(self, labels: Labels) -> Cells:
        cells = self._cells[labels] = self._values.series("counter", self._family[0], labels, self._buckets + 1)
        return cells


class FastGauge(Collector):
    """Hold a number. `combine` makes one of those of all living processes."""

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

    @property
    def description(self) -> Description:
        return Description(*self._family, "gauge")

    def own(self) -> Mapping[Labels, Series]:
        """Return the numbers of this process; not a number: nothing is known."""
        return self._values.own(self._family[0])

    def keep(self, known: Collection[str]) -> None:
        """Forget the numbers whose first label is not known any more."""
        for labels, series in self.own().items():
            if labels[0] not in known:
                series.set(math.nan)

    def set(self, number: float, labels: Labels = ()) -> None:
        cells, at = self._values.series("gauge", self._family[0], labels)
        cells[at] = number

    def collect(self) -> Iterator[Metric]:
        yield self.family()

    def family(self, known: Collection[str] | None = None) -> GaugeMetricFamily:
        """Return the metric. `known`: values of the first label to show alone."""
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


FastMetric = FastCounter | FastGauge | FastHistogram


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


SEGMENT_BYTES = 2**16

SEGMENT_CELLS = SEGMENT_BYTES // 8

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  a folder of our own is made in it

PREFIX = "uniroute-metrics-"

MIN_ABANDONED_S = 60.0

Labels = tuple[str, ...]

Kind = Literal["counter", "gauge"]

Segment = Union["memoryview[float]", list[float]]

# Where the first of a series' cells is.
Cells = tuple[Segment, int]


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
    """Keep the numbers of this process alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._segments: list[Segment] = []
        self._free = 0
        self._series: dict[str, dict[Labels, Series]] = {}

    def series(self, kind: Kind, metric: str, labels: Labels, count: int = 1) -> Cells:
        """Return the cells of a series. Those of a new one are zeros."""
        found = self._series.setdefault(metric, {}).get(labels)
        if found is None:
            first = self._reserve(count)
            found = Series(kind, self._clock(), self._cells(first), count)
            self._publish(metric, labels, first, found)
            self._series[metric][labels] = found
        return found.cells

    def read(self, metric: str) -> Iterator[Mapping[Labels, Series]]:
        """Yield a metric's series of each process: counters of all, gauges of those that are alive."""
        yield self._series.get(metric, {})

    def own(self, metric: str) -> Mapping[Labels, Series]:
        """Return a metric's series of this process."""
        return self._series.get(metric, {})

    def refresh(self) -> None:
        """Read what other processes have written: once, before several metrics are read."""

    def _reserve(self, count: int) -> int:
        """Return the first of so many cells, all in one segment."""
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

    def _publish(self, metric: str, labels: Labels, first: int, series: Series) -> None:
        """Let other processes find it."""


class SharedValues(Values):
    """Keep the numbers of a worker in a folder where other workers read them. Raises OSError."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self._folder = folder
        self._peers: dict[Path, _PeerValues] = {}
        self._alive: set[Path] = set()
        self._path, self._index = _claim_index(folder)
        self._values = os.open(self._path.with_suffix(".values"), os.O_RDWR | os.O_CREAT, 0o600)
        self._take_over()

    def read(self, metric: str) -> Iterator[Mapping[Labels, Series]]:
        yield from super().read(metric)
        for path, peer in self._peers.items():
            found = peer.series.get(metric, {})
            alive = path in self._alive
            yield {labels: series for labels, series in found.items() if alive or series.kind == "counter"}

    def refresh(self) -> None:
        for path in self._folder.glob("*.index"):
            if path != self._path:
                self._peers.setdefault(path, _PeerValues(path)).refresh()
        self._alive = {path for path in self._peers if _is_held(path)}

    def _take_over(self) -> None:
        left = _PeerValues(self._path)
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
        """Add a segment to the file; if it cannot grow, or its folder is gone, one that this process alone sees."""
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

    def _publish(self, metric: str, labels: Labels, first: int, series: Series) -> None:
        line = json.dumps([series.kind, metric, labels, first, series.count, series.began])
        try:
            os.write(self._index, f"{line}\n".encode())
        except OSError as error:
            log.warning("a series of %s is seen by this worker alone: %s", metric, error)


class _PeerValues:
    """Read what another process writes, or has left, on from where it was read to last."""

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
    """Make a folder for the numbers of several workers. None: it cannot be made, and each counts for itself."""
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
    """Whether a folder was left by a supervisor that was killed, and is not about to be used for the first time."""
    try:
        found = folder.stat()
    except OSError:
        return False
    ours, old = found.st_uid == os.getuid(), time.time() - found.st_mtime > MIN_ABANDONED_S
    return ours and old and not any(_is_held(path) for path in folder.glob("*.index"))


def open_values(folder: Path | None) -> Values:
    """Open the shared values of a worker, if its supervisor has made `folder`; else those of this process alone."""
    if folder is not None:
        try:
            return SharedValues(folder)
        except OSError as error:
            log.warning("the metrics of this worker are seen by itself alone: %s", error)
    return Values()


def _claim_index(folder: Path) -> tuple[Path, int]:
    """Lock the first index that no living process holds, and return its path and descriptor."""
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
