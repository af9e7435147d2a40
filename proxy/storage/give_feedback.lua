-- Count what somebody says of one answer, in place of what was said of it before; or take that back.
-- KEYS: feedback of decisions; what was observed of the model; the same by key; the key's calls in this minute; what
-- was observed of the model by hour; what was said by day and source.
-- ARGV: decision, what is said ('' takes it back), key, calls that the key may make in a minute, seconds to keep;
-- what the labels belong to (map and model's parameters, '' if nothing is counted), error, half-life in seconds,
-- labels that a key may have of one model and cluster; the error that was expected, the hour of the answer, hours and
-- days to keep, fields of the last hash at most, the source; pairs of cluster and weight.
-- Labels are kept in units of the time `since`: a label of today counts 2^(age of `since` / half-life), so that all of
-- them decay at once when they are read, and each can be taken back exactly. Those by hour do not decay.
-- Returns what was counted as text, or -1: too many calls.
local calls = redis.call('INCR', KEYS[4])
if calls == 1 then redis.call('EXPIRE', KEYS[4], 60) end
if calls > tonumber(ARGV[4]) then return -1 end
local now, half_life = tonumber(redis.call('TIME')[1]), tonumber(ARGV[8])
local owner, hour, hours_kept, days_kept = ARGV[6], tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])

local function add(key, field, amount)
  if tonumber(redis.call('HINCRBYFLOAT', key, field, string.format('%.12g', amount))) < 1e-9 then
    redis.call('HDEL', key, field)
  end
end

local function rescale(key, factor)
  local fields = redis.call('HGETALL', key)
  for place = 1, #fields, 2 do
    if string.find(fields[place], ':') then
      redis.call('HSET', key, fields[place], string.format('%.12g', fields[place + 1] * factor))
    end
  end
end

-- Remove fields `kind:number…` of an earlier hour or day.
local function drop_before(key, first)
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local number = tonumber(string.match(field, '^%a:(%d+)'))
    if number and number < first then redis.call('HDEL', key, field) end
  end
end

local function add_hour(of, labels, wrong, expected)
  add(KEYS[5], 'n:' .. of, labels)
  add(KEYS[5], 'e:' .. of, labels * wrong)
  add(KEYS[5], 'x:' .. of, labels * expected)
end

if owner ~= '' and redis.call('HGET', KEYS[2], 'for') ~= owner then
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('HSET', KEYS[2], 'for', owner, 'since', now, 'half_life', half_life)
end
if owner ~= '' and redis.call('HGET', KEYS[5], 'for') ~= owner then
  redis.call('DEL', KEYS[5])
  redis.call('HSET', KEYS[5], 'for', owner)
end
local since = tonumber(redis.call('HGET', KEYS[2], 'since') or now)
local before = tonumber(redis.call('HGET', KEYS[2], 'half_life') or half_life)
local grown = 2 ^ ((now - since) / before)
if grown > 2 ^ 30 or before ~= half_life then
  rescale(KEYS[2], 1 / grown)
  rescale(KEYS[3], 1 / grown)
  since, grown = now, 1
  redis.call('HSET', KEYS[2], 'since', now, 'half_life', half_life)
end

local stored = redis.call('HGET', KEYS[1], ARGV[1])
local said = stored and cjson.decode(stored)
if said and said.labels and said['for'] == redis.call('HGET', KEYS[2], 'for') then
  local shrunk = 2 ^ ((said.since - since) / half_life)
  for _, label in ipairs(said.labels) do
    local amount = label[2] * shrunk
    add(KEYS[2], 'n:' .. label[1], -amount)
    add(KEYS[2], 'e:' .. label[1], -amount * said.error)
    add(KEYS[3], said.key .. ':' .. label[1], -amount)
  end
end
if said and said.hour and said['for'] == redis.call('HGET', KEYS[5], 'for')
    and redis.call('HEXISTS', KEYS[5], 'n:' .. said.hour) == 1 then
  add_hour(said.hour, -said.counted, said.error, said.expected)
end
if said and said.listed and redis.call('HEXISTS', KEYS[6], 'n:' .. said.listed) == 1 then
  add(KEYS[6], 'n:' .. said.listed, -1)
  add(KEYS[6], 's:' .. said.listed, -said.score)
end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  return '0'
end

local counted, labels, wrong = 0, {}, tonumber(ARGV[7])
for place = 16, #ARGV, 2 do
  local cluster = ARGV[place]
  local had = tonumber(redis.call('HGET', KEYS[3], ARGV[3] .. ':' .. cluster) or 0) / grown
  local weight = math.min(tonumber(ARGV[place + 1]), tonumber(ARGV[9]) - had)
  if weight > 1e-3 then
    local amount = weight * grown
    add(KEYS[2], 'n:' .. cluster, amount)
    add(KEYS[2], 'e:' .. cluster, amount * wrong)
    add(KEYS[3], ARGV[3] .. ':' .. cluster, amount)
    counted = counted + weight
    table.insert(labels, {cluster, amount})
  end
end
local record = cjson.decode(ARGV[2])
if #labels > 0 then
  record.labels, record.key, record.error = labels, ARGV[3], wrong
  record.since, record['for'] = since, owner
  local this_hour = math.floor(now / 3600)
  if hour > this_hour - hours_kept then
    record.hour, record.counted, record.expected = hour, counted, tonumber(ARGV[10])
    if redis.call('HEXISTS', KEYS[5], 'n:' .. hour) == 0 then drop_before(KEYS[5], this_hour - hours_kept + 1) end
    add_hour(hour, counted, wrong, record.expected)
  end
end
local today = math.floor(now / 86400)
record.listed = string.format('%d:%s', today, ARGV[15])
if redis.call('HEXISTS', KEYS[6], 'n:' .. record.listed) == 0 then
  drop_before(KEYS[6], today - days_kept + 1)
  if redis.call('HLEN', KEYS[6]) + 2 > tonumber(ARGV[14]) then record.listed = string.format('%d:(others)', today) end
end
add(KEYS[6], 'n:' .. record.listed, 1)
add(KEYS[6], 's:' .. record.listed, record.score)
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(record))
redis.call('EXPIRE', KEYS[1], ARGV[5])
-- By then a label counts a thousandth.
for place = 2, 3 do redis.call('EXPIRE', KEYS[place], math.ceil(10 * half_life)) end
redis.call('EXPIRE', KEYS[5], hours_kept * 3600)
redis.call('EXPIRE', KEYS[6], days_kept * 86400)
return string.format('%.6g', counted)
