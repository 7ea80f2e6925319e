#!lua flags=allow-oom
-- Takes part of a group's members out of it; a job that no other group holds is cancelled, its lease dropped.
-- KEYS 1 group members, 2 group done, 3 started (wip), 4 scheduled, 5 canceled
-- ARGV 1 key prefix, 2 group id, 3 first rank, 4 last rank, 5 now (ISO), 6 ttl (s) of a cancelled job
-- Returns { members looked at, cancelled, left to another group, already terminal }.
-- A cancelled id stays in the queue's list until a worker reaches it (LREM would cost the queue's length each time).
local prefix, group, iso, ttl = ARGV[1], ARGV[2], ARGV[5], ARGV[6]
local members = redis.call('ZRANGE', KEYS[1], ARGV[3], ARGV[4])
local cancelled, left, terminal = 0, 0, 0
for _, member in ipairs(members) do
  local id = job_of(member)
  local key = prefix .. ':job:' .. id
  local f = redis.call('HMGET', key, 'status', 'groups')
  if f[1] == 'queued' or f[1] == 'started' or f[1] == 'scheduled' or f[1] == 'deferred' then
    local others = without_group(f[2], group)
    if others ~= f[2] then
      redis.call('HSET', key, 'groups', others)
      if others ~= '' then
        left = left + 1
      else
        cancelled = cancelled + 1
        for _, execution in ipairs(redis.call('ZRANGE', prefix .. ':executions:' .. id, 0, -1)) do
          local lease = id .. ':' .. execution
          drop_lease(prefix, KEYS[3], lease, redis.call('HGET', prefix .. ':execution:' .. lease, 'worker_name'))
        end
        redis.call('ZREM', KEYS[4], id)
        redis.call('HSET', key, 'status', 'canceled', 'ended_at', iso)
        redis.call('EXPIRE', key, ttl)
        redis.call('ZADD', KEYS[5], now_ms() / 1000 + ttl, id)
      end
      redis.call('XADD', KEYS[2], '*', 'j', id)
    end
  else
    terminal = terminal + 1
  end
end
return {#members, cancelled, left, terminal}
