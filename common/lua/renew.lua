#!lua flags=allow-oom
-- Extends a worker's leases and its own record, if that is still its own.
-- KEYS 1 started (wip), 2 the worker's executions, 3 the worker
-- ARGV 1 lease ttl (s), 2 stock grace (s), 3 worker ttl (s), 4 now (ISO), 5 incarnation
-- Returns 'known', 'forgotten' (Redis has no record of the worker: leases were extended), or 'replaced' (another worker
-- has taken its name: nothing was).
local own = redis.call('HGET', KEYS[3], 'incarnation')
if own and own ~= ARGV[5] then return 'replaced' end
local alive_until = now_ms() / 1000 + tonumber(ARGV[1])
for _, member in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  if redis.call('ZADD', KEYS[1], 'XX', 'CH', alive_until + tonumber(ARGV[2]), member) == 0
    and not redis.call('ZSCORE', KEYS[1], member) then
    redis.call('SREM', KEYS[2], member)  -- ended by stock tools, which know nothing of this set
  end
end
redis.call('EXPIRE', KEYS[2], RECORD_TTL)
if not own then return 'forgotten' end
redis.call('HSET', KEYS[3], 'last_heartbeat', ARGV[4], 'alive_until', alive_until)
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 'known'
