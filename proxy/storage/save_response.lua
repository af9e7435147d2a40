-- Keep a response of one scope, and drop the oldest ones of the scope that are too many or too large together.
-- KEYS: the response, the scope's index (sorted set: id by time), its sizes (hash: id → bytes, and `total`).
-- ARGV: id, record, its bytes, seconds to keep, how many may be kept, how many bytes, prefix of the responses' keys.
local now = redis.call('TIME')
local at = now[1] + now[2] / 1e6

local function drop(id, key)
  redis.call('UNLINK', key)
  redis.call('ZREM', KEYS[2], id)
  local size = redis.call('HGET', KEYS[3], id)
  redis.call('HDEL', KEYS[3], id)
  return redis.call('HINCRBY', KEYS[3], 'total', -(size or 0))
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', at - ARGV[4])) do drop(id, ARGV[7] .. id) end
drop(ARGV[1], KEYS[1])
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
redis.call('ZADD', KEYS[2], string.format('%.6f', at), ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
local total = redis.call('HINCRBY', KEYS[3], 'total', ARGV[3])
local count = redis.call('ZCARD', KEYS[2])
while count > 1 and (count > tonumber(ARGV[5]) or total > tonumber(ARGV[6])) do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if oldest == ARGV[1] then break end
  total = drop(oldest, ARGV[7] .. oldest)
  count = count - 1
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[4])
return count
