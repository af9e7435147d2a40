-- Needs fence.lua and storage/remember_profile.lua. Constants: CHANGED, KEPT_S.
-- KEYS continue: open, version, profiles, models, previous profiles, the model's history, texts.
-- ARGV: token, id, state, error, model, profile, '1' if the model is configured, entry of the history.
-- A job for one map leaves the profile of the other map to the processes that still use that map.
local state, error = ARGV[3], ARGV[4]
if state == 'ready' and ARGV[7] ~= '1' and redis.call('HEXISTS', KEYS[8], ARGV[5]) == 0 then
  state, error = 'failed', 'the model was removed'
end
if state == 'ready' then
  local version = redis.call('INCR', KEYS[6])
  local before = redis.call('HEXISTS', KEYS[2], 'map') == 1 and redis.call('HGET', KEYS[7], ARGV[5])
  redis.call('HDEL', KEYS[9], ARGV[5])
  if before then redis.call('HSET', KEYS[9], ARGV[5], before) end
  redis.call('HSET', KEYS[7], ARGV[5], ARGV[6])
  remember(KEYS[10], ARGV[8])
  redis.call('PUBLISH', CHANGED, version)
end
redis.call('HSET', KEYS[2], 'state', state, 'error', error, 'eta_s', state == 'ready' and '0' or '')
redis.call('SREM', KEYS[5], ARGV[2])
redis.call('EXPIRE', KEYS[2], KEPT_S)
redis.call('EXPIRE', KEYS[3], KEPT_S)
redis.call('EXPIRE', KEYS[11], KEPT_S)
redis.call('DEL', KEYS[1], KEYS[4])
return 1
