-- KEYS: version, models, profiles, previous profiles, audit log.
-- ARGV: name, '1' if the model is configured, profile, audit line. Returns -1 if there is no such model.
if ARGV[2] ~= '1' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
return version
