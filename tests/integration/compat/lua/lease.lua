#!lua flags=allow-oom
-- Leases jobs from the head of the queue, the admission limits checked in the same step.
-- KEYS 1 queue, 2 started (wip), 3 the worker's executions, 4 limits, 5 suspended
-- ARGV 1 key prefix, 2 queue name, 3 worker, 4 model, 5 jobs wanted, 6 payload bytes at most, 7 lease ttl (s),
--      8 stock grace (s), 9 fleet cap (0: none), 10 14 hexadecimal characters that no other call uses, 11 now (ISO),
--      12 first position to look at, 13 positions to look at
-- Returns { leased, unknown, gate, queue length, now (ms), next position }:
--   leased   per job a list: id, execution, data, enqueued_ms or '', enqueued_at or '', attempts, result_ttl or '',
--            failure_ttl or '', name of an RQ feature that isn't served or ''
--   unknown  per job without a model (a plain RQ client's): id, data. It stays where it is: see adopt.lua
--   gate     what kept jobs in the queue: 'open' (nothing did), 'suspended', 'worker', 'fleet'
-- The execution id starts with the time and the order of leasing, so that what is handed back keeps its order.
-- An id that RQ would not have made is dropped. Keys of jobs are made here from ids found in the queue, so they can't be passed in KEYS.
local prefix, queue_name, worker, model = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local want, max_bytes = tonumber(ARGV[5]), tonumber(ARGV[6])
local first, scan = tonumber(ARGV[12]), tonumber(ARGV[13])
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now = math.floor(now_us / 1000)
local gate, bound = 'open', 'open'
if redis.call('EXISTS', KEYS[5]) == 1 then
  want, gate = 0, 'suspended'
else
  local held = redis.call('HMGET', KEYS[4], 'max_in_flight', 'max_in_flight_fleet')
  local room = tonumber(held[1]) and tonumber(held[1]) - redis.call('SCARD', KEYS[3])
  if room and room < want then want, gate = room, 'worker' end
  local own, fleet = tonumber(ARGV[9]), tonumber(held[2])
  if own > 0 then fleet = math.min(fleet or own, own) end
  if fleet then
    local left = fleet - redis.call('ZCARD', KEYS[2])
    if left < want then want, gate = left, 'fleet' end
  end
end
local leased, unknown, taken, bytes, position, heads = {}, {}, 0, 0, first, 0
local expiry = now / 1000 + tonumber(ARGV[7]) + tonumber(ARGV[8])
local ids = want > 0 and redis.call('LRANGE', KEYS[1], first, first + scan - 1) or {}

local function pop_heads()
  if heads > 0 then redis.call('LPOP', KEYS[1], heads) end
  heads = 0
end

-- Out of the queue. Those at its head go together, before the first that stays: LREM would find a second copy of them.
local function take(id)
  if position == 0 then heads = heads + 1 else redis.call('LREM', KEYS[1], 1, id) end
end

local function skip()
  pop_heads()
  position = position + 1
end

-- Status and model alone while jobs of other models are in the way: their payloads stay where they are.
local function look(key)
  local seen = redis.pcall('HMGET', key, 'status', 'model')
  if seen.err or seen[1] ~= 'queued' then return nil end
  return seen[2] and seen[2] ~= model and seen[2] ~= '*' and 'foreign' or 'mine'
end

-- RQ features that are not served, in the order of their fields below.
local UNSERVED = {'on_success', 'on_failure', 'on_stopped', 'webhooks', 'depends_on', 'repeat', 'rate_limit'}

for _, id in ipairs(ids) do
  if taken >= want then break end
  local key = prefix .. ':job:' .. id
  local seen = string.match(id, '^[%w_-]+$') and (position > 0 and look(key) or 'mine')
  local f = seen == 'mine' and redis.pcall('HMGET', key, 'status', 'model', 'data', 'enqueued_ms', 'enqueued_at',
    'attempts', 'result_ttl', 'failure_ttl', 'success_callback_name', 'failure_callback_name', 'stopped_callback_name',
    'webhooks', 'dependency_ids', 'repeats_left', 'rate_limit_key', 'started_at')
  if seen == 'foreign' or (f and f[2] and f[2] ~= model and f[2] ~= '*' and f[1] == 'queued') then
    skip()
  elseif not f or f.err or f[1] ~= 'queued' then
    take(id)  -- cancelled, deleted or expired, or a second copy of an id that runs already
  else
    bytes = bytes + #(f[3] or '')
    if bytes > max_bytes and (taken > 0 or #unknown > 0) then break end
    if not f[2] then
      unknown[#unknown + 1] = id
      unknown[#unknown + 1] = f[3] or ''
      skip()
    else
      local refused = ''
      for i = 1, #UNSERVED do
        if f[8 + i] and f[8 + i] ~= '' then refused = UNSERVED[i] end
      end
      local execution = string.format('%014x%04x', now_us, taken) .. ARGV[10]
      local member = id .. ':' .. execution
      -- RQ's requeue empties started_at, a hand-back doesn't: a job that somebody requeued has all its attempts again.
      local attempts = (f[16] ~= '' and tonumber(f[6]) or 0) + 1
      take(id)
      redis.call('HSET', key, 'status', 'started', 'started_at', ARGV[11], 'last_heartbeat', ARGV[11],
        'worker_name', worker, 'attempts', attempts)
      if not f[4] then redis.call('PERSIST', key) end  -- a plain RQ client may have given it a time to wait
      redis.call('ZADD', KEYS[2], expiry, member)
      redis.call('HSET', prefix .. ':execution:' .. member, 'id', execution, 'job_id', id, 'created_at', now / 1000,
        'last_heartbeat', now / 1000, 'worker_name', worker)
      redis.call('EXPIRE', prefix .. ':execution:' .. member, RECORD_TTL)
      redis.call('ZADD', prefix .. ':executions:' .. id, now / 1000 + RECORD_TTL, execution)
      redis.call('EXPIRE', prefix .. ':executions:' .. id, RECORD_TTL)
      redis.call('SADD', KEYS[3], member)
      taken = taken + 1
      leased[taken] = {id, execution, f[3] or '', f[4] or '', f[5] or '', attempts, f[7] or '', f[8] or '', refused}
    end
  end
end
pop_heads()
local length = redis.call('LLEN', KEYS[1])
if gate == 'suspended' or length > 0 and taken >= want then bound = gate end
if taken > 0 then
  redis.call('EXPIRE', KEYS[3], RECORD_TTL)
  if length > 0 and bound ~= 'fleet' then wake(prefix, queue_name, model) end
end
return {leased, unknown, bound, length, now, position}
