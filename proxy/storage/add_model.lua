-- KEYS: version, models, profiles, previous profiles, paused models, the model's history, audit log. Needs
-- remember_profile.lua.
-- ARGV: name, record, profile or '', entry of the history, audit line. Returns -1 if another model has the name.
-- A pause and a history that a model of the configuration has left behind are not the new model's.
local stored = redis.call('HGET', KEYS[2], ARGV[1])
if stored and stored ~= ARGV[2] then return -1 end
local version = changed()
if not stored then
  redis.pcall('HDEL', KEYS[5], ARGV[1])
  redis.call('DEL', KEYS[6])
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then
  redis.pcall('HDEL', KEYS[4], ARGV[1])
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
  remember(KEYS[6], ARGV[4])
end
return version
