-- Take the lease of a job. Constants: GIVEN_UP, KEPT_S, MAX_TRIES.
-- KEYS: job, lease, kick, answers, reserved, open, texts. ARGV: token, lease in ms, the worker's map, the job's id.
-- Returns 0 if it cannot be had, 1 if it is taken, 2 if the job was tried too often and has failed now.
-- Running it again with the same token changes nothing. A lease without an end is none of ours. What was reserved
-- when a job is given up counts as spent.
local state, only = unpack(redis.call('HMGET', KEYS[1], 'state', 'map'))
if state ~= 'queued' and state ~= 'running' then return 0 end
if only and only ~= ARGV[3] then return 0 end
if redis.call('PTTL', KEYS[2]) == -1 then redis.call('DEL', KEYS[2]) end
if not redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return redis.call('GET', KEYS[2]) == ARGV[1] and 1 or 0
end
local tries = tonumber(redis.call('HGET', KEYS[1], 'tries') or 0)
if not tries or not (tries >= 0 and tries <= MAX_TRIES) then tries = 0 end
if tries < MAX_TRIES then
  redis.call('HSET', KEYS[1], 'state', 'running', 'tries', tries + 1)
  return 1
end
if redis.call('HEXISTS', KEYS[1], 'spent_usd') == 1 then
  for _, usd in ipairs(redis.call('HVALS', KEYS[5])) do redis.call('HINCRBYFLOAT', KEYS[1], 'spent_usd', usd) end
end
redis.call('HSET', KEYS[1], 'state', 'failed', 'error', GIVEN_UP, 'eta_s', '')
redis.call('SREM', KEYS[6], ARGV[4])
redis.call('EXPIRE', KEYS[1], KEPT_S)
redis.call('EXPIRE', KEYS[4], KEPT_S)
redis.call('EXPIRE', KEYS[7], KEPT_S)
redis.call('DEL', KEYS[2], KEYS[5])
return 2
