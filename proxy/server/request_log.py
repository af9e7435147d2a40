from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from proxy.errors import UpstreamError
from proxy.routing.affinity import Affinity, AffinityRecorder
from proxy.routing.requirements import estimate_document_tokens
from proxy.routing.selection import Selection
from proxy.server.dependencies import RequestContext
from proxy.server.log_handler import info
from proxy.server.reservations import Reservation, Settlement
from proxy.storage.usage import (
    ObservedTraffic,
    TokenCounts,
    UsageRecord,
    cost_of,
    parse_usage,
    plausible_usage,
    usage_of,
)

log = logging.getLogger("uniroute.request")

# Why an attempt is passed over whose answer has no content.
_EMPTY = "it gave an empty answer"

# A discarded answer with more bytes is not searched for its usage.
_MAX_DISCARDED_BYTES = 256 * 1024

# Of the header that names what was left out of a request.
MAX_LEFT_OUT_CHARS = 1000


class RequestRecord:
    """Collect what one request used, and write it down: usage record, metrics, traffic statistics, one log line.

    All but `wait_until_settled` is synchronous, so that it can run while a request is being cancelled.

    Args:
        reservation: what was reserved of the key's limits.
    """

    def __init__(
        self, ctx: RequestContext, selection: Selection, affinity: Affinity, reservation: Reservation | None = None
    ) -> None:
        self.selection = selection
        self.affinity = AffinityRecorder(ctx.app.sessions, affinity, ctx.request.body["messages"])
        self.model = selection.model
        self.reason = selection.reason
        # From the request's arrival to the first call to an upstream; None before that call.
        self.overhead_s: float | None = None
        # The output token limit that the last attempt sent in place of a larger one of the caller's.
        self.clamped: int | None = None
        # Fields of the client's request that the last attempt could not send to its model.
        self.left_out: tuple[str, ...] = ()
        # The client's own body, if the last attempt sent it to an upstream that speaks the client's API.
        self.native_document: Mapping[str, Any] | None = None
        self._ctx = ctx
        self._reservation = reservation
        self._output_bytes = 0
        self._reported_bytes = 0
        self._timed_out = False
        self._attempted_at = ctx.received_at
        self._first_content_at: float | None = None
        self._counts = TokenCounts()
        self._fault: str | None = None
        self._finished = False
        self._settlement: Settlement | None = None

    def start_attempt(self, model: str) -> None:
        """Count for another attempt from now on. The one before, if it failed, gets a usage record of its own."""
        self._record_failed_attempt()
        self._attempted_at = time.monotonic()
        if self.overhead_s is None:
            self.overhead_s = self._attempted_at - self._ctx.received_at
            self._ctx.app.metrics.overhead.observe(self.overhead_s)
        if model != self.selection.model:
            self.reason = "fallback"
        self.model = model
        self._counts, self._first_content_at = TokenCounts(), None
        self._output_bytes, self._reported_bytes, self._timed_out = 0, 0, False
        self.clamped, self.left_out, self.native_document = None, (), None

    @property
    def has_asked(self) -> bool:
        """Whether a model was asked."""
        return self.overhead_s is not None

    @property
    def has_content(self) -> bool:
        """Whether the model of the last attempt has sent any content."""
        return self._first_content_at is not None

    def first_content(self) -> None:
        if self._first_content_at is None:
            self._first_content_at = time.monotonic()

    def set_usage(self, reported: object) -> None:
        """Read the usage that a completion or a chunk reports (or `usage` itself); the last report counts.

        A report covers the output that was added before it. A report of zeros is ignored.
        """
        if not isinstance(reported, Mapping):
            return
        usage = usage_of(reported)
        counts = parse_usage(reported if usage is None else usage)
        if counts.prompt_tokens or counts.output_tokens:
            self._counts, self._reported_bytes = counts.after(self._counts), self._output_bytes

    def add_output(self, size: int) -> None:
        """Count bytes of content, from which usage is estimated if none is reported."""
        self._output_bytes += size

    def attempt_failed(self, failure: UpstreamError) -> None:
        """Note that the last attempt gave no answer, or broke it off."""
        self._timed_out = failure.timed_out
        # The provider bills an answer that is discarded here, too.
        self.set_usage(_json_with_usage(failure.body))
        self._ctx.app.metrics.attempts_failed.add((self.model, _status(failure)))
        self._fault = str(failure)

    def mark_empty(self) -> None:
        """Note that the last attempt gave an answer without content."""
        self._ctx.app.metrics.attempts_failed.add((self.model, "empty"))
        self._fault = _EMPTY

    def finish(self, ending: str) -> None:
        """Write everything down, at the first call; later calls are ignored."""
        if self._finished:
            return
        self._finished = True
        entry = self._write_usage(ending, self._reservation)
        metrics = self._ctx.app.metrics
        model = (self.model,)
        metrics.requests.add((self.model, self.reason, ending))
        metrics.seconds.observe(entry.seconds, model)
        if entry.first_token_s is not None:
            metrics.first_token.observe(entry.first_token_s, model)
        if ending == "complete":
            counts = self._plausible_counts()
            self._observe_traffic(counts.output_tokens)
            self.affinity.commit(self.model, counts.total)
        self._log(entry)

    async def wait_until_settled(self) -> None:
        """Wait until the key's limits include what this request used, or until that takes too long."""
        if self._settlement is not None and self._reservation is not None:
            await asyncio.wait({self._settlement}, timeout=self._reservation.wait_s)

    def headers(self) -> dict[str, str]:
        """Return the response headers about the decision and about the key's limits."""
        headers = {
            "x-uniroute-model": self.model,
            "x-uniroute-decision": self.selection.id,
            "x-uniroute-reason": self.reason,
            "x-uniroute-overhead-ms": self._overhead_ms(),
        }
        if self.clamped is not None:
            headers["x-uniroute-max-tokens"] = str(self.clamped)
        if self.left_out:
            headers["x-uniroute-left-out"] = _header_list(self.left_out)
        if self._reservation is not None:
            headers |= self._reservation.headers
        return headers

    def _overhead_ms(self) -> str:
        return f"{(self.overhead_s or 0.0) * 1000:.2f}"

    def _record_failed_attempt(self) -> None:
        """Write a usage record for the last attempt alone if it failed: the client gets nothing of it."""
        fault, self._fault = self._fault, None
        if fault is None:
            return
        self._write_usage("empty" if fault is _EMPTY else "failed")
        request, decision = self._ctx.ids.request_id, self.selection.id
        log.warning("request=%s decision=%s model=%s passed over: %s", request, decision, self.model, fault)

    def _write_usage(self, ending: str, reservation: Reservation | None = None) -> UsageRecord:
        """Write the usage record of the last attempt.

        Args:
            reservation: settled with this record; None for an attempt that is followed by another, whose record
                settles it.
        """
        app = self._ctx.app
        price = app.snapshots.current.prices.get(self.model)
        counts, observed = self._plausible_counts(), self._observed()
        billed = self._may_be_billed(ending)
        cost = cost_of(counts, price.price if price else None, observed, billed=billed)
        first_content_at, received_at = self._first_content_at, self._ctx.received_at
        entry = UsageRecord(
            decision=self.selection.id,
            at=time.time(),
            model=self.model,
            key_id=self._ctx.key.id if self._ctx.key else None,
            reason=self.reason,
            ending=ending,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            output_tokens=counts.output_tokens,
            reasoning_tokens=counts.reasoning_tokens,
            cost_usd=cost.usd,
            seconds=time.monotonic() - received_at,
            first_token_s=None if first_content_at is None else first_content_at - received_at,
            reservation=reservation.id if reservation else None,
            estimated=cost.estimated,
            cache_write_tokens=counts.written_tokens,
            audio_input_tokens=counts.audio_input_tokens,
            audio_output_tokens=counts.audio_output_tokens,
        )
        app.usage.record(entry)
        if reservation:
            self._settlement = reservation.settle(counts.total if billed else (counts.total or 0), entry.cost_picousd)
        self._count_tokens(entry)
        return entry

    def _observed(self) -> ObservedTraffic:
        size, prompt = self._output_bytes, self.selection.requirements.prompt_tokens
        if self.native_document is not None and self._counts.prompt_tokens is None:
            prompt = max(prompt, estimate_document_tokens(self.native_document))
        return ObservedTraffic(prompt, size, size - self._reported_bytes, self.has_content)

    def _plausible_counts(self) -> TokenCounts:
        """Return the reported usage as far as it agrees with what this process saw."""
        return plausible_usage(self._counts, self._observed())

    def _may_be_billed(self, ending: str) -> bool:
        """Whether the model of the last attempt may have begun to answer, and so may bill for it."""
        if self.overhead_s is None or ending == "busy":
            return False
        if ending in ("client_gone", "shutdown") and self._fault is not None and not self.has_content:
            # The last attempt had failed already, and the request ended before the next attempt began.
            return self._timed_out
        return ending != "failed" or self._timed_out

    def _count_tokens(self, entry: UsageRecord) -> None:
        metrics = self._ctx.app.metrics
        for kind, count in (
            ("prompt", entry.prompt_tokens),
            ("cached", entry.cached_tokens),
            ("output", entry.output_tokens),
            ("cache_write", entry.cache_write_tokens),
            ("reasoning", entry.reasoning_tokens),
            ("audio_input", entry.audio_input_tokens),
            ("audio_output", entry.audio_output_tokens),
        ):
            if count:
                metrics.tokens.add((self.model, kind), count)
        if entry.cost_usd:
            metrics.cost.add((self.model,), entry.cost_usd)

    def _observe_traffic(self, output_tokens: int | None) -> None:
        """Add this answer to the length and latency that later decisions expect of the model in these clusters."""
        decision = self.selection.decision
        if decision is None or decision.assignment is None:
            return
        clusters, seconds = decision.assignment, time.monotonic() - self._attempted_at
        self._ctx.app.traffic_stats.observe(self.model, clusters.ids[0], clusters.weights[0], output_tokens, seconds)

    def _log(self, entry: UsageRecord) -> None:
        cost = "?" if entry.cost_usd is None else f"{entry.cost_usd:.8f}"
        first = "-" if entry.first_token_s is None else f"{entry.first_token_s:.3f}"
        clamped = (
            ""
            if self.clamped is None
            else f" max_tokens={self.selection.requirements.max_output_tokens}>{self.clamped}"
        )
        left_out = f" left_out={_header_list(self.left_out)!r}" if self.left_out else ""
        info(
            log,
            f"request={self._ctx.ids.request_id} decision={entry.decision} model={entry.model} reason={entry.reason}"
            f" ending={entry.ending} key={entry.key_id or '-'}"
            f" tokens={entry.prompt_tokens or '?'}+{entry.output_tokens or '?'} cost_usd={cost}"
            f" overhead_ms={self._overhead_ms()} first_s={first} seconds={entry.seconds:.3f}{clamped}{left_out}",
        )


def _header_list(names: Sequence[str]) -> str:
    """Join names for a header of limited length, without characters that no header may have."""
    text = ", ".join(names).encode("ascii", "replace").decode()
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= MAX_LEFT_OUT_CHARS else f"{text[:MAX_LEFT_OUT_CHARS]}..."


def _json_with_usage(body: Mapping[str, Any] | list[Any] | bytes | None) -> object:
    """Return the body of a failed attempt, parsed if it is bytes; None if it cannot report usage."""
    if not isinstance(body, bytes):
        return body
    if len(body) > _MAX_DISCARDED_BYTES or b'"usage' not in body:
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _status(failure: UpstreamError) -> str:
    """Return the value of the label `status` in the metrics."""
    return "timeout" if failure.timed_out else str(failure.status or "unreachable")
