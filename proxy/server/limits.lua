-- Functions that the scripts of the limits share. `reservations.py` describes the keys. Needs bucket.lua.
-- Constant: PREFIX.
-- Reservations and the levels of buckets are forgotten within minutes anyway. They go to replicas, and not into the
-- append-only file: a request would wait for the disk before it is sent. What was spent goes into the file.
-- A server of Redis' protocol that has no set_repl writes all of it where it writes the rest.
local set_repl = redis.set_repl or function() end
local function limits_in_memory() set_repl(redis.REPL_REPLICA) end
local function limits_durable() set_repl(redis.REPL_ALL) end
local function limits_root(key_id) return PREFIX .. '{' .. key_id .. '}:' end
local function limits_now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function limits_keep(root, seconds)
  for _, name in ipairs({'state', 'held', 'open'}) do
    if redis.call('TTL', root .. name) < seconds then redis.call('EXPIRE', root .. name, seconds) end
  end
end
local function limits_fill_s(used, per_minute)
  return per_minute > 0 and math.min(86400, math.ceil(used * 60 / per_minute)) or 0
end
local function limits_is_count(text) return string.match(text, '^%d+$') and #text <= 19 end
local function limits_number(text)
  local number = tonumber(text or '0')
  return number and number >= 0 and number < 1e15 and number
end
local function limits_read(held) return string.match(held or '', '^([^:]*):(%d+):([^:]*):?(.*)$') end
local function limits_held(root, reservation) return limits_read(redis.call('HGET', root .. 'held', reservation)) end
local function limits_recount(root)
  local sums = {reserved = 0, ended = 0}
  for _, held in ipairs(redis.call('HVALS', root .. 'held')) do
    local _, picousd, _, ended = limits_read(held)
    local sum = ended == 'ended' and 'ended' or 'reserved'
    sums[sum] = sums[sum] + (limits_number(picousd) or 0)
  end
  local reserved, ended = string.format('%.0f', sums.reserved), string.format('%.0f', sums.ended)
  redis.call('HSET', root .. 'state', 'reserved', reserved, 'ended', ended)
  return reserved, ended
end
local function limits_add(root, sum, picousd)
  if picousd == '0' or picousd == '-0' then return end
  local left = redis.pcall('HINCRBY', root .. 'state', sum, picousd)
  if type(left) == 'table' or left < 0 then limits_recount(root) end
end
local function limits_release(root, reservation)
  local _, picousd, _, ended = limits_held(root, reservation)
  redis.call('HDEL', root .. 'held', reservation)
  redis.call('ZREM', root .. 'open', reservation)
  limits_add(root, ended == 'ended' and 'ended' or 'reserved', '-' .. (picousd or '0'))
end
local function limits_correct(root, held_tokens, tokens)
  local used, at, limit = unpack(redis.call('HMGET', root .. 'state', 'tokens', 'tokens_at', 'tokens_limit'))
  used, at, limit = used and limits_number(used), at and limits_number(at), limit and limits_number(limit)
  if tokens == '' or tokens == held_tokens or not (used and at and limit and limits_number(held_tokens)) then return end
  local now = limits_now()
  used = math.max(0, limits_leaked(used, at, limit, now) + tonumber(tokens) - tonumber(held_tokens))
  redis.call('HSET', root .. 'state', 'tokens', string.format('%.17g', used), 'tokens_at', string.format('%.6f', now))
  limits_keep(root, limits_fill_s(used, limit) + 60)
end
