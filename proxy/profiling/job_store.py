from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from proxy.profiling.job import (
    JOBS,
    KEPT_S,
    LATEST,
    OPEN,
    Job,
    Lease,
    LeaseLost,
    PromptAnswer,
    ReusedAnswers,
    answers_key,
    job_key,
    lease_key,
    reserved_key,
)
from proxy.storage.audit_log import Step
from proxy.storage.models import ModelRecord, StoredProfile
from proxy.storage.redis import CHANGED, MODELS, PREVIOUS_PROFILES, PROFILES, VERSION, Store, awaited, load_script
from proxy.storage.values import InvalidRecord, OddValues
from router_core.profiles import Profile

SUBMIT: Final = load_script(__package__, "submit_job", KEPT_S=KEPT_S)
CANCEL: Final = load_script(__package__, "cancel_job", KEPT_S=KEPT_S)

# Only the holder of the lease may run these. They return -1 if the lease is lost.
BEGIN: Final = load_script(__package__, "fence", "begin_job")
RESERVE: Final = load_script(__package__, "fence", "reserve_usd")
CHECKPOINT: Final = load_script(__package__, "fence", "store_answer")
FINISH: Final = load_script(__package__, "fence", "finish_job", CHANGED=CHANGED, KEPT_S=KEPT_S)

log = logging.getLogger("uniroute.jobs")


class JobStore:
    """Jobs and their answers in Redis.

    All methods raise StoreUnavailable; those that take a lease raise LeaseLost if it is lost.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._odd_values = OddValues(log)

    async def submit(
        self, record: ModelRecord, prompts: int, max_usd: float | None, reused: ReusedAnswers | None = None
    ) -> str:
        """Return the id of the new job, or of the unfinished one that measures the same model.

        With `reused` it is "" if the profile is no longer that of the earlier job: the model was measured meanwhile.
        """
        step = self.submission(record, prompts, max_usd, reused)
        return str(await self._store.run_durably("submit a job", step.script, step.keys, step.arguments))

    def submission(
        self, record: ModelRecord, prompts: int, max_usd: float | None, reused: ReusedAnswers | None = None
    ) -> Step:
        """Return what `submit` does, to be done together with another write."""
        job_id, now = uuid.uuid4().hex[:16], time.time()
        stored = {
            "model": record.name,
            "fingerprint": record.fingerprint,
            "state": "queued",
            "total": prompts,
            "max_usd": "" if max_usd is None else max_usd,
            "submitted_at": now,
        }
        recorded = {}
        if reused is not None:
            stored |= reused.to_fields()
            recorded = {prompt_id: answer.to_json() for prompt_id, answer in reused.answers.items()}
        bound = [reused.map_id, reused.earlier] if reused else ["", ""]
        arguments = [job_id, record.name, record.fingerprint, now, *bound, 2 * len(stored), *_pairs(stored)]
        keys = (JOBS, OPEN, LATEST, PROFILES, job_key(job_id), answers_key(job_id))
        return Step(SUBMIT, keys, (*arguments, *_pairs(recorded)))

    async def get(self, job_id: str) -> Job | None:
        async with self._store.operation("read a job") as client:
            return Job.from_fields(job_id, await _hash(client, job_key(job_id)))

    async def for_model(self, name: str) -> Job | None:
        """Return the model's latest job."""
        async with self._store.operation("read a job") as client:
            job_id = await awaited(client.hget(LATEST, name))
        return await self.get(job_id) if job_id else None

    async def latest(self) -> dict[str, Job]:
        """Return each model's latest job."""
        async with self._store.operation("read the jobs") as client:
            ids = await _hash(client, LATEST)
            async with client.pipeline(transaction=False) as pipe:
                for job_id in ids.values():
                    pipe.hgetall(job_key(job_id))
                stored = await pipe.execute(raise_on_error=False)
        found: dict[str, Job] = {}
        for (name, job_id), fields in zip(ids.items(), stored, strict=True):
            if isinstance(fields, RedisError):
                self._odd_values.warn_once(job_key(job_id), fields)
            elif (job := Job.from_fields(job_id, fields)) is not None:
                found[name] = job
        return found

    async def cancel(self, job_id: str, why: str = "") -> bool:
        """Cancel a job; return False if it was over."""
        keys = [job_key(job_id), OPEN, answers_key(job_id)]
        return bool(await self._run("cancel a job", CANCEL, keys, [job_id, why]))

    async def answers(self, job_id: str) -> dict[str, PromptAnswer]:
        """Return the answers of a job by prompt id, without those that cannot be read."""
        async with self._store.operation("read the answers of a job") as client:
            stored = await _hash(client, answers_key(job_id))
        answers = {}
        for prompt_id, text in stored.items():
            try:
                answers[prompt_id] = PromptAnswer.from_json(text)
            except InvalidRecord as error:
                self._odd_values.warn_once(f"{answers_key(job_id)} {prompt_id}", error)
        return answers

    async def begin(self, lease: Lease, total: int, *, priced: bool) -> None:
        """Begin or continue a job. Money that a dead worker had reserved and never settled counts as spent."""
        await self._fenced("begin a job", BEGIN, lease, [total, "1" if priced else "0"])

    async def reserve(self, lease: Lease, prompt_id: str, usd: float) -> None:
        await self._fenced("reserve money", RESERVE, lease, [prompt_id, repr(usd)])

    async def checkpoint(self, lease: Lease, prompt_id: str, answer: PromptAnswer, eta_s: float | None) -> None:
        """Store one answer, once."""
        kind = "failed" if answer.failed else "unlabelled" if answer.score is None else ""
        cost = "" if answer.cost_usd is None else repr(answer.cost_usd)
        eta = "" if eta_s is None else f"{eta_s:.1f}"
        await self._fenced("store an answer", CHECKPOINT, lease, [prompt_id, answer.to_json(), kind, cost, eta])

    async def finish(self, lease: Lease, record: ModelRecord, profile: Profile) -> None:
        """Mark the job ready and store its profile, in one step. Give the lease back."""
        entry = StoredProfile(record.fingerprint, profile, lease.job_id).to_json()
        configured = "1" if record.source == "config" else "0"
        await self._finish(lease, "ready", "", [record.name, entry, configured])

    async def fail(self, lease: Lease, error: str) -> None:
        """Mark the job failed; a profile from before stays. Give the lease back."""
        await self._finish(lease, "failed", error, ["", "", ""])

    async def _finish(self, lease: Lease, state: str, error: str, result: list[str]) -> None:
        more_keys = [OPEN, VERSION, PROFILES, MODELS, PREVIOUS_PROFILES]
        await self._fenced("finish a job", FINISH, lease, [lease.job_id, state, error, *result], more_keys)

    async def _fenced(
        self, what: str, script: str, lease: Lease, arguments: Sequence[Any], more_keys: Sequence[str] = ()
    ) -> None:
        job_id = lease.job_id
        keys = [lease_key(job_id), job_key(job_id), answers_key(job_id), reserved_key(job_id), *more_keys]
        if await self._run(what, script, keys, [lease.token, *arguments]) == -1:
            raise LeaseLost("the job was cancelled or taken over")

    async def _run(self, what: str, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        async with self._store.operation(what) as client:
            return await client.register_script(script)(keys=list(keys), args=list(arguments))


def _pairs(fields: Mapping[str, Any]) -> list[Any]:
    return [word for pair in fields.items() for word in pair]


async def _hash(client: Redis, key: str) -> Mapping[str, str]:
    found: Mapping[str, str] = await awaited(client.hgetall(key))
    return found
