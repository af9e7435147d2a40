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
from proxy.storage.complaints import Complaints
from proxy.storage.models import ModelRecord, StoredProfile
from proxy.storage.redis import (
    CHANGED,
    MODELS,
    PREVIOUS_PROFILES,
    PROFILES,
    VERSION,
    InvalidRecord,
    Store,
    load_script,
)
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
    """All methods raise StoreUnavailable; those that take a lease raise LeaseLost where it is no longer ours."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._complaints = Complaints(log)

    async def submit(
        self, record: ModelRecord, prompts: int, max_usd: float | None, carried: ReusedAnswers | None = None
    ) -> str:
        """The id of the new job, or of the unfinished one that measures the same arm.

        With `carried` it is "" where the profile is no longer that of the earlier job: somebody measured the model.
        """
        step = self.submission(record, prompts, max_usd, carried)
        return str(await self._store.run_durably("submit a job", step.script, step.keys, step.arguments))

    def submission(
        self, record: ModelRecord, prompts: int, max_usd: float | None, carried: ReusedAnswers | None = None
    ) -> Step:
        """What `submit` does, to be done together with something else."""
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
        if carried is not None:
            stored |= carried.to_fields()
            recorded = {prompt_id: answer.to_json() for prompt_id, answer in carried.answers.items()}
        bound = [carried.map_id, carried.earlier] if carried else ["", ""]
        arguments = [job_id, record.name, record.fingerprint, now, *bound, 2 * len(stored), *_pairs(stored)]
        keys = (JOBS, OPEN, LATEST, PROFILES, job_key(job_id), answers_key(job_id))
        return Step(SUBMIT, keys, (*arguments, *_pairs(recorded)))

    async def get(self, job_id: str) -> Job | None:
        async with self._store.asking("read a job") as client:
            return Job.from_fields(job_id, await _hash(client, job_key(job_id)))

    async def for_model(self, name: str) -> Job | None:
        """The model's latest job."""
        async with self._store.asking("read a job") as client:
            job_id = await _plain(client.hget(LATEST, name))
        return await self.get(job_id) if job_id else None

    async def latest(self) -> dict[str, Job]:
        """Each model's latest job."""
        async with self._store.asking("read the jobs") as client:
            ids = await _hash(client, LATEST)
            async with client.pipeline(transaction=False) as pipe:
                for job_id in ids.values():
                    pipe.hgetall(job_key(job_id))
                stored = await pipe.execute(raise_on_error=False)
        found: dict[str, Job] = {}
        for (name, job_id), fields in zip(ids.items(), stored, strict=True):
            if isinstance(fields, RedisError):
                self._complaints.make(job_key(job_id), fields)
            elif (job := Job.from_fields(job_id, fields)) is not None:
                found[name] = job
        return found

    async def cancel(self, job_id: str, why: str = "") -> bool:
        """False where there was nothing left to cancel."""
        keys = [job_key(job_id), OPEN, answers_key(job_id)]
        return bool(await self._run("cancel a job", CANCEL, keys, [job_id, why]))

    async def answers(self, job_id: str) -> dict[str, PromptAnswer]:
        """Prompt id to what became of it. What cannot be read is left out."""
        async with self._store.asking("read the answers of a job") as client:
            stored = await _hash(client, answers_key(job_id))
        answers = {}
        for prompt_id, text in stored.items():
            try:
                answers[prompt_id] = PromptAnswer.from_json(text)
            except InvalidRecord as error:
                self._complaints.make(f"{answers_key(job_id)} {prompt_id}", error)
        return answers

    async def begin(self, lease: Lease, total: int, *, priced: bool) -> None:
        """Money that was set aside and never settled, because a worker died, counts as spent."""
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
        """Ready, and the profile in use, in one step. Gives the lease back."""
        entry = StoredProfile(record.fingerprint, profile, lease.job_id).to_json()
        configured = "1" if record.source == "config" else "0"
        await self._finish(lease, "ready", "", [record.name, entry, configured])

    async def fail(self, lease: Lease, error: str) -> None:
        """The old profile, if there is one, stays. Gives the lease back."""
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
        async with self._store.asking(what) as client:
            return await client.register_script(script)(keys=list(keys), args=list(arguments))


def _pairs(fields: Mapping[str, Any]) -> list[Any]:
    return [word for pair in fields.items() for word in pair]


async def _hash(client: Redis, key: str) -> Mapping[str, str]:
    found: Mapping[str, str] = await _plain(client.hgetall(key))
    return found


async def _plain(reply: Any) -> Any:
    return await reply
