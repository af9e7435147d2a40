-- KEYS: version, models, audit log. ARGV: name, record, the version that the record was made from or '', audit line.
-- Returns -1 if there is no such model, -2 if something was changed since that version.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
if ARGV[3] ~= '' and version_now() ~= ARGV[3] then return -2 end
local version = changed()
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return version
