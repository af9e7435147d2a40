-- Needs fence.lua and storage/remember_profile.lua. Constants: CHANGED, KEPT_S.
-- KEYS continue: open, version, profiles, models, previous profiles, texts, latest, the history of each
-- profile.
-- ARGV: token, id, state, error, the name that must be registered ('' if the model is configured), and for each profile
-- its name, the profile, and its entry of the history.
-- A job for one map leaves the profile of the other map to the processes that still use that map.
local state, error = ARGV[3], ARGV[4]
if state == 'ready' and ARGV[5] ~= '' and redis.call('HEXISTS', KEYS[8], ARGV[5]) == 0 then
  state, error = 'failed', 'the model was removed'
  -- Submitted while the model was being removed.
  if redis.pcall('HGET', KEYS[11], ARGV[5]) == ARGV[2] then redis.call('HDEL', KEYS[11], ARGV[5]) end
end
if state == 'ready' then
  local version = redis.call('INCR', KEYS[6])
  local carried_over = redis.call('HEXISTS', KEYS[2], 'map') == 1
  for place = 6, #ARGV, 3 do
    local name = ARGV[place]
    local before = carried_over and redis.call('HGET', KEYS[7], name)
    redis.call('HDEL', KEYS[9], name)
    if before then redis.call('HSET', KEYS[9], name, before) end
    redis.call('HSET', KEYS[7], name, ARGV[place + 1])
    remember(KEYS[12 + (place - 6) / 3], ARGV[place + 2])
  end
  redis.call('PUBLISH', CHANGED, version)
end
redis.call('HSET', KEYS[2], 'state', state, 'error', error, 'eta_s', state == 'ready' and '0' or '')
redis.call('SREM', KEYS[5], ARGV[2])
redis.call('EXPIRE', KEYS[2], KEPT_S)
redis.call('EXPIRE', KEYS[3], KEPT_S)
redis.call('EXPIRE', KEYS[10], KEPT_S)
redis.call('DEL', KEYS[1], KEYS[4])
return 1
