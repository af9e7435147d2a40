"""The health of the registered models as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from proxy.health.health import ModelHealth
from proxy.recording.metrics import Metrics


class HealthCollector(Collector):
    """Labels are registered models alone, so that the series of a removed one are gone."""

    def __init__(self, metrics: Metrics, health: ModelHealth, known: Callable[[], Collection[str]]) -> None:
        self._metrics = metrics
        self._health = health
        self._known = known
        self._counted: dict[str, int] = {}

    def look(self) -> None:
        resting, opened = self._health.resting(), self._health.opened()
        for model in self._known():
            self._metrics.model_resting.set(float(model in resting), (model,))
            more = opened.get(model, 0) - self._counted.get(model, 0)
            if more > 0:
                self._metrics.breaker_opened.add((model,), more)
        self._counted = opened

    def collect(self) -> Iterator[Metric]:
        known = sorted(self._known())
        yield self._metrics.model_resting.family(known)
        yield self._metrics.breaker_opened.family(known)
