-- Mark a journal as done, and forget journals that were done long ago.
-- KEYS: journals. ARGV: journal, seconds. The field stays for a while: a late attempt to apply the journal's last
-- records may still be under way, and must find that they are applied.
local now = tonumber(redis.call('TIME')[1])
redis.call('HSET', KEYS[1], ARGV[1], 'done:' .. now)
local fields = redis.call('HGETALL', KEYS[1])
for place = 1, #fields, 2 do
  local done = string.match(fields[place + 1], '^done:(%d+)$')
  if done and now - tonumber(done) > tonumber(ARGV[2]) then redis.call('HDEL', KEYS[1], fields[place]) end
end
return 1
