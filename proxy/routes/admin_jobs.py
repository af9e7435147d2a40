"""/admin/jobs: how far measuring a model is, what it answered, and stopping it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from proxy.errors import UnknownJob
from proxy.jobs.records import Job
from proxy.routes.context import Audit, OurServices
from proxy.storage.audit_log import CANCEL_JOB

jobs_router = APIRouter(prefix="/admin/jobs")


@jobs_router.get("/{job_id}", response_model=None)
async def get_job(job_id: str, services: OurServices) -> dict[str, Any]:
    """With a `warning` where it is ready and no model gets anything right."""
    job = await _job(job_id, services)
    shown: dict[str, Any] = job.to_json()
    doubt = services.state.current.measuring_doubt
    return {**shown, "warning": doubt} if job.state == "ready" and doubt else shown


@jobs_router.get("/{job_id}/outcomes", response_model=None)
async def get_outcomes(job_id: str, services: OurServices) -> dict[str, Any]:
    """The graded answers so far, as lines of an outcomes file, for as long as the job itself can be read."""
    await _job(job_id, services)
    return {"outcomes": await services.jobs.outcomes(job_id)}


@jobs_router.delete("/{job_id}", response_model=None)
async def cancel_job(job_id: str, services: OurServices, audit: Audit) -> dict[str, Any]:
    """The job as it is after that; a finished one stays as it was."""
    await _job(job_id, services)
    if await services.jobs.cancel(job_id):
        await audit.note(CANCEL_JOB, job_id)
    return await get_job(job_id, services)


async def _job(job_id: str, services: OurServices) -> Job:
    job = await services.jobs.get(job_id)
    if job is None:
        raise UnknownJob(f"no job has the id {job_id[:100]!r}", param="job")
    return job
