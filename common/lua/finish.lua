#!lua flags=allow-oom
-- Ends leases with their results, each fenced by its lease: 0 from the ZREM means that it was lost, and nothing is written.
-- KEYS 1 queue, 2 started (wip), 3 finished, 4 failed, 5 scheduled, 6 the worker
-- ARGV 1 key prefix, 2 queue name, 3 worker, 4 model, 5 now (ISO), 6 the payload of a finished job,
--      then per lease: id, execution, kind, ttl (s, -1: for ever), return value (base64), exception (base64, zlib), leased (ms)
--      kind: S succeeded, F failed (RQ's Retry applies), P failed for good, X stopped
-- A job that will be retried goes into its tenant's list; that key, and those of the jobs, are made here.
-- Returns one word a lease: finished, failed, stopped, scheduled, queued (it will be retried), written (by this very
-- lease, before: the answer was lost), or fenced.
local prefix, queue_name, worker, model, iso, stub = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local now = now_ms()
local outcome, known_groups, totals, succeeded, failed, worked = {}, {}, {}, 0, 0, 0

-- As the producer bounds them; of a plain RQ client there may be any number, all of them at once.
local MAX_RETRIES = 1000

local function due_in(key)
  local f = redis.call('HMGET', key, 'retries_left', 'retry_intervals')
  local left = math.min(count_of(f[1]), MAX_RETRIES)
  if left < 1 then return nil end
  local ok, intervals = pcall(cjson.decode, f[2] or '[]')
  if not ok or type(intervals) ~= 'table' then intervals = {} end
  redis.call('HSET', key, 'retries_left', left - 1)
  return count_of(intervals[math.max(#intervals - left, 0) + 1])  -- as rq.job.Job.get_retry_interval
end

local function keep(results, execution, type, value, exception, leased)
  local fields = {'type', type, 'worker_name', worker, 'execution_id', execution,
    'execution_started_at', leased / 1000, 'execution_ended_at', now / 1000}
  if value ~= '' then fields[#fields + 1] = 'return_value'; fields[#fields + 1] = value end
  if exception ~= '' then fields[#fields + 1] = 'exc_string'; fields[#fields + 1] = exception end
  store(results, fields)
end

-- Whether this very lease has written its result already. A dead letter of hand_back's has no start.
local function is_written(results, execution)
  local newest, r = redis.pcall('XREVRANGE', results, '+', '-', 'COUNT', 1)[1], {}
  for k = 1, newest and #newest[2] or 0, 2 do r[newest[2][k]] = newest[2][k + 1] end
  return r.execution_id == execution and r.execution_started_at ~= nil
end

heal(KEYS[1], 'list')
for k = 3, 5 do heal(KEYS[k], 'zset') end
for i = 7, #ARGV, 7 do
  local id, execution, kind, ttl = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local value, exception, leased = ARGV[i + 4], ARGV[i + 5], tonumber(ARGV[i + 6])
  local key, results = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local word = 'fenced'
  local held = drop_lease(prefix, queue_name, id .. ':' .. execution, worker, totals)
  local f = held == 1 and read(key, 'status', 'groups', 'tenant', 'enqueue_at_front_on_retry') or {}
  if held == 0 then
    if is_written(results, execution) then word = 'written' end
  elseif f[1] == 'started' then
    worked = worked + (now - leased) / 1000
    if kind == 'S' then
      word, succeeded = 'finished', succeeded + 1
      if ttl == 0 then
        redis.call('DEL', key, results)
      else
        redis.call('HSET', key, 'status', 'finished', 'ended_at', iso, 'last_heartbeat', iso, 'data', stub)
        keep(results, execution, 1, value, exception, leased)
        redis.call('ZADD', KEYS[3], expire(ttl, now / 1000, key, results), id)
      end
    else
      failed = failed + 1
      local wait = kind == 'F' and due_in(key)
      if wait and wait > 0 then
        word = 'scheduled'
        redis.call('HSET', key, 'status', 'scheduled')
        redis.call('ZADD', KEYS[5], math.floor(now / 1000 + wait), id)
      elseif wait then
        word = 'queued'
        redis.call('HSET', key, 'status', 'queued', 'enqueued_at', iso)
        requeue(prefix, queue_name, f[3], id, f[4] == '1' and 'LPUSH' or 'RPUSH')
      else
        word = kind == 'X' and 'stopped' or 'failed'
        redis.call('HSET', key, 'status', word, 'ended_at', iso, 'last_heartbeat', iso)
        keep(results, execution, 2, value, exception, leased)
        redis.call('ZADD', KEYS[4], expire(ttl, now / 1000, key, results), id)
      end
    end
    if word ~= 'scheduled' and word ~= 'queued' then announce(prefix, f[2], id, known_groups) end
  end
  outcome[#outcome + 1] = word
end
settle(prefix, totals)
if read(KEYS[6], 'birth')[1] then
  if succeeded > 0 then redis.pcall('HINCRBY', KEYS[6], 'successful_job_count', succeeded) end
  if failed > 0 then redis.pcall('HINCRBY', KEYS[6], 'failed_job_count', failed) end
  redis.pcall('HINCRBYFLOAT', KEYS[6], 'total_working_time', worked)
end
-- Room under a fleet-wide limit may be what an idle worker waits for.
if has_backlog(prefix, queue_name) then wake(prefix, queue_name, model) end
return outcome
