from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.errors import UpstreamError
from proxy.routing.affinity import AffinityRecorder
from proxy.routing.selection import Selection
from proxy.server.log_handler import info
from proxy.server.metrics import Metrics
from proxy.server.ratelimit import Reservation, Settling
from proxy.server.requests import RequestIds
from proxy.storage.client_keys import ClientKey
from proxy.storage.snapshot import SnapshotWatcher
from proxy.storage.traffic_stats import TrafficStats
from proxy.storage.usage import ObservedTraffic, TokenCounts, UsageRecord, believed, cost_of, parse_usage, usage_of
from proxy.storage.usage_writer import UsageWriter

log = logging.getLogger("uniroute.request")

_EMPTY = "it gave an empty answer"

_MAX_DISCARDED = 256 * 1024
"""Bytes of an answer that was thrown away, and is still looked through for its usage."""


@dataclass(frozen=True)
class Books:
    """Where a request is written down."""

    state: SnapshotWatcher
    usage: UsageWriter
    metrics: Metrics
    live: TrafficStats | None


class RequestRecord:
    """One per request. `finish` is synchronous, and only its first call counts."""

    def __init__(
        self,
        books: Books,
        choice: Selection,
        key: ClientKey | None,
        trace: RequestIds,
        started: float,
        marks: AffinityRecorder,
        granted: Reservation | None = None,
    ) -> None:
        """`granted`: what was set aside of the key's limits."""
        self.choice = choice
        self.marks = marks
        self.model = choice.model
        self.reason = choice.reason
        self.overhead_s: float | None = None
        """From the request's arrival to the first upstream call; None: there was none yet."""
        self._books = books
        self._key = key
        self._trace = trace
        self.started = started
        """Monotonic seconds at which the request arrived."""
        self.clamped: int | None = None
        """The limit of an answer that the model asked last was told in place of the caller's."""
        self._granted = granted
        self._received_bytes = 0
        self._reported_bytes = 0
        self._timed_out = False
        self._asked = started
        self._first: float | None = None
        self._counts = TokenCounts()
        self._fault: str | None = None
        self._finished = False
        self._settling: Settling | None = None

    def asking(self, model: str) -> None:
        """`model` is asked now."""
        self._record_failed_attempt()
        self._asked = time.monotonic()
        if self.overhead_s is None:
            self.overhead_s = self._asked - self.started
            self._books.metrics.overhead.observe(self.overhead_s)
        if model != self.choice.model:
            self.reason = "fallback"
        self.model = model
        self._counts, self._first = TokenCounts(), None
        self._received_bytes, self._reported_bytes, self._timed_out = 0, 0, False
        self.clamped = None

    @property
    def has_content(self) -> bool:
        """Whether the model asked last has said anything."""
        return self._first is not None

    def first_content(self) -> None:
        if self._first is None:
            self._first = time.monotonic()

    def used(self, told: object) -> None:
        """Read what a completion or a chunk reports of usage (or `usage` itself): the last report counts.

        It covers what was `received` before. Zeros alone are no report.
        """
        if not isinstance(told, Mapping):
            return
        usage = usage_of(told)
        counts = parse_usage(told if usage is None else usage)
        if counts.prompt_tokens or counts.output_tokens:
            self._counts, self._reported_bytes = counts.after(self._counts), self._received_bytes

    def received(self, content_bytes: int) -> None:
        """So much more of an answer, for the estimate where no usage is reported."""
        self._received_bytes += content_bytes

    def failed(self, failure: UpstreamError) -> None:
        """The model asked last gave no answer, or broke it off."""
        self._timed_out = failure.timed_out
        self.used(_told_in(failure.body))  # an answer that is thrown away was answered, and is paid for
        self._books.metrics.attempts_failed.add((self.model, _status(failure)))
        self._fault = str(failure)

    def empty(self) -> None:
        """The model asked last gave an answer without a word in it."""
        self._books.metrics.attempts_failed.add((self.model, "empty"))
        self._fault = _EMPTY

    def _record_failed_attempt(self) -> None:
        """Nothing of the model asked last will be relayed: it is recorded by itself."""
        fault, self._fault = self._fault, None
        if fault is None:
            return
        self._record("empty" if fault is _EMPTY else "failed")
        request, decision = self._trace.request_id, self.choice.id
        log.warning("request=%s decision=%s model=%s passed over: %s", request, decision, self.model, fault)

    def finish(self, ending: str) -> None:
        if self._finished:
            return
        self._finished = True
        entry = self._record(ending, self._granted)
        metrics = self._books.metrics
        model = (self.model,)
        metrics.requests.add((self.model, self.reason, ending))
        metrics.seconds.observe(entry.seconds, model)
        if entry.first_token_s is not None:
            metrics.first_token.observe(entry.first_token_s, model)
        if ending == "complete":
            self._observe_live()
            self.marks.finish(self.model, self._believed().whole)
        self._log(entry)

    async def settled(self) -> None:
        """Return once the key's next request is judged by what this one took, or that has been waited for in vain."""
        if self._settling is not None and self._granted is not None:
            await asyncio.wait({self._settling}, timeout=self._granted.wait_s)

    def headers(self) -> dict[str, str]:
        return {
            "x-uniroute-model": self.model,
            "x-uniroute-decision": self.choice.id,
            "x-uniroute-reason": self.reason,
            "x-uniroute-overhead-ms": self._overhead_ms(),
            **({} if self.clamped is None else {"x-uniroute-max-tokens": str(self.clamped)}),
            **(self._granted.headers if self._granted else {}),
        }

    def _overhead_ms(self) -> str:
        return f"{(self.overhead_s or 0.0) * 1000:.2f}"

    def _told(self) -> str:
        return "" if self.clamped is None else f" max_tokens={self.choice.needs.max_output_tokens}>{self.clamped}"

    def _record(self, ending: str, granted: Reservation | None = None) -> UsageRecord:
        """`granted`: settled with this record. Models that were passed over leave it to the one that answers."""
        now = time.monotonic()
        live_price = self._books.state.current.prices.get(self.model)
        counts, received = self._believed(), self._received()
        billed = self._may_be_billed(ending)
        cost = cost_of(counts, live_price.price if live_price else None, received, billed=billed)
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
            cost_usd=cost.usd,
            seconds=now - self.started,
            first_token_s=None if self._first is None else self._first - self.started,
            reservation=granted.reservation if granted else None,
            estimated=cost.estimated,
            cache_write_tokens=counts.written_tokens,
            audio_input_tokens=counts.audio_input_tokens,
            audio_output_tokens=counts.audio_output_tokens,
        )
        self._books.usage.record(entry)
        if granted:
            self._settling = granted.used(counts.whole if billed else (counts.whole or 0), entry.cost_picousd)
        self._count_tokens(entry)
        return entry

    def _received(self) -> ObservedTraffic:
        came = self._received_bytes
        return ObservedTraffic(self.choice.needs.prompt_tokens, came, came - self._reported_bytes, self.has_content)

    def _believed(self) -> TokenCounts:
        return believed(self._counts, self._received())

    def _may_be_billed(self, ending: str) -> bool:
        """Whether the model asked last began, as far as is known. One that was never asked did not."""
        if self.overhead_s is None or ending == "busy":
            return False
        if ending in ("client_gone", "shutdown") and self._fault is not None and not self.has_content:
            return self._timed_out  # it had failed already, and the request was cut before another was asked
        return ending != "failed" or self._timed_out

    def _count_tokens(self, entry: UsageRecord) -> None:
        metrics = self._books.metrics
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

    def _observe_live(self) -> None:
        """How long real answers of this model are in these clusters, for the decisions to come."""
        decision = self.choice.decision
        if self._books.live is None or decision is None or decision.assignment is None:
            return
        over, seconds = decision.assignment, time.monotonic() - self._asked
        self._books.live.observe(self.model, over.ids[0], over.weights[0], self._believed().output_tokens, seconds)

    def _log(self, entry: UsageRecord) -> None:
        cost = "?" if entry.cost_usd is None else f"{entry.cost_usd:.8f}"
        first = "-" if entry.first_token_s is None else f"{entry.first_token_s:.3f}"
        info(
            log,
            f"request={self._trace.request_id} decision={entry.decision} model={entry.model} reason={entry.reason}"
            f" ending={entry.ending} key={entry.key_id or '-'}"
            f" tokens={entry.prompt_tokens or '?'}+{entry.output_tokens or '?'} cost_usd={cost}"
            f" overhead_ms={self._overhead_ms()} first_s={first} seconds={entry.seconds:.3f}{self._told()}",
        )


def _told_in(body: Mapping[str, Any] | list[Any] | bytes | None) -> object:
    """What a model said that was no answer for the caller, where it is JSON and speaks of usage."""
    if not isinstance(body, bytes):
        return body
    if len(body) > _MAX_DISCARDED or b'"usage' not in body:
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _status(failure: UpstreamError) -> str:
    return "timeout" if failure.timed_out else str(failure.status or "unreachable")
