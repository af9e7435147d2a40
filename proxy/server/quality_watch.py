"""Watch what feedback says of the models, for those who do not look at the page: a metric, and a line in the log."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Metric

from proxy.server.metrics import FastGauge, FastMetric, PartsCollector, Values
from proxy.storage.feedback import FeedbackStore, Observed, comparison, finding, in_words
from proxy.storage.redis import Availability, StoreUnavailable
from proxy.storage.snapshot import RoutingSnapshot, SnapshotWatcher

log = logging.getLogger("uniroute.quality")

INTERVAL_S = 60.0

# Of several processes one writes the line, and again after so long.
TOLD_S = 86_400


class QualityWatch(PartsCollector):
    """Compare now and then what is observed of every model with what was measured. One per process."""

    def __init__(self, feedback: FeedbackStore, snapshots: SnapshotWatcher, values: Values) -> None:
        """`values`: those that workers share."""
        self._feedback = feedback
        self._snapshots = snapshots
        self._availability = Availability(log)
        self._worse = FastGauge(
            "uniroute_model_observed_worse",
            "1 while feedback says that a model became worse, or is worse than measured; of several workers, by any",
            ["model"],
            combine=max,
            values=values,
        )

    @property
    def parts(self) -> Sequence[FastMetric]:
        return (self._worse,)

    def refresh(self) -> None:
        """Forget models that are gone. One that was not compared yet is shown as fine: a series must not come late."""
        profiles = self._snapshots.current.profiles
        self._worse.keep(profiles)
        compared = {labels[0] for labels, series in self._worse.own().items() if not math.isnan(series.numbers[0])}
        for name in profiles.keys() - compared:
            self._worse.set(0, (name,))

    def collect(self) -> Iterator[Metric]:
        self.refresh()
        yield self._worse.family(sorted(self._snapshots.current.profiles))

    async def run(self) -> None:
        while True:
            try:
                await self.look()
                self._availability.mark_available()
            except StoreUnavailable as error:
                self._availability.mark_unavailable(f"what feedback says of models is not known: {error}")
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Compare all models once. Raises StoreUnavailable."""
        snapshot = self._snapshots.current
        records = [snapshot.models[name] for name in snapshot.profiles]
        cluster_map = snapshot.cluster_map
        observed = await self._feedback.observed_of_all(records, cluster_map.id, cluster_map.size)
        findings = await asyncio.to_thread(_findings, snapshot, observed)
        for record in records:
            found = findings.get(record.name)
            self._worse.set(float(found is not None and "worse" in found[0]), (record.name,))
        for name, (found_, words) in findings.items():
            if await self._feedback.tell_once(name, found_, TOLD_S):
                log.warning("model %s %s by feedback: %s", name, found_, words)


def _findings(snapshot: RoutingSnapshot, observed: Mapping[str, Observed]) -> dict[str, tuple[str, str]]:
    """Return what is found of each model of which something is, and by which figures."""
    found = {}
    for name, each in observed.items():
        figures = comparison(snapshot.profiles[name], each)
        if (what := finding(figures)) is not None:
            found[name] = what, in_words(figures)
    return found
