-- Reserve what a request may take, if the limits of its key allow it. Needs limits.lua and date.lua.
-- KEYS: the key's state. ARGV: key id, reservation, seconds until it expires, tokens, picodollars; then the limits,
-- '' where there is none: requests a minute, tokens a minute, picodollars a day, picodollars a month.
-- Returns one text of eight words, because Redis takes three times as long to send a list: 'granted' or the limit
-- that refuses (requests, tokens, day, month), then what is used, this request included: requests, tokens,
-- picodollars of the day, of the month (0 if neither is limited), reserved, ended; and Redis' time.
-- A refused request uses nothing. A request that costs nothing is within any budget.
-- A reservation that was granted is granted again.
limits_in_memory()
local key_id, reservation, lives = ARGV[1], ARGV[2], tonumber(ARGV[3])
local picousd = ARGV[5]
local amounts = {requests = 1, tokens = tonumber(ARGV[4])}
local rates = {requests = tonumber(ARGV[6]), tokens = tonumber(ARGV[7])}
local budgets = {day = tonumber(ARGV[8]), month = tonumber(ARGV[9])}
local root, now = limits_root(key_id), limits_now()
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', root .. 'open', '-inf', now, 'LIMIT', 0, 1000)) do
  limits_release(root, ended)
end
local today = limits_date(now)
local spent = {day = '0', month = '0'}
if budgets.day or budgets.month then
  spent.day = redis.call('GET', root .. 'day:' .. today) or '0'
  spent.month = redis.call('GET', root .. 'month:' .. string.sub(today, 1, 7)) or '0'
  for _, period in ipairs({'day', 'month'}) do
    if not limits_is_count(spent[period]) then
      return redis.error_reply(root .. period .. ':* holds no count of picodollars; set it to a whole number')
    end
  end
end
local names = {'reserved', 'ended', 'requests', 'requests_at', 'tokens', 'tokens_at'}
local state = {}
for place, value in ipairs(redis.call('HMGET', root .. 'state', unpack(names))) do state[names[place]] = value end
local reserved, ended = state.reserved or '0', state.ended or '0'
if not (limits_is_count(reserved) and limits_is_count(ended)) then reserved, ended = limits_recount(root) end
local used = {requests = 0, tokens = 0}
for kind, per_minute in pairs(rates) do
  local level, at = limits_number(state[kind]), limits_number(state[kind .. '_at'])
  if not (level and at) or at > now + 60 then  -- none of ours, or of a clock that is far from here: full, as of now
    level, at = per_minute, now
    redis.call('HSET', root .. 'state', kind, level, kind .. '_at', string.format('%.6f', now))
  end
  used[kind] = limits_leaked(level, at, per_minute, now)
end
local function reply(verdict)
  local requests, tokens = string.format('%.17g', used.requests), string.format('%.17g', used.tokens)
  local words = {verdict, requests, tokens, spent.day, spent.month, reserved, ended, string.format('%.6f', now)}
  return table.concat(words, ' ')
end
if redis.call('HEXISTS', root .. 'held', reservation) == 1 then return reply('granted') end
for _, period in ipairs({'day', 'month'}) do
  local limit = budgets[period]
  local committed = tonumber(spent[period]) + tonumber(reserved) + tonumber(ended) + tonumber(picousd)
  if limit and picousd ~= '0' and committed > limit then return reply(period) end
end
for _, kind in ipairs({'requests', 'tokens'}) do
  if rates[kind] and not limits_has(used[kind], rates[kind], amounts[kind]) then return reply(kind) end
end
if picousd ~= '0' then redis.call('HINCRBY', root .. 'state', 'reserved', picousd) end
redis.call('HSET', root .. 'held', reservation, ARGV[4] .. ':' .. picousd .. ':' .. today)
redis.call('ZADD', root .. 'open', string.format('%.6f', now + lives), reservation)
local kept, levels = math.ceil(lives), {}
for kind, per_minute in pairs(rates) do
  used[kind] = used[kind] + amounts[kind]
  for _, word in ipairs({kind, string.format('%.17g', used[kind]), kind .. '_at', string.format('%.6f', now),
                         kind .. '_limit', per_minute}) do
    levels[#levels + 1] = word
  end
  kept = math.max(kept, limits_fill_s(used[kind], per_minute))
end
if #levels > 0 then redis.call('HSET', root .. 'state', unpack(levels)) end
limits_keep(root, kept + 60)
return reply('granted')
