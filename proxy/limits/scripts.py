"""The Lua of the limits: every change of what a key has used, in one atomic step. Who runs it is limiter.

All that is kept of a key lies under one hash tag, so that a cluster keeps it together:

uniroute:limits:{<key id>}:state        requests, tokens: used of each bucket, and …_at when; picodollars: reserved, and
                                        ended, of requests that are over and whose usage records are on the way
uniroute:limits:{<key id>}:held         reservation → tokens:picodollars:day, then :ended once that is what it took
uniroute:limits:{<key id>}:open         reservation, by when it ends
uniroute:limits:{<key id>}:day:<day>    picodollars spent, also :month:<month>; as text, for Lua's numbers end at 2^53

Buckets and reservations go by Redis' own clock, so that replicas with different clocks agree.
"""

from __future__ import annotations

from typing import Final

PREFIX: Final = "uniroute:limits:"
DAY_KEPT_S = 8 * 86_400
MONTH_KEPT_S = 62 * 86_400
"""After the last cost of that period."""

# What is used of a bucket, as it leaks, nothing being a full one; and whether an amount may still be taken. The same as
# in bucket.
BUCKET: Final = """
local function limits_leaked(used, at, per_minute, now)
  return math.max(0, used - math.max(0, now - at) * per_minute / 60)
end
local function limits_has(used, per_minute, amount) return used + amount <= per_minute end
"""
# The Gregorian date of Unix seconds, in UTC: Howard Hinnant's civil_from_days.
DATE: Final = """
local function limits_date(now)
  local days = math.floor(now / 86400) + 719468
  local era = math.floor(days / 146097)
  local day = days - era * 146097
  local leaps = math.floor(day / 1460) - math.floor(day / 36524) + math.floor(day / 146096)
  local year = math.floor((day - leaps) / 365)
  day = day - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local month = math.floor((5 * day + 2) / 153)
  day = day - math.floor((153 * month + 2) / 5) + 1
  month = month < 10 and month + 3 or month - 9
  return string.format('%04d-%02d-%02d', year + era * 400 + (month <= 2 and 1 or 0), month, day)
end
"""
_SHARED = f"""{BUCKET}
local function limits_root(key_id) return '{PREFIX}{{' .. key_id .. '}}:' end
local function limits_now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function limits_keep(root, seconds)
  for _, name in ipairs({{'state', 'held', 'open'}}) do
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
  local sums = {{reserved = 0, ended = 0}}
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
"""

# All arguments are texts. `tokens` and `picousd` may be '': not known, and then what was reserved is what was used.
# `reservation` may be '': there was none, and the cost alone is counted, in `day` and `month`. A reservation's cost
# belongs to the day that it was made on, by Redis' clock, whatever the clock of the caller says.
# Of a reservation that is not there any more nothing is given back, so that giving back twice is once.
SETTLE_FUNCTION: Final = f"""{_SHARED}
local function settle(key_id, reservation, tokens, picousd, day, month)
  local root = limits_root(key_id)
  local held_tokens, held_picousd, held_day
  if reservation ~= '' then held_tokens, held_picousd, held_day = limits_held(root, reservation) end
  if held_day then day, month = held_day, string.sub(held_day, 1, 7) end
  if picousd == '' then picousd = held_picousd or '0' end
  local uncounted
  if picousd ~= '0' then
    local periods = {{{{'day:' .. day, {DAY_KEPT_S}}}, {{'month:' .. month, {MONTH_KEPT_S}}}}}
    for _, period in ipairs(periods) do
      local spent = redis.pcall('INCRBY', root .. period[1], picousd)
      uncounted = uncounted or (type(spent) == 'table' and spent.err)
      redis.call('EXPIRE', root .. period[1], period[2])
    end
  end
  if reservation ~= '' then limits_release(root, reservation) end
  if held_day then limits_correct(root, held_tokens, tokens) end
  if uncounted then error(uncounted) end
  if not held_day then return 0 end
  return 1
end
"""

# ARGV: the arguments of settle. KEYS[1]: the key's state, for a cluster to know where.
SETTLE: Final = f"{SETTLE_FUNCTION} return settle(unpack(ARGV))"

# What a request took takes the place of what was reserved for it, before its usage record comes with the next batch.
# KEYS[1]: the key's state. ARGV: key id, reservation, tokens and picodollars, '' where not known. Again is harmless.
END: Final = f"""{_SHARED}
local key_id, reservation, tokens, picousd = unpack(ARGV)
local root = limits_root(key_id)
local held_tokens, held_picousd, day, ended = limits_held(root, reservation)
if ended ~= '' then return 0 end
if tokens == '' then tokens = held_tokens end
if picousd == '' then picousd = held_picousd end
redis.call('HSET', root .. 'held', reservation, tokens .. ':' .. picousd .. ':' .. day .. ':ended')
limits_add(root, 'reserved', '-' .. held_picousd)
limits_add(root, 'ended', picousd)
limits_correct(root, held_tokens, tokens)
return 1
"""

# KEYS[1]: the key's state. ARGV: key id, reservation, seconds until it ends by itself, tokens, picodollars, then the
# limits, '' where there is none: requests a minute, tokens a minute, picodollars a day, a month.
# Returns what stands against it, or 'granted'; then what is used with it: requests, tokens, picodollars of the day, of
# the month, reserved and ended, and Redis' time; as one text of eight words: a list takes three times as long to read.
# What is refused uses nothing, and what costs nothing is within any budget.
# Asked again, a granted one is granted.
RESERVE: Final = f"""{_SHARED}{DATE}
local key_id, reservation, lives = ARGV[1], ARGV[2], tonumber(ARGV[3])
local picousd = ARGV[5]
local amounts = {{requests = 1, tokens = tonumber(ARGV[4])}}
local rates = {{requests = tonumber(ARGV[6]), tokens = tonumber(ARGV[7])}}
local budgets = {{day = tonumber(ARGV[8]), month = tonumber(ARGV[9])}}
local root, now = limits_root(key_id), limits_now()
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', root .. 'open', '-inf', now, 'LIMIT', 0, 1000)) do
  limits_release(root, ended)
end
local today = limits_date(now)
local spent = {{
  day = redis.call('GET', root .. 'day:' .. today) or '0',
  month = redis.call('GET', root .. 'month:' .. string.sub(today, 1, 7)) or '0',
}}
for _, period in ipairs({{'day', 'month'}}) do
  if not limits_is_count(spent[period]) then
    if budgets.day or budgets.month then
      return redis.error_reply(root .. period .. ':* holds no count of picodollars; set it to a whole number')
    end
    spent[period] = '0'
  end
end
local reserved, ended = unpack(redis.call('HMGET', root .. 'state', 'reserved', 'ended'))
reserved, ended = reserved or '0', ended or '0'
if not (limits_is_count(reserved) and limits_is_count(ended)) then reserved, ended = limits_recount(root) end
local used = {{requests = 0, tokens = 0}}
for kind, per_minute in pairs(rates) do
  local level, at = unpack(redis.call('HMGET', root .. 'state', kind, kind .. '_at'))
  level, at = limits_number(level), limits_number(at)
  if not (level and at) or at > now + 60 then  -- none of ours, or of a clock that is far from here: full, as of now
    level, at = per_minute, now
    redis.call('HSET', root .. 'state', kind, level, kind .. '_at', string.format('%.6f', now))
  end
  used[kind] = limits_leaked(level, at, per_minute, now)
end
local function reply(verdict)
  local requests, tokens = string.format('%.17g', used.requests), string.format('%.17g', used.tokens)
  local words = {{verdict, requests, tokens, spent.day, spent.month, reserved, ended, string.format('%.6f', now)}}
  return table.concat(words, ' ')
end
if redis.call('HEXISTS', root .. 'held', reservation) == 1 then return reply('granted') end
for _, period in ipairs({{'day', 'month'}}) do
  local limit = budgets[period]
  local committed = tonumber(spent[period]) + tonumber(reserved) + tonumber(ended) + tonumber(picousd)
  if limit and picousd ~= '0' and committed > limit then return reply(period) end
end
for _, kind in ipairs({{'requests', 'tokens'}}) do
  if rates[kind] and not limits_has(used[kind], rates[kind], amounts[kind]) then return reply(kind) end
end
redis.call('HINCRBY', root .. 'state', 'reserved', picousd)
redis.call('HSET', root .. 'held', reservation, ARGV[4] .. ':' .. picousd .. ':' .. today)
redis.call('ZADD', root .. 'open', string.format('%.6f', now + lives), reservation)
local kept = math.ceil(lives)
for kind, per_minute in pairs(rates) do
  used[kind] = used[kind] + amounts[kind]
  local level, at = string.format('%.17g', used[kind]), string.format('%.6f', now)
  redis.call('HSET', root .. 'state', kind, level, kind .. '_at', at, kind .. '_limit', per_minute)
  kept = math.max(kept, limits_fill_s(used[kind], per_minute))
end
limits_keep(root, kept + 60)
return reply('granted')
"""


def state_key(key_id: str) -> str:
    return f"{PREFIX}{{{key_id}}}:state"
