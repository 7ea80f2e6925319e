#!lua flags=allow-oom
-- Puts leased jobs back at the front of the queue in the order in which they were leased.
-- KEYS 1 queue, 2 started (wip), 3 failed
-- ARGV 1 key prefix, 2 queue name, 3 now (ISO), 4 stock grace (s), 5 attempts at most (0: the hand-back is not an
--      attempt), 6 exception of a dead letter (base64, zlib), 7 failure ttl (s) of a job that names none, 8 jobs at most,
--      then the leases "id:execution"; none given: those that have expired
-- Returns { handed back, dead-lettered, lost before }.
local prefix, queue_name, iso, max_attempts = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5])
local now = now_ms() / 1000
local members = {}
for i = 9, #ARGV do members[#members + 1] = ARGV[i] end
if #members == 0 then
  members = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now + tonumber(ARGV[4]), 'LIMIT', 0, ARGV[8])
end
table.sort(members, function(a, b) return execution_of(a) > execution_of(b) end)  -- last leased first, because of LPUSH
local known_groups, back, dead, lost = {}, 0, 0, 0
for _, member in ipairs(members) do
  local id = job_of(member)
  local key = prefix .. ':job:' .. id
  local worker = redis.call('HGET', prefix .. ':execution:' .. member, 'worker_name')
  local held = drop_lease(prefix, KEYS[2], member, worker)
  local f = redis.call('HMGET', key, 'status', 'attempts', 'failure_ttl', 'groups', 'model')
  if held == 0 or f[1] ~= 'started' then
    lost = lost + 1
  elseif max_attempts > 0 and tonumber(f[2] or 1) >= max_attempts then
    dead = dead + 1
    local ttl = tonumber(f[3]) or tonumber(ARGV[7])
    redis.call('HSET', key, 'status', 'failed', 'ended_at', iso)
    redis.call('XADD', prefix .. ':results:' .. id, 'MAXLEN', 10, '*', 'type', 2, 'worker_name', worker or '',
      'exc_string', ARGV[6], 'execution_id', execution_of(member), 'execution_ended_at', now)
    redis.call('ZADD', KEYS[3], expire(ttl, now, key, prefix .. ':results:' .. id), id)
    announce(prefix, f[4], id, known_groups)
  else
    back = back + 1
    if max_attempts == 0 then redis.call('HINCRBY', key, 'attempts', -1) end
    redis.call('HSET', key, 'status', 'queued', 'enqueued_at', iso)
    redis.call('LPUSH', KEYS[1], id)
    if f[5] then wake(prefix, queue_name, f[5]) end
  end
end
return {back, dead, lost}
