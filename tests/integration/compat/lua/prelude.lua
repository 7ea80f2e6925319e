-- Put before the body of every script (Redis scripts can't import). Only functions and constants; no keys are touched here.

-- Seconds that RQ's records of an execution last: longer than any lease is held. They go when the lease does.
local RECORD_TTL = 30 * 86400

-- Milliseconds since the epoch by this server's clock: the only clock that judges leases.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The "id" of a lease member "id:execution".
local function job_of(member)
  return string.sub(member, 1, string.find(member, ':', 1, true) - 1)
end

local function execution_of(member)
  return string.sub(member, string.find(member, ':', 1, true) + 1)
end

-- A job of this status will still end: enqueueing it again joins it, cancelling it ends it.
local function is_live(status)
  return status == 'queued' or status == 'started' or status == 'scheduled' or status == 'deferred'
end

-- Removes every trace of a lease. Returns 1 if it was held, 0 if it had been lost: this ZREM is the fence.
local function drop_lease(prefix, started, member, worker)
  local held = redis.call('ZREM', started, member)
  if held == 1 then
    redis.call('DEL', prefix .. ':execution:' .. member, prefix .. ':executions:' .. job_of(member))
  else  -- another lease of the job may be in those records
    redis.call('DEL', prefix .. ':execution:' .. member)
    redis.call('ZREM', prefix .. ':executions:' .. job_of(member), execution_of(member))
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
  if redis.call('LLEN', key) == 0 then
    redis.call('LPUSH', key, '1')
    redis.call('EXPIRE', key, 3600)
  end
end

-- Tells a job's groups (space-separated ids) that it is terminal. An expired group stays away. `known` is a table of
-- the caller's, empty at first: a group's keys are looked up and given their time once a script call.
local function announce(prefix, groups, id, known)
  for group in string.gmatch(groups or '', '%S+') do
    local key = prefix .. ':ingest:group:' .. group
    if known[group] == nil then known[group] = redis.call('HGET', key, 'ttl') end
    if known[group] then
      redis.call('XADD', key .. ':done', '*', 'j', id)
      if not known[key] then
        known[key] = true
        for _, suffix in ipairs({'', ':members', ':done'}) do redis.call('EXPIRE', key .. suffix, known[group]) end
      end
    end
  end
end

local function without_group(groups, group)
  local kept = {}
  for other in string.gmatch(groups or '', '%S+') do
    if other ~= group then kept[#kept + 1] = other end
  end
  return table.concat(kept, ' ')
end
