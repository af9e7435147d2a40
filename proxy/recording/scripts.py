"""The Lua scripts by which usage reaches Redis, each record once. Asks nobody."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from proxy.recording.journal import Entry

STREAM: Final = "uniroute:usage"
TOTALS: Final = "uniroute:usage:totals"
"""With `:<model>`, the hash of what a model used."""
KEY_TOTALS: Final = "uniroute:usage:key"
"""With `:<id>`, the hash of what a client key used."""
JOURNALS: Final = "uniroute:usage:journals"
"""Hash: journal id → number of the last record applied, or `done:` and when it was."""
MOST_ENTRIES = 100_000
COLUMNS = ("ending", "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_picousd", "cost_usd")

NO_SETTLING = """
local function settle(key_id, reservation_id, tokens, picousd, day, month)
end
"""
"""What a client key's record does to its limits. All arguments are texts: amounts can be larger than what a Lua number
holds exactly, and where one is unknown it is ''. Whatever it raises is counted, and holds nothing up."""

# KEYS: journals, stream. ARGV: journal, the number known to be applied, most entries of the stream; then 13 a record:
# number, text, model, key, reservation, day, and the COLUMNS. Returns the last number applied before, and how many
# figures could not be counted. With fewer applied than was known nothing is done: the store is an older one.
# The first write is no pcall: where the store takes none (full, a replica, its disk) the whole script must fail.
_APPLY = f"""
local WIDTH, TOTALS, KEY_TOTALS = 13, '{TOTALS}:', '{KEY_TOTALS}:'
local journal, known = ARGV[1], tonumber(ARGV[2])
local stored = redis.call('HGET', KEYS[1], journal) or '0'
local last = tonumber(stored) or math.huge
if last == math.huge then return {{known, 0}} end
if last < known then return {{last, 0}} end
if tonumber(ARGV[#ARGV - WIDTH + 1]) <= last then return {{last, 0}} end
redis.call('HSET', KEYS[1], journal, ARGV[#ARGV - WIDTH + 1])
local uncounted = 0
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then uncounted = uncounted + 1 end
end
local function add(hash, at)
  try('HINCRBY', hash, 'requests', 1)
  try('HINCRBY', hash, ARGV[at], 1)
  for place, name in ipairs({{'prompt_tokens', 'cached_tokens', 'output_tokens', 'reasoning_tokens'}}) do
    local count = ARGV[at + place]
    if count ~= '' and count ~= '0' then try('HINCRBY', hash, name, count) end
  end
  if ARGV[at + 5] == '' then
    try('HINCRBY', hash, 'cost_unknown', 1)
  else
    try('HINCRBY', hash, 'cost_picousd', ARGV[at + 5])
    try('HINCRBYFLOAT', hash, 'cost_usd', ARGV[at + 6])
  end
end
local function tokens(at)
  local prompt, output = ARGV[at + 1], ARGV[at + 3]
  if prompt == '' or output == '' then return '' end
  return string.format('%.0f', tonumber(prompt) + tonumber(output))
end
for at = 4, #ARGV, WIDTH do
  if tonumber(ARGV[at]) > last then
    try('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'record', ARGV[at + 1])
    add(TOTALS .. ARGV[at + 2], at + 6)
    local key = ARGV[at + 3]
    if key ~= '' then
      add(KEY_TOTALS .. key, at + 6)
      local day = ARGV[at + 5]
      local settled = pcall(settle, key, ARGV[at + 4], tokens(at + 6), ARGV[at + 11], day, string.sub(day, 1, 7))
      if not settled then uncounted = uncounted + 1 end
    end
  end
end
return {{last, uncounted}}
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


def arguments_of(entry: Entry) -> list[str | int]:
    """One record for the script. Raises ValueError: it is not one that we wrote."""
    fields = entry.fields
    try:
        day = datetime.fromtimestamp(fields["at"], UTC).strftime("%Y-%m-%d")
        named = [_text(fields[name]) for name in ("model", "key_id", "reservation")]
        return [entry.number, entry.text, *named, day, *(_text(fields[name]) for name in COLUMNS)]
    except (KeyError, TypeError, OverflowError, OSError) as error:
        raise ValueError(f"not a usage record: {type(error).__name__} {error}") from error


def _text(value: Any) -> str:
    return "" if value is None else str(value)
