-- Count what a request has cost, and release its reservation. Needs limits.lua. Constants: DAY_KEPT_S, MONTH_KEPT_S.
-- All arguments are texts: amounts can be larger than what a Lua number holds exactly. `tokens` and `picousd` may be
-- '': they are not known, and what was reserved counts as used. `reservation` may be '': there was none, and only
-- the cost counts, in `day` and `month`. The cost of a reservation belongs to the day on which it was made, by
-- Redis' clock. A reservation that is no longer there releases nothing, so settling twice is settling once.
local function settle(key_id, reservation, tokens, picousd, day, month)
  local root = limits_root(key_id)
  local held_tokens, held_picousd, held_day
  if reservation ~= '' then held_tokens, held_picousd, held_day = limits_held(root, reservation) end
  if held_day then day, month = held_day, string.sub(held_day, 1, 7) end
  if picousd == '' then picousd = held_picousd or '0' end
  local uncounted
  limits_durable()
  if picousd ~= '0' then
    local periods = {{'day:' .. day, DAY_KEPT_S}, {'month:' .. month, MONTH_KEPT_S}}
    for _, period in ipairs(periods) do
      local spent = redis.pcall('INCRBY', root .. period[1], picousd)
      uncounted = uncounted or (type(spent) == 'table' and spent.err)
      redis.call('EXPIRE', root .. period[1], period[2])
    end
  end
  limits_in_memory()
  if reservation ~= '' then limits_release(root, reservation) end
  if held_day then limits_correct(root, held_tokens, tokens) end
  if uncounted then error(uncounted) end
  if not held_day then return 0 end
  return 1
end
