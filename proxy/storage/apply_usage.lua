-- Count one batch of a usage journal, once. Needs a local function `settle`, and the constants REFUSED, DAY_TOTALS and
-- DAYS_KEPT_S: how the names of sums begin that are of one day, and for how long those are kept.
-- KEYS: journals, stream, decisions, their times, their bytes, what was said of them.
-- ARGV: journal; the number that is known to be applied; the first and the last number of this batch; the length of
-- the stream; of decisions, for how long they are kept, how many, and how many bytes; how many texts, and the texts;
-- how many sums, and the sums, three words each; how many decisions, and the decisions, three words each;
-- settlements, six words each. Returns the last number applied, and how many figures could not be counted, or REFUSED:
-- the batch is not what comes next, since part of it is applied or the store has lost what it had.
-- A stored number that is not ours counts as the known one: otherwise records would be left out or counted twice.
-- The first write is no pcall: where the store takes none (it is full, or a replica) the whole script must fail.
local journal, known, first, last = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local stored = redis.call('HGET', KEYS[1], journal) or '0'
if string.sub(stored, 1, 5) == 'done:' then return {tonumber(last), 0} end
local applied = string.match(stored, '^%d+$') and #stored <= 15 and tonumber(stored) or known
if applied < known or applied >= first then return {applied, REFUSED} end
redis.call('HSET', KEYS[1], journal, last)
local uncounted = 0
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then uncounted = uncounted + 1 end
end
local function forget(id)
  local size = redis.call('HSTRLEN', KEYS[3], id)
  redis.call('HDEL', KEYS[3], id)
  redis.call('ZREM', KEYS[4], id)
  redis.call('HDEL', KEYS[6], id)
  return redis.call('INCRBY', KEYS[5], -size)
end
local function keep(from, to)
  local texts, times, size = {}, {}, 0
  for place = from, to, 3 do
    local id, time, text = unpack(ARGV, place, place + 2)
    texts[#texts + 1], texts[#texts + 2] = id, text
    times[#times + 1], times[#times + 2] = time, id
    size = size + #text
  end
  if redis.call('ZADD', KEYS[4], unpack(times)) < #times / 2 then  -- some were kept before
    for place = 1, #texts, 2 do size = size - redis.call('HSTRLEN', KEYS[3], texts[place]) end
  end
  redis.call('HSET', KEYS[3], unpack(texts))
  redis.call('INCRBY', KEYS[5], size)
end
local function drop_old(kept_s, most, bytes)
  local now = tonumber(redis.call('TIME')[1])
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now - kept_s, 'LIMIT', 0, 1000)) do forget(id) end
  local total, count = tonumber(redis.call('GET', KEYS[5])), redis.call('ZCARD', KEYS[4])
  for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, 999)) do
    if count <= most and total <= bytes then break end
    total, count = forget(id), count - 1
  end
  for place = 3, 5 do redis.call('EXPIRE', KEYS[place], kept_s) end
end
local at = 9
for place = at + 1, at + tonumber(ARGV[at]) do
  try('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'record', ARGV[place])
end
at = at + 1 + tonumber(ARGV[at])
for place = at + 1, at + 3 * tonumber(ARGV[at]), 3 do
  local field = ARGV[place + 1]
  try(field == 'cost_usd' and 'HINCRBYFLOAT' or 'HINCRBY', ARGV[place], field, ARGV[place + 2])
  if field == 'requests' and string.sub(ARGV[place], 1, #DAY_TOTALS) == DAY_TOTALS then
    try('EXPIRE', ARGV[place], DAYS_KEPT_S)
  end
end
at = at + 1 + 3 * tonumber(ARGV[at])
local last_decision = at + 3 * tonumber(ARGV[at])
if last_decision > at and not pcall(keep, at + 1, last_decision) then uncounted = uncounted + 1 end
if last_decision > at and not pcall(drop_old, tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])) then
  uncounted = uncounted + 1
end
at = last_decision + 1
for place = at, #ARGV, 6 do
  if not pcall(settle, unpack(ARGV, place, place + 5)) then uncounted = uncounted + 1 end
end
return {tonumber(last), uncounted}
