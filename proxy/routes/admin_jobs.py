"""/admin/jobs: how far measuring a model is, and stopping it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from proxy.errors import UnknownJob
from proxy.routes.context import OurServices

router = APIRouter(prefix="/admin/jobs")


@router.get("/{job_id}", response_model=None)
async def get_job(job_id: str, services: OurServices) -> dict[str, Any]:
    job = await services.jobs.get(job_id)
    if job is None:
        raise UnknownJob(f"no job has the id {job_id[:100]!r}", param="job")
    shown: dict[str, Any] = job.to_json()
    return shown


@router.delete("/{job_id}", response_model=None)
async def cancel_job(job_id: str, services: OurServices) -> dict[str, Any]:
    """The job as it is after that; a finished one stays as it was."""
    if await services.jobs.get(job_id) is None:
        raise UnknownJob(f"no job has the id {job_id[:100]!r}", param="job")
    await services.jobs.cancel(job_id)
    return await get_job(job_id, services)
