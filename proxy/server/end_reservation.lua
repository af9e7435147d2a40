-- Replace what was reserved for a request by what it took, until its usage record arrives. Needs limits.lua.
-- KEYS: the key's state. ARGV: key id, reservation, tokens, picodollars; the last two '' if not known.
-- Running it again changes nothing.
limits_in_memory()
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
