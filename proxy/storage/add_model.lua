-- KEYS: version, models, profiles, previous profiles, paused models, audit log.
-- ARGV: name, record, profile or '', audit line. Returns -1 if another model has the name.
-- A pause that a model of the configuration has left behind is not the new model's.
local stored = redis.call('HGET', KEYS[2], ARGV[1])
if stored and stored ~= ARGV[2] then return -1 end
local version = changed()
if not stored then redis.pcall('HDEL', KEYS[5], ARGV[1]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then
  redis.pcall('HDEL', KEYS[4], ARGV[1])
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
end
return version
