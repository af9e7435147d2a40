"""What one request took, counted where it ends: usage, metrics, live expectations and the one log line."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.errors import UpstreamFailure
from proxy.recording.metrics import Metrics
from proxy.recording.recorder import UsageRecorder
from proxy.recording.usage import TokenCounts, UsageRecord, cost_usd, counts_of
from proxy.routing.choosing import Choice
from proxy.state.holder import StateHolder
from proxy.state.live import LiveExpectations
from proxy.state.records import ClientKey
from proxy.trace import Trace

log = logging.getLogger("uniroute.request")


@dataclass(frozen=True)
class Books:
    """Where a request is written down."""

    state: StateHolder
    usage: UsageRecorder
    metrics: Metrics
    live: LiveExpectations | None


class Meter:
    """One per request. `finish` is synchronous, and only its first call counts."""

    def __init__(self, books: Books, choice: Choice, key: ClientKey | None, trace: Trace, started: float) -> None:
        self.choice = choice
        self.model = choice.model
        self.reason = choice.reason
        self.overhead_s = 0.0
        self._books = books
        self._key = key
        self._trace = trace
        self._started = started
        self._asked = started
        self._first: float | None = None
        self._counts = TokenCounts()
        self._finished = False

    def asking(self, model: str) -> None:
        """`model` is asked now; the time before the first such call is our own."""
        self._asked = time.monotonic()
        if model == self.choice.model:
            self.overhead_s = self._asked - self._started
            self._books.metrics.overhead.observe(self.overhead_s)
        else:
            self.reason = "fallback"
        self.model = model
        self._counts, self._first = TokenCounts(), None

    def passed_over(self, failure: UpstreamFailure | None) -> None:
        """The model asked last gave nothing to relay, and the next one is asked."""
        self._books.metrics.attempts_failed.labels(self.model, _status(failure)).inc()
        self._record("empty" if failure is None else "failed")
        log.warning(
            "request=%s decision=%s model=%s passed over: %s",
            self._trace.request_id,
            self.choice.id,
            self.model,
            failure or "it gave an empty answer",
        )

    def first_content(self) -> None:
        if self._first is None:
            self._first = time.monotonic()

    def used(self, usage: object) -> None:
        self._counts = counts_of(usage)

    def failed(self, failure: UpstreamFailure) -> None:
        self._books.metrics.attempts_failed.labels(self.model, _status(failure)).inc()

    def finish(self, ending: str) -> None:
        if self._finished:
            return
        self._finished = True
        entry = self._record(ending)
        metrics = self._books.metrics
        metrics.requests.labels(self.model, self.reason, ending).inc()
        metrics.seconds.labels(self.model).observe(entry.seconds)
        if entry.first_token_s is not None:
            metrics.first_token.labels(self.model).observe(entry.first_token_s)
        if ending == "complete":
            self._observe_live()
        self._log(entry)

    def headers(self) -> dict[str, str]:
        return {
            "x-uniroute-model": self.model,
            "x-uniroute-decision": self.choice.id,
            "x-uniroute-reason": self.reason,
            "x-uniroute-overhead-ms": f"{self.overhead_s * 1000:.2f}",
        }

    def _record(self, ending: str) -> UsageRecord:
        now = time.monotonic()
        live_price = self._books.state.current.prices.get(self.model)
        counts = self._counts
        entry = UsageRecord(
            decision=self.choice.id,
            at=time.time(),
            model=self.model,
            key_id=self._key.id if self._key else None,
            reason=self.reason,
            ending=ending,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            output_tokens=counts.output_tokens,
            reasoning_tokens=counts.reasoning_tokens,
            cost_usd=cost_usd(counts, live_price.price if live_price else None),
            seconds=now - self._started,
            first_token_s=None if self._first is None else self._first - self._started,
        )
        self._books.usage.record(entry)
        self._count_tokens(entry)
        return entry

    def _count_tokens(self, entry: UsageRecord) -> None:
        metrics = self._books.metrics
        counted = {"prompt": entry.prompt_tokens, "cached": entry.cached_tokens, "output": entry.output_tokens}
        for kind, count in counted.items():
            if count:
                metrics.tokens.labels(self.model, kind).inc(count)
        if entry.cost_usd:
            metrics.cost.labels(self.model).inc(entry.cost_usd)

    def _observe_live(self) -> None:
        """How long real answers of this model are in these clusters, for the decisions to come."""
        decision = self.choice.decision
        if self._books.live is None or decision is None or decision.assignment is None:
            return
        ids, weights = decision.assignment.ids[0].tolist(), decision.assignment.weights[0].tolist()
        seconds = time.monotonic() - self._asked
        self._books.live.observe(self.model, ids, weights, self._counts.output_tokens, seconds)

    def _log(self, entry: UsageRecord) -> None:
        facts: Mapping[str, Any] = {
            "request": self._trace.request_id,
            "decision": entry.decision,
            "model": entry.model,
            "reason": entry.reason,
            "ending": entry.ending,
            "key": entry.key_id or "-",
            "tokens": f"{entry.prompt_tokens or '?'}+{entry.output_tokens or '?'}",
            "cost_usd": "?" if entry.cost_usd is None else f"{entry.cost_usd:.8f}",
            "overhead_ms": f"{self.overhead_s * 1000:.2f}",
            "first_s": "-" if entry.first_token_s is None else f"{entry.first_token_s:.3f}",
            "seconds": f"{entry.seconds:.3f}",
        }
        log.info(" ".join(f"{name}={value}" for name, value in facts.items()))


def _status(failure: UpstreamFailure | None) -> str:
    if failure is None:
        return "empty"
    return "timeout" if failure.timed_out else str(failure.status or "unreachable")
