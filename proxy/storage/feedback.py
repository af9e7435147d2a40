"""What callers say of answers, and the labels that this makes per model and cluster.

uniroute:decisions:feedback       decision → what was said of it last, with the labels that it made
uniroute:observed:<model>         `n:` and `e:<cluster>`: labels, and the errors among them; `since`, `half_life`, `for`
uniroute:observed:<model>:keys    <key>:<cluster>, labels
uniroute:observed:<model>:hours   `n:`, `e:` and `x:<hour>`: labels, the errors among them, and those expected; `for`
uniroute:observed:<model>:told:…  a finding that was logged within a day
uniroute:feedback:sources         `n:` and `s:<day>:<source>`: decisions, and the sum of their scores
uniroute:feedback:<key>           calls of a key in the current minute

Hours and days are since 1970 (UTC): an hour is that of the answer's end, a day that of the feedback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import numpy as np

from proxy.storage.decisions import FEEDBACK
from proxy.storage.records import ModelRecord
from proxy.storage.redis import Availability, Store, StoreUnavailable, awaited, load_script
from router_core.change_point import TEST as CHANGE_TEST
from router_core.change_point import THRESHOLD, ChangePoint, GradedHours, change_point
from router_core.decision import wilson_interval
from router_core.profiles import Profile
from router_core.text import rfc3339
from router_core.types import Doubles

log = logging.getLogger("uniroute.feedback")

OBSERVED: Final = "uniroute:observed"

_CALLS: Final = "uniroute:feedback"

SOURCES: Final = "uniroute:feedback:sources"

# How long labels are kept by hour, and the volume of feedback by source.
HOURS_KEPT, DAYS_KEPT = 14 * 24, 31

# Fields of SOURCES: two a day and source.
MAX_SOURCE_FIELDS = 4000

NO_SOURCE: Final = "(none)"

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
    expected: float = 0.5
    """The error that was expected of this answer."""
    hour: int = 0
    """When the answer ended: hours since 1970, UTC."""


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
        source = said.get("source") if said else None
        observed = f"{OBSERVED}:{model}"
        pairs = [part for cluster, weight in (labels.clusters if labels else {}).items() for part in (cluster, weight)]
        async with self._store.operation("count the feedback"):
            counted = await self._give(
                keys=[FEEDBACK, observed, f"{observed}:keys", f"{_CALLS}:{key}", f"{observed}:hours", SOURCES],
                args=[
                    *(decision, json.dumps(said) if said else "", key, limits.calls_per_minute, limits.ttl_s),
                    *(owner, labels.error if labels else 0, limits.half_life_s, limits.labels_per_key),
                    *(labels.expected if labels else 0, labels.hour if labels else 0, HOURS_KEPT, DAYS_KEPT),
                    *(MAX_SOURCE_FIELDS, source or NO_SOURCE),
                    *pairs,
                ],
            )
        return None if counted == -1 else float(counted)

    async def observed(self, record: ModelRecord, map_id: str, clusters: int) -> Observed | None:
        """Return what was observed of a model as it is now; None if that is nothing."""
        return (await self.observed_of_all([record], map_id, clusters)).get(record.name)

    async def observed_of_all(
        self, records: Collection[ModelRecord], map_id: str, clusters: int
    ) -> dict[str, Observed]:
        """Return what was observed of each model of which anything was."""
        async with self._store.operation("read the feedback") as client:
            reading = client.pipeline(transaction=False)
            for record in records:
                reading.hgetall(f"{OBSERVED}:{record.name}")
                reading.hgetall(f"{OBSERVED}:{record.name}:hours")
            replies = await reading.execute()
        found = {}
        for record, stored, hours in zip(records, replies[::2], replies[1::2], strict=True):
            owner = owner_of(map_id, record.fingerprint)
            errors = parse_observed(stored, owner, clusters, time.time())
            if errors is not None:
                found[record.name] = Observed(errors, parse_hours(hours, owner))
        return found

    async def tell_once(self, model: str, what: str, for_s: int) -> bool:
        """Return True to one process, once in so many seconds for each thing that is to be told of a model."""
        async with self._store.operation("note what is told of a model") as client:
            return bool(await client.set(f"{OBSERVED}:{model}:told:{what.replace(' ', '-')}", "1", nx=True, ex=for_s))

    async def sources(self) -> list[SourceVolume]:
        """Return how much feedback there was from each source in the last DAYS_KEPT days, the most first."""
        async with self._store.operation("read the feedback") as client:
            stored = await awaited(client.hgetall(SOURCES))
        return parse_sources(stored, int(time.time() // 86_400) - DAYS_KEPT + 1)


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


@dataclass(frozen=True, eq=False)
class HourlyLabels:
    """Labels of live answers by the hour of the answer, ascending; each array is (B,)."""

    hours: tuple[int, ...] = ()
    """Since 1970, UTC."""
    labels: Doubles = field(default_factory=lambda: np.zeros(0))
    error_sums: Doubles = field(default_factory=lambda: np.zeros(0))
    expected_sums: Doubles = field(default_factory=lambda: np.zeros(0))

    def since(self, hour: int) -> HourlyLabels:
        """Leave out what is before an hour."""
        first = int(np.searchsorted(np.array(self.hours, dtype=np.int64), hour))
        columns = (self.labels[first:], self.error_sums[first:], self.expected_sums[first:])
        return HourlyLabels(self.hours[first:], *columns)

    @property
    def total(self) -> GradedHours:
        return GradedHours(float(self.labels.sum()), float(self.error_sums.sum()), float(self.expected_sums.sum()))

    def change(self) -> ChangePoint | None:
        """Return the change that is certain; None: none is."""
        found = change_point(self.hours, self.labels, self.error_sums, self.expected_sums)
        return found if found is not None and found.is_certain else None

    def grouped(self, hours: int) -> list[tuple[int, GradedHours]]:
        """Return the labels of so many hours together, each with its first hour; those without labels are left out."""
        sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        columns = (self.labels.tolist(), self.error_sums.tolist(), self.expected_sums.tolist())
        for hour, *amounts in zip(self.hours, *columns, strict=True):
            total = sums[hour // hours * hours]
            for place, amount in enumerate(amounts):
                total[place] += amount
        return [(hour, GradedHours(*total)) for hour, total in sorted(sums.items())]


@dataclass(frozen=True, eq=False)
class Observed:
    """What was observed of one model as it is now."""

    errors: ObservedErrors
    hourly: HourlyLabels = field(default_factory=HourlyLabels)


def parse_hours(stored: Mapping[str, str], owner: str) -> HourlyLabels:
    """Read a model's hash of hours; empty if it is of another map or other parameters, or holds no number of ours."""
    if stored.get("for") != owner:
        return HourlyLabels()
    found: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    try:
        for name, amount in stored.items():
            kind, _, hour = name.partition(":")
            if hour:
                found[int(hour)]["nex".index(kind)] = float(amount)
    except (ValueError, IndexError):
        return HourlyLabels()
    hours = tuple(sorted(hour for hour, (labels, _, _) in found.items() if labels > 0))
    columns = np.array([found[hour] for hour in hours]).reshape(len(hours), 3).T
    if not np.isfinite(columns).all():
        return HourlyLabels()
    return HourlyLabels(hours, columns[0], *(np.clip(each, 0.0, columns[0]) for each in columns[1:]))


@dataclass(frozen=True, slots=True)
class SourceVolume:
    """The feedback of one source."""

    source: str
    decisions: float
    mean_score: float
    last_day: int
    """Since 1970, UTC."""


def parse_sources(stored: Mapping[str, str], first_day: int) -> list[SourceVolume]:
    """Read SOURCES from a day on, without fields that are none of ours."""
    counts: defaultdict[str, float] = defaultdict(float)
    scores: defaultdict[str, float] = defaultdict(float)
    last: dict[str, int] = {}
    for name, text in stored.items():
        try:
            kind, day, source = name.split(":", 2)
            amount = float(text)
            if int(day) < first_day or not math.isfinite(amount):
                continue
            {"n": counts, "s": scores}[kind][source] += amount
            last[source] = max(last.get(source, 0), int(day))
        except (ValueError, KeyError):
            continue
    volumes = [
        SourceVolume(source, count, min(scores[source] / count, 1.0), last[source])
        for source, count in counts.items()
        if count > 0
    ]
    return sorted(volumes, key=lambda each: (-each.decisions, each.source))


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


def comparison(profile: Profile, observed: Observed) -> dict[str, Any]:
    """Compare what was observed of a model with what was measured.

    Counted are the labels of answers that were given after the model was measured, at most HOURS_KEPT hours old; if the
    model changed meanwhile, those since. The measured rate is that which was expected of the same answers. It has the
    effective number of labels of such a weighted mean, 1 / Σ (w² / n), of the clusters that the feedback is of.
    """
    hourly = observed.hourly.since(_first_hour(profile.measured_at))
    change = hourly.change()
    current = hourly.since(change.hour) if change else hourly
    total = current.total
    measured_labels = _measured_labels(profile, observed.errors.labels)
    p = None
    if total.labels >= MIN_LABELS and measured_labels > 0:
        p = two_proportion_p(total.rate, total.labels, total.expected_rate, measured_labels)
    return {
        "since": _rfc3339_of(current.hours[0]) if current.hours else None,
        **graded(total, measured_labels),
        "test": TEST,
        "p": p,
        "differs": None if p is None else p < MAX_P,
        "change": None if change is None else _change_to_json(change),
        "clusters": _compared_clusters(profile, observed.errors),
    }


def finding(figures: Mapping[str, Any]) -> str | None:
    """Return what a comparison finds: became worse, became better, worse than measured, better than measured.

    Returns:
        None: nothing, or it has too few labels.
    """
    if (change := figures["change"]) is not None:
        return "became worse" if change["worse"] else "became better"
    if not figures["differs"]:
        return None
    return f"{'worse' if figures['mean_error'] > figures['measured_mean_error'] else 'better'} than measured"


def in_words(figures: Mapping[str, Any]) -> str:
    """Say by which figures there is a finding."""
    if (change := figures["change"]) is not None:
        before, after = change["before"], change["after"]
        since = change["since"][:16].replace("T", " ")
        return (
            f"Since {since} UTC {after['mean_error']:.0%} of its answers are graded wrong"
            f" ({after['labels']:.0f} labels), and before {before['mean_error']:.0%} ({before['labels']:.0f} labels);"
            f" of these prompts {after['measured_mean_error']:.0%} and {before['measured_mean_error']:.0%} were"
            f" expected. The root of the likelihood ratio is {change['statistic']:.1f}, where {THRESHOLD:g} suffice."
        )
    return (
        f"{figures['mean_error']:.0%} of its answers are graded wrong ({figures['labels']:.0f} labels), where"
        f" {figures['measured_mean_error']:.0%} were expected by what was measured; p = {figures['p']:.2g}."
    )


def graded(total: GradedHours, measured_labels: float) -> dict[str, Any]:
    """Return observed and expected error rates with their 90 % bounds; None where there is no label."""
    known = total.labels > 0
    rates = np.array([total.rate, total.expected_rate]) if known else np.zeros(2)
    low, high = wilson_interval(rates, np.array([total.labels, measured_labels]))
    names = ("mean_error", "measured_mean_error")
    columns = {"": rates, "_low": low, "_high": high}
    return {
        "labels": total.labels,
        "measured_labels": measured_labels,
        **{
            f"{name}{suffix}": float(values[row]) if known else None
            for row, name in enumerate(names)
            for suffix, values in columns.items()
        },
    }


def _compared_clusters(profile: Profile, errors: ObservedErrors) -> list[dict[str, Any]]:
    rates = profile.errors()
    observed = np.divide(errors.error_sums, errors.labels, out=np.zeros_like(rates), where=errors.labels > 0)
    low, high = wilson_interval(observed, errors.labels)
    measured_low, measured_high = wilson_interval(rates, profile.labels)
    return [
        {
            "id": row,
            "labels": float(errors.labels[row]),
            "error": float(observed[row]),
            "error_low": float(low[row]),
            "error_high": float(high[row]),
            "measured_labels": float(profile.labels[row]),
            "measured_error": float(rates[row]),
            "measured_error_low": float(measured_low[row]),
            "measured_error_high": float(measured_high[row]),
            "differs": _differ(observed[row], errors.labels[row], rates[row], profile.labels[row]),
        }
        for row in np.flatnonzero(errors.labels > 0).tolist()
    ]


def _differ(rate: float, labels: float, measured: float, measured_labels: float) -> bool | None:
    """Return whether two rates differ by TEST; None: there are too few labels of one of them."""
    if labels < MIN_LABELS or measured_labels <= 0:
        return None
    return two_proportion_p(float(rate), float(labels), float(measured), float(measured_labels)) < MAX_P


def _measured_labels(profile: Profile, mix: Doubles) -> float:
    """Return how many measured labels a mean over this mix of clusters is worth; 0 if most of it was not measured."""
    weights = mix / mix.sum()
    known = profile.labels > 0
    variance = float((weights[known] ** 2 / profile.labels[known]).sum())
    if variance <= 0 or float(weights[known].sum()) <= 0.5:
        return 0.0
    return min(1.0 / variance, profile.total_labels)


def _first_hour(measured_at: str | None) -> int:
    """Return the first whole hour after a model was measured; 0 if it is not known when."""
    try:
        return int(datetime.fromisoformat(measured_at or "").timestamp() // 3600) + 1
    except ValueError:
        return 0


def _change_to_json(change: ChangePoint) -> dict[str, Any]:
    return {
        "since": _rfc3339_of(change.hour),
        "worse": change.statistic > 0,
        **{
            name: {"labels": part.labels, "mean_error": part.rate, "measured_mean_error": part.expected_rate}
            for name, part in (("before", change.before), ("after", change.after))
        },
        "difference": change.difference,
        "statistic": abs(change.statistic),
        "threshold": THRESHOLD,
        "test": CHANGE_TEST,
    }


def _rfc3339_of(hour: int) -> str:
    return rfc3339(hour * 3600.0)


def two_proportion_p(first: float, first_count: float, second: float, second_count: float) -> float:
    """Return the p-value of the pooled two-proportion z-test; 1 where both rates are 0 or both are 1."""
    pooled = (first * first_count + second * second_count) / (first_count + second_count)
    variance = pooled * (1 - pooled) * (1 / first_count + 1 / second_count)
    return 1.0 if variance <= 0 else math.erfc(abs(first - second) / math.sqrt(2 * variance))
