-- ARGV: token, number of prompts, '1' if the price is known. Needs fence.lua.
-- What another writer has put in the place of a count stays as it is: pcall, because a script that raises is
-- repeated, and would ask a prompt again each time. The first write is no pcall: where none is taken the script must
-- fail.
redis.call('HSET', KEYS[2], 'total', ARGV[2])
if ARGV[3] == '1' then
  redis.call('HSETNX', KEYS[2], 'spent_usd', '0')
  for _, usd in ipairs(redis.pcall('HVALS', KEYS[4])) do
    if (tonumber(usd) or -1) >= 0 then redis.pcall('HINCRBYFLOAT', KEYS[2], 'spent_usd', usd) end
  end
end
redis.call('DEL', KEYS[4])
return 1
