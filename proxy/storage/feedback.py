"""What callers say of answers, and the labels that this makes per model and cluster.

uniroute:decisions:feedback       decision → what was said of it last, with the labels that it made
uniroute:observed:<model>         `n:` and `e:<cluster>`: labels, and the errors among them; `since`, `half_life`, `for`
uniroute:observed:<model>:keys    <key>:<cluster>, labels
uniroute:feedback:<key>           calls of a key in the current minute
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from proxy.storage.decisions import FEEDBACK
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Availability, Store, StoreUnavailable, awaited, load_script
from router_core.profiles import Profile
from router_core.types import Doubles

log = logging.getLogger("uniroute.feedback")

OBSERVED: Final = "uniroute:observed"

_CALLS: Final = "uniroute:feedback"

_GIVE = load_script(__package__, "give_feedback")

REFRESH_INTERVAL_S = 15.0

# With fewer labels measured and observed rates are not compared.
MIN_LABELS = 20.0

# Each look is a test of its own: an ordinary level would flag one model in twenty that is as measured.
MAX_P = 0.001

TEST = "two-proportion z-test, two-sided"


@dataclass(frozen=True, slots=True)
class FeedbackLimits:
    half_life_s: float
    labels_per_key: float
    """Labels, decayed, that one key may have of one model and cluster."""
    calls_per_minute: int
    """Of one key."""
    ttl_s: int


@dataclass(frozen=True, slots=True)
class Labels:
    """What one piece of feedback makes of the model that answered."""

    belongs_to: str
    """The map and the parameters of the model: labels of others are not mixed with these."""
    error: float
    clusters: Mapping[int, float]
    """Cluster → weight of the prompt."""


def owner_of(map_id: str, fingerprint: str) -> str:
    """Return what labels belong to."""
    return f"{map_id} {fingerprint}"


class FeedbackStore:
    """Count feedback, in one atomic script. Raises StoreUnavailable."""

    def __init__(self, store: Store, limits: FeedbackLimits) -> None:
        self._store = store
        self._limits = limits
        self._give = store.client.register_script(_GIVE)

    async def give(
        self, decision: str, model: str, key: str, said: Mapping[str, Any] | None, labels: Labels | None
    ) -> float | None:
        """Replace what was said of a decision; return how many labels that counts as.

        Args:
            key: who says it.
            said: what is kept with the decision; None takes back what was said.
            labels: None: the model's error rates are left alone.

        Returns:
            None: the key has called too often in this minute.
        """
        limits, owner = self._limits, labels.belongs_to if labels else ""
        pairs = [part for cluster, weight in (labels.clusters if labels else {}).items() for part in (cluster, weight)]
        async with self._store.operation("count the feedback"):
            counted = await self._give(
                keys=[FEEDBACK, f"{OBSERVED}:{model}", f"{OBSERVED}:{model}:keys", f"{_CALLS}:{key}"],
                args=[
                    *(decision, json.dumps(said) if said else "", key, limits.calls_per_minute, limits.ttl_s),
                    *(owner, labels.error if labels else 0, limits.half_life_s, limits.labels_per_key),
                    *pairs,
                ],
            )
        return None if counted == -1 else float(counted)

    async def observed(self, record: ModelRecord, map_id: str, clusters: int) -> ObservedErrors | None:
        """Return what was observed of a model as it is now; None if that is nothing."""
        async with self._store.operation("read the feedback") as client:
            stored = await awaited(client.hgetall(f"{OBSERVED}:{record.name}"))
        return parse_observed(stored, owner_of(map_id, record.fingerprint), clusters, time.time())


@dataclass(frozen=True, eq=False)
class ObservedErrors:
    """Labels of live answers by cluster, each (K,), decayed up to now."""

    labels: Doubles
    error_sums: Doubles

    def blend_into(self, profile: Profile) -> Profile:
        """Return the profile with these labels added to the measured ones."""
        labels, error_sums = profile.labels + self.labels, profile.error_sums + self.error_sums
        stated = profile.stated_rates
        if stated is not None:
            stated = np.where(labels > 0, np.clip(error_sums / np.maximum(labels, 1e-9), 0.0, 1.0), stated)
        return replace(profile, labels=labels, error_sums=error_sums, stated_rates=stated)


def parse_observed(stored: Mapping[str, str], owner: str, clusters: int, now: float) -> ObservedErrors | None:
    """Read a model's hash; None if it is of another map or other parameters, or holds no number of ours."""
    if stored.get("for") != owner:
        return None
    try:
        shrunk = 2.0 ** ((float(stored["since"]) - now) / float(stored["half_life"]))
        columns = np.zeros((2, clusters))
        for name, amount in stored.items():
            kind, _, cluster = name.partition(":")
            if cluster:
                columns["ne".index(kind), int(cluster)] = float(amount) * shrunk
    except (ValueError, KeyError, IndexError, ArithmeticError):
        return None
    if not np.isfinite(columns).all():
        return None
    labels = np.maximum(columns[0], 0.0)
    return ObservedErrors(labels, np.clip(columns[1], 0.0, labels)) if labels.any() else None


class ObservedProfiles:
    """What was observed of every model, read now and then for `feedback: adapt`. One per process.

    The snapshot watcher builds it in when `changes` has moved, and never more often than it does for live traffic.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stored: dict[str, dict[str, str]] = {}
        self._availability = Availability(log)
        self.changes = 0

    def blend_into(self, record: ModelRecord, profile: Profile) -> Profile:
        stored = self._stored.get(record.name, {})
        owner = owner_of(profile.map_id, record.fingerprint)
        observed = parse_observed(stored, owner, len(profile.labels), time.time())
        return profile if observed is None else observed.blend_into(profile)

    async def run(self, models: Callable[[], Collection[str]]) -> None:
        while True:
            try:
                await self.refresh(models())
                self._availability.mark_available()
            except StoreUnavailable as error:
                self._availability.mark_unavailable(f"what was observed of models stays as it is: {error}")
            await asyncio.sleep(REFRESH_INTERVAL_S)

    async def refresh(self, models: Collection[str]) -> None:
        """Read all models. Raise StoreUnavailable."""
        async with self._store.operation("read the feedback") as client:
            reading = client.pipeline(transaction=False)
            for name in models:
                reading.hgetall(f"{OBSERVED}:{name}")
            found = await reading.execute()
        stored = {name: fields for name, fields in zip(models, found, strict=True) if fields}
        if stored != self._stored:
            self._stored = stored
            self.changes += 1


def comparison(profile: Profile, observed: ObservedErrors) -> dict[str, Any]:
    """Compare measured and observed error rates over the clusters that the feedback is of.

    The measured rate is that of the same mix of clusters, with the effective number of labels of such a weighted mean:
    1 / Σ (w² / n).
    """
    labels, errors = float(observed.labels.sum()), float(observed.error_sums.sum())
    weights = observed.labels / labels
    rates = profile.errors()
    measured, rate = float(weights @ rates), errors / labels
    known = profile.labels > 0
    variance = float((weights[known] ** 2 / profile.labels[known]).sum())
    measured_labels = 1.0 / variance if variance > 0 and float(weights[known].sum()) > 0.5 else 0.0
    p = None
    if labels >= MIN_LABELS and measured_labels > 0:
        p = two_proportion_p(rate, labels, measured, measured_labels)
    return {
        "labels": labels,
        "mean_error": rate,
        "measured_mean_error": measured,
        "test": TEST,
        "p": p,
        "differs": None if p is None else p < MAX_P,
        "clusters": [
            {"id": row, "labels": count, "error": wrong / count, "measured_error": rates[row]}
            for row, (count, wrong) in enumerate(
                zip(observed.labels.tolist(), observed.error_sums.tolist(), strict=True)
            )
            if count > 0
        ],
    }


def two_proportion_p(first: float, first_count: float, second: float, second_count: float) -> float:
    """Return the p-value of the pooled two-proportion z-test; 1 where both rates are 0 or both are 1."""
    pooled = (first * first_count + second * second_count) / (first_count + second_count)
    variance = pooled * (1 - pooled) * (1 / first_count + 1 / second_count)
    return 1.0 if variance <= 0 else math.erfc(abs(first - second) / math.sqrt(2 * variance))
