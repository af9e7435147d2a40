from __future__ import annotations

import contextlib
import json
import logging
import time
from binascii import b2a_base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from proxy.errors import UpstreamError
from proxy.routing.affinity import Affinity, AffinityRecorder
from proxy.routing.requirements import estimate_document_tokens, routing_text
from proxy.routing.selection import Selection
from proxy.routing.trajectory import NO_TRAJECTORY, Trajectory
from proxy.server.dependencies import RequestContext
from proxy.server.log_handler import info
from proxy.server.reservations import Reservation, Settlement
from proxy.storage.client_keys import MAX_TAGS
from proxy.storage.decisions import AttemptRecord, attempt_row
from proxy.storage.redis import StoreUnavailable
from proxy.storage.usage import (
    NOTHING_REPORTED,
    ObservedTraffic,
    TokenCounts,
    UsageRecord,
    cost_of,
    parse_usage,
    plausible_usage,
    usage_of,
)
from proxy.upstream.payload import content_bytes
from router_core.decision import RoutingDecision
from router_core.types import Doubles, Indices, frozen

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
        self.trajectory = affinity.trajectory
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
        self._counts = NOTHING_REPORTED
        self._fault: str | None = None
        self._finished = False
        self._ending = ""
        self._settlement: Settlement | None = None
        self.request_id = ctx.ids.request_id
        self.trace = ctx.trace
        self._attempts: list[AttemptRecord] = []
        # What the attempts cost that gave no answer; None: not known of one of them.
        self._failed_usd: float | None = 0.0
        self._costs: Costs | None = None

    def start_attempt(self, model: str) -> None:
        """Count for another attempt from now on. The one before, if it failed, gets a usage record of its own."""
        if self._fault is not None:
            self._record_failed_attempt(self._fault)
        self._attempted_at = time.monotonic()
        if self.overhead_s is None:
            self.overhead_s = self._attempted_at - self._ctx.received_at
            self._ctx.app.metrics.overhead.observe(self.overhead_s)
        self._ctx.app.metrics.attempts.add((model,))
        if model != self.selection.model:
            self.reason = "fallback"
        self.model = model
        self._attempts.append(AttemptRecord(model, self._attempted_at - self._ctx.received_at))
        self._counts, self._first_content_at = NOTHING_REPORTED, None
        self._output_bytes, self._reported_bytes, self._timed_out = 0, 0, False
        self.clamped, self.left_out, self.native_document = None, (), None
        if self.trace is not None:
            self.trace.start_attempt(self._ctx, model)

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
            if self.trace is not None:
                self.trace.event("uniroute.first_content")

    def observe(self, chunk: Mapping[str, Any]) -> tuple[int, Any]:
        """Record what a chunk adds to the answer, and return the bytes of its text, and the usage that it reports."""
        self.affinity.observe(chunk, self.model)
        size = content_bytes(chunk)
        # A report covers all output up to and with its own chunk.
        self._output_bytes += size
        if usage := usage_of(chunk):
            self.set_usage(usage)
        return size, usage

    def observe_completion(self, body: Mapping[str, Any]) -> None:
        """Record a whole answer."""
        self.affinity.observe_completion(body, self.model)
        self._output_bytes += content_bytes(body)
        self.set_usage(body)

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
        status = _status(failure)
        self._ctx.app.metrics.attempts_failed.add((self.model, status))
        self._fault = str(failure)
        self._end_attempt("failed", status)

    def mark_empty(self) -> None:
        """Note that the last attempt gave an answer without content."""
        self._ctx.app.metrics.attempts_failed.add((self.model, "empty"))
        self._fault = _EMPTY
        self._end_attempt("empty")

    def _end_attempt(self, outcome: str, status: str | None = None) -> None:
        """Note how the last attempt ended, unless that is noted already."""
        if self._attempts and (last := self._attempts[-1]).outcome is None:
            last.outcome, last.status, last.ended_s = outcome, status, time.monotonic() - self._ctx.received_at

    def finish(self, ending: str) -> None:
        """Write everything down, at the first call; later calls are ignored."""
        if self._finished:
            return
        self._finished, self._ending = True, ending
        self._end_attempt(ending)
        entry = self._write_usage(ending, self._reservation, is_last=True)
        metrics = self._ctx.app.metrics
        model = (self.model,)
        metrics.requests.add((self.model, self.reason, ending))
        metrics.requests_by_api.add((self._ctx.api,))
        metrics.seconds.observe(entry.seconds, model)
        if entry.first_token_s is not None:
            metrics.first_token.observe(entry.first_token_s, model)
        if ending == "complete":
            self._observe_traffic(entry.output_tokens)
            self.affinity.commit(self.model, entry.total_tokens)
        if self.trace is not None:
            self.trace.finish(self._ctx, self.model, entry, self._facts)
        self._log(entry)

    async def wait_until_settled(self) -> None:
        """Wait until the key's limits include what this request used, or until that takes too long."""
        settlement, reservation = self._settlement, self._reservation
        if settlement is None or reservation is None or settlement.done():
            return
        with contextlib.suppress(StoreUnavailable, TimeoutError), self._ctx.app.deadlines.within(reservation.wait_s):
            await settlement

    def headers(self) -> dict[str, str]:
        """Return the response headers about the decision and about the key's limits."""
        headers = {
            "x-uniroute-model": self.model,
            "x-uniroute-decision": self.selection.id,
            "x-uniroute-reason": self.reason,
            "x-uniroute-overhead-ms": self.overhead_ms(),
        }
        if self.clamped is not None:
            headers["x-uniroute-max-tokens"] = str(self.clamped)
        if self.left_out:
            headers["x-uniroute-left-out"] = _header_list(self.left_out)
        if self._reservation is not None:
            headers |= self._reservation.headers
        return headers

    def metadata(self) -> dict[str, Any]:
        """Return what an answer says of itself where its request asks for it. To be called after `finish`."""
        costs = self._costs
        return {
            "decision": self.selection.id,
            "model": self.model,
            "reason": self.reason,
            "expected_error": self._expected()[0],
            "cost_usd": costs.usd if costs else None,
            "saved_usd": costs.saved_usd if costs else None,
        }

    def _expected(self) -> tuple[float | None, float | None]:
        """Return the error, and the cost in USD, that were expected of the answer. None: the model was not scored."""
        decision = self.selection.decision
        if decision is None or self.model not in decision.table.names:
            return None, None
        row = list(decision.table.names).index(self.model)
        return float(decision.table.errors[row]), float(decision.table.costs_usd[row])

    def _facts(self) -> dict[str, Any]:
        """Return what a trace says of the decision. To be called after `finish`."""
        error, usd = self._expected()
        return {
            **self.metadata(),
            "expected_error": error,
            "expected_cost_usd": usd,
            "lambda": self.selection.lambda_,
            "ending": self._ending,
            "degraded": self.selection.degraded_reason,
            "overhead_ms": (self.overhead_s or 0.0) * 1000,
            "key.id": self._ctx.key.id if self._ctx.key else None,
            "tags": tags_of(self._ctx),
        }

    def overhead_ms(self) -> str:
        return f"{(self.overhead_s or 0.0) * 1000:.2f}"

    def _record_failed_attempt(self, fault: str) -> None:
        """Write a usage record for the last attempt alone, which failed: the client gets nothing of it."""
        failed_usd = self._write_usage("empty" if fault is _EMPTY else "failed").cost_usd
        self._fault = None
        self._failed_usd = add_known(self._failed_usd, failed_usd)
        fields = {"request": self.request_id, "decision": self.selection.id, "model": self.model}
        facts = " ".join(f"{name}={value}" for name, value in fields.items())
        log.warning("%s passed over: %s", facts, fault, extra={"fields": fields})

    def _write_usage(
        self, ending: str, reservation: Reservation | None = None, *, is_last: bool = False
    ) -> UsageRecord:
        """Write the usage record of the last attempt.

        Args:
            reservation: settled with this record; None for an attempt that is followed by another, whose record
                settles it.
            is_last: no other attempt follows: the decision is kept with this record.
        """
        app = self._ctx.app
        price = app.snapshots.current.prices.get(self.model)
        observed = self._observed()
        counts = plausible_usage(self._counts, observed)
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
            tags=tags_of(self._ctx),
        )
        detail = ""
        if is_last:
            keep = app.usage.takes_decision()
            is_told = self._ctx.request.options.metadata or (self.trace is not None and self.trace.is_sampled)
            if keep or is_told:
                self._costs = self._compare(cost.usd, counts, observed, billed=billed)
                self._count_savings(self._costs)
                if keep:
                    detail = decision_detail(self._ctx, self.selection, self._attempts, self._costs, self.trajectory)
        app.usage.record(entry, detail)
        if reservation:
            self._settlement = reservation.settle(counts.total if billed else (counts.total or 0), entry.cost_picousd)
        self._count_tokens(entry)
        if self.trace is not None and self._attempts:
            self.trace.end_attempt(entry, self._attempts[-1], first_content_at, self._fault)
        return entry

    def _compare(self, usd: float | None, counts: TokenCounts, observed: ObservedTraffic, *, billed: bool) -> Costs:
        """Set what the answer cost against what the same tokens would have cost at the baseline."""
        baseline = baseline_of(self._ctx)
        price = self._ctx.app.snapshots.current.prices.get(baseline) if baseline else None
        # A model that answers every turn of a session has the last one in its cache, if that was a moment ago.
        cached = None if baseline == self.model else self.affinity.cached_prompt(self._ctx.app.settings)
        there = counts if cached is None else with_earlier_turn_cached(counts, cached[1])
        baseline_usd = cost_of(there, price.price, observed, billed=billed).usd if price else None
        return Costs(usd, self._failed_usd, baseline, baseline_usd)

    def _observed(self) -> ObservedTraffic:
        size, prompt = self._output_bytes, self.selection.requirements.prompt_tokens
        if self.native_document is not None and self._counts.prompt_tokens is None:
            prompt = max(prompt, estimate_document_tokens(self.native_document))
        return ObservedTraffic(prompt, size, size - self._reported_bytes, self.has_content)

    def _may_be_billed(self, ending: str) -> bool:
        """Whether the model of the last attempt may have begun to answer, and so may bill for it.

        complete, empty, broken                            yes
        busy, or no model was asked                        no
        failed, by a timeout                               yes: the model may have begun
        failed otherwise: refused, not reached, …          no
        client_gone, shutdown, during the attempt          yes
        client_gone, shutdown, after the attempt had       as failed
          failed or was empty, before the next began
        """
        if self.overhead_s is None or ending == "busy":
            return False
        between_attempts = self._fault is not None and not self.has_content
        has_failed = ending == "failed" or (ending in ("client_gone", "shutdown") and between_attempts)
        return self._timed_out or not has_failed

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

    def _count_savings(self, costs: Costs) -> None:
        usd = costs.usd
        if usd is not None and costs.baseline_usd is not None:
            metrics, labels = self._ctx.app.metrics, (self.model,)
            metrics.baseline_cost.add(labels, costs.baseline_usd)
            metrics.compared_cost.add(labels, usd)

    def _observe_traffic(self, output_tokens: int | None) -> None:
        """Add this answer to the length and latency that later decisions expect of the model in these clusters."""
        decision = self.selection.decision
        if decision is None or decision.assignment is None:
            return
        clusters, seconds = decision.assignment, time.monotonic() - self._attempted_at
        self._ctx.app.traffic_stats.observe(self.model, clusters.ids[0], clusters.weights[0], output_tokens, seconds)

    def _log(self, entry: UsageRecord) -> None:
        info(log, RequestLine(self, entry))


class RequestLine:
    """The log line of one request."""

    __slots__ = ("_entry", "_record")

    def __init__(self, record: RequestRecord, entry: UsageRecord) -> None:
        self._record = record
        self._entry = entry

    def __str__(self) -> str:
        record, entry = self._record, self._entry
        cost = "?" if entry.cost_usd is None else f"{entry.cost_usd:.8f}"
        first = "-" if entry.first_token_s is None else f"{entry.first_token_s:.3f}"
        clamped = (
            ""
            if record.clamped is None
            else f" max_tokens={record.selection.requirements.max_output_tokens}>{record.clamped}"
        )
        left_out = f" left_out={_header_list(record.left_out)!r}" if record.left_out else ""
        ids = None if record.trace is None else record.trace.ids
        trace = "" if ids is None else f" trace_id={ids[0]} span_id={ids[1]}"
        return (
            f"request={record.request_id} decision={entry.decision} model={entry.model} reason={entry.reason}"
            f" ending={entry.ending} key={entry.key_id or '-'}"
            f" tokens={entry.prompt_tokens or '?'}+{entry.output_tokens or '?'} cost_usd={cost}"
            f" overhead_ms={record.overhead_ms()} first_s={first} seconds={entry.seconds:.3f}{clamped}{left_out}{trace}"
        )

    def fields(self) -> dict[str, object]:
        record, entry = self._record, self._entry
        fields: dict[str, object] = {
            "request": record.request_id,
            "decision": entry.decision,
            "model": entry.model,
            "reason": entry.reason,
            "ending": entry.ending,
            "key": entry.key_id,
            "prompt_tokens": entry.prompt_tokens,
            "output_tokens": entry.output_tokens,
            "cost_usd": None if entry.cost_usd is None else round(entry.cost_usd, 12),
            "overhead_ms": round((record.overhead_s or 0.0) * 1000, 2),
            "first_s": None if entry.first_token_s is None else round(entry.first_token_s, 6),
            "seconds": round(entry.seconds, 6),
        }
        if record.clamped is not None:
            fields["max_tokens"] = record.clamped
            fields["requested_max_tokens"] = record.selection.requirements.max_output_tokens
        if record.left_out:
            fields["left_out"] = _header_list(record.left_out)
        if record.trace is not None and (ids := record.trace.ids) is not None:
            fields["trace_id"], fields["span_id"] = ids
        return fields


@frozen
class Costs:
    """What a request cost in USD, and would have cost. None: not known."""

    answer_usd: float | None
    """Of the last attempt."""
    failed_usd: float | None
    """Of the attempts before."""
    baseline: str | None
    """The model that would have answered without routing."""
    baseline_usd: float | None
    """What the same tokens cost there."""

    @property
    def usd(self) -> float | None:
        return add_known(self.answer_usd, self.failed_usd)

    @property
    def saved_usd(self) -> float | None:
        usd = self.usd
        return None if usd is None or self.baseline_usd is None else self.baseline_usd - usd


def add_known(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def tags_of(ctx: RequestContext) -> tuple[str, ...]:
    """Return the tags of the key, then those of the request, up to MAX_TAGS of them."""
    own, stated = ctx.key.tags if ctx.key else (), ctx.request.options.tags
    return tuple(dict.fromkeys((*own, *stated)))[:MAX_TAGS] if own and stated else own or stated


def with_earlier_turn_cached(counts: TokenCounts, tokens: int) -> TokenCounts:
    """Return the usage of a model that would have had so many tokens of the prompt in its cache, at least."""
    cached = min(tokens, counts.prompt_tokens or 0)
    return counts if cached <= (counts.cached_tokens or 0) else replace(counts, cached_tokens=cached)


def baseline_of(ctx: RequestContext) -> str | None:
    """Return the model that the client asked for by name, or else the best one on average that it may use."""
    if ctx.request.model in ctx.snapshot.models:
        return ctx.request.model
    usable = None if ctx.key is None or ctx.key.models is None else ctx.key.models
    if usable is not None and ctx.snapshot.efforts:
        usable = tuple(sorted(ctx.snapshot.with_efforts(usable)))
    return ctx.snapshot.pool.best_on_average(usable)


# Of a decision's record.
MAX_CANDIDATES, MAX_INELIGIBLE, MAX_PROMPT_CHARS, MAX_NAME_CHARS = 16, 20, 4000, 128


def decision_detail(
    ctx: RequestContext,
    selection: Selection,
    attempts: Sequence[AttemptRecord],
    costs: Costs,
    trajectory: Trajectory = NO_TRAJECTORY,
) -> str:
    """Return what is kept of a decision beside its usage, as JSON. `storage/decisions.py` reads it."""
    decision, snapshot = selection.decision, ctx.snapshot
    model = snapshot.models.get(attempts[-1].model if attempts else selection.model)
    detail: dict[str, Any] = {
        "request": ctx.ids.request_id,
        "api": ctx.api,
        "requested": ctx.request.model[:MAX_NAME_CHARS],
        "lambda": selection.lambda_,
        "version": snapshot.version,
        "map": snapshot.cluster_map.id,
        "fingerprint": None if model is None else model.fingerprint,
        "chosen_s": selection.made_at - ctx.received_at,
        "attempts": list(map(attempt_row, attempts)),
        "clusters": ((), (), ()),
        "ineligible": {},
        "failed_usd": costs.failed_usd,
        "baseline": costs.baseline,
        "baseline_usd": costs.baseline_usd,
    }
    if decision is not None:
        if (placed := decision.assignment) is not None:
            names = decision.cluster_names
            ids = placed.ids[0].tolist()
            detail["clusters"] = (ids, [names[number] for number in ids], placed.weights[0].tolist())
            detail["cosine"], detail["novel"] = decision.nearest_cosine, decision.is_novel
        if decision.eligibility is not None:
            detail["ineligible"] = decision.eligibility.why_ruled_out(MAX_INELIGIBLE)
        _add_candidates(detail, decision)
    if trajectory.turns:
        detail["trajectory"] = trajectory.to_json()
    if selection.degraded_reason is not None:
        detail["degraded"] = selection.degraded_reason[:MAX_PROMPT_CHARS]
    if selection.lost_affinity is not None:
        detail["lost_affinity"] = selection.lost_affinity
    if ctx.app.settings.log_prompts:
        detail["prompt"] = routing_text(ctx.request.body["messages"])[:MAX_PROMPT_CHARS]
    try:
        return orjson.dumps(detail).decode()
    except TypeError:  # half a character in a name
        return json.dumps(detail)


def _add_candidates(detail: dict[str, Any], decision: RoutingDecision) -> None:
    """Add the models that were scored, the best of them if they are many.

    Their figures are packed: as JSON they would take twice the time.
    """
    table = decision.table
    names: Sequence[str] = table.names
    columns: Sequence[Doubles] = (table.errors, table.costs, table.scores, table.costs_usd)
    if decision.has_doubts:
        columns = (*columns, decision.added)
    if len(names) > MAX_CANDIDATES:
        rows: Indices = np.argpartition(table.scores, MAX_CANDIDATES)[:MAX_CANDIDATES]
        best = rows.tolist()
        if decision.choice not in best:  # within a tie the cheapest is chosen
            best[-1] = rows[-1] = decision.choice
        detail["unlisted"] = len(names) - MAX_CANDIDATES
        columns, names = [column.take(rows) for column in columns], [names[row] for row in best]
    packed = b2a_base64(b"".join([column.tobytes() for column in columns]), newline=False).decode()
    listed = names if type(names) is tuple else list(names)
    detail["candidates"] = {"models": listed, "columns": packed, "tie": decision.tie, "chosen": decision.chosen}


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
