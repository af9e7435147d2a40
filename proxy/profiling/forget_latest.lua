-- KEYS: latest. ARGV: model and job, for each job that was found to be gone.
-- A newer job of the same model may have been submitted since.
for place = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[place]) == ARGV[place + 1] then redis.call('HDEL', KEYS[1], ARGV[place]) end
end
return 0
