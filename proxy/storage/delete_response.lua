-- Forget a response of one scope. KEYS: the response, the scope's index, its sizes. ARGV: id.
-- Returns 1 if there was one.
local found = redis.call('UNLINK', KEYS[1])
if redis.call('ZREM', KEYS[2], ARGV[1]) == 1 then
  redis.call('HINCRBY', KEYS[3], 'total', -(redis.call('HGET', KEYS[3], ARGV[1]) or 0))
  redis.call('HDEL', KEYS[3], ARGV[1])
end
return found
