-- Add to what is counted of one day's traffic. KEYS: the day's hash. ARGV: seconds to keep it; pairs of field, amount.
-- The first write is no pcall: where the store takes none the script must fail, and the amounts are sent again.
redis.call('HSETNX', KEYS[1], 'n', '0')
for place = 2, #ARGV, 2 do redis.pcall('HINCRBYFLOAT', KEYS[1], ARGV[place], ARGV[place + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
