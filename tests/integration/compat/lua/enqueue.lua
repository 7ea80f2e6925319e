#!lua
-- Puts a chunk of jobs into the queue and into a group, each job once.
-- KEYS 1 queue, 2 queues; with a group: 3 group, 4 group members, 5 group done
-- ARGV 1 key prefix, 2 queue name, 3 group id or '', 4 group ttl (s), 5 now (ISO, for display),
--      6 result ttl (s), 7 failure ttl (s), 8 retries or '', 9 retry intervals (JSON) or '', 10 '1': retry at the front,
--      then per job: id, data, document id, model
-- Returns one number a job: 1 enqueued, 2 was already there (queued, scheduled or running), 3 was already finished.
-- A job's field `groups` names who holds it: groups, and '(lone)' (no group can be called that) for whoever submitted
-- it outside of any. A job without the field is a plain RQ client's, which holds it alone.
local prefix, queue_name, group, group_ttl, iso = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local lone = '(lone)'
local holder = group ~= '' and group or lone
local now, outcome, fresh, models, members = now_ms(), {}, {}, {}, {}
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

if group ~= '' then
  if redis.call('HSETNX', KEYS[3], 'created_ms', now) == 1 then
    redis.call('HSET', KEYS[3], 'queue', queue_name, 'ttl', group_ttl)
  end
  rank = tonumber(redis.call('HGET', KEYS[3], 'next_rank') or 0)
end
for i = 11, #ARGV, 4 do
  local id, data, document, model = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local key, results = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local seen = redis.call('HMGET', key, 'status', 'groups', 'origin')
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
      redis.call('XADD', KEYS[5], '*', 'j', id)
    end
  elseif is_live(status) then
    outcome[#outcome + 1] = 2
    redis.call('HSET', key, 'groups', with_holder(seen[2] or lone))
  else
    -- New, or failed, cancelled, stopped or expired: it runs (again), as if it had never been there.
    outcome[#outcome + 1] = 1
    if status then
      redis.call('DEL', key, results)
      for _, registry in ipairs({':finished:', ':failed:', ':canceled:'}) do
        redis.call('ZREM', prefix .. registry .. (seen[3] or queue_name), id)
      end
    end
    redis.call('HSET', key, 'data', data, 'status', 'queued', 'origin', queue_name, 'description', document,
      'created_at', iso, 'enqueued_at', iso, 'enqueued_ms', now, 'model', model,
      'result_ttl', ARGV[6], 'failure_ttl', ARGV[7], 'groups', status and with_holder(seen[2] or '') or holder)
    if ARGV[8] ~= '' then redis.call('HSET', key, 'retries_left', ARGV[8], 'retry_intervals', ARGV[9]) end
    if ARGV[10] == '1' then redis.call('HSET', key, 'enqueue_at_front_on_retry', 1) end
    fresh[#fresh + 1] = id
    models[model] = true
  end
end
if #fresh > 0 then
  redis.call('RPUSH', KEYS[1], unpack(fresh))
  redis.call('SADD', KEYS[2], KEYS[1])
  for model in pairs(models) do wake(prefix, queue_name, model) end
end
if group ~= '' then
  redis.call('ZADD', KEYS[4], 'NX', unpack(members))
  redis.call('HSET', KEYS[3], 'seen_ms', now, 'next_rank', rank)
  for k = 3, 5 do redis.call('EXPIRE', KEYS[k], group_ttl) end
end
return outcome
