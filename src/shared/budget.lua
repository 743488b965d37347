-- A proxy reports what it has spent of a budget and holds for calls under way, and is allotted what it may use
-- until it asks again. What is allotted to all together never exceeds the budget.
-- KEYS: the budget's period. ARGV: proxy, limit, spent, used (spent and held), kept, busy, proxies, lease in ms,
-- life of the key in ms, had. Kept: what it may go on using until the answer; had: what it might have used before
-- it asked; -1 when it was never allotted anything.
-- Returns: allotted, spent by the others, left of the budget.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, busy = ARGV[1], ARGV[6] == '1'
local limit, spent, used, kept = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local proxies, lease, had = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[10])
local text = function(number) return string.format('%.0f', number) end

-- When this was heard of last; until when nobody counts as dead; until when a store without a memory
-- leaves everybody what they had.
local last, no_dead_until, no_growth_until = 0, 0, 0
local meta = redis.call('HGET', KEYS[1], '!')
if meta then
  local a, b, c = string.match(meta, '^(%d+) (%d+) (%d+)$')
  last, no_dead_until, no_growth_until = tonumber(a), tonumber(b), tonumber(c)
  if now - last > lease / 2 then no_dead_until = now + lease end
else
  no_dead_until, no_growth_until = now + lease, now + lease
end

local others_spent, others_used, reserved = 0, 0, 0
local rows = redis.call('HGETALL', KEYS[1])
for index = 1, #rows, 2 do
  if rows[index] ~= '!' and rows[index] ~= me then
    local a, b, c, d = string.match(rows[index + 1], '^(-?%d+) (-?%d+) (-?%d+) (%d+)$')
    local its_spent, its_used, allotted, seen = tonumber(a), tonumber(b), tonumber(c), tonumber(d)
    others_spent = others_spent + its_spent
    if now - seen < lease or now < no_dead_until then
      others_used = others_used + its_used
      reserved = reserved + math.max(allotted, its_used)
    else
      -- Dead: what its calls held and what was allotted to it is free again.
      others_used = others_used + its_spent
      reserved = reserved + its_spent
    end
  end
end

local left = limit - others_used - used
local free = limit - reserved - used
local more = 0
if free > 0 then
  -- Who seems to be alone with a store without a memory is perhaps the first of many, which get nothing of what it
  -- has until then.
  if proxies == 1 and now < no_growth_until then more = math.ceil(free / 2)
  elseif proxies == 1 then more = free elseif busy then more = math.ceil(free / 2) else more = math.floor(free / (2 * proxies)) end
end
-- While anything is left, one call may come in anywhere.
if more < 1 and left > 0 then more = 1 end
local allotted = math.max(kept, used + more)
if now < no_growth_until and had >= 0 then allotted = math.max(had, used) end

redis.call('HSET', KEYS[1], me, table.concat({ text(spent), text(used), text(allotted), text(now) }, ' '))
redis.call('HSET', KEYS[1], '!', table.concat({ text(now), text(no_dead_until), text(no_growth_until) }, ' '))
redis.call('PEXPIRE', KEYS[1], ARGV[9])
return { text(allotted), text(others_spent), text(left) }
