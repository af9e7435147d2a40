"""One span for each request that asks a model, and one below it for each attempt.

The SDK is not imported here: `otlp.py` opens it, if it is asked for, and hands its parts over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from proxy.observability.genai import (
    OTHER,
    AnswerFacts,
    GenAIMetrics,
    Target,
    input_messages,
    request_attributes,
    text,
    usage_attributes,
)
from proxy.observability.spans import LiveSpan, SpanSender
from proxy.routing.selection_context import preset_of
from proxy.server.api.client_apis import CLIENT_APIS, EMBEDDINGS, TEXT_COMPLETIONS
from proxy.server.dependencies import RequestContext
from proxy.server.exchange import Exchange
from proxy.server.model_endpoints import ModelEndpoints
from proxy.server.requests import Headers
from proxy.settings.model_config import RESERVED_NAMES
from proxy.storage.decisions import AttemptRecord
from proxy.storage.records import ModelRecord
from proxy.storage.usage import UsageRecord
from proxy.upstream.payload import JSONPayload

# The paths whose requests ask a model, with the API that their clients speak.
TRACED = {**{path: api.name for path, api in CLIENT_APIS.items()}, EMBEDDINGS: "embeddings"}

# Of the description of an error.
MAX_ERROR_CHARS = 500

MAX_REQUESTED_CHARS = 128


class Tracing:
    """Begin the traces of requests, and count what they say of models.

    Args:
        spans: None: only metrics are sent.
        metrics: None: only traces are sent.
        captures_content: whether spans hold prompts and answers.
        latest: whether names are those of the newest conventions.
        propagates: whether trace contexts are taken from callers and passed to models.
    """

    def __init__(
        self,
        spans: SpanSender | None,
        metrics: GenAIMetrics | None,
        *,
        captures_content: bool = False,
        latest: bool = False,
        propagates: bool = True,
    ) -> None:
        self.spans = spans
        self.metrics = metrics
        self.captures_content = captures_content
        self.latest = latest
        self.propagates = propagates
        self._targets: dict[str, Target] = {}

    def begin(self, exchange: Exchange) -> RequestTrace:
        """Begin the trace of a request that has just arrived."""
        path, ids = exchange.path, exchange.ids
        api = TRACED[path]
        if self.spans is None:
            return RequestTrace(self, api, None)
        parent, state = (ids.traceparent, ids.tracestate) if self.propagates else (None, None)
        # What a sampler may go by; more is added once it is known that the span is sent.
        span = self.spans.begin(
            f"POST {path}",
            parent,
            state,
            {"http.request.method": "POST", "url.path": path, "gen_ai.operation.name": operation_of(api)},
        )
        if span.is_sampled:
            more = {"http.route": path, "url.scheme": scheme_of(exchange.headers), "uniroute.api": api}
            span.attributes |= {**more, "uniroute.request_id": ids.request_id}
            if agents := exchange.headers.getlist("user-agent"):
                span.attributes["user_agent.original"] = text(agents[0])
        return RequestTrace(self, api, span)

    def target(self, record: ModelRecord) -> Target:
        """Return what is known of a model, worked out once per record."""
        found = self._targets.get(record.name)
        if found is None or found.record is not record:
            if len(self._targets) > 10_000:  # most of them are of models that were removed
                self._targets.clear()
            found = self._targets[record.name] = Target.of(record)
        return found


def operation_of(api: str) -> str:
    """Return what a client asks for, in the convention's words."""
    return {"embeddings": "embeddings", TEXT_COMPLETIONS.name: "text_completion"}.get(api, "chat")


def scheme_of(headers: Headers) -> str:
    """Return the scheme of the client's address, as a proxy in front states it: this server has no TLS of its own."""
    return "https" if headers.getlist("x-forwarded-proto") == ["https"] else "http"


def call_of(api: str) -> str:
    """Return what a model is asked for: text completions are asked for as chat."""
    return "embeddings" if api == "embeddings" else "chat"


class RequestTrace:
    """The spans of one request. `server/request_log.py` and `server/attempts.py` tell it what happens."""

    __slots__ = ("_answer", "_api", "_attempt", "_number", "_span", "_started_at", "_target", "_tracing")

    def __init__(self, tracing: Tracing, api: str, span: LiveSpan | None) -> None:
        self._tracing = tracing
        self._api = api
        self._span = span
        self._started_at = time.monotonic()
        self._target: Target | None = None
        self._attempt: LiveSpan | None = None
        self._number = 0
        self._answer: AnswerFacts | None = None

    @property
    def ids(self) -> tuple[str, str] | None:
        """Return the ids of the trace and of the request's span; None: no spans are sent."""
        return None if self._span is None else self._span.ids

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are sent."""
        return self._span is not None and self._span.is_sampled

    def start_attempt(self, ctx: RequestContext, model: str) -> None:
        """Begin the span of a call. The last one has ended."""
        tracing, parent = self._tracing, self._span
        self._number += 1
        self._target = target = tracing.target(ctx.snapshot.models[model])
        self._answer = self._attempt = None
        if tracing.spans is None or parent is None:
            return
        operation = call_of(self._api)
        span = self._attempt = tracing.spans.below(parent, f"{operation} {target.model}", {})
        if not span.is_sampled:
            return
        request, captures = ctx.request, tracing.captures_content
        self._answer = AnswerFacts(keeps_text=captures)
        span.attributes = {
            **target.attributes(operation),
            **request_attributes(request.body, stream=request.stream, latest=tracing.latest),
            "uniroute.model": model,
            "uniroute.attempt": self._number,
        }
        if captures and request.body["messages"]:
            span.attributes["gen_ai.input.messages"] = input_messages(request.body["messages"])
        if (session := request.options.session) is not None:
            span.attributes["gen_ai.conversation.id"] = text(session)

    def headers(self) -> dict[str, str]:
        """Return the headers with which an upstream continues the trace from the attempt's own span."""
        return {} if self._attempt is None or not self._tracing.propagates else self._attempt.headers

    def event(self, name: str) -> None:
        """Note that something has happened in the attempt."""
        if self._attempt is not None:
            self._attempt.events.append((name, time.time_ns()))

    def observe(self, payload: JSONPayload) -> None:
        """Read what a completion, or a chunk, says of itself."""
        if self._answer is not None:
            self._answer.observe(payload)

    def end_attempt(
        self, entry: UsageRecord, attempt: AttemptRecord, first_content_at: float | None, fault: str | None
    ) -> None:
        """End the span of the call.

        Args:
            entry: what the call used.
            first_content_at: monotonic seconds.
            fault: why the answer was passed over, or broke off.
        """
        tracing, span, target = self._tracing, self._attempt, self._target
        self._attempt = self._target = None
        if target is None:
            return
        seconds = max(0.0, attempt.ended_s - attempt.started_s)
        failed = attempt.outcome in ("failed", "empty")
        error = "broken" if entry.ending == "broken" else str(attempt.status or attempt.outcome) if failed else ""
        first_s = None
        if first_content_at is not None:
            first_s = max(0.0, first_content_at - (time.monotonic() - entry.seconds) - attempt.started_s)
        if tracing.metrics is not None:
            tracing.metrics.count_attempt(target, call_of(self._api), entry, seconds, first_s, error)
        if span is None or tracing.spans is None or not span.is_sampled:
            return
        found = span.attributes
        found |= usage_attributes(entry, latest=tracing.latest)
        if self._answer is not None:
            found |= self._answer.attributes()
        if first_s is not None:
            found["gen_ai.response.time_to_first_chunk"] = first_s
        if entry.cost_usd is not None:
            found["uniroute.cost_usd"] = entry.cost_usd
        found["uniroute.ending"] = attempt.outcome if failed else entry.ending
        if error:
            found["error.type"] = error
            span.error = text(fault or error, MAX_ERROR_CHARS)
        tracing.spans.send(span, span.start_ns + int(seconds * 1e9))

    def finish(
        self, ctx: RequestContext, model: str, entry: UsageRecord, facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Note what became of the request.

        Args:
            model: whose answer, or failure, the client gets.
            facts: returns what is known of the decision, by name. What is None is left out.
        """
        error = "" if entry.ending in ("complete", "client_gone") else entry.ending
        metrics, record, span = self._tracing.metrics, ctx.snapshot.models.get(model), self._span
        if metrics is not None and record is not None:
            target = self._tracing.target(record)
            metrics.count_request(target, operation_of(self._api), bounded_name(ctx), entry, error)
        if span is None or not span.is_sampled:
            return
        found = span.attributes
        found["gen_ai.request.model"] = text(ctx.request.model, MAX_REQUESTED_CHARS)
        found["gen_ai.response.model"] = model
        found["uniroute.attempts"] = self._number
        if ctx.request.options.session is not None:
            found["gen_ai.conversation.id"] = text(ctx.request.options.session)
        for name, value in facts().items():
            if value is not None and value != ():
                found[f"uniroute.{name}"] = text(value) if isinstance(value, str) else value
        if error:
            found["error.type"] = span.error = error

    def end(self, status: int | None) -> None:
        """End the span of the request: its last byte is sent, or it has failed.

        Args:
            status: of the response; None: none was sent.
        """
        span, spans = self._span, self._tracing.spans
        if span is None or spans is None or not span.is_sampled:
            return
        if status is not None:
            span.attributes["http.response.status_code"] = status
            if status >= 500:
                span.error = span.error or ""
                span.attributes.setdefault("error.type", str(status))
        spans.send(span, time.time_ns())


def bounded_name(ctx: RequestContext) -> str:
    """Return the name that the client asked for, if it is one of ours: a client can make up no label."""
    name, settings = ctx.request.model, ctx.app.settings
    known = name in ctx.snapshot.models or name in RESERVED_NAMES or (name != "*" and name in settings.route_names)
    return name if known or preset_of(name, settings, ctx.snapshot) is not None else OTHER


class TracedEndpoints(ModelEndpoints):
    """Serve requests all the same, and trace each from its arrival to the last byte of its answer."""

    async def serve(self, exchange: Exchange) -> None:
        app = self.startup.app_state
        tracing: Tracing | None = None if app is None else app.tracing
        if tracing is None:
            await super().serve(exchange)
            return
        trace = exchange.trace = tracing.begin(exchange)
        try:
            await super().serve(exchange)
        finally:
            trace.end(exchange.status)
