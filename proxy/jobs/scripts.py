"""The Lua of the ledger: every change of a job in one atomic step. Who runs it with which keys is ledger."""

from __future__ import annotations

from typing import Final

from proxy.jobs.records import KEPT_S
from proxy.storage.redis import CHANGED

# KEYS: jobs, open, latest, profiles, the new job's hash, its answers. ARGV: id, model, fingerprint, time, map, the
# earlier job, how many words the fields are, the fields, prompt ids and answers. A job for one map alone begins with
# the earlier job's answers, and only while that job's profile is the stored one. It gives way to one that asks.
SUBMIT: Final = f"""
local id, model, fingerprint, now, map, earlier, words = unpack(ARGV, 1, 7)
if earlier ~= '' then
  local profile = redis.call('HGET', KEYS[4], model)
  local readable, current = pcall(function() return cjson.decode(profile).job == earlier end)
  if not (readable and current) then return '' end
end
local latest = redis.call('HGET', KEYS[3], model)
local known = latest and redis.pcall('HMGET', 'uniroute:job:' .. latest, 'state', 'fingerprint', 'map')
if known and not known.err then
  local state, of, only = unpack(known)
  if state == 'queued' or state == 'running' then
    if latest == id or (of == fingerprint and (not only or only == map)) then return latest end
    local why = of == fingerprint and 'a newer job took its place' or 'litellm_params were changed'
    redis.call('HSET', 'uniroute:job:' .. latest, 'state', 'cancelled', 'error', why)
    redis.call('EXPIRE', 'uniroute:job:' .. latest, {KEPT_S})
    redis.call('EXPIRE', 'uniroute:job:' .. latest .. ':answers', {KEPT_S})
    redis.call('SREM', KEYS[2], latest)
  end
end
redis.call('HSET', KEYS[5], unpack(ARGV, 8, 7 + words))
for place = 8 + words, #ARGV, 2 do redis.call('HSET', KEYS[6], ARGV[place], ARGV[place + 1]) end
redis.pcall('ZADD', KEYS[1], now, id)
redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - {KEPT_S})
redis.call('SADD', KEYS[2], id)
redis.call('HSET', KEYS[3], model, id)
return id
"""
# Fenced scripts. KEYS: lease, job, answers, reserved. ARGV[1]: token. They return -1 where the lease is not ours.
_FENCE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('HGET', KEYS[2], 'state') ~= 'running' then return -1 end
"""
# What a foreign writer has put in the place of a count stays as it is: pcall, since a script that raises is repeated,
# and each time a prompt would be asked again. The first write is no pcall: where none is taken the script must fail.
BEGIN: Final = f"""{_FENCE}
redis.call('HSET', KEYS[2], 'total', ARGV[2])
if ARGV[3] == '1' then
  redis.call('HSETNX', KEYS[2], 'spent_usd', '0')
  for _, usd in ipairs(redis.pcall('HVALS', KEYS[4])) do
    if (tonumber(usd) or -1) >= 0 then redis.pcall('HINCRBYFLOAT', KEYS[2], 'spent_usd', usd) end
  end
end
redis.call('DEL', KEYS[4])
return 1
"""
RESERVE: Final = f"{_FENCE} return redis.call('HSET', KEYS[4], ARGV[2], ARGV[3])"
CHECKPOINT: Final = f"""{_FENCE}
redis.call('HDEL', KEYS[4], ARGV[2])
if redis.call('HSETNX', KEYS[3], ARGV[2], ARGV[3]) == 0 then return 0 end
redis.pcall('HINCRBY', KEYS[2], 'done', 1)
if ARGV[4] ~= '' then redis.pcall('HINCRBY', KEYS[2], ARGV[4], 1) end
if ARGV[5] ~= '' then redis.pcall('HINCRBYFLOAT', KEYS[2], 'spent_usd', ARGV[5]) end
redis.call('HSET', KEYS[2], 'eta_s', ARGV[6])
return 1
"""
# KEYS go on: open, version, profiles, models, earlier profiles. ARGV: token, id, state, error, model, profile, "1" if
# configured. A job for one map alone leaves the profile of the other map to the processes that still use that map.
FINISH: Final = f"""{_FENCE}
local state, error = ARGV[3], ARGV[4]
if state == 'ready' and ARGV[7] ~= '1' and redis.call('HEXISTS', KEYS[8], ARGV[5]) == 0 then
  state, error = 'failed', 'the model was removed'
end
if state == 'ready' then
  local version = redis.call('INCR', KEYS[6])
  local before = redis.call('HEXISTS', KEYS[2], 'map') == 1 and redis.call('HGET', KEYS[7], ARGV[5])
  redis.call('HDEL', KEYS[9], ARGV[5])
  if before then redis.call('HSET', KEYS[9], ARGV[5], before) end
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
CANCEL: Final = f"""
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error', ARGV[2], 'eta_s', '')
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], {KEPT_S})
redis.call('EXPIRE', KEYS[3], {KEPT_S})
return 1
"""
