#!lua flags=allow-oom
-- Puts leased jobs back at the front of their lists (the queue's or their tenants'), in the order in which they were leased.
-- KEYS 1 queue, 2 started (wip), 3 failed
-- ARGV 1 key prefix, 2 queue name, 3 now (ISO), 4 stock grace (s), 5 crashes at most (0: the hand-back is neither an
--      attempt nor a crash), 6 exception of a dead letter (base64, zlib), 7 failure ttl (s) of a job that names none,
--      8 jobs at most, 9 worker or '', 10 its incarnation, 11 not after (s by this server's clock) or '', then the leases
--      "id:execution"
--      No leases given: the worker's from this queue, as long as its name is its own; without a worker, those that have
--      expired.
-- Returns { handed back, dead-lettered, lost before }.
-- Of more leases than it may take it takes those leased last: the next call puts its jobs in front of them.
local prefix, queue_name, iso, max_crashes = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5])
local now, limit, owner = now_ms() / 1000, tonumber(ARGV[8]), ARGV[9]
-- Expired leases to sort at most: all of any one worker's. More of them are of several workers, which have no order.
local SORTED = 8192
local members = {}

-- Whether a lease that a worker is said to hold is for another call to hand back: it is from another queue.
local function is_elsewhere(member)
  if redis.call('ZSCORE', KEYS[2], member) then return false end
  local origin = read(prefix .. ':job:' .. job_of(member), 'origin')[1]
  return origin and origin ~= queue_name
end

-- What a tenant was charged for a lease, as long as it has taken part all the time. One that starts anew starts even.
local takes_part = {}
local function refund(lease)
  local tenant = lease.tenant
  if not tenant then return end
  if takes_part[tenant] == nil then
    local score = redis.pcall('ZSCORE', prefix .. ':ingest:tenants:' .. queue_name, tenant)
    takes_part[tenant] = type(score) == 'string'
  end
  if takes_part[tenant] then charge(prefix, queue_name, tenant, -lease.kv_tokens) end
end

-- A call may lie in a stalled server's buffers long after its caller has given it up: what it knew isn't so any more.
if ARGV[11] ~= '' and now > tonumber(ARGV[11]) then return {0, 0, 0} end
if owner ~= '' then
  local incarnation = read(prefix .. ':worker:' .. owner, 'incarnation')[1]
  if incarnation and incarnation ~= ARGV[10] then return {0, 0, 0} end
end
heal(KEYS[1], 'list')
heal(KEYS[3], 'zset')
if #ARGV > 11 then
  for i = 12, #ARGV do members[#members + 1] = ARGV[i] end
elseif owner ~= '' then
  for _, member in ipairs(redis.call('SMEMBERS', prefix .. ':worker:' .. owner .. ':executions')) do
    if not is_elsewhere(member) then members[#members + 1] = member end
  end
else
  members = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now + tonumber(ARGV[4]), 'LIMIT', 0, SORTED)
end
local execution = {}
for _, member in ipairs(members) do execution[member] = execution_of(member) end
table.sort(members, function(a, b) return execution[a] > execution[b] end)  -- last leased first, because of LPUSH
local known_groups, totals, models, back, dead, lost = {}, {}, {}, 0, 0, 0
for i = 1, math.min(#members, limit) do
  local member = members[i]
  local id = job_of(member)
  local key = prefix .. ':job:' .. id
  local held, lease = drop_lease(prefix, queue_name, member, owner ~= '' and owner or nil, totals)
  local f = read(key, 'status', 'attempts', 'failure_ttl', 'groups', 'model', 'crashes', 'tenant')
  local crashes = max_crashes > 0 and count_of(f[6]) + 1 or 0
  if held == 0 or f[1] ~= 'started' then
    lost = lost + 1
  elseif max_crashes > 0 and crashes >= max_crashes then
    dead = dead + 1
    bury(prefix, KEYS[3], id, {iso = iso, now = now, ttl = ttl_of(f[3], ARGV[7]), exception = ARGV[6],
      worker = lease.worker or '', execution = execution_of(member), crashes = crashes}, f[4], known_groups)
  else
    back = back + 1
    if max_crashes > 0 then
      redis.call('HSET', key, 'crashes', crashes)
    else
      redis.call('HSET', key, 'attempts', math.max(0, count_of(f[2]) - 1))
    end
    redis.call('HSET', key, 'status', 'queued', 'enqueued_at', iso)
    refund(lease)
    requeue(prefix, queue_name, f[7], id, 'LPUSH')
    if f[5] then models[f[5]] = true end
  end
end
settle(prefix, totals)
for model in pairs(models) do wake(prefix, queue_name, model) end
return {back, dead, lost}
