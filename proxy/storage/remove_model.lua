-- KEYS: version, models, profiles, previous profiles, price, paused models, the model's history, audit log.
-- ARGV: name, audit line.
-- Returns -1 if there is no such model.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.call('HDEL', KEYS[2], ARGV[1])
redis.pcall('HDEL', KEYS[3], ARGV[1])
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('DEL', KEYS[5], KEYS[7])
redis.pcall('HDEL', KEYS[6], ARGV[1])
return version
