#!lua flags=allow-oom
-- Moves scheduled jobs (retries with an interval) that are due into the queue, without RQ's scheduler.
-- KEYS 1 scheduled, 2 queue
-- ARGV 1 key prefix, 2 queue name, 3 now (ISO), 4 jobs at most
-- Returns how many were moved. The keys of jobs and of their tenants' lists are made here from the ids.
local moved = 0
heal(KEYS[2], 'list')  -- a tenant's: see requeue
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms() / 1000, 'LIMIT', 0, ARGV[4])) do
  local key = ARGV[1] .. ':job:' .. id
  redis.call('ZREM', KEYS[1], id)
  local f = read(key, 'status', 'enqueue_at_front_on_retry', 'model', 'tenant')
  if f[1] == 'scheduled' then
    moved = moved + 1
    redis.call('HSET', key, 'status', 'queued', 'enqueued_at', ARGV[3])
    requeue(ARGV[1], ARGV[2], f[4], id, f[2] == '1' and 'LPUSH' or 'RPUSH')
    if f[3] then wake(ARGV[1], ARGV[2], f[3]) end
  end
end
return moved
