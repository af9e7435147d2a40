-- ARGV: token, prompt id, USD. Needs fence.lua.
return redis.call('HSET', KEYS[4], ARGV[2], ARGV[3])
