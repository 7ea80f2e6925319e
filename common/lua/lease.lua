#!lua flags=allow-oom
-- Leases jobs from the head of the queue, the admission limits checked in the same step.
-- KEYS 1 queue, 2 started (wip), 3 the worker's executions, 4 limits, 5 suspended, 6 failed
-- ARGV 1 key prefix, 2 queue name, 3 worker, 4 model, 5 jobs wanted, 6 payload bytes at most, 7 lease ttl (s),
--      8 stock grace (s), 9 fleet cap (0: none), 10 14 hexadecimal characters that no other call uses, 11 now (ISO),
--      12 first position to look at, 13 positions to look at, 14 bytes of one payload at most, 15 schema version at most,
--      16 exception of a dead letter that is no job (base64, zlib), 17 the smallest company that a job held already may be
--      in (0: any), then the companies for jobs that lost 1, 2, ... workers
-- Returns { leased, unknown, gate, queue length, now (ms), next position }:
--   leased   per job a list: id, execution, data, enqueued_ms or '', enqueued_at or '', attempts, result_ttl or '',
--            failure_ttl or '', what of RQ the job asks for that isn't served or '', crashes
--   unknown  per job without a model (a plain RQ client's): id, data. It stays where it is: see adopt.lua
--   gate     what kept jobs in the queue: 'open' (nothing did), 'suspended', 'worker', 'fleet', 'company'
-- The execution id starts with the time and the order of leasing, so that what is handed back keeps its order.
-- A job that lost workers may have killed them: it runs in ever smaller company, so that in the end it is alone. At the
-- head of the queue it holds up everybody until one worker has few enough in flight: passed over, it would never run.
-- A job of a newer schema stays in the queue for a newer worker, like one of another model.
-- An id that RQ would not have made is dropped; what is under a job's key and is no job is failed. Keys of jobs are made
-- here from ids found in the queue, so they can't be passed in KEYS.
local prefix, queue_name, worker, model = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local want, max_bytes = tonumber(ARGV[5]), tonumber(ARGV[6])
local first, scan = tonumber(ARGV[12]), tonumber(ARGV[13])
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now = math.floor(now_us / 1000)
local max_payload, max_schema = tonumber(ARGV[14]), tonumber(ARGV[15])
-- As _MAX_SCHEMA in prompts.py: no release will come to it, so a job that names it is taken, to be refused.
local NO_SCHEMA = 1000
local gate, bound = 'open', 'open'
local in_flight, company = redis.call('SCARD', KEYS[3]), tonumber(ARGV[17])
if company == 0 then company = math.huge end
if redis.call('EXISTS', KEYS[5]) == 1 then
  want, gate = 0, 'suspended'
else
  local held = read(KEYS[4], 'max_in_flight', 'max_in_flight_fleet')
  local room = tonumber(held[1]) and tonumber(held[1]) - in_flight
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

-- Whether a model can have that name: see ModelName in schema.py.
local function is_name(job_model)
  return #job_model > 0 and #job_model <= 2048 and not string.find(job_model, '[%z\1-\31\127]')
end

-- Whether a queued job is for others: of another model, or too new.
local function is_foreign(job_model, schema)
  local version = count_of(schema)
  return job_model and job_model ~= model and job_model ~= '*' and is_name(job_model)
    or version > max_schema and version < NO_SCHEMA
end

-- Few fields while jobs of others are in the way: their payloads stay where they are.
local function look(key)
  local seen = read(key, 'status', 'model', 'schema')
  if seen[1] ~= 'queued' then return nil end
  return is_foreign(seen[2], seen[3]) and 'foreign' or 'mine'
end

-- In how large a company, itself included, a job may be that lost so many workers.
local function company_of(crashes)
  local known = math.min(crashes, #ARGV - 17)
  return known > 0 and tonumber(ARGV[17 + known]) or math.huge
end

-- Ends what is no job and would never end: another kind of key, or a hash with a status or model that can't be.
local function end_malformed(id, key)
  take(id)
  bury(prefix, KEYS[6], id, {iso = ARGV[11], now = now / 1000, ttl = 31536000, exception = ARGV[16], worker = worker,
    execution = '', crashes = 0}, read(key, 'groups')[1], {})
end

-- All of rq.job.JobStatus.
local STATUSES = {}
for status in string.gmatch('created queued finished failed started deferred scheduled stopped canceled rate_limited '
    .. 'ready_to_enqueue', '%S+') do
  STATUSES[status] = true
end

-- RQ features that are not served, in the order of their fields below.
local UNSERVED = {'on_success', 'on_failure', 'on_stopped', 'webhooks', 'depends_on', 'repeat', 'rate_limit'}

local function refusal(f)
  for i = 1, #UNSERVED do
    if f[8 + i] and f[8 + i] ~= '' then return UNSERVED[i] end
  end
  return ''
end

-- Shows a short field of a job; what is longer is none of ours.
local function short(raw) return string.sub(raw or '', 1, 64) end

for _, id in ipairs(ids) do
  if taken >= want then break end
  local key = prefix .. ':job:' .. id
  local seen = string.match(id, '^[%w_-]+$') and (position > 0 and look(key) or 'mine')
  local too_large = seen == 'mine' and redis.pcall('HSTRLEN', key, 'data')
  if type(too_large) == 'table' then
    redis.call('DEL', key)  -- no hash: nobody could tell what it was to be
    end_malformed(id, key)
    seen = 'buried'
  end
  too_large = seen == 'mine' and too_large > max_payload
  local f = seen == 'mine' and redis.call('HMGET', key, 'status', 'model', too_large and '' or 'data', 'enqueued_ms',
    'enqueued_at', 'attempts', 'result_ttl', 'failure_ttl', 'success_callback_name', 'failure_callback_name',
    'stopped_callback_name', 'webhooks', 'dependency_ids', 'repeats_left', 'rate_limit_key', 'started_at', 'crashes',
    'schema')
  if seen == 'foreign' or (f and f[1] == 'queued' and is_foreign(f[2], f[18])) then
    skip()
  elseif seen == 'buried' then
    -- Gone from the queue.
  elseif f and (not STATUSES[f[1]] or f[1] == 'queued' and f[2] and not is_name(f[2]))
    and redis.call('EXISTS', key) == 1 then
    end_malformed(id, key)
  elseif not f or f[1] ~= 'queued' then
    take(id)  -- cancelled, deleted or expired, or a second copy of an id that runs already
  else
    bytes = bytes + #(f[3] or '')
    if bytes > max_bytes and (taken > 0 or #unknown > 0) then break end
    if not f[2] then
      unknown[#unknown + 1] = id
      unknown[#unknown + 1] = f[3] or ''
      skip()
    else
      -- RQ's requeue empties started_at, a hand-back doesn't: a job that somebody requeued has all its attempts again.
      local requeued = f[16] == ''
      local attempts = (requeued and 0 or count_of(f[6])) + 1
      local crashes = requeued and 0 or count_of(f[17])
      company = math.min(company, company_of(crashes))
      if in_flight + taken + 1 > company then
        bound = 'company'
        break
      end
      local execution = string.format('%014x%04x', now_us, taken) .. ARGV[10]
      local member = id .. ':' .. execution
      take(id)
      redis.call('HSET', key, 'status', 'started', 'started_at', ARGV[11], 'last_heartbeat', ARGV[11],
        'worker_name', worker, 'attempts', attempts)
      if requeued and f[17] then redis.call('HDEL', key, 'crashes') end
      -- A plain RQ client may have given it a time to wait, and a requeued one still has that of the dead letter.
      if requeued or not f[4] then redis.call('PERSIST', key) end
      redis.call('ZADD', KEYS[2], expiry, member)
      redis.call('HSET', prefix .. ':execution:' .. member, 'id', execution, 'job_id', id, 'created_at', now / 1000,
        'last_heartbeat', now / 1000, 'worker_name', worker)
      redis.call('EXPIRE', prefix .. ':execution:' .. member, RECORD_TTL)
      redis.pcall('ZADD', prefix .. ':executions:' .. id, now / 1000 + RECORD_TTL, execution)  -- for RQ's tools alone
      redis.call('EXPIRE', prefix .. ':executions:' .. id, RECORD_TTL)
      redis.call('SADD', KEYS[3], member)
      taken = taken + 1
      leased[taken] = {id, execution, f[3] or '', short(f[4]), short(f[5]), attempts, short(f[7]), short(f[8]),
        too_large and 'size' or refusal(f), crashes}
    end
  end
end
pop_heads()
local length = redis.call('LLEN', KEYS[1])
if bound ~= 'company' and (gate == 'suspended' or length > 0 and taken >= want) then bound = gate end
if taken > 0 then
  redis.call('EXPIRE', KEYS[3], RECORD_TTL)
  if length > 0 and bound ~= 'fleet' then wake(prefix, queue_name, model) end
end
return {leased, unknown, bound, length, now, position}
