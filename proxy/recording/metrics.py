"""Counters and histograms for Prometheus. Labels are registered models, reasons and endings: nothing a caller wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest

from proxy.log_lines import lines_dropped
from proxy.recording.series import Counted, Distribution, Level
from proxy.recording.values import Values

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OVERHEAD = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One registry per app, so that two apps in a process do not share counts. Workers share `values`."""

    def __init__(self, values: Values | None = None) -> None:
        self.registry = CollectorRegistry()
        self.values = values or Values()
        self._looking: list[Callable[[], None]] = []
        self.requests = self._counter("requests", "Requests by who answered, why and how it ended", "reason", "ending")
        self.attempts_failed = self._counter("upstream_failures", "Upstream attempts that failed", "status")
        self.tokens = self._counter("tokens", "Tokens that upstreams reported", "kind")
        self.cost = self._counter("cost_usd", "Cost at the live price")
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
        self.limited = self._total("limited", "Requests refused by a limit of their key", "limit")
        self.limits_unchecked = self._total(
            "limits_unchecked", "Requests of limited keys while Redis did not answer: local, refused or open", "outcome"
        )
        self.errors = self._total("errors", "Responses that were errors, by status", "status")
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
            "overhead_seconds", "From the request's arrival to the upstream call", _OVERHEAD
        )
        self.first_token = self._histogram("time_to_first_chunk_seconds", "Until the first content", _SECONDS, "model")
        self.seconds = self._histogram("request_seconds", "Until the end", _SECONDS, "model")
        self._lines_dropped = self._total("log_lines_dropped", "Log lines dropped: nobody read standard error")
        self._lines_told = 0
        self.registry.register(worker_deaths(self.values))
        self.look_at(self._look)

    def look_at(self, look: Callable[[], None]) -> None:
        """Have `look` write down what is only known by looking: before each scrape, and now and then for others'."""
        self._looking.append(look)

    def look(self) -> None:
        for look in self._looking:
            look()

    def expose(self) -> bytes:
        self.look()
        self.values.refresh()
        return generate_latest(self.registry)

    def _look(self) -> None:
        self._in_flight.set(self.in_flight)
        dropped = lines_dropped()
        self._lines_dropped.inc(max(0, dropped - self._lines_told))
        self._lines_told = dropped

    def _total(self, name: str, text: str, *labels: str) -> Counted:
        counter = Counted(f"uniroute_{name}", text, labels, values=self.values)
        self.registry.register(counter)
        return counter

    def _counter(self, name: str, text: str, *labels: str) -> Counted:
        """Of a model, first of all; written with every request."""
        return self._total(name, text, "model", *labels)

    def _gauge(self, name: str, text: str, combine: Callable[[Iterable[float]], float] = sum) -> Level:
        gauge = Level(f"uniroute_{name}", text, combine=combine, values=self.values)
        self.registry.register(gauge)
        return gauge

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Distribution:
        histogram = Distribution(f"uniroute_{name}", text, labels, buckets, values=self.values)
        self.registry.register(histogram)
        return histogram


def worker_deaths(values: Values) -> Counted:
    """Counted by the supervisor, shown by the workers."""
    text = "Worker processes that died and were started again, by signal, status, or that they gave no sign of life"
    return Counted("uniroute_worker_deaths", text, ["cause"], values=values)
