"""Who may work on a job: one worker at a time, while it shows that it lives. A token fences all that it writes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from proxy.concurrency import end
from proxy.jobs.records import KEPT_S, OPEN, answers_key, job_key, kick_key, lease_key, reserved_key
from proxy.storage.redis import Store, StoreUnavailable

log = logging.getLogger("uniroute.jobs")

LEASE_S = 8.0
HEARTBEAT_S = 2.0
DOUBTFUL_S = 4.0
"""Without a renewal for this long work stops: the next failed attempt might end after the lease does."""

MOST_TRIES = 5
"""Workers that may take a job and neither finish it nor give it back: what kills one of them, or freezes it for longer
than a lease, would do so for ever."""
GIVEN_UP = (
    f"given up after {MOST_TRIES} tries: each time the worker that measured the model died or lost its lease, and its"
    " log says more; profile the model again"
)

# KEYS: job, lease, kick, answers, reserved, open. ARGV: token, lease in ms, the worker's map, the job's id. Repeating
# it with the same token is harmless. A lease that never ends is nobody's: ours all do. What was set aside when a job is
# given up counts as spent.
_TAKE = f"""
local state, only = unpack(redis.call('HMGET', KEYS[1], 'state', 'map'))
if state ~= 'queued' and state ~= 'running' then return 0 end
if only and only ~= ARGV[3] then return 0 end
if redis.call('PTTL', KEYS[2]) == -1 then redis.call('DEL', KEYS[2]) end
if not redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return redis.call('GET', KEYS[2]) == ARGV[1] and 1 or 0
end
local tries = tonumber(redis.call('HGET', KEYS[1], 'tries') or 0)
if not tries or not (tries >= 0 and tries <= {MOST_TRIES}) then tries = 0 end
if tries < {MOST_TRIES} then
  redis.call('HSET', KEYS[1], 'state', 'running', 'tries', tries + 1)
  return 1
end
if redis.call('HEXISTS', KEYS[1], 'spent_usd') == 1 then
  for _, usd in ipairs(redis.call('HVALS', KEYS[5])) do redis.call('HINCRBYFLOAT', KEYS[1], 'spent_usd', usd) end
end
redis.call('HSET', KEYS[1], 'state', 'failed', 'error', '{GIVEN_UP}', 'eta_s', '')
redis.call('SREM', KEYS[6], ARGV[4])
redis.call('EXPIRE', KEYS[1], {KEPT_S})
redis.call('EXPIRE', KEYS[4], {KEPT_S})
redis.call('DEL', KEYS[2], KEYS[5])
return 2
"""
_RENEW = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
return redis.call('PEXPIRE', KEYS[2], ARGV[2])
"""
# A job that was given back was not tried in vain.
_RELEASE = """
if redis.call('GET', KEYS[2]) == ARGV[1] then
  redis.call('DEL', KEYS[2], KEYS[3])
  if redis.call('HEXISTS', KEYS[1], 'tries') == 1 then
    local tries = tonumber(redis.call('HGET', KEYS[1], 'tries'))
    redis.call('HSET', KEYS[1], 'tries', tries and tries >= 1 and tries - 1 or 0)
  end
end
return 1
"""


class LeaseLost(Exception):
    """The job is another worker's now, or was cancelled. Nothing more may be written for it."""


@dataclass(frozen=True, slots=True)
class Lease:
    job_id: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


class Leases:
    """Takes, renews and releases leases, for a worker that measures on one cluster map."""

    def __init__(self, store: Store, map_id: str = "") -> None:
        self._store = store
        self._map_id = map_id

    async def take(self, job_id: str) -> Lease | None:
        """None: the job is over, or somebody is at it, or it is for another map, or it was tried too often and is over
        by that. Raises StoreUnavailable."""
        lease = Lease(job_id)
        taken = await self._run("take a job", _TAKE, lease)
        if taken == 2:
            log.error("job %s: %s", job_id, GIVEN_UP)
        return lease if taken == 1 else None

    async def renew(self, lease: Lease) -> bool:
        """False: lost or cancelled. Raises StoreUnavailable."""
        return bool(await self._run("renew a lease", _RENEW, lease))

    async def release(self, lease: Lease) -> None:
        """Let another worker take the job at once. Raises StoreUnavailable; then the lease runs out by itself."""
        await self._run("release a lease", _RELEASE, lease)

    async def while_held(self, lease: Lease, work: asyncio.Task[Any]) -> None:
        """Renew until `work` is over. Ends `work` and raises LeaseLost before anybody else could have the job."""
        renewed = monotonic()
        try:
            while not (await asyncio.wait({work}, timeout=HEARTBEAT_S))[0]:
                asked = monotonic()
                try:
                    if not await self.renew(lease):
                        raise LeaseLost("the job was cancelled or taken over")
                    renewed = asked
                except StoreUnavailable as error:
                    if monotonic() - renewed >= DOUBTFUL_S:
                        raise LeaseLost(str(error)) from error
        finally:
            if not work.done():
                await end(work)

    async def _run(self, what: str, script: str, lease: Lease) -> Any:
        job_id = lease.job_id
        keys = [job_key(job_id), lease_key(job_id), kick_key(job_id), answers_key(job_id), reserved_key(job_id), OPEN]
        async with self._store.asking(what) as client:
            return await client.register_script(script)(
                keys=keys, args=[lease.token, int(LEASE_S * 1000), self._map_id, job_id]
            )
