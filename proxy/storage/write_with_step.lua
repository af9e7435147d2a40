-- Run two scripts, both or neither: `write` changes what is registered, and `step` what belongs to it.
-- Needs the local functions `write` and `step`. Constants: WRITE_KEYS, WRITE_ARGUMENTS, how many are `write`'s.
-- Returns the new version, or the negative answer of `write`; and what `step` answered.
local version = write({unpack(KEYS, 1, WRITE_KEYS)}, {unpack(ARGV, 1, WRITE_ARGUMENTS)})
if version < 0 then return {version, ''} end
return {version, step({unpack(KEYS, WRITE_KEYS + 1)}, {unpack(ARGV, WRITE_ARGUMENTS + 1)})}
