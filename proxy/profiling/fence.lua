-- Comes before the scripts that only the holder of a lease may run.
-- KEYS: lease, job, answers, reserved. ARGV[1]: token. Returns -1 if the lease is lost.
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('HGET', KEYS[2], 'state') ~= 'running' then return -1 end
