#!lua flags=allow-oom
-- Reserves what leased jobs need, now that it is known, instead of what was estimated when they were leased.
-- KEYS 1 started (wip), 2 limits, 3 KV tokens
-- ARGV 1 key prefix, 2 queue name, 3 worker, 4 KV tokens that the worker may have reserved in all (0: no bound),
--      5 KV tokens over the fleet (0: no bound), then per lease: "id:execution", tokens of its prompt, of its
--      output at most, KV tokens to reserve
-- Returns one word a lease: granted; denied (there is no room for the difference: it keeps what it had, until it is handed
-- back); lost (it isn't the worker's any more).
-- The tokens are written down in any case: when the job is leased again, its need is known.
local prefix, queue_name, worker = ARGV[1], ARGV[2], ARGV[3]
local limits = read(KEYS[2], 'max_kv_tokens', 'max_kv_tokens_fleet')
local held = read(KEYS[3], 'worker:' .. worker, 'queue:' .. queue_name)
local left = tighter(ARGV[4], limits[1]) - total_of(held[1])
local left_fleet = tighter(ARGV[5], limits[2]) - total_of(held[2])
local words, totals = {}, {}

local function reserve(record, tenant, more, kv_tokens)
  redis.call('HSET', record, 'kv_tokens', kv_tokens)
  charge(prefix, queue_name, tenant, more)
  add(totals, 'worker:' .. worker, more)
  add(totals, 'queue:' .. queue_name, more)
  left, left_fleet = left - more, left_fleet - more
end

for i = 6, #ARGV, 4 do
  local member, kv_tokens = ARGV[i], tonumber(ARGV[i + 3])
  local record = prefix .. ':execution:' .. member
  local f = read(record, 'worker_name', 'kv_tokens', 'tenant')
  local more = kv_tokens - count_of(f[2])
  if f[1] ~= worker or not redis.call('ZSCORE', KEYS[1], member) then
    words[#words + 1] = 'lost'
  else
    local key = prefix .. ':job:' .. job_of(member)
    if read(key, 'status')[1] == 'started' then
      redis.call('HSET', key, 'tokens', ARGV[i + 1], 'tokens_exact', 1, 'max_tokens', ARGV[i + 2])
    end
    local granted = more <= 0 or more <= left and more <= left_fleet
    if granted then reserve(record, f[3], more, kv_tokens) end
    words[#words + 1] = granted and 'granted' or 'denied'
  end
end
settle(prefix, totals)
return words
