-- A proxy says that it lives, and takes, renews or gives back the planner's lease.
-- KEYS: lease, last token, proxies, rent booked. ARGV: proxy, lease in ms, wish, then pairs: pool, booked until.
-- Returns: time in ms, proxies alive, own token (0: another has the lease), holder, then pairs: pool, booked until.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, lease, wish = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if wish == 'leave' then
  redis.call('ZREM', KEYS[3], me)
else
  redis.call('ZADD', KEYS[3], now, me)
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - lease)
redis.call('PEXPIRE', KEYS[3], lease)

local token = 0
local holder = redis.call('GET', KEYS[1])
local last = redis.call('GET', KEYS[2])
if holder == me and last then
  if wish == 'leave' then
    redis.call('DEL', KEYS[1])
    holder = false
  else
    redis.call('PEXPIRE', KEYS[1], lease)
    token = tonumber(last)
  end
elseif not holder and not last then
  -- A store without a memory may have been one with a holder: nobody has the lease for as long as that one could.
  redis.call('SET', KEYS[2], string.format('%.0f', now))
  redis.call('SET', KEYS[1], 'nobody', 'PX', lease, 'NX')
elseif not holder and wish == 'take' then
  -- Above every earlier token, even those of a store that has lost its memory.
  token = math.max(tonumber(last) + 1, now)
  redis.call('SET', KEYS[2], string.format('%.0f', token))
  redis.call('SET', KEYS[1], me, 'PX', lease, 'NX')
  holder = me
end
-- What is booked stays booked, whoever says so: a store without a memory hears it again from all.
for index = 4, #ARGV, 2 do
  local known = tonumber(redis.call('HGET', KEYS[4], ARGV[index]) or 0)
  if tonumber(ARGV[index + 1]) > known then
    redis.call('HSET', KEYS[4], ARGV[index], ARGV[index + 1])
  end
end
local answer = { string.format('%.0f', now), redis.call('ZCARD', KEYS[3]), string.format('%.0f', token), holder or '' }
for _, word in ipairs(redis.call('HGETALL', KEYS[4])) do
  table.insert(answer, word)
end
return answer
