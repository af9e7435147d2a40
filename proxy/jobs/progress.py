"""What is said to callers who come before the models are measured: how far that is, and what answers meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from proxy.errors import NotMeasured
from proxy.jobs.records import Job
from proxy.routing.candidates import listed
from proxy.settings.schema import Settings

QUEUED_RETRY_S = 5
MAX_RETRY_S = 60


def with_progress(error: NotMeasured, jobs: Mapping[str, Job], settings: Settings) -> NotMeasured:
    """Say of each model how far its latest job is, or why that failed, with a `retry-after` where waiting helps."""
    latest = {name: jobs[name] for name in error.why if name in jobs}
    reasons = {name: _progress(latest[name], why) if name in latest else why for name, why in error.why.items()}
    under_way = [job for job in latest.values() if job.unfinished]
    message = "no model can be chosen yet"
    if under_way:
        done, total = sum(job.done for job in under_way), sum(job.total for job in under_way)
        message += f": models are being measured, {done} of {total} prompts are done"
    headers = {"retry-after": str(_retry_after_s(under_way))} if under_way else {}
    return NotMeasured(f"{message}{listed(reasons)}; {_meanwhile(settings)}", error.why, headers)


def _progress(job: Job, why: str) -> str:
    match job.state:
        case "queued":
            return "waits to be measured"
        case "running":
            left = "" if job.eta_s is None else f", about {math.ceil(job.eta_s)} s left"
            return f"{job.done} of {job.total} prompts are done{left}"
        case "failed":
            return f"measuring it failed: {job.error}"
    return why


def _retry_after_s(under_way: Iterable[Job]) -> int:
    """Until the first one is measured, as far as known."""
    left = [job.eta_s for job in under_way if job.eta_s is not None]
    return min(MAX_RETRY_S, max(1, math.ceil(min(left, default=QUEUED_RETRY_S))))


def _meanwhile(settings: Settings) -> str:
    if settings.default_model is None:
        return "set default_model, and that model answers meanwhile"
    return f"default_model {settings.default_model!r} cannot take this request, or is not there"
