"""The health of the registered models as Prometheus metrics, read when they are asked for. Keeps no series itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.health.health import ModelHealth


class HealthCollector(Collector):
    """Labels are registered models alone, so that the series of a removed one are gone."""

    def __init__(self, health: ModelHealth, known: Callable[[], Collection[str]]) -> None:
        self._health = health
        self._known = known

    def collect(self) -> Iterator[Metric]:
        models, resting, opened = sorted(self._known()), self._health.resting(), self._health.opened()
        gauge = GaugeMetricFamily("uniroute_model_resting", "1 while the model is not asked", labels=["model"])
        counter = CounterMetricFamily(
            "uniroute_breaker_opened", "Times that this process found a model failing", labels=["model"]
        )
        for model in models:
            gauge.add_metric([model], float(model in resting))
            counter.add_metric([model], opened.get(model, 0))
        yield from (gauge, counter)
