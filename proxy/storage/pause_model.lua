-- KEYS: version, models, paused models, audit log.
-- ARGV: name, the name that must be registered ('' if the model is configured), the pause or '' to end it, audit line.
-- Returns -1 if there is no such model. A pause stays the one that it was if the model is paused already, and then there
-- is no new version and no line.
if ARGV[2] ~= '' and redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return -1 end
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == (ARGV[3] == '' and 0 or 1) then return tonumber(version_now()) end
local version = changed()
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[3], ARGV[1])
else
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
end
return version
