-- KEYS: version, models, price, audit log. Constant: PRICING.
-- ARGV: name, '1' if the model is configured, '1' if only a price from a feed may be replaced, the fields, audit
-- line. Returns -1 if there is no such model, -2 if the price stays.
if ARGV[2] ~= '1' and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -1 end
if ARGV[3] == '1' and redis.call('EXISTS', KEYS[3]) == 1 and redis.pcall('HGET', KEYS[3], 'source') ~= 'sync' then
  return -2
end
local version = changed()
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[3], unpack(ARGV, 4, #ARGV - 1))
redis.call('PUBLISH', PRICING, ARGV[1])
return version
