-- A proxy reports what it has taken of a rate limit, and is allotted what it may take until it asks again. The
-- level is what all have taken and has not come back; it falls by the limit in a minute.
-- KEYS: the limit. ARGV: proxy, units a minute, taken in all, taken at the last answer, kept, busy, proxies,
-- lease in ms.
-- Returns: allotted beyond what is taken, free of the limit (negative: owed).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, busy = ARGV[1], ARGV[6] == '1'
local limit, taken, before, kept = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local proxies, lease = tonumber(ARGV[7]), tonumber(ARGV[8])

local level, at, reserved = 0, now, 0
local rows = redis.call('HGETALL', KEYS[1])
for index = 1, #rows, 2 do
  local field, value = rows[index], rows[index + 1]
  if field == '!' then
    local a, b = string.match(value, '^(%S+) (%d+)$')
    level, at = tonumber(a), tonumber(b)
  else
    local a, b, c = string.match(value, '^(-?%d+) (%d+) (%d+)$')
    if field == me then
      before = tonumber(a)
    elseif now - tonumber(c) < lease then
      reserved = reserved + tonumber(b)
    else
      redis.call('HDEL', KEYS[1], field)
    end
  end
end
level = math.max(0, level - (now - at) * limit / 60000)
level = math.max(0, level + taken - before)

local left = limit - level
local free = left - reserved
local more = 0
if free > 0 then
  if proxies == 1 then more = math.floor(free) elseif busy then more = math.ceil(free / 2) else more = math.floor(free / (2 * proxies)) end
end
-- While anything is left, one call may come in anywhere.
if more < 1 and left >= 1 then more = 1 end
local allotted = math.max(kept, more)

redis.call('HSET', KEYS[1], me, string.format('%.0f %.0f %.0f', taken, allotted, now))
redis.call('HSET', KEYS[1], '!', string.format('%.6f %.0f', level, now))
redis.call('PEXPIRE', KEYS[1], math.ceil(level / math.max(limit, 1) * 60000) + 2 * 60000)
return { string.format('%.0f', allotted), string.format('%.0f', math.floor(left)) }
