"""The Lua scripts by which usage reaches Redis, each batch once. What a batch adds up to is tally."""

from __future__ import annotations

from typing import Final

STREAM: Final = "uniroute:usage"
JOURNALS: Final = "uniroute:usage:journals"
"""Hash: journal id → number of the last record applied, or `done:` and when it was."""
MOST_ENTRIES = 100_000
REFUSED = -1

NO_SETTLING = """
local function settle(key_id, reservation_id, tokens, picousd, day, month)
end
"""
"""What a client key's record does to its limits. All arguments are texts: amounts can be larger than what a Lua number
holds exactly, and where one is unknown it is ''. Whatever it raises is counted, and holds nothing up."""

# KEYS: journals, stream. ARGV: journal, the number known to be applied, first and last number of this batch, most
# entries of the stream; how many texts and these; how many sums and these, three words each; settlements, six each.
# Returns the last number applied and how many figures could not be counted, or REFUSED: the batch is not what comes
# next, since some of it is applied, or the store is an older one than was known.
# A number that is none of ours counts as what was known: taken as it is, records would be left out or counted twice.
# The first write is no pcall: where the store takes none (full, a replica, its disk) the whole script must fail.
_APPLY = f"""
local journal, known, first, last = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local stored = redis.call('HGET', KEYS[1], journal) or '0'
if string.sub(stored, 1, 5) == 'done:' then return {{tonumber(last), 0}} end
local applied = string.match(stored, '^%d+$') and #stored <= 15 and tonumber(stored) or known
if applied < known or applied >= first then return {{applied, {REFUSED}}} end
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
return {{tonumber(last), uncounted}}
"""

# KEYS: journals. ARGV: journal, seconds. A field is kept for a while: an attempt to apply the journal's last records
# that was given up may still lie on the way, and must then find that they are applied.
FINISH = """
local now = tonumber(redis.call('TIME')[1])
redis.call('HSET', KEYS[1], ARGV[1], 'done:' .. now)
local fields = redis.call('HGETALL', KEYS[1])
for place = 1, #fields, 2 do
  local done = string.match(fields[place + 1], '^done:(%d+)$')
  if done and now - tonumber(done) > tonumber(ARGV[2]) then redis.call('HDEL', KEYS[1], fields[place]) end
end
return 1
"""
FINISHED_KEPT_S = 3600


def apply_script(settle_function: str = NO_SETTLING) -> str:
    """`settle_function`: Lua text of a local function `settle` with the parameters of NO_SETTLING's."""
    return settle_function + _APPLY
