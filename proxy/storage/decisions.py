"""The decisions that asked a model, each whole, within bounds of time, number and bytes.

A decision is written with the usage record that ends its request, through the same journal and in the same script:
see usage_writer.py. Here they are read.

uniroute:decisions          decision → record: the usage record, with `detail`
uniroute:decisions:times    sorted set: decision by the Unix seconds of its end
uniroute:decisions:bytes    of all records together
"""

from __future__ import annotations

import math
import time
from binascii import a2b_base64
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import numpy as np

from proxy.storage.records import InvalidRecord, json_object
from proxy.storage.redis import Store, awaited
from router_core.decision import lambda_thresholds
from router_core.text import rfc3339

DECISIONS: Final = "uniroute:decisions"

TIMES: Final = f"{DECISIONS}:times"

BYTES: Final = f"{DECISIONS}:bytes"

# Hash: decision → what was said of its answer; see feedback.py.
FEEDBACK: Final = f"{DECISIONS}:feedback"

# Member of a usage record in the journal, and of a stored decision.
DETAIL: Final = "detail"

# Read in one round trip, at most.
CHUNK_SIZE = 200

# Looked at for one page, so that a rare filter does not keep the server busy. The page's cursor goes on from there.
MAX_SCANNED = 5000


@dataclass(slots=True)
class AttemptRecord:
    """One attempt of a request, in progress or ended. Times are seconds from the request's arrival."""

    model: str
    started_s: float
    outcome: str | None = None
    """failed, empty, or the ending of the request; None: it has not ended."""
    status: str | None = None
    """Of a failure: the upstream's status, timeout or unreachable."""
    ended_s: float = math.nan


# An attempt as records keep it: as an array.
attempt_row = attrgetter("model", "started_s", "outcome", "status", "ended_s")


@dataclass(frozen=True, slots=True)
class DecisionBounds:
    """How long decisions are kept, how many, and how many bytes of them."""

    ttl_s: int
    max_decisions: int
    max_bytes: int
    max_per_s: int
    """That one process records."""

    def script_args(self) -> tuple[int, int, int]:
        return self.ttl_s, self.max_decisions, self.max_bytes


@dataclass(frozen=True, slots=True)
class DecisionFilter:
    """Which decisions are asked for. None: whichever."""

    model: str | None = None
    key: str | None = None
    tag: str | None = None
    ending: str | None = None
    reason: str | None = None
    since: float | None = None
    """Unix seconds, of the end of the request; `until` is not included."""
    until: float | None = None

    @property
    def only_times(self) -> bool:
        """Whether every decision within the time matches."""
        return all(getattr(self, name) is None for name in ("model", "key", "tag", "ending", "reason"))

    def matches(self, decision: Mapping[str, Any]) -> bool:
        wanted = ((self.model, "model"), (self.key, "key"), (self.ending, "ending"), (self.reason, "reason"))
        if any(value is not None and decision[name] != value for value, name in wanted):
            return False
        return self.tag is None or self.tag in decision["tags"]


ALL = DecisionFilter()


@dataclass(frozen=True, slots=True)
class Cursor:
    """The decision that the page before ended with."""

    at: float
    id: str

    def __str__(self) -> str:
        return f"{self.at!r}~{self.id}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """Return None for a text that is no cursor."""
        at, _, decision = text.partition("~")
        try:
            parsed = float(at)
        except ValueError:
            return None
        return cls(parsed, decision) if decision and math.isfinite(parsed) else None


@dataclass(frozen=True, slots=True)
class Page:
    decisions: list[dict[str, Any]]
    """The newest first."""
    next: Cursor | None
    """None: there are no more."""


class DecisionStore:
    """Read decisions. Every method raises StoreUnavailable."""

    def __init__(self, store: Store, ttl_s: int) -> None:
        self._store = store
        self._ttl_s = ttl_s

    async def find(self, decision: str) -> dict[str, Any] | None:
        """Return one decision, whole; None if it is not kept."""
        async with self._store.operation("read a decision") as client:
            at = await awaited(client.zscore(TIMES, decision))
            text = await awaited(client.hget(DECISIONS, decision))
            said = await awaited(client.hget(FEEDBACK, decision))
        if text is None or at is None or at < time.time() - self._ttl_s:
            return None
        return _parsed(text, said)

    async def page(
        self, limit: int, wanted: DecisionFilter = ALL, after: Cursor | None = None, *, flips: bool = True
    ) -> Page:
        """Return up to `limit` decisions. Fewer may come although there are more: `next` says so.

        Args:
            flips: whether to find the λ at which each candidate would have been chosen, which takes half of the time.
        """
        found: list[dict[str, Any]] = []
        seen = 0
        chunk_size = min(limit, CHUNK_SIZE) if wanted.only_times else CHUNK_SIZE
        async for cursor, decision in self._newest_first(wanted, after, chunk_size, flips=flips):
            seen += 1
            if decision is not None and wanted.matches(decision):
                found.append(decision)
            if len(found) == limit or seen == MAX_SCANNED:
                return Page(found, cursor)
        return Page(found, None)

    async def _newest_first(
        self, wanted: DecisionFilter, after: Cursor | None, chunk_size: int, *, flips: bool
    ) -> AsyncIterator[tuple[Cursor, dict[str, Any] | None]]:
        """Yield every decision within the time that is asked for; None in place of one that cannot be read."""
        oldest = max(time.time() - self._ttl_s, wanted.since or 0.0)
        newest = "+inf" if wanted.until is None else f"({wanted.until!r}"
        if after is not None and (wanted.until is None or after.at < wanted.until):
            newest = repr(after.at)
        offset = 0
        while True:
            async with self._store.operation("read the decisions") as client:
                listed = await awaited(
                    client.zrevrangebyscore(TIMES, newest, oldest, start=offset, num=chunk_size, withscores=True)
                )
                names = [name for name, _ in listed]
                texts = await awaited(client.hmget(DECISIONS, names)) if names else []
                said = await awaited(client.hmget(FEEDBACK, names)) if names else []
            for (name, at), text, words in zip(listed, texts, said, strict=True):
                # Of decisions of the same time the last by name comes first, here as in Redis.
                if after is None or (at, name) < (after.at, after.id):
                    yield Cursor(at, name), None if text is None else _parsed(text, words, flips=flips)
            if len(listed) < chunk_size:
                return
            offset += chunk_size


def _parsed(text: str, said: str | None, *, flips: bool = True) -> dict[str, Any] | None:
    try:
        feedback = json_object(said) if said else {}
        return {
            **decision_to_json(json_object(text), flips=flips),
            "score": feedback.get("score"),
            "score_source": feedback.get("source"),
        }
    except (InvalidRecord, KeyError, TypeError, ValueError):  # another program wrote it
        return None


_USAGE = (
    *("prompt_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens"),
    *("audio_input_tokens", "audio_output_tokens"),
)


def decision_to_json(stored: Mapping[str, Any], *, flips: bool = True) -> dict[str, Any]:
    """Return a stored decision as the admin API shows it."""
    detail, ended_at = stored[DETAIL], float(stored["at"])
    attempts = detail["attempts"]
    candidates = list(_candidates(detail, flips=flips))
    return {
        "id": stored["decision"],
        "request": detail["request"],
        "received_at": rfc3339(ended_at - stored["seconds"], "milliseconds"),
        "ended_at": rfc3339(ended_at, "milliseconds"),
        "key": stored["key_id"],
        "tags": stored.get("tags", []),
        "api": detail["api"],
        "requested": detail["requested"],
        "model": stored["model"],
        "reason": stored["reason"],
        "ending": stored["ending"],
        "expected_error": next((row["expected_error"] for row in candidates if row["model"] == stored["model"]), None),
        "lambda": detail["lambda"],
        "state_version": detail["version"],
        "map": detail["map"],
        "fingerprint": detail["fingerprint"],
        "degraded": detail.get("degraded"),
        "lost_affinity": detail.get("lost_affinity"),
        "clusters": [
            {"id": number, "name": name, "weight": weight}
            for number, name, weight in zip(*detail["clusters"], strict=True)
        ],
        "nearest_cosine": detail.get("cosine"),
        "novel": detail.get("novel"),
        "trajectory": detail.get("trajectory"),
        "candidates": candidates,
        "candidates_left_out": detail.get("unlisted", 0),
        "ineligible": [{"model": name, "why": why} for name, why in detail["ineligible"].items()],
        "attempts": [
            {"model": model, "outcome": outcome, "status": status, "started_s": started, "ended_s": ended}
            for model, started, outcome, status, ended in attempts
        ],
        "times": {
            "chosen_s": detail["chosen_s"],
            "asked_s": attempts[0][1] if attempts else None,
            "first_content_s": stored["first_token_s"],
            "ended_s": stored["seconds"],
        },
        "usage": {name: stored.get(name) for name in _USAGE},
        "cost_usd": _sum(stored["cost_usd"], detail["failed_usd"]),
        "cost_estimated": stored["estimated"],
        "failed_attempts_cost_usd": detail["failed_usd"],
        "baseline": {"model": detail["baseline"], "cost_usd": detail["baseline_usd"]},
        "saved_usd": _sum(detail["baseline_usd"], stored["cost_usd"], detail["failed_usd"], sign=-1),
        "prompt": detail.get("prompt"),
    }


def _sum(first: float | None, *others: float | None, sign: int = 1) -> float | None:
    """Add to `first`, or with `sign` -1 take off it. None: one of them is not known."""
    total = first
    for other in others:
        if total is None or other is None:
            return None
        total += sign * other
    return total


def _candidates(detail: Mapping[str, Any], *, flips: bool) -> Iterator[dict[str, Any]]:
    """Yield the models that were scored, the best first, with the λ at which each would have been chosen if `flips`."""
    stated = detail.get("candidates")
    if not stated:
        return
    names = stated["models"]
    # The last column is kept only where something was added to the errors.
    columns = np.frombuffer(a2b_base64(stated["columns"])).reshape(-1, len(names))
    errors, costs, scores, usd, *added = columns.tolist()
    # If some are left out it is not known when they would win.
    thresholds = [math.nan] * len(names)
    if flips and not detail.get("unlisted"):
        thresholds = lambda_thresholds(columns[0], columns[1], detail["lambda"], stated["tie"]).tolist()
    for row in sorted(range(len(names)), key=lambda row: (names[row] != stated["chosen"], scores[row], costs[row])):
        yield {
            "model": names[row],
            "expected_error": errors[row],
            "trajectory_error": added[0][row] if added else 0.0,
            "expected_cost_usd": usd[row],
            "cost": costs[row],
            "score": scores[row],
            "flips_at_lambda": None if math.isnan(thresholds[row]) else thresholds[row],
        }
