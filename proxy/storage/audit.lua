-- Functions for the scripts that change what is registered. Constants: CHANGED, MAX_DIGITS, MAX_LINES, MAX_INTEGER.
-- KEYS[1] is the version, the last of KEYS the audit log, the last of ARGV the audit line or ''.
-- A script calls `changed` before it changes anything: if it fails midway, the log has a line too many, and no
-- change is without its line. A version that is not ours starts again, above any that a process may have seen.
local function changed()
  local version = redis.pcall('INCR', KEYS[1])
  if type(version) == 'table' or version < 1 or version > MAX_INTEGER then
    version = tonumber(redis.call('TIME')[1])
    redis.call('SET', KEYS[1], version)
  end
  if ARGV[#ARGV] ~= '' then
    redis.call('XADD', KEYS[#KEYS], 'MAXLEN', MAX_LINES, '*', 'line', ARGV[#ARGV])
  end
  redis.call('PUBLISH', CHANGED, version)
  return version
end
local function version_now()
  local version = redis.pcall('GET', KEYS[1])
  local ours = type(version) == 'string' and string.match(version, '^%d+$') and #version <= MAX_DIGITS
  return ours and version or '0'
end
