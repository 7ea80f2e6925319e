#!lua flags=allow-oom
-- Adds to what is known of the lengths of finished documents' outputs.
-- KEYS 1 lengths
-- ARGV 1 ttl (s), then per count: task, bucket, documents
-- Returns all that is known, a flat list: task, bucket, documents, ...
-- What is known of a task is halved, once a call, beyond MAX_DOCUMENTS: what it is like now outweighs what it was like.
-- Beyond MAX_TASKS those known least go, those that were just observed after all others. A bucket has at most three
-- digits, a count that is read at most nine; what else is there goes.
local MAX_DOCUMENTS, MAX_TASKS = 2048, 256
heal(KEYS[1], 'hash')
local found, counts, totals, before = redis.call('HGETALL', KEYS[1]), {}, {}, {}

local function add(task, bucket, documents)
  counts[task] = counts[task] or {}
  counts[task][bucket] = (counts[task][bucket] or 0) + documents
  totals[task] = (totals[task] or 0) + documents
end

local function halve(task)
  totals[task] = 0
  for bucket, documents in pairs(counts[task]) do
    local left = math.floor(documents / 2)
    counts[task][bucket] = left > 0 and left or nil
    totals[task] = totals[task] + left
  end
end

for i = 1, #found, 2 do
  local task, bucket = string.match(found[i], '^(%w+):(%d%d?%d?)$')
  if task and #found[i + 1] <= 9 then add(task, bucket, count_of(found[i + 1])) end
  before[found[i]] = found[i + 1]
end
local tasks, is_new = {}, {}
for i = 2, #ARGV, 3 do
  add(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]))
  is_new[ARGV[i]] = true
end
for task in pairs(counts) do
  if totals[task] > MAX_DOCUMENTS then halve(task) end
  tasks[#tasks + 1] = task
end
table.sort(tasks, function(a, b)
  if is_new[a] ~= is_new[b] then return is_new[a] or false end
  return totals[a] > totals[b] or totals[a] == totals[b] and a < b
end)
for i = MAX_TASKS + 1, #tasks do counts[tasks[i]] = nil end

local flat = {}
for task, buckets in pairs(counts) do
  for bucket, documents in pairs(buckets) do
    local field = task .. ':' .. bucket
    if before[field] ~= tostring(documents) then redis.call('HSET', KEYS[1], field, documents) end
    before[field] = nil
    flat[#flat + 1] = task; flat[#flat + 1] = bucket; flat[#flat + 1] = documents
  end
end
for field in pairs(before) do redis.call('HDEL', KEYS[1], field) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return flat
