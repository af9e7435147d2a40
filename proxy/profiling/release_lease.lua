-- KEYS as in take_job.lua. ARGV: token. A job that is given back was not tried in vain.
if redis.call('GET', KEYS[2]) == ARGV[1] then
  redis.call('DEL', KEYS[2], KEYS[3])
  if redis.call('HEXISTS', KEYS[1], 'tries') == 1 then
    local tries = tonumber(redis.call('HGET', KEYS[1], 'tries'))
    redis.call('HSET', KEYS[1], 'tries', tries and tries >= 1 and tries - 1 or 0)
  end
end
return 1
