-- Token bucket: what is used leaks away, and nothing used is a full bucket. The same as `refill` and `take` in
-- ratelimit.py.
local function limits_leaked(used, at, per_minute, now)
  return math.max(0, used - math.max(0, now - at) * per_minute / 60)
end
local function limits_has(used, per_minute, amount) return used + amount <= per_minute end
