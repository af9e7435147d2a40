-- Add a profile to the history of its model, unless it is the newest entry already. Constant: MAX_PROFILES.
-- What another writer has put in the place of the list goes.
local function remember(key, entry)
  local newest = redis.pcall('LINDEX', key, 0)
  if type(newest) == 'table' then redis.call('DEL', key) end
  if newest == entry then return end
  redis.call('LPUSH', key, entry)
  redis.call('LTRIM', key, 0, MAX_PROFILES - 1)
end
