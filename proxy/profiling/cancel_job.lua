-- KEYS: job, open, answers, texts. ARGV: id, why. Constant: KEPT_S. Returns 0 if the job was over.
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error', ARGV[2], 'eta_s', '')
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], KEPT_S)
redis.call('EXPIRE', KEYS[3], KEPT_S)
redis.call('EXPIRE', KEYS[4], KEPT_S)
return 1
