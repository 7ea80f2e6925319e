#!lua
-- Puts a chunk of jobs into the queue and into a group, each job once.
-- KEYS 1 the queue's list or its tenant's, 2 queues; with a group: 3 group, 4 group members, 5 group done
-- ARGV 1 key prefix, 2 queue name, 3 group id or '', 4 group ttl (s), 5 now (ISO, for display),
--      6 result ttl (s), 7 failure ttl (s), 8 retries or '', 9 retry intervals (JSON) or '', 10 '1': retry at the front,
--      11 tenant or '', then per job: id, data, document id, model, prompt tokens (0: not known), output tokens at most
--      (0: not known), task or ''
-- Returns one number a job: 1 enqueued, 2 was already there (queued, scheduled or running), 3 was already finished.
-- A job's field `groups` names who holds it: groups, and '(lone)' (no group can be called that) for whoever submitted
-- it outside of any. A job without the field is a plain RQ client's, which holds it alone.
local prefix, queue_name, group, group_ttl, iso = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local tenant = ARGV[11]
local lone = '(lone)'
local holder = group ~= '' and group or lone
local now, outcome, models, members = now_ms(), {}, {}, {}
local rank = 0

-- Without the groups that have expired; a document that is submitted every hour would collect them for ever.
local function living(groups)
  local kept = {}
  for other in string.gmatch(groups, '%S+') do
    if other == lone or redis.call('EXISTS', prefix .. ':ingest:group:' .. other) == 1 then kept[#kept + 1] = other end
  end
  return table.concat(kept, ' ')
end

local function with_holder(groups)
  local others = without_group(#groups > 1000 and living(groups) or groups, holder)
  return others == '' and holder or others .. ' ' .. holder
end

-- What is known of a job's needs, and its tenant: fields and values.
local function known_of(i)
  local known = {}
  local function note(name, value)
    if value ~= '' and value ~= '0' then known[#known + 1] = name; known[#known + 1] = value end
  end
  note('tokens', ARGV[i + 4])
  note('max_tokens', ARGV[i + 5])
  note('task', ARGV[i + 6])
  note('tenant', tenant)
  return known
end

redis.call('LLEN', KEYS[1])  -- an error, if it is no list, before anything is written
if group ~= '' then
  if redis.call('HSETNX', KEYS[3], 'created_ms', now) == 1 then
    redis.call('HSET', KEYS[3], 'queue', queue_name, 'ttl', group_ttl)
  end
  rank = tonumber(redis.call('HGET', KEYS[3], 'next_rank') or 0)
end
for i = 12, #ARGV, 7 do
  local id, data, document, model = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local key, results = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local seen = read(key, 'status', 'groups', 'origin')
  local status = seen[1]
  if group ~= '' then
    rank = rank + 1
    members[#members + 1] = rank
    members[#members + 1] = id .. ':' .. document
  end
  if status == 'finished' and redis.call('EXISTS', results) == 1 then
    outcome[#outcome + 1] = 3
    if group ~= '' then
      redis.call('HSET', key, 'groups', with_holder(seen[2] or lone))
      redis.pcall('XADD', KEYS[5], '*', 'j', id)  -- not to end midway, with jobs that are in no queue
    end
  elseif is_live(status) then
    outcome[#outcome + 1] = 2
    redis.call('HSET', key, 'groups', with_holder(seen[2] or lone))
  else
    -- New, or failed, cancelled, stopped or expired: it runs (again), as if it had never been there.
    outcome[#outcome + 1] = 1
    if redis.call('EXISTS', key) == 1 then
      redis.call('DEL', key, results)
      for _, registry in ipairs({':finished:', ':failed:', ':canceled:'}) do
        redis.call('ZREM', prefix .. registry .. (seen[3] or queue_name), id)
      end
    end
    -- Into the queue first: should a write fail, what stays is an id without a job, which a worker drops, and not a job
    -- that every later call would join and no worker would find.
    redis.call('RPUSH', KEYS[1], id)
    redis.call('HSET', key, 'data', data, 'status', 'queued', 'origin', queue_name, 'description', document,
      'created_at', iso, 'enqueued_at', iso, 'enqueued_ms', now, 'model', model,
      'result_ttl', ARGV[6], 'failure_ttl', ARGV[7], 'groups', status and with_holder(seen[2] or '') or holder,
      unpack(known_of(i)))
    if ARGV[8] ~= '' then redis.call('HSET', key, 'retries_left', ARGV[8], 'retry_intervals', ARGV[9]) end
    if ARGV[10] == '1' then redis.call('HSET', key, 'enqueue_at_front_on_retry', 1) end
    models[model] = true
  end
end
if next(models) then
  redis.call('SADD', KEYS[2], KEYS[1])
  if tenant ~= '' then join(prefix, queue_name, tenant) end
end
for model in pairs(models) do wake(prefix, queue_name, model) end
if group ~= '' then
  redis.call('ZADD', KEYS[4], 'NX', unpack(members))
  redis.call('HSET', KEYS[3], 'seen_ms', now, 'next_rank', rank)
  for k = 3, 5 do redis.call('EXPIRE', KEYS[k], group_ttl) end
end
return outcome
