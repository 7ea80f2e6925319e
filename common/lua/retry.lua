#!lua
-- Puts failed or stopped jobs back into the queue, with all their attempts, as RQ's requeue does.
-- KEYS 1 queue, 2 failed, 3 queues
-- ARGV 1 key prefix, 2 queue name, 3 now (ISO; the same where the call is repeated), then the job ids
-- Returns per job 1, or 0 for one that is not failed any more.
-- Keys of jobs and of their tenants' lists are made here from the ids. A job's groups see it as open again: it still names
-- them.
local retried, models = {}, {}
heal(KEYS[1], 'list')  -- a tenant's: see requeue
heal(KEYS[2], 'zset')
for i = 4, #ARGV do
  local id = ARGV[i]
  local key = ARGV[1] .. ':job:' .. id
  local f = read(key, 'status', 'model', 'origin', 'enqueued_at', 'tenant')
  local is_ours = (f[1] == 'failed' or f[1] == 'stopped') and f[3] == ARGV[2]
  if is_ours then
    -- Into the queue first: an id without a job is dropped there, a job without its id would wait for ever.
    requeue(ARGV[1], ARGV[2], f[5], id, 'RPUSH')
    -- Without started_at, lease takes it for a job of which nothing has been tried.
    redis.call('HSET', key, 'status', 'queued', 'enqueued_at', ARGV[3], 'enqueued_ms', now_ms(), 'started_at', '',
      'ended_at', '')
    redis.call('HDEL', key, 'attempts', 'crashes', 'exc_info', 'worker_name', 'blocked_ms', 'passed', 'held_for',
      'held_until')
    redis.call('PERSIST', key)
    redis.call('ZREM', KEYS[2], id)
    if f[2] then models[f[2]] = true end
  end
  retried[#retried + 1] = (is_ours or f[1] == 'queued' and f[4] == ARGV[3]) and 1 or 0
end
redis.call('SADD', KEYS[3], KEYS[1])
for model in pairs(models) do wake(ARGV[1], ARGV[2], model) end
return retried
