"""The last profiles of each model, in the order in which they were stored: whether it changes, and how far.

uniroute:profiles:history:<model>   list of entries, the newest first
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

import numpy as np

from proxy.storage.feedback import MAX_P, MIN_LABELS, TEST, two_proportion_p
from proxy.storage.records import InvalidRecord, ModelRecord, WarnOnce, json_object, number, unix_time
from proxy.storage.redis import PROFILES, Store, awaited, load_script
from router_core.decision import wilson_interval
from router_core.estimators import mean_error, shrunk_rates
from router_core.profiles import MAX_VALUE, Profile
from router_core.text import rfc3339
from router_core.types import Doubles

HISTORY: Final = f"{PROFILES}:history"

MAX_PROFILES: Final = 20

# A local function `remember` of a key and an entry, for the scripts that store a profile.
REMEMBER: Final = load_script(__package__, "remember_profile", MAX_PROFILES=MAX_PROFILES)

# Clusters that are named of a change, those that changed most first.
MAX_CLUSTERS = 5

Source = Literal["job", "carried_over", "upload"]
"""Measured by a job; made of an earlier job's answers for another map; or handed over."""

_warn_once = WarnOnce(logging.getLogger("uniroute.state"))


def history_key(model: str) -> str:
    return f"{HISTORY}:{model}"


@dataclass(frozen=True, eq=False)
class ProfileEntry:
    """One profile as it was stored, and where it came from. None: not known."""

    stored_at: float
    """Unix seconds."""
    source: Source
    map_id: str
    fingerprint: str
    """Of the model's parameters."""
    error_sums: Doubles
    """(K,)"""
    labels: Doubles
    """(K,)"""
    recipe: str | None = None
    """The recipe that was in use."""
    job: str | None = None
    spent_usd: float | None = None
    measured_at: str | None = None
    mean_output_tokens: float | None = None
    mean_seconds: float | None = None

    @classmethod
    def of(
        cls,
        record: ModelRecord,
        profile: Profile,
        now: float,
        *,
        source: Source = "upload",
        recipe: str | None = None,
        job: str | None = None,
        spent_usd: float | None = None,
    ) -> Self:
        return cls(
            stored_at=now,
            source=source,
            map_id=profile.map_id,
            fingerprint=record.fingerprint,
            error_sums=profile.error_sums,
            labels=profile.labels,
            recipe=recipe,
            job=job,
            spent_usd=spent_usd,
            measured_at=profile.measured_at,
            mean_output_tokens=profile.mean_output_tokens,
            mean_seconds=profile.mean_seconds,
        )

    @property
    def total_labels(self) -> float:
        return float(self.labels.sum())

    @property
    def mean_error(self) -> float:
        return mean_error(float(self.error_sums.sum()), self.total_labels)

    @property
    def interval(self) -> tuple[float, float]:
        """Return bounds of the mean error, with 90 % confidence."""
        # the mean has half an error in one label beside the measured ones
        low, high = wilson_interval(np.array([self.mean_error]), np.array([self.total_labels + 1.0]))
        return float(low[0]), float(high[0])

    def to_text(self) -> str:
        """Return what is stored."""
        texts = ("source", "map_id", "fingerprint", "recipe", "job", "measured_at")
        amounts = ("stored_at", "spent_usd", "mean_output_tokens", "mean_seconds")
        stored = {name: getattr(self, name) for name in (*texts, *amounts)}
        return json.dumps({**stored, "error_sums": _rounded(self.error_sums), "labels": _rounded(self.labels)})

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse what is stored, or raise InvalidRecord."""
        stored = json_object(text)
        if stored.get("source") not in get_args(Source):
            raise InvalidRecord(f"the source of a profile must be one of {', '.join(get_args(Source))}")
        texts = {name: stored.get(name) for name in ("map_id", "fingerprint", "recipe", "job", "measured_at")}
        if not all(isinstance(value, str | None) for value in texts.values()):
            raise InvalidRecord(f"must be texts or null: {', '.join(texts)}")
        labels, error_sums = (_sums(stored, name) for name in ("labels", "error_sums"))
        if len(labels) != len(error_sums) or not (error_sums <= labels * (1 + 1e-5) + 1e-5).all():
            raise InvalidRecord("needs as many error sums as labels, none of them larger")
        return cls(
            stored_at=unix_time(stored.get("stored_at")),
            source=stored["source"],
            map_id=texts["map_id"] or "",
            fingerprint=texts["fingerprint"] or "",
            error_sums=error_sums,
            labels=labels,
            recipe=texts["recipe"],
            job=texts["job"],
            spent_usd=_amount(stored, "spent_usd"),
            measured_at=texts["measured_at"],
            mean_output_tokens=_amount(stored, "mean_output_tokens"),
            mean_seconds=_amount(stored, "mean_seconds"),
        )


def _rounded(sums: Doubles) -> list[float]:
    """Return numbers of six digits: a list of a large map would be three times as long otherwise."""
    return [float(f"{value:.6g}") for value in sums.tolist()]


def _sums(stored: Mapping[str, Any], name: str) -> Doubles:
    values = stored.get(name)
    if not isinstance(values, list) or not all(isinstance(each, int | float) for each in values):
        raise InvalidRecord(f"{name} must be a list with a number for each cluster")
    if any(number(each, MAX_VALUE) is None for each in values):
        raise InvalidRecord(f"{name} must be numbers from 0 to {MAX_VALUE:g}")
    return np.array(values, dtype=np.float64)


def _amount(stored: Mapping[str, Any], name: str) -> float | None:
    value = stored.get(name)
    return None if value is None else number(value, MAX_VALUE)


async def read_history(store: Store, model: str) -> list[ProfileEntry]:
    """Return the last profiles of a model, the newest first, without those that cannot be read.

    Raises:
        StoreUnavailable.
    """
    async with store.operation("read the profiles of a model") as client:
        stored = await awaited(client.lrange(history_key(model), 0, MAX_PROFILES - 1))
    found = []
    for text in stored:
        try:
            found.append(ProfileEntry.from_text(text))
        except InvalidRecord as error:
            _warn_once(history_key(model), error)
    return found


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """How much a model's error rate has changed in one cluster. Rates with few labels are near the model's mean."""

    cluster: int
    before: float
    after: float
    labels_before: float
    labels: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class ProfileChange:
    """How a profile differs from the one before."""

    mean_error: float
    """The difference of the two."""
    p: float | None
    """By TEST. None: too few labels."""
    differs: bool | None
    same_map: bool
    same_parameters: bool
    clusters: Sequence[ClusterChange]
    """Those that changed most; empty if the maps differ."""

    @classmethod
    def between(cls, before: ProfileEntry, after: ProfileEntry) -> Self:
        """Compare two profiles by the test that feedback is compared with what was measured by."""
        p = None
        if min(before.total_labels, after.total_labels) >= MIN_LABELS:
            rates = [float(each.error_sums.sum()) / each.total_labels for each in (before, after)]
            p = two_proportion_p(rates[0], before.total_labels, rates[1], after.total_labels)
        same_map = before.map_id == after.map_id and len(before.labels) == len(after.labels)
        return cls(
            mean_error=after.mean_error - before.mean_error,
            p=p,
            differs=None if p is None else p < MAX_P,
            same_map=same_map,
            same_parameters=before.fingerprint == after.fingerprint,
            clusters=_most_changed(before, after) if same_map else (),
        )


def _most_changed(before: ProfileEntry, after: ProfileEntry) -> list[ClusterChange]:
    first, second = (shrunk_rates(each.error_sums[None, :], each.labels[None, :])[0] for each in (before, after))
    measured = (before.labels > 0) & (after.labels > 0)
    order = np.argsort(-np.abs(second - first) * measured, kind="stable")[:MAX_CLUSTERS]
    return [
        ClusterChange(int(k), float(first[k]), float(second[k]), float(before.labels[k]), float(after.labels[k]))
        for k in order
        if measured[k] and second[k] != first[k]
    ]


def changes_of(entries: Sequence[ProfileEntry]) -> list[ProfileChange | None]:
    """Compare each of these entries, the newest first, with the one before it; None: there is none."""
    older: list[ProfileEntry | None] = [*entries[1:], None]
    return [
        None if before is None else ProfileChange.between(before, after)
        for before, after in zip(older[: len(entries)], entries, strict=True)
    ]


def entries_to_json(entries: Sequence[ProfileEntry], map_id: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Show entries, the newest first. `names`: of the clusters of the map in use."""
    return [
        _to_json(entry, change, names if entry.map_id == map_id and len(entry.labels) == len(names) else ())
        for entry, change in zip(entries, changes_of(entries), strict=True)
    ]


def _to_json(entry: ProfileEntry, change: ProfileChange | None, names: Sequence[str]) -> dict[str, Any]:
    low, high = entry.interval
    shown: dict[str, Any] = {
        "stored_at": rfc3339(entry.stored_at),
        "measured_at": entry.measured_at,
        "source": entry.source,
        "job": entry.job,
        "map": entry.map_id,
        "recipe": entry.recipe,
        "fingerprint": entry.fingerprint,
        "mean_error": entry.mean_error,
        "error_low": low,
        "error_high": high,
        "total_labels": entry.total_labels,
        "spent_usd": entry.spent_usd,
        "mean_output_tokens": entry.mean_output_tokens,
        "mean_seconds": entry.mean_seconds,
        "error_sums": entry.error_sums.tolist(),
        "labels": entry.labels.tolist(),
        "change": None,
    }
    if change is not None:
        shown["change"] = {
            "mean_error": change.mean_error,
            "test": TEST,
            "p": change.p,
            "differs": change.differs,
            "same_map": change.same_map,
            "same_parameters": change.same_parameters,
            "clusters": [
                {
                    "id": each.cluster,
                    "name": names[each.cluster] if names else None,
                    "change": each.change,
                    "labels_before": each.labels_before,
                    "labels": each.labels,
                }
                for each in change.clusters
            ],
        }
    return shown
