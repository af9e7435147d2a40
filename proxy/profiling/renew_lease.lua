-- KEYS as in take_job.lua. ARGV: token, lease in ms. Returns 0 if the lease is lost.
if redis.call('GET', KEYS[2]) ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
return redis.call('PEXPIRE', KEYS[2], ARGV[2])
