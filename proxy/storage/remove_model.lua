-- KEYS: version, models, profiles, previous profiles, price, paused models, latest jobs, the histories of the model and
-- its efforts, audit log. ARGV: name, names of its efforts, audit line.
-- Returns -1 if there is no such model.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
local version = changed()
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('DEL', KEYS[5])
redis.pcall('HDEL', KEYS[7], ARGV[1])
for place = 1, #ARGV - 1 do
  redis.pcall('HDEL', KEYS[3], ARGV[place])
  redis.pcall('HDEL', KEYS[4], ARGV[place])
  redis.pcall('HDEL', KEYS[6], ARGV[place])
  redis.call('DEL', KEYS[7 + place])
end
return version
