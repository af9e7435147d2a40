from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import NotProfiled
from proxy.profiling.job_store import Job
from proxy.profiling.jobs import with_progress
from proxy.settings.schema import Settings

EARLY = NotProfiled(
    "no model can be chosen yet", {"a": "not profiled", "b": "not profiled", "c": "costs nothing known"}
)


def a_job(model: str, state: str, **more: Any) -> Job:
    fields: dict[str, Any] = {"done": 0, "total": 60, "failed": 0, "unlabelled": 0, "spent_usd": 0.0, "eta_s": None}
    return Job(id=f"job-of-{model}", model=model, state=state, **{**fields, "error": None, **more})


def progress_error(*jobs: Job, **settings: Any) -> NotProfiled:
    return with_progress(EARLY, {job.model: job for job in jobs}, Settings.model_validate(settings))


def test_progress_is_told_of_each_model_and_of_all() -> None:
    refusal = progress_error(a_job("a", "running", done=12, eta_s=40.2), a_job("b", "queued"))

    assert refusal.message == (
        "no model can be chosen yet: models are being measured, 12 of 120 prompts are done (a: 12 of 60 prompts are"
        " done, about 41 s left; b: waits to be measured; c: costs nothing known); set default_model, and that model"
        " answers meanwhile"
    )
    assert refusal.headers == {"retry-after": "41"}


@pytest.mark.parametrize(("eta_s", "wait"), [(None, "5"), (0.0, "1"), (9_000.0, "60")])
def test_the_wait_is_never_nothing_and_never_long(eta_s: float | None, wait: str) -> None:
    assert progress_error(a_job("a", "running", eta_s=eta_s)).headers == {"retry-after": wait}


def test_where_nothing_is_under_way_waiting_is_not_advised() -> None:
    refusal = progress_error(a_job("a", "failed", error="no price"), a_job("b", "ready"), default_model="d")

    assert refusal.headers == {}
    assert "(a: measuring it failed: no price; b: not profiled; c: costs nothing known)" in refusal.message
    assert refusal.message.endswith("; default_model 'd' cannot take this request, or is not there")
