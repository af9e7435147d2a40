"""A collector of OpenTelemetry's: real HTTP on loopback, which decodes what it is sent and keeps it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.waiting import wait_until


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def attributes_of(listed: Any) -> dict[str, Any]:
    return {each.key: value_of(each.value) for each in listed}


@dataclass(frozen=True)
class ReceivedSpan:
    trace_id: str
    id: str
    parent: str
    name: str
    kind: int
    attributes: Mapping[str, Any]
    events: Mapping[str, int]
    """Unix nanoseconds by name."""
    status: int
    message: str
    start: int
    end: int
    state: str
    resource: Mapping[str, Any]


@dataclass(frozen=True)
class ReceivedPoint:
    attributes: Mapping[str, Any]
    number: float
    """Of a histogram the sum."""
    count: int
    bounds: tuple[float, ...]
    is_delta: bool
    resource: Mapping[str, Any]


SERVER, CLIENT, ERROR = 2, 3, 2


@dataclass
class OTLPReceiver:
    """`hangs`: it reads a request and never answers. `status`: what it answers."""

    hangs: bool = False
    status: int = 200
    spans: list[ReceivedSpan] = field(default_factory=list)
    metrics: dict[str, list[ReceivedPoint]] = field(default_factory=dict)
    """The newest points of each metric and process; of deltas their sums."""
    units: dict[str, str] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)
    requests: int = 0

    def __post_init__(self) -> None:
        receiver = self
        self._released = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
                receiver.requests += 1
                if receiver.hangs:
                    receiver._released.wait(60)
                    self.close_connection = True
                    return
                if receiver.status == 200:
                    receiver.keep(self.path, gzip.decompress(body) if "content-encoding" in self.headers else body)
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)

    def keep(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            self.spans += _spans(ExportTraceServiceRequest.FromString(body))
        else:
            assert path == "/v1/metrics", path
            self._keep_metrics(ExportMetricsServiceRequest.FromString(body))

    def _keep_metrics(self, request: ExportMetricsServiceRequest) -> None:
        for group in request.resource_metrics:
            resource = attributes_of(group.resource.attributes)
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    self.units[metric.name] = metric.unit
                    before = self.metrics.get(metric.name, [])
                    kept = [each for each in before if each.resource["process.pid"] != resource["process.pid"]]
                    added = [_added(point, before) if point.is_delta else point for point in _points(metric, resource)]
                    self.metrics[metric.name] = [*kept, *added]

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        return sorted((each for each in self.spans if each.trace_id == trace_id), key=lambda each: each.start)

    def wait_for_trace(self, request_id: str, wait_s: float = 20) -> tuple[ReceivedSpan, list[ReceivedSpan]]:
        """Return a request's span and those of its attempts, in their order."""

        def servers() -> list[ReceivedSpan]:
            return [each for each in self.spans if each.attributes.get("uniroute.request_id") == request_id]

        assert wait_until(servers, wait_s), [span.name for span in self.spans]
        (server,) = servers()
        spans = self.trace(server.trace_id)
        return server, [each for each in spans if each.parent == server.id]

    def points(self, name: str, **attributes: Any) -> list[ReceivedPoint]:
        """Return the points of a metric that have these attributes, a dot written as two underscores."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        return [each for each in self.metrics.get(name, []) if wanted.items() <= each.attributes.items()]


def _spans(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for group in request.resource_spans:
        resource = attributes_of(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    trace_id=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    name=span.name,
                    kind=span.kind,
                    attributes=attributes_of(span.attributes),
                    events={event.name: event.time_unix_nano for event in span.events},
                    status=span.status.code,
                    message=span.status.message,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    state=span.trace_state,
                    resource=resource,
                )


def _added(point: ReceivedPoint, before: list[ReceivedPoint]) -> ReceivedPoint:
    for each in before:
        if (each.attributes, each.resource) == (point.attributes, point.resource):
            return replace(point, number=point.number + each.number, count=point.count + each.count)
    return point


def _points(metric: Any, resource: Mapping[str, Any]) -> Iterator[ReceivedPoint]:
    kind = metric.WhichOneof("data")
    data = getattr(metric, kind)
    is_delta = kind != "gauge" and data.aggregation_temporality == 1
    for point in data.data_points:
        attributes = attributes_of(point.attributes)
        if kind == "histogram":
            assert sum(point.bucket_counts) == point.count
            bounds = tuple(point.explicit_bounds)
            yield ReceivedPoint(attributes, point.sum, point.count, bounds, is_delta, resource)
        else:
            yield ReceivedPoint(attributes, point.as_double, 1, (), is_delta, resource)
