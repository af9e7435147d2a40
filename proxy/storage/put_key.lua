-- KEYS: version, keys, audit log. ARGV: id, the record that the change was made from or '', the record, audit line.
-- A script that is run again finds its own work done. Where nothing changes it cannot tell, and logs a line too many.
local stored = redis.call('HGET', KEYS[2], ARGV[1]) or ''
if stored == ARGV[3] and ARGV[2] ~= ARGV[3] then return tonumber(version_now()) end
if stored ~= ARGV[2] then return -1 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return version
