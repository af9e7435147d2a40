-- ARGV: token, prompt id, answer, 'failed', 'unlabelled' or '', cost in USD or '', seconds left or '', text or ''.
-- Needs fence.lua. KEYS continue: texts. Returns 0 if the answer was stored before.
redis.call('HDEL', KEYS[4], ARGV[2])
if redis.call('HSETNX', KEYS[3], ARGV[2], ARGV[3]) == 0 then return 0 end
redis.pcall('HINCRBY', KEYS[2], 'done', 1)
if ARGV[7] ~= '' then redis.pcall('HSET', KEYS[5], ARGV[2], ARGV[7]) end
if ARGV[4] ~= '' then redis.pcall('HINCRBY', KEYS[2], ARGV[4], 1) end
if ARGV[5] ~= '' then redis.pcall('HINCRBYFLOAT', KEYS[2], 'spent_usd', ARGV[5]) end
redis.call('HSET', KEYS[2], 'eta_s', ARGV[6])
return 1
