"""The health of the registered models as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from proxy.recording.series import Counted, Level
from proxy.recording.values import Values
from proxy.upstream.health import ModelHealth


class HealthCollector(Collector):
    """Labels are registered models alone, so that the series of a removed one are gone."""

    def __init__(self, health: ModelHealth, known: Callable[[], Collection[str]], values: Values | None = None) -> None:
        """`values`: those that workers share."""
        values = values or Values()
        self._health = health
        self._known = known
        self._resting = Level(
            "uniroute_model_resting",
            "1 while the model is not asked; of several workers, by any of them",
            ["model"],
            combine=max,
            values=values,
        )
        self._opened = Counted(
            "uniroute_breaker_opened", "Times that a process found a model failing", ["model"], values=values
        )
        self._counted: dict[str, int] = {}

    def look(self) -> None:
        resting, opened = self._health.resting(), self._health.opened()
        for model in self._known():
            self._resting.set(float(model in resting), (model,))
            more = opened.get(model, 0) - self._counted.get(model, 0)
            if more > 0:
                self._opened.add((model,), more)
        self._counted = opened

    def collect(self) -> Iterator[Metric]:
        self.look()
        known = sorted(self._known())
        yield self._resting.family(known)
        yield self._opened.family(known)
