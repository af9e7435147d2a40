"""Spans that are written down while a request runs, and handed to OpenTelemetry's SDK when they end.

The SDK's own spans check and copy each attribute as it is set, under a lock, which took twice the time of this.
Sampling, ids, queue and export are the SDK's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

SAMPLED, RANDOM = 0x01, 0x02


@dataclass(slots=True)
class LiveSpan:
    """A span that has not ended."""

    name: str
    is_server: bool
    trace_id: int
    span_id: int
    parent_id: int
    """0: it is the first of its trace."""
    flags: int
    state: Any
    """The trace's `TraceState`."""
    start_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, int]] = field(default_factory=list)
    error: str | None = None
    """The description of what went wrong; None: nothing did."""

    @property
    def is_sampled(self) -> bool:
        """Whether it will be sent; otherwise nothing has to be written down."""
        return bool(self.flags & SAMPLED)

    @property
    def ids(self) -> tuple[str, str]:
        return f"{self.trace_id:032x}", f"{self.span_id:016x}"

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of a call that is this span's."""
        headers = {"traceparent": f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"}
        if self.state:
            headers["tracestate"] = self.state.to_header()
        return headers


class SpanSender:
    """Begin spans, and send those that have ended.

    Args:
        processor: of the provider.
    """

    def __init__(self, provider: TracerProvider, processor: SpanProcessor, scope: str, version: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits
        from opentelemetry.sdk.trace.sampling import Decision
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._record_and_sample = Decision.RECORD_AND_SAMPLE
        self._trace = trace
        self._event = Event
        self._span = ReadableSpan
        self._scope = InstrumentationScope(scope, version)
        self._provider = provider
        self._processor = processor
        self._max_chars = SpanLimits().max_span_attribute_length
        self.close: Callable[[], None] = provider.shutdown

    def begin(self, name: str, parent: str | None, state: str | None, attributes: dict[str, Any]) -> LiveSpan:
        """Begin the span of a request.

        Args:
            parent: the caller's `traceparent`, well formed.
            state: the caller's `tracestate`.
        """
        ids, kind = self._provider.id_generator, self._trace.SpanKind.SERVER
        trace_id, parent_id, flags, context, trace_state = ids.generate_trace_id(), 0, 0, None, None
        if parent is not None:
            _, stated_trace, stated_span, stated_flags, *_ = parent.split("-")
            trace_id, parent_id, flags = int(stated_trace, 16), int(stated_span, 16), int(stated_flags, 16)
            trace_state = self._trace.TraceState.from_header([state]) if state else None
            remote = self._context(trace_id, parent_id, flags, trace_state, is_remote=True)
            context = self._trace.set_span_in_context(self._trace.NonRecordingSpan(remote), _NO_CONTEXT)
        chosen = self._provider.sampler.should_sample(context or _NO_CONTEXT, trace_id, name, kind, attributes)
        sampled = SAMPLED if chosen.decision is self._record_and_sample else 0
        return LiveSpan(
            name=name,
            is_server=True,
            trace_id=trace_id,
            span_id=ids.generate_span_id(),
            parent_id=parent_id,
            flags=(flags & RANDOM) | sampled,
            state=chosen.trace_state,
            start_ns=time.time_ns(),
            attributes=attributes | dict(chosen.attributes or ()),
        )

    def below(self, span: LiveSpan, name: str, attributes: dict[str, Any]) -> LiveSpan:
        """Begin the span of a call that is made for another span, and sampled as that one is."""
        return LiveSpan(
            name=name,
            is_server=False,
            trace_id=span.trace_id,
            span_id=self._provider.id_generator.generate_span_id(),
            parent_id=span.span_id,
            flags=span.flags,
            state=span.state,
            start_ns=time.time_ns(),
            attributes=attributes,
        )

    def send(self, span: LiveSpan, end_ns: int) -> None:
        """End a span, and queue it unless the queue is full."""
        if not span.is_sampled:
            return
        trace, attributes = self._trace, span.attributes
        if self._max_chars is not None:
            attributes = {name: _cut(value, self._max_chars) for name, value in attributes.items()}
        parent = None
        if span.parent_id:
            parent = self._context(span.trace_id, span.parent_id, span.flags, None, is_remote=span.is_server)
        status = trace.Status() if span.error is None else trace.Status(trace.StatusCode.ERROR, span.error)
        self._processor.on_end(
            self._span(
                name=span.name,
                context=self._context(span.trace_id, span.span_id, span.flags, span.state, is_remote=False),
                parent=parent,
                resource=self._provider.resource,
                attributes=attributes,
                events=[self._event(name, timestamp=at_ns) for name, at_ns in span.events],
                kind=trace.SpanKind.SERVER if span.is_server else trace.SpanKind.CLIENT,
                status=status,
                start_time=span.start_ns,
                end_time=max(end_ns, span.start_ns),
                instrumentation_scope=self._scope,
            )
        )

    def _context(self, trace_id: int, span_id: int, flags: int, state: Any, *, is_remote: bool) -> Any:
        return self._trace.SpanContext(trace_id, span_id, is_remote, self._trace.TraceFlags(flags), state)


class _NoContext(dict[str, object]):
    """No span is the current one."""


# The SDK would look for the current context otherwise.
_NO_CONTEXT: Any = _NoContext()


def _cut(value: Any, max_chars: int) -> Any:
    return value[:max_chars] if isinstance(value, str) else value
