-- Put before the body of every script (Redis scripts can't import). Only functions and constants; no keys are touched here.

-- Seconds that RQ's records of an execution last: longer than any lease is held. They go when the lease does.
local RECORD_TTL = 30 * 86400

-- Milliseconds since the epoch by this server's clock: the only clock that judges leases.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The "id" of a lease member "id:execution", and of a group's "id:document". Of a member that has no colon, which none
-- of ours wrote, it is the whole.
local function job_of(member)
  return string.match(member, '^[^:]*')
end

local function execution_of(member)
  return string.match(member, ':(.*)') or ''
end

-- A job of this status will still end: enqueueing it again joins it, cancelling it ends it.
local function is_live(status)
  return status == 'queued' or status == 'started' or status == 'scheduled' or status == 'deferred'
end

-- Fields of a hash; false for each where the key is missing or holds something else: anybody may have written it.
local function read(key, ...)
  local f = redis.pcall('HMGET', key, ...)
  if not f.err then return f end
  if string.find(f.err, 'WRONGTYPE', 1, true) ~= 1 then error(f) end  -- a right that the user lacks is no missing job
  local none = {}
  for i = 1, select('#', ...) do none[i] = false end
  return none
end

-- Makes way for one of the queue's own keys where somebody put something else: what is there can't be of any use.
local function heal(key, type)
  local found = redis.call('TYPE', key).ok
  if found ~= type and found ~= 'none' then redis.call('DEL', key) end
end

-- A count from a job hash, 0 where it is missing or not one.
local function count_of(raw)
  local n = tonumber(raw or 0)
  if not n or n ~= n or n < 0 or n > 2 ^ 31 then return 0 end
  return math.floor(n)
end

-- Seconds that a row is kept, at most ten years; -1 for ever. Redis refuses more in the middle of a script.
local function ttl_of(raw, default)
  local ttl = tonumber(raw) or tonumber(default)
  if ttl ~= ttl then ttl = tonumber(default) end
  return math.max(-1, math.min(math.floor(ttl), 315360000))
end

-- Adds KV tokens to a total that `settle` writes once a script call. `fields`: "queue:Q" or "worker:W" -> tokens.
local function add(fields, field, tokens)
  fields[field] = (fields[field] or 0) + tokens
end

-- Adds to the totals of what leases reserve. One that would fall below zero has drifted: recount.lua sets it right.
local function settle(prefix, fields)
  local key = prefix .. ':ingest:kv_tokens'
  for field, tokens in pairs(fields) do
    local total = tokens ~= 0 and redis.pcall('HINCRBY', key, field, tokens)
    if type(total) == 'table' then  -- whatever somebody wrote there
      heal(key, 'hash')
      redis.call('HSET', key, field, math.max(tokens, 0))
      total = tokens
    end
    if total and total <= 0 then redis.call('HDEL', key, field) end
  end
end

-- Removes every trace of a lease, and takes what it reserved off `totals`, for `settle`. `worker`: where the caller knows
-- who holds it. Returns 1 if it was held, 0 if it had been lost (this ZREM is the fence), and what it was: worker,
-- KV tokens, the tenant that they were charged to (false: none was).
local function drop_lease(prefix, queue_name, member, worker, totals)
  local record = prefix .. ':execution:' .. member
  local f = read(record, 'worker_name', 'kv_tokens', 'tenant')
  local lease = {worker = worker or f[1], kv_tokens = count_of(f[2]), tenant = f[3]}
  local held = redis.call('ZREM', prefix .. ':wip:' .. queue_name, member)
  if held == 1 then
    redis.call('DEL', record, prefix .. ':executions:' .. job_of(member))
    if lease.kv_tokens > 0 then
      add(totals, 'queue:' .. queue_name, -lease.kv_tokens)
      add(totals, 'worker:' .. (f[1] or ''), -lease.kv_tokens)
    end
  else  -- another lease of the job may be in those records
    redis.call('DEL', record)
    redis.pcall('ZREM', prefix .. ':executions:' .. job_of(member), execution_of(member))
  end
  if lease.worker then redis.call('SREM', prefix .. ':worker:' .. lease.worker .. ':executions', member) end
  return held, lease
end

-- A tenant's name, '' where there is none or it can't be one: see check_name in producer/group.py.
local function tenant_of(raw)
  return raw and #raw <= 128 and string.match(raw, '^[%w_.:-]+$') or ''
end

-- The waiting list of a tenant; '' is whoever names none, and the queue's own list.
local function list_of(prefix, queue_name, tenant)
  return prefix .. ':queue:' .. queue_name .. (tenant == '' and '' or '@' .. tenant)
end

-- Lets a tenant take part in the fair share: beside the one that was served least, so that nobody has saved up turns
-- while nothing of theirs waited. (One that is still there keeps its score: it was ahead when its list ran empty.)
local function join(prefix, queue_name, tenant)
  local key = prefix .. ':ingest:tenants:' .. queue_name
  local least = redis.pcall('ZRANGE', key, 0, 0, 'WITHSCORES')
  if least.err then redis.call('DEL', key) end  -- whatever somebody put there
  redis.call('ZADD', key, 'NX', least[2] or 0, tenant)
  redis.call('SADD', prefix .. ':queues', list_of(prefix, queue_name, tenant))  -- for `rq info`
end

-- Adds to what a tenant was served, as long as it takes part.
local function charge(prefix, queue_name, tenant, kv_tokens)
  if tenant and kv_tokens ~= 0 then
    redis.pcall('ZADD', prefix .. ':ingest:tenants:' .. queue_name, 'XX', 'INCR', kv_tokens, tenant)
  end
end

-- Puts a job back into its tenant's list. `push`: LPUSH (front), RPUSH (back). `raw`: the job's field.
local function requeue(prefix, queue_name, raw, id, push)
  local tenant = tenant_of(raw)
  local list = list_of(prefix, queue_name, tenant)
  if tenant ~= '' then heal(list, 'list') end  -- the queue's own: its caller has seen to it, once
  redis.call(push, list, id)
  if tenant ~= '' then join(prefix, queue_name, tenant) end
end

-- Whether anything waits in the queue, whoever's it is.
local function has_backlog(prefix, queue_name)
  return redis.call('EXISTS', prefix .. ':queue:' .. queue_name, prefix .. ':ingest:tenants:' .. queue_name) > 0
end

-- A total from the hash of reservations.
local function total_of(raw)
  return tonumber(raw or 0) or 0
end

-- A limit as read_limits in limits.py reads it; nil: none.
local function limit_of(raw)
  return raw and string.match(raw, '^%d+$') and tonumber(raw) or nil
end

-- The smaller of two bounds, either of which may be missing: the worker's (a number, 0 for none) and the queue's.
local function tighter(own, limit)
  own, limit = tonumber(own), limit_of(limit)
  if own == 0 then return limit or math.huge end
  return math.min(own, limit or math.huge)
end

-- Gives a job and its results `ttl` seconds to live, -1 for ever; returns the score of the registry that it goes to.
local function expire(ttl, now, job, results)
  if ttl < 0 then
    redis.call('PERSIST', job)
    redis.call('PERSIST', results)
    return '+inf'
  end
  redis.call('EXPIRE', job, ttl)
  redis.call('EXPIRE', results, ttl)
  return now + ttl
end

-- Leaves one token for the idle workers of a model; a worker that takes work and leaves some passes it on.
local function wake(prefix, queue_name, model)
  local key = prefix .. ':ingest:wake:' .. queue_name .. ':' .. string.sub(redis.sha1hex(model), 1, 16)
  local tokens = redis.pcall('LLEN', key)
  if type(tokens) == 'table' then tokens = redis.call('DEL', key) - 1 end  -- whatever else was there
  if tokens == 0 then
    redis.call('LPUSH', key, '1')
    redis.call('EXPIRE', key, 3600)
  end
end

-- Tells a job's groups (space-separated ids) that it is terminal. An expired group stays away, and so does one whose
-- keys are not what they should be. `known` is a table of the caller's, empty at first: a group's keys are looked up and
-- given their time once a script call.
local function announce(prefix, groups, id, known)
  for group in string.gmatch(groups or '', '%S+') do
    local key = prefix .. ':ingest:group:' .. group
    if known[group] == nil then known[group] = tonumber(read(key, 'ttl')[1]) or false end
    if known[group] then
      redis.pcall('XADD', key .. ':done', '*', 'j', id)
      if not known[key] then
        known[key] = true
        for _, suffix in ipairs({'', ':members', ':done'}) do
          redis.call('EXPIRE', key .. suffix, ttl_of(known[group], 60))
        end
      end
    end
  end
end

-- Appends to a job's RQ results. Whatever else is under that key goes.
local function store(results, fields)
  if redis.pcall('XADD', results, 'MAXLEN', 10, '*', unpack(fields)).err then
    redis.call('DEL', results)
    redis.call('XADD', results, 'MAXLEN', 10, '*', unpack(fields))
  end
end

-- Makes a job a dead letter. `how`: iso, now (s), ttl (s), exception (base64, zlib), worker, execution, crashes.
local function bury(prefix, failed, id, how, groups, known)
  local key, results = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  redis.call('HSET', key, 'status', 'failed', 'ended_at', how.iso, 'crashes', how.crashes)
  store(results, {'type', 2, 'worker_name', how.worker, 'exc_string', how.exception, 'execution_id', how.execution,
    'execution_ended_at', how.now})
  redis.call('ZADD', failed, expire(how.ttl, how.now, key, results), id)
  announce(prefix, groups, id, known)
end

local function without_group(groups, group)
  local kept = {}
  for other in string.gmatch(groups or '', '%S+') do
    if other ~= group then kept[#kept + 1] = other end
  end
  return table.concat(kept, ' ')
end
