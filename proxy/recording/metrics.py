"""Counters and histograms for Prometheus. Labels are registered models, reasons and endings: nothing a caller wrote."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.log_lines import lines_dropped
from proxy.recording.series import Counted, Distribution

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OVERHEAD = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One registry per app, so that two apps in a process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by who answered, why and how it ended", "reason", "ending")
        self.attempts_failed = self._counter("upstream_failures", "Upstream attempts that failed", "status")
        self.tokens = self._counter("tokens", "Tokens that upstreams reported", "kind")
        self.cost = self._counter("cost_usd", "Cost at the live price")
        self.degraded = self._total("degraded", "Requests routed without looking at the prompt")
        self.usage_dropped = self._total("usage_dropped", "Usage records dropped: neither Redis nor the disk took them")
        self.usage_journal = Gauge(
            "uniroute_usage_journal_bytes", "Usage journals of this process on disk", registry=self.registry
        )
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
        in_flight = Gauge("uniroute_in_flight", "Chat requests being served", registry=self.registry)
        in_flight.set_function(lambda: self.in_flight)
        self.tasks = Gauge("uniroute_tasks", "asyncio tasks of this process", registry=self.registry)
        self.state_version = Gauge(
            "uniroute_state_version", "Version of the routing state in use", registry=self.registry
        )
        self.store_available = Gauge(
            "uniroute_store_available", "1 while the store answers this process", registry=self.registry
        )
        self.overhead = self._histogram(
            "overhead_seconds", "From the request's arrival to the upstream call", _OVERHEAD
        )
        self.first_token = self._histogram("time_to_first_chunk_seconds", "Until the first content", _SECONDS, "model")
        self.seconds = self._histogram("request_seconds", "Until the end", _SECONDS, "model")

        self.registry.register(_LogLines())

    def expose(self) -> bytes:
        return generate_latest(self.registry)

    def _total(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"uniroute_{name}_total", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counted:
        """Of a model, first of all; written with every request."""
        counter = Counted(f"uniroute_{name}", text, ("model", *labels))
        self.registry.register(counter)
        return counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Distribution:
        histogram = Distribution(f"uniroute_{name}", text, labels, buckets)
        self.registry.register(histogram)
        return histogram


class _LogLines(Collector):
    """Of the process, whose standard error it is."""

    def collect(self) -> Iterator[Metric]:
        text = "Log lines of this process dropped: nobody read its standard error"
        yield CounterMetricFamily("uniroute_log_lines_dropped", text, value=lines_dropped())
