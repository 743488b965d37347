-- A proxy reports its calls in flight on each replica of a pool, and, if it orders replicas, which of them are to
-- stop.
-- KEYS: the pool's replicas. ARGV: proxy, lease in ms, calls in flight by replica (`0,3`), replicas to stop
-- (`0,1` for the second; `-` of a proxy that does not order).
-- Returns: replicas to stop (`-`: nobody says), then the others' calls in flight by replica.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, lease = ARGV[1], tonumber(ARGV[2])
redis.call('HSET', KEYS[1], me, string.format('%.0f %s %s', now, ARGV[3], ARGV[4]))
redis.call('PEXPIRE', KEYS[1], 2 * lease)
local leaving, sums = '-', {}
local rows = redis.call('HGETALL', KEYS[1])
for index = 1, #rows, 2 do
  local seen, counts, stops = string.match(rows[index + 1], '^(%d+) (%S+) (%S+)$')
  if now - tonumber(seen) >= lease then
    redis.call('HDEL', KEYS[1], rows[index])
  elseif rows[index] ~= me then
    if stops ~= '-' then leaving = stops end
    local replica = 0
    for count in string.gmatch(counts, '%d+') do
      replica = replica + 1
      sums[replica] = (sums[replica] or 0) + tonumber(count)
    end
  end
end
local answer = { leaving }
for _, sum in ipairs(sums) do
  table.insert(answer, string.format('%.0f', sum))
end
return answer
