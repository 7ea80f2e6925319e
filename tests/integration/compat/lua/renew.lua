#!lua flags=allow-oom
-- Extends leases and the worker's own record; tells which leases are gone (cancelled, deleted or taken over).
-- KEYS 1 started (wip), 2 the worker's executions, 3 the worker
-- ARGV 1 lease ttl + stock grace (s), 2 worker ttl (s), 3 now (ISO), then the leases "id:execution"
-- Returns { 1 if Redis still knows the worker else 0, positions, from 1, of the leases that are gone }.
local expiry, gone = now_ms() / 1000 + tonumber(ARGV[1]), {}
for i = 4, #ARGV do
  if redis.call('ZADD', KEYS[1], 'XX', 'CH', expiry, ARGV[i]) == 0 and not redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    gone[#gone + 1] = i - 3
  end
end
redis.call('EXPIRE', KEYS[2], RECORD_TTL)
local known = redis.call('HEXISTS', KEYS[3], 'birth')
if known == 1 then
  redis.call('HSET', KEYS[3], 'last_heartbeat', ARGV[3])
  redis.call('EXPIRE', KEYS[3], ARGV[2])
end
return {known, gone}
