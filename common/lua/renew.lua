#!lua flags=allow-oom
-- Extends a worker's leases and its own record, if that is still its own.
-- KEYS 1 the worker's executions, 2 the worker, then the started registry (wip) of each of its queues
-- ARGV 1 lease ttl (s), 2 stock grace (s), 3 worker ttl (s), 4 now (ISO), 5 incarnation
-- Returns 'known', 'forgotten' (Redis has no record of the worker: leases were extended), or 'replaced' (another worker
-- has taken its name: nothing was).
local own = redis.call('HGET', KEYS[2], 'incarnation')
if own and own ~= ARGV[5] then return 'replaced' end
local alive_until = now_ms() / 1000 + tonumber(ARGV[1])
local expiry = alive_until + tonumber(ARGV[2])

-- Whether the lease is held, in whichever queue.
local function extend(member)
  for k = 3, #KEYS do
    if redis.call('ZADD', KEYS[k], 'XX', 'CH', expiry, member) == 1 or redis.call('ZSCORE', KEYS[k], member) then
      return true
    end
  end
end

for _, member in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  -- Stock tools, which end leases too, know nothing of this set.
  if not extend(member) then redis.call('SREM', KEYS[1], member) end
end
redis.call('EXPIRE', KEYS[1], RECORD_TTL)
if not own then return 'forgotten' end
redis.call('HSET', KEYS[2], 'last_heartbeat', ARGV[4], 'alive_until', alive_until)
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 'known'
