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

-- Fields of a job hash; none of them where the key is missing or holds something else: anybody may have written it.
local function read(key, ...)
  local f = redis.pcall('HMGET', key, ...)
  if not f.err then return f end
  if string.find(f.err, 'WRONGTYPE', 1, true) ~= 1 then error(f) end  -- a right that the user lacks is no missing job
  return {}
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

-- Removes every trace of a lease. Returns 1 if it was held, 0 if it had been lost: this ZREM is the fence.
local function drop_lease(prefix, started, member, worker)
  local held = redis.call('ZREM', started, member)
  if held == 1 then
    redis.call('DEL', prefix .. ':execution:' .. member, prefix .. ':executions:' .. job_of(member))
  else  -- another lease of the job may be in those records
    redis.call('DEL', prefix .. ':execution:' .. member)
    redis.pcall('ZREM', prefix .. ':executions:' .. job_of(member), execution_of(member))
  end
  if worker then redis.call('SREM', prefix .. ':worker:' .. worker .. ':executions', member) end
  return held
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
