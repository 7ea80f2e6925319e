#!lua flags=allow-oom
-- Takes part of a group's members out of it; a job that nobody else holds is cancelled, its lease dropped.
-- KEYS 1 group members, 2 group done
-- ARGV 1 key prefix, 2 group id, 3 first rank, 4 last rank, 5 now (ISO), 6 ttl (s) of a cancelled job
-- Returns { members looked at, cancelled, left to another holder, already terminal }.
-- Keys of jobs and of their queues' registries are made here from the members: a job that the group joined may be in
-- another queue. A cancelled id stays in its queue's list until a worker reaches it (LREM would cost the queue's length
-- each time).
local prefix, group, iso, ttl = ARGV[1], ARGV[2], ARGV[5], ARGV[6]
local members = redis.call('ZRANGE', KEYS[1], ARGV[3], ARGV[4])
local cancelled, left, terminal, totals = 0, 0, 0, {}

local function end_job(key, id, queue_name)
  for _, execution in ipairs(redis.pcall('ZRANGE', prefix .. ':executions:' .. id, 0, -1)) do
    drop_lease(prefix, queue_name, id .. ':' .. execution, nil, totals)
  end
  redis.call('ZREM', prefix .. ':scheduled:' .. queue_name, id)
  redis.call('HSET', key, 'status', 'canceled', 'ended_at', iso)
  redis.call('EXPIRE', key, ttl)
  redis.call('EXPIRE', prefix .. ':results:' .. id, ttl)  -- of a run before
  redis.call('ZADD', prefix .. ':canceled:' .. queue_name, now_ms() / 1000 + ttl, id)
end

for _, member in ipairs(members) do
  local id = job_of(member)
  local key = prefix .. ':job:' .. id
  local f = read(key, 'status', 'groups', 'origin')
  if is_live(f[1]) then
    local holders = f[2] or ''  -- without the field it is a plain RQ client's
    local others = without_group(holders, group)
    if others ~= holders then
      redis.call('HSET', key, 'groups', others)
      if others ~= '' then
        left = left + 1
      else
        cancelled = cancelled + 1
        end_job(key, id, f[3] or '')
      end
      redis.pcall('XADD', KEYS[2], '*', 'j', id)
    end
  else
    terminal = terminal + 1
  end
end
settle(prefix, totals)
redis.call('EXPIRE', KEYS[2], math.max(redis.call('TTL', KEYS[1]), 1))  -- it may be new
return {#members, cancelled, left, terminal}
