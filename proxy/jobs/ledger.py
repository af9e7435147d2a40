"""Jobs in Redis: submitted, looked up, cancelled, checkpointed answer by answer, finished. Works on none."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from proxy.jobs.leases import Lease, LeaseLost
from proxy.jobs.records import (
    JOBS,
    KEPT_S,
    LATEST,
    OPEN,
    Job,
    PromptAnswer,
    answers_key,
    job_key,
    lease_key,
    reserved_key,
)
from proxy.state.records import ModelRecord, StoredProfile
from proxy.state.store import Store
from proxy.state.stored import CHANGED, MODELS, PROFILES, VERSION
from router_core.profiles import Profile

# KEYS: jobs, open, latest, the new job's hash. ARGV: id, model, fingerprint, time, then the fields.
_SUBMIT = f"""
local id = redis.call('HGET', KEYS[3], ARGV[2])
if id then
  local state, of = unpack(redis.call('HMGET', 'uniroute:job:' .. id, 'state', 'fingerprint'))
  if state == 'queued' or state == 'running' then
    if of == ARGV[3] or id == ARGV[1] then return id end
    redis.call('HSET', 'uniroute:job:' .. id, 'state', 'cancelled', 'error', 'litellm_params were changed')
    redis.call('EXPIRE', 'uniroute:job:' .. id, {KEPT_S})
    redis.call('SREM', KEYS[2], id)
  end
end
redis.call('HSET', KEYS[4], unpack(ARGV, 5))
redis.call('ZADD', KEYS[1], ARGV[4], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[4] - {KEPT_S})
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[1])
return ARGV[1]
"""
# Fenced scripts. KEYS: lease, job, answers, reserved. ARGV[1]: token. They return -1 where the lease is not ours.
_FENCE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('HGET', KEYS[2], 'state') ~= 'running' then return -1 end
"""
_BEGIN = f"""{_FENCE}
redis.call('HSET', KEYS[2], 'total', ARGV[2])
if ARGV[3] == '1' then
  redis.call('HSETNX', KEYS[2], 'spent_usd', '0')
  for _, usd in ipairs(redis.call('HVALS', KEYS[4])) do redis.call('HINCRBYFLOAT', KEYS[2], 'spent_usd', usd) end
end
redis.call('DEL', KEYS[4])
return 1
"""
_RESERVE = f"{_FENCE} return redis.call('HSET', KEYS[4], ARGV[2], ARGV[3])"
_CHECKPOINT = f"""{_FENCE}
redis.call('HDEL', KEYS[4], ARGV[2])
if redis.call('HSETNX', KEYS[3], ARGV[2], ARGV[3]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[2], 'done', 1)
if ARGV[4] ~= '' then redis.call('HINCRBY', KEYS[2], ARGV[4], 1) end
if ARGV[5] ~= '' then redis.call('HINCRBYFLOAT', KEYS[2], 'spent_usd', ARGV[5]) end
redis.call('HSET', KEYS[2], 'eta_s', ARGV[6])
return 1
"""
# KEYS go on: open, version, profiles, models. ARGV: token, id, state, error, model, profile, "1" if configured.
_FINISH = f"""{_FENCE}
local state, error = ARGV[3], ARGV[4]
if state == 'ready' and ARGV[7] ~= '1' and redis.call('HEXISTS', KEYS[8], ARGV[5]) == 0 then
  state, error = 'failed', 'the model was removed'
end
if state == 'ready' then
  local version = redis.call('INCR', KEYS[6])
  redis.call('HSET', KEYS[7], ARGV[5], ARGV[6])
  redis.call('PUBLISH', '{CHANGED}', version)
end
redis.call('HSET', KEYS[2], 'state', state, 'error', error, 'eta_s', state == 'ready' and '0' or '')
redis.call('SREM', KEYS[5], ARGV[2])
redis.call('EXPIRE', KEYS[2], {KEPT_S})
redis.call('EXPIRE', KEYS[3], {KEPT_S})
redis.call('DEL', KEYS[1], KEYS[4])
return 1
"""
# KEYS: job, open, answers. ARGV: id, why.
_CANCEL = f"""
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error', ARGV[2], 'eta_s', '')
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], {KEPT_S})
redis.call('EXPIRE', KEYS[3], {KEPT_S})
return 1
"""


class Ledger:
    """All methods raise StoreUnavailable; those that take a lease raise LeaseLost where it is no longer ours."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def submit(self, record: ModelRecord, prompts: int, max_usd: float | None) -> str:
        """The id of the new job, or of the unfinished one that measures the same arm."""
        job_id, now = uuid.uuid4().hex[:16], time.time()
        stored = {
            "model": record.name,
            "fingerprint": record.fingerprint,
            "state": "queued",
            "total": prompts,
            "max_usd": "" if max_usd is None else max_usd,
            "submitted_at": now,
        }
        words = [word for pair in stored.items() for word in pair]
        arguments = [job_id, record.name, record.fingerprint, now, *words]
        return str(await self._run("submit a job", _SUBMIT, [JOBS, OPEN, LATEST, job_key(job_id)], arguments))

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
                stored = await pipe.execute()
        found = {name: Job.from_fields(ids[name], fields) for name, fields in zip(ids, stored, strict=True)}
        return {name: job for name, job in found.items() if job is not None}

    async def cancel(self, job_id: str, why: str = "") -> bool:
        """False where there was nothing left to cancel."""
        keys = [job_key(job_id), OPEN, answers_key(job_id)]
        return bool(await self._run("cancel a job", _CANCEL, keys, [job_id, why]))

    async def answers(self, job_id: str) -> dict[str, PromptAnswer]:
        """Prompt id to what became of it."""
        async with self._store.asking("read the answers of a job") as client:
            stored = await _hash(client, answers_key(job_id))
        return {prompt_id: PromptAnswer.from_json(text) for prompt_id, text in stored.items()}

    async def begin(self, lease: Lease, total: int, *, priced: bool) -> None:
        """Money that was set aside and never settled, because a worker died, counts as spent."""
        await self._fenced("begin a job", _BEGIN, lease, [total, "1" if priced else "0"])

    async def reserve(self, lease: Lease, prompt_id: str, usd: float) -> None:
        await self._fenced("reserve money", _RESERVE, lease, [prompt_id, repr(usd)])

    async def checkpoint(self, lease: Lease, prompt_id: str, answer: PromptAnswer, eta_s: float | None) -> None:
        """Store one answer, once."""
        kind = "failed" if answer.failed else "unlabelled" if answer.score is None else ""
        cost = "" if answer.cost_usd is None else repr(answer.cost_usd)
        eta = "" if eta_s is None else f"{eta_s:.1f}"
        await self._fenced("store an answer", _CHECKPOINT, lease, [prompt_id, answer.to_json(), kind, cost, eta])

    async def finish(self, lease: Lease, record: ModelRecord, profile: Profile) -> None:
        """Ready, and the profile in use, in one step. Gives the lease back."""
        entry = StoredProfile(record.fingerprint, profile).to_json()
        configured = "1" if record.source == "config" else "0"
        await self._finish(lease, "ready", "", [record.name, entry, configured])

    async def fail(self, lease: Lease, error: str) -> None:
        """The old profile, if there is one, stays. Gives the lease back."""
        await self._finish(lease, "failed", error, ["", "", ""])

    async def _finish(self, lease: Lease, state: str, error: str, result: list[str]) -> None:
        more_keys = [OPEN, VERSION, PROFILES, MODELS]
        await self._fenced("finish a job", _FINISH, lease, [lease.job_id, state, error, *result], more_keys)

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


async def _hash(client: Redis, key: str) -> Mapping[str, str]:
    found: Mapping[str, str] = await _plain(client.hgetall(key))
    return found


async def _plain(reply: Any) -> Any:
    return await reply
