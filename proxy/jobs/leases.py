"""Who may work on a job: one worker at a time, while it shows that it lives. A token fences all that it writes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from proxy.jobs.records import job_key, kick_key, lease_key
from proxy.state.store import Store, StoreUnavailable
from proxy.tasks import end

log = logging.getLogger("uniroute.jobs")

LEASE_S = 8.0
HEARTBEAT_S = 2.0
DOUBTFUL_S = 4.0
"""Without a renewal for this long work stops: the next failed attempt might end after the lease does."""

# KEYS: job, lease. ARGV: token, lease in ms, the worker's map. Repeating it with the same token is harmless.
# A lease that never ends is nobody's: ours all do.
_TAKE = """
local state, only = unpack(redis.call('HMGET', KEYS[1], 'state', 'map'))
if state ~= 'queued' and state ~= 'running' then return 0 end
if only and only ~= ARGV[3] then return 0 end
if redis.call('PTTL', KEYS[2]) == -1 then redis.call('DEL', KEYS[2]) end
if not redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) and redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'running')
return 1
"""
_RENEW = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
return redis.call('PEXPIRE', KEYS[2], ARGV[2])
"""
_RELEASE = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2], KEYS[3]) end
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
        """None: the job is over, or somebody is at it, or it is for another map. Raises StoreUnavailable."""
        lease = Lease(job_id)
        return lease if await self._run("take a job", _TAKE, lease) else None

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
        keys = [job_key(lease.job_id), lease_key(lease.job_id), kick_key(lease.job_id)]
        async with self._store.asking(what) as client:
            return await client.register_script(script)(
                keys=keys, args=[lease.token, int(LEASE_S * 1000), self._map_id]
            )
