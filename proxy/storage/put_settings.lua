-- Replace all settings that were made while the server runs. KEYS: version, settings, audit log.
-- ARGV: names and values, audit line; no names: the configuration holds in all. Where nothing changes, or a script is
-- run again, there is no new version and no line.
local same = #ARGV - 1 == 2 * redis.call('HLEN', KEYS[2])
for place = 1, #ARGV - 1, 2 do
  same = same and redis.call('HGET', KEYS[2], ARGV[place]) == ARGV[place + 1]
end
if same then return tonumber(version_now()) end
local version = changed()
redis.call('DEL', KEYS[2])
for place = 1, #ARGV - 1, 2 do redis.call('HSET', KEYS[2], ARGV[place], ARGV[place + 1]) end
return version
