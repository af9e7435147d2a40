"""What is sent by OpenTelemetry's protocol, to a collector that OTEL_EXPORTER_OTLP_ENDPOINT names.

Without that variable nothing of OpenTelemetry is imported. Spans are sent by the SDK, from a queue of bounded length
and a thread of its own. Metrics are counted as those of /metrics are, and sent now and then.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from proxy.concurrency import background, in_own_thread, run_uncancelled
from proxy.observability.genai import CAPTURE, LATEST, OPT_IN, GenAIMetrics
from proxy.observability.spans import SpanSender
from proxy.observability.tracing import Tracing
from proxy.server.metrics import FastMetric, Labels, Metrics
from proxy.settings.schema import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Metric, MetricExporter, MetricsData
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("uniroute.otel")

INSTALL = "pip install 'uniroute[otel]'"

SCOPE = "uniroute"

# How long the end of the process waits for a collector.
FLUSH_TIMEOUT_S = 5.0

DEFAULT_INTERVAL_MS = 60_000

MIN_INTERVAL_S = 0.05

REPEAT_S = 60.0

MAX_MESSAGES = 100

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_{}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_CAPTURING = frozenset({"true", "1", "span_only", "span_and_event"})


def is_sent(signal: str, environ: Mapping[str, str]) -> bool:
    """Return whether the environment names a collector for a signal, TRACES or METRICS, and does not turn it off."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() or "otlp"
    return "otlp" in exporters.split(",") and any(environ.get(name.format(signal), "").strip() for name in _ENDPOINTS)


def is_enabled(environ: Mapping[str, str]) -> bool:
    return is_sent("TRACES", environ) or is_sent("METRICS", environ)


@asynccontextmanager
async def open_telemetry(
    settings: Settings, environ: Mapping[str, str], metrics: Metrics
) -> AsyncIterator[Tracing | None]:
    """Open what is sent to the collector, and send the rest of it at the end. None: nothing is sent.

    It fails no start: what cannot be opened is logged.
    """
    if not is_enabled(environ):
        yield None
        return
    try:
        opened = await in_own_thread(lambda: _open(settings, environ, metrics))
    except ImportError as error:
        log.error("nothing is sent to the OpenTelemetry collector: %s; %s", error, INSTALL)
        yield None
        return
    except ValueError as error:  # of a variable
        log.error("nothing is sent to the OpenTelemetry collector: %s", error)
        yield None
        return
    log.info("%s are sent to the OpenTelemetry collector", " and ".join(opened.signals))
    try:
        async with background("uniroute-otlp", opened.send_metrics):
            yield opened.tracing
    finally:
        await run_uncancelled(opened.close())


@dataclass(frozen=True)
class _Opened:
    tracing: Tracing
    signals: Sequence[str]
    metrics: MetricSender | None
    close_spans: Callable[[], None] | None

    async def send_metrics(self) -> None:
        if self.metrics is not None:
            await self.metrics.run()

    async def close(self) -> None:
        """Send what is left, for no longer than FLUSH_TIMEOUT_S."""
        steps = [step for step in (self.close_spans, self.metrics.last_export() if self.metrics else None) if step]
        threads = [threading.Thread(target=step, name="uniroute-otlp-end", daemon=True) for step in steps]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:  # noqa: ASYNC110  threads
            await asyncio.sleep(0.02)
        if any(thread.is_alive() for thread in threads):
            log.warning("the OpenTelemetry collector did not take what was left within %g s", FLUSH_TIMEOUT_S)


def _open(settings: Settings, environ: Mapping[str, str], metrics: Metrics) -> _Opened:
    """Import the SDK and open its parts. Raises ImportError or ValueError."""
    if find_spec("opentelemetry.sdk") is None or find_spec("opentelemetry.sdk.trace") is None:
        raise ImportError("the extra `otel` is not installed")
    _relay_messages()
    latest = LATEST in {each.strip() for each in environ.get(OPT_IN, "").split(",")}
    captures = settings.log_prompts or environ.get(CAPTURE, "").strip().lower() in _CAPTURING
    propagators = [each.strip() for each in environ.get("OTEL_PROPAGATORS", "tracecontext").split(",")]
    resource = _resource()
    spans, sender, genai = None, None, None
    if is_sent("TRACES", environ):
        spans = _open_spans(environ, resource, metrics)
    if is_sent("METRICS", environ):
        genai = GenAIMetrics(latest=latest)
        exporter = _exporter("METRICS", environ)
        sender = MetricSender(metrics, genai, exporter, resource, _interval_s(environ), _is_delta(exporter))
    tracing = Tracing(spans, genai, captures_content=captures, latest=latest, propagates="tracecontext" in propagators)
    signals = [name for name, part in (("traces", spans), ("metrics", sender)) if part is not None]
    return _Opened(tracing, signals, sender, spans.close if spans else None)


class SDKMessages(logging.Handler):
    """Log what OpenTelemetry says under our name, each message once in REPEAT_S: it repeats itself with each export."""

    def __init__(self) -> None:
        super().__init__()
        self._logged_at: dict[tuple[str, str], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            return
        key, now = (record.name, str(record.msg)[:200]), time.monotonic()
        if now - self._logged_at.get(key, -REPEAT_S) < REPEAT_S:
            return
        if len(self._logged_at) >= MAX_MESSAGES:
            self._logged_at.clear()
        self._logged_at[key] = now
        log.log(record.levelno, "%s", record.getMessage())


def _relay_messages() -> None:
    sdk = logging.getLogger("opentelemetry")
    sdk.propagate = False
    if not any(isinstance(handler, SDKMessages) for handler in sdk.handlers):
        sdk.addHandler(SDKMessages())


def _resource() -> Resource:
    """Return what this process is called. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win, but for the process.

    Each worker has a process id and, unless it is stated, an instance id of its own: metrics of processes that call
    themselves the same would be taken for one.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    named = {
        "service.name": "uniroute",
        "service.version": version("uniroute"),
        "service.instance.id": uuid.uuid4().hex,
    }
    return Resource.create(named).merge(OTELResourceDetector().detect()).merge(Resource({"process.pid": os.getpid()}))


PROTOCOL = "http/protobuf"


def _check_protocol(signal: str, environ: Mapping[str, str]) -> None:
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if stated := environ.get(name, "").strip():
            if stated != PROTOCOL:
                message = f"{name} must be {PROTOCOL}; got {stated[:40]!r}"
                raise ValueError(f"{message}. Collectors take it on port 4318")
            return


def _exporter(signal: str, environ: Mapping[str, str]) -> Any:
    """Return the exporter of a signal, which reads its endpoint, headers, timeout and certificates from variables."""
    _check_protocol(signal, environ)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter() if signal == "TRACES" else OTLPMetricExporter()


def _open_spans(environ: Mapping[str, str], resource: Resource, metrics: Metrics) -> SpanSender:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    processor = BatchSpanProcessor(counted(_exporter("TRACES", environ), metrics))
    provider.add_span_processor(processor)
    return SpanSender(provider, processor, SCOPE, version("uniroute"))


class Reported:
    """Count exports by their outcome, and log the first failure of a row and the end of it."""

    def __init__(self, signal: str, metrics: Metrics) -> None:
        self._signal = signal
        self._metrics = metrics
        self._failing = False

    def report(self, *, sent: bool) -> None:
        self._metrics.otel_exports.add((self._signal, "sent" if sent else "failed"))
        if sent == self._failing:
            self._failing = not sent
            if sent:
                log.info("the OpenTelemetry collector takes %s again", self._signal)
            else:
                log.warning("the OpenTelemetry collector does not take %s; it is tried again", self._signal)


def counted(exporter: SpanExporter, metrics: Metrics) -> SpanExporter:
    """Return an exporter whose exports are counted."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    reported = Reported("traces", metrics)

    class Counted(SpanExporter):
        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            result = exporter.export(spans)
            reported.report(sent=result is SpanExportResult.SUCCESS)
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Counted()


def _interval_s(environ: Mapping[str, str]) -> float:
    stated = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip() or str(DEFAULT_INTERVAL_MS)
    with suppress(ValueError):
        return max(MIN_INTERVAL_S, float(stated) / 1000)
    raise ValueError(f"OTEL_METRIC_EXPORT_INTERVAL must be milliseconds; got {stated[:40]!r}")


def _is_delta(exporter: Any) -> bool:
    """Return whether the collector is to be sent what was added since the last export, and not all sums."""
    from opentelemetry.sdk.metrics import Histogram
    from opentelemetry.sdk.metrics.export import AggregationTemporality

    return bool(exporter._preferred_temporality[Histogram] is AggregationTemporality.DELTA)


class MetricSender:
    """Send the metrics of this process: those of the conventions, and those of /metrics under the same names.

    They are read on the event loop, which writes them, and encoded and sent by a thread.
    """

    def __init__(
        self,
        metrics: Metrics,
        genai: GenAIMetrics,
        exporter: MetricExporter,
        resource: Resource,
        interval_s: float,
        is_delta: bool,  # noqa: FBT001
    ) -> None:
        self._metrics = metrics
        self._genai = genai
        self._exporter = exporter
        self._resource = resource
        self._interval_s = interval_s
        self._points = Points(is_delta=is_delta)
        self._reported = Reported("metrics", metrics)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            data = self._read()
            await in_own_thread(lambda data=data: self._export(data))  # type: ignore[misc]

    def last_export(self) -> Callable[[], None]:
        """Read the metrics once more; return what sends them and closes the exporter."""
        data = self._read()

        def finish() -> None:
            self._export(data)
            self._exporter.shutdown()

        return finish

    def _export(self, data: MetricsData) -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        sent = self._exporter.export(data) is MetricExportResult.SUCCESS
        self._reported.report(sent=sent)

    def _read(self) -> MetricsData:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._metrics.refresh()
        now_ns = time.time_ns()
        named: list[tuple[FastMetric, str]] = [(each.series, each.unit) for each in self._genai.instruments]
        # A collector adds `_total` to the names of counters, as /metrics does.
        named += [(each, "") for each in self._metrics.every]
        found = [self._points.of(metric, unit, now_ns) for metric, unit in named]
        scope = InstrumentationScope(SCOPE, version("uniroute"))
        scopes = ScopeMetrics(scope, [each for each in found if each is not None], "")
        return MetricsData([ResourceMetrics(self._resource, [scopes], self._resource.schema_url)])


class Points:
    """Turn series into OpenTelemetry's data points: sums since each began or, as deltas, since the last time."""

    def __init__(self, *, is_delta: bool) -> None:
        self._is_delta = is_delta
        self._before: dict[tuple[str, Labels], tuple[list[float], int]] = {}

    def of(self, metric: FastMetric, unit: str, now_ns: int) -> Metric | None:
        """Return a metric with all its series; None: it has none."""
        from opentelemetry.sdk.metrics.export import (
            AggregationTemporality,
            Gauge,
            Histogram,
            HistogramDataPoint,
            Metric,
            NumberDataPoint,
            Sum,
        )

        told = metric.description
        temporality = AggregationTemporality.DELTA if self._is_delta else AggregationTemporality.CUMULATIVE
        points: list[Any] = []
        for labels, series in list(metric.own().items()):
            numbers, since_ns = series.numbers, int(series.began * 1e9)
            if math.isnan(numbers[0]):
                continue
            if told.kind != "gauge":
                numbers, since_ns = self._since(told.name, labels, numbers, since_ns, now_ns)
            attributes = _attributes(told.labels, labels)
            if told.kind == "histogram":
                counts, unknown = [int(each) for each in numbers[:-1]], cast(float, None)
                points.append(
                    HistogramDataPoint(
                        *(attributes, since_ns, now_ns, sum(counts), numbers[-1], counts, told.bounds),
                        *(unknown, unknown),
                    )
                )
            else:
                points.append(NumberDataPoint(attributes, since_ns, now_ns, float(numbers[0])))
        if not points:
            return None
        data: Any = Gauge(points)
        if told.kind == "counter":
            data = Sum(points, temporality, is_monotonic=True)
        elif told.kind == "histogram":
            data = Histogram(points, temporality)
        return Metric(told.name, told.text, unit, data)

    def _since(
        self, name: str, labels: Labels, numbers: list[float], began_ns: int, now_ns: int
    ) -> tuple[list[float], int]:
        """Return the numbers to send, and since when they were counted."""
        if not self._is_delta:
            return numbers, began_ns
        before, since_ns = self._before.get((name, labels), ([0.0] * len(numbers), began_ns))
        self._before[name, labels] = (numbers, now_ns)
        return [now - then for now, then in zip(numbers, before, strict=True)], since_ns


def _attributes(names: Labels, values: Labels) -> dict[str, Any]:
    """Return labels as attributes: an empty one stands for none, and a port is a number."""
    return {
        name: int(value) if name == "server.port" else value for name, value in zip(names, values, strict=True) if value
    }
