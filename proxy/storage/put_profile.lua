-- KEYS: version, models, profiles, previous profiles, the model's history, audit log. Needs remember_profile.lua.
-- ARGV: name, the name that must be registered ('' if the model is configured), profile, entry of the history, audit line.
-- Returns -1 if there is no such model.
if ARGV[2] ~= '' and redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return -1 end
local version = changed()
redis.pcall('HDEL', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
remember(KEYS[5], ARGV[4])
return version
