-- Count one batch of a usage journal, once. Needs a local function `settle`, and the constant REFUSED.
-- KEYS: journals, stream.
-- ARGV: journal; the number that is known to be applied; the first and the last number of this batch; the length of
-- the stream; how many texts, and the texts; how many sums, and the sums, three words each; settlements, six words
-- each. Returns the last number applied, and how many figures could not be counted, or REFUSED: the batch is not
-- what comes next, since part of it is applied or the store has lost what it had.
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
local at = 6
for place = at + 1, at + tonumber(ARGV[at]) do
  try('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'record', ARGV[place])
end
at = at + 1 + tonumber(ARGV[at])
for place = at + 1, at + 3 * tonumber(ARGV[at]), 3 do
  local field = ARGV[place + 1]
  try(field == 'cost_usd' and 'HINCRBYFLOAT' or 'HINCRBY', ARGV[place], field, ARGV[place + 2])
end
at = at + 1 + 3 * tonumber(ARGV[at])
for place = at, #ARGV, 6 do
  if not pcall(settle, unpack(ARGV, place, place + 5)) then uncounted = uncounted + 1 end
end
return {tonumber(last), uncounted}
