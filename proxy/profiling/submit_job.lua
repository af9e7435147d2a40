-- Submit a job, unless an unfinished one measures the same. Constant: KEPT_S.
-- KEYS: jobs, open, latest, profiles, the new job's hash, its answers, their texts.
-- ARGV: id, model, fingerprint, time, map, the earlier job, the name that its profile is stored under, '1' if the texts
-- of its answers are taken over, number of words of the fields, the fields, prompt ids and answers. Returns the job's id.
-- A job for one map begins with the answers of an earlier job, and only while that job's profile is the stored one;
-- else it returns ''. It gives way to a job that asks the model.
local id, model, fingerprint, now, map, earlier, profiled, texts, words = unpack(ARGV, 1, 9)
if earlier ~= '' then
  local profile = redis.call('HGET', KEYS[4], profiled)
  local readable, current = pcall(function() return cjson.decode(profile).job == earlier end)
  if not (readable and current) then return '' end
end
local latest = redis.call('HGET', KEYS[3], model)
local known = latest and redis.pcall('HMGET', 'uniroute:job:' .. latest, 'state', 'fingerprint', 'map')
if known and not known.err then
  local state, of, only = unpack(known)
  if state == 'queued' or state == 'running' then
    if latest == id or (of == fingerprint and (not only or only == map)) then return latest end
    local why = of == fingerprint and 'a newer job took its place' or 'litellm_params were changed'
    redis.call('HSET', 'uniroute:job:' .. latest, 'state', 'cancelled', 'error', why)
    redis.call('EXPIRE', 'uniroute:job:' .. latest, KEPT_S)
    redis.call('EXPIRE', 'uniroute:job:' .. latest .. ':answers', KEPT_S)
    redis.call('EXPIRE', 'uniroute:job:' .. latest .. ':texts', KEPT_S)
    redis.call('SREM', KEYS[2], latest)
  end
end
redis.call('HSET', KEYS[5], unpack(ARGV, 10, 9 + words))
for place = 10 + words, #ARGV, 2 do
  redis.call('HSET', KEYS[6], ARGV[place], ARGV[place + 1])
  local text = texts == '1' and redis.pcall('HGET', 'uniroute:job:' .. earlier .. ':texts', ARGV[place])
  if type(text) == 'string' then redis.call('HSET', KEYS[7], ARGV[place], text) end
end
redis.pcall('ZADD', KEYS[1], now, id)
redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - KEPT_S)
redis.call('SADD', KEYS[2], id)
redis.call('HSET', KEYS[3], model, id)
return id
