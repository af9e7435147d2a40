"""A profiling job and an answer within it, as types, as JSON and as Redis stores them. No Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from proxy.storage.redis import InvalidRecord, json_object, number, whole_number
from router_core.profiles import MOST

JOBS: Final = "uniroute:jobs"
"""Every job's id by the time it was submitted; `:open` is the set of the unfinished, `:models` each model's latest."""
OPEN: Final = f"{JOBS}:open"
LATEST: Final = f"{JOBS}:models"
MAX_PROMPTS: Final = 1_000_000
_MOST: Final = {"score": 1.0, "output_tokens": MOST, "seconds": MOST, "cost_usd": MOST}
UNFINISHED = frozenset({"queued", "running"})
KEPT_S = 30 * 86_400
"""How long a finished job can still be read."""


def job_key(job_id: str) -> str:
    return f"uniroute:job:{job_id}"


def answers_key(job_id: str) -> str:
    return f"{job_key(job_id)}:answers"


def reserved_key(job_id: str) -> str:
    return f"{job_key(job_id)}:reserved"


def lease_key(job_id: str) -> str:
    return f"{job_key(job_id)}:lease"


def kick_key(job_id: str) -> str:
    return f"{job_key(job_id)}:kicked"


@dataclass(frozen=True)
class Job:
    """Measuring one model. `done` counts prompts that ended in any way; labelled are done - failed - unlabelled."""

    id: str
    model: str
    state: str
    """queued, running, ready, failed or cancelled."""
    done: int
    total: int
    failed: int
    """Prompts that the model did not answer, after all retries."""
    unlabelled: int
    """Answers that say nothing of right or wrong: cut off by our limit, empty after thinking, not judged."""
    spent_usd: float | None
    """None: the model has no known price."""
    eta_s: float | None
    error: str | None
    fingerprint: str = ""
    max_usd: float | None = None
    measured_at: str | None = None
    """RFC 3339, UTC: when the answers were given that it took from an earlier job. None: it took none."""

    @property
    def unfinished(self) -> bool:
        return self.state in UNFINISHED

    def to_json(self) -> dict[str, Any]:
        """What an administrator is shown."""
        shown = ("id", "model", "state", "done", "total", "failed", "unlabelled", "spent_usd", "eta_s", "error")
        return {name: getattr(self, name) for name in shown}

    @classmethod
    def from_fields(cls, job_id: str, stored: Mapping[str, str]) -> Job | None:
        """None where the hash is missing, or not one of ours."""
        if not {"model", "state"} <= stored.keys():
            return None
        # What cannot be read allows nothing: a limit that is no number is none that was lifted.
        max_usd = (number(stored["max_usd"]) or 0.0) if stored.get("max_usd") else None
        return cls(
            id=job_id,
            model=stored["model"],
            state=stored["state"],
            done=whole_number(stored.get("done")) or 0,
            total=min(whole_number(stored.get("total")) or 0, MAX_PROMPTS),
            failed=whole_number(stored.get("failed")) or 0,
            unlabelled=whole_number(stored.get("unlabelled")) or 0,
            spent_usd=_spent(stored.get("spent_usd"), max_usd),
            eta_s=number(stored.get("eta_s")),
            error=stored.get("error") or None,
            fingerprint=stored.get("fingerprint", ""),
            max_usd=max_usd,
            measured_at=stored.get("measured_at") or None,
        )


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """What became of one validation prompt. None: not known."""

    score: float | None = None
    """In [0, 1]; None: unlabelled."""
    output_tokens: float | None = None
    seconds: float | None = None
    cost_usd: float | None = None
    finish_reason: str | None = None
    failed: bool = False

    def to_json(self) -> str:
        return json.dumps({column.name: getattr(self, column.name) for column in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> PromptAnswer:
        """Raises InvalidRecord."""
        stored = json_object(text)
        reason, failed = stored.get("finish_reason"), stored.get("failed", False)
        numbers = {name: stored.get(name) for name in ("score", "output_tokens", "seconds", "cost_usd")}
        broken = [name for name, value in numbers.items() if value is not None and number(value, _MOST[name]) is None]
        if broken or not isinstance(reason, str | None) or not isinstance(failed, bool):
            raise InvalidRecord(f"not an answer to a prompt: {', '.join(broken) or 'finish_reason, failed'}")
        return cls(**numbers, finish_reason=reason, failed=failed)


@dataclass(frozen=True)
class Carried:
    """Answers to an earlier job that a new one begins with: done, and paid for already."""

    earlier: str
    """The id of the job that they were given to."""
    map_id: str
    """The cluster map to measure on: no worker of another one takes the job."""
    answers: Mapping[str, PromptAnswer]
    """By prompt id."""
    measured_at: str | None

    @property
    def labels(self) -> int:
        return sum(answer.score is not None for answer in self.answers.values())

    def to_fields(self) -> dict[str, Any]:
        """What they add to the hash of the new job."""
        done = len(self.answers)
        counted = {"done": done, "unlabelled": done - self.labels}
        return {**counted, "map": self.map_id, "measured_at": self.measured_at or ""}


def _spent(stored: str | None, max_usd: float | None) -> float | None:
    """What was spent. Where that is no number, all that may be."""
    return None if not stored else max_usd if (spent := number(stored)) is None else spent
