#!lua flags=allow-oom
-- Leases jobs from the head of the queue, the admission limits checked in the same step.
-- KEYS 1 queue, 2 started (wip), 3 the worker's executions, 4 limits, 5 suspended, 6 failed, 7 tenants, 8 KV tokens
-- ARGV 1 key prefix, 2 queue name, 3 worker, 4 model, 5 now (ISO), 6 14 hexadecimal characters that no other call uses,
--      7 lease ttl (s), 8 stock grace (s), 9 first position to look at, 10 positions to look at, 11 schema version at most,
--      12 bytes of one payload at most, 13 exception of a dead letter that is no job (base64, zlib);
--      what the worker admits: 14 jobs, 15 payload bytes, 16 prompt tokens or '' (no bound), and over what is held already
--      17 documents of the fleet, 18 KV tokens of the worker, 19 KV tokens of the fleet (0: no bound);
--      20 KV cache block (tokens), 21 how many may pass a job that doesn't fit, 22 for how long (s), 23 the smallest company
--      that a job held already may be in (0: any), 24 how many companies follow, then the companies for jobs that lost 1, 2, ... workers, then task, output tokens to reserve, ...
-- Returns { leased, unknown, gate, queue length (of the lists opened: see MAX_LISTS), now (ms), next position, limits }:
--   leased   per job a list: id, execution, data, enqueued_ms or '', enqueued_at or '', attempts, result_ttl or '',
--            failure_ttl or '', what of RQ the job asks for that isn't served or '', crashes, tenant or '', task or '',
--            output tokens at most, prompt tokens, KV tokens reserved
--   unknown  per job without a model (a plain RQ client's): id, data. It stays where it is: see adopt.lua
--   gate     what kept jobs in the queue: 'open' (nothing did, or the worker wanted no more), 'suspended', 'worker' and
--            'fleet' (documents), 'kv' and 'kv_fleet' (KV tokens), 'prefill' (prompt tokens), 'company', 'head'
--   limits   as they stand in Redis: max_in_flight, max_in_flight_fleet, max_kv_tokens, max_kv_tokens_fleet, ttft_sla_ms
-- The execution id starts with the time and the order of leasing, so that what is handed back keeps its order.
-- An id that RQ would not have made is dropped; what is under a job's key and is no job is failed. Keys of jobs and of
-- tenants' lists are made here from what is found in the queue, so they can't be passed in KEYS.
--
-- A job that lost workers may have killed them: it runs in ever smaller company, so that in the end it is alone. At the
-- head of the queue it holds up everybody until one worker has few enough in flight: passed over, it would never run.
-- A job of a newer schema stays in the queue for a newer worker, like one of another model.
--
-- Reservation: a job takes prompt tokens + expected output, in whole blocks. What the prompt has is the producer's estimate
-- until a worker has counted it (tokens_exact), so that an estimate beyond a whole limit says nothing: the job gets what
-- there is, and its worker finds out. If its exact need is beyond, or a whole limit is less than a block, its worker is to
-- fail it: it gets nothing.
--
-- Head of line: where a job doesn't fit, those behind it may pass, MAX_PASSES of them within PATIENCE (ARGV 21, 22). Then, if it is the
-- fleet that has no room, nobody leases anything until it has (gate 'kv_fleet'); if it is the engine, one worker makes
-- room for the job (held_for, held_until; gate 'head') and the others go on.
--
-- Fair share: each tenant has a list, and a score of the tokens that it was served. A job is taken from whoever has the
-- lowest. One that is ahead when its list runs empty keeps its score until it is its turn, and then goes: no turns are
-- saved up, and none are won by enqueueing one at a time (start-time fair queueing; Goyal, Vin, Cheng 1996).
-- Where KV tokens are short, the small ones of others would pass a large one for ever: passes count for the job that
-- doesn't fit whose tenant was served least, whoever passes, and once that tenant is behind by more than the job needs,
-- room is saved for it.
-- A position is one in every list. Once a job that doesn't fit was met it is 0: nobody looks farther past that.
-- Known limits: as the position is one number for all lists, jobs that move to the front of a long list while others' are
-- in the way are met only when the search starts anew. Of more than MAX_LOOKS tenants, those served most are not met
-- while none of those before them has a job for this worker.

local MAX_PASSES, PATIENCE = tonumber(ARGV[21]), tonumber(ARGV[22])
local MAX_LOOKS = 2048                -- at jobs, in one call, over all lists
local MAX_LISTS = 256                 -- opened at once, those served least; more only where these give nothing
local MAX_SCORE = 2 ^ 53              -- beyond it, adding a token changes nothing
local DEFAULT_MAX_TOKENS = 256        -- as in schema.py
local NO_SCHEMA = 1000                -- as _MAX_SCHEMA in prompts.py: no release will come to it; it is taken, to be refused
local NUM_ARGS = 24

local prefix, queue_name, worker, model, iso, call_id = unpack(ARGV, 1, 6)
local first, scan, max_schema, max_payload = unpack({tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]),
  tonumber(ARGV[12])})
local block = tonumber(ARGV[20])
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now = math.floor(now_us / 1000)
local expiry = now / 1000 + tonumber(ARGV[7]) + tonumber(ARGV[8])

-- What may be leased still, and what has been.
local limits = read(KEYS[4], 'max_in_flight', 'max_in_flight_fleet', 'max_kv_tokens', 'max_kv_tokens_fleet', 'ttft_sla_ms')
local in_flight = redis.call('SCARD', KEYS[3])
local want, want_gate = tonumber(ARGV[14]), 'open'
local bytes, prompt_tokens = tonumber(ARGV[15]), tonumber(ARGV[16]) or math.huge
local company = tonumber(ARGV[23])
if company == 0 then company = math.huge end
local whole, whole_fleet = tighter(ARGV[18], limits[3]), tighter(ARGV[19], limits[4])
local room, room_fleet = whole, whole_fleet
local leased, unknown, taken, totals = {}, {}, 0, {}
-- The gate that ended the call, and whether it is closed for every worker; that of the first job that didn't fit.
local stopped, is_shut, misfit_gate
-- The list served least of those with a job that doesn't fit, unless a worker makes room for that already.
local foremost
-- Virtual time: the score at which the last job was taken.
local clock

local function at_most(jobs, gate)
  if jobs < want then want, want_gate = jobs, gate end
end

local function admit()
  if redis.call('EXISTS', KEYS[5]) == 1 then return at_most(-math.huge, 'suspended') end
  at_most((limit_of(limits[1]) or math.huge) - in_flight, 'worker')
  local max_fleet = tighter(ARGV[17], limits[2])
  if max_fleet < math.huge then at_most(max_fleet - redis.call('ZCARD', KEYS[2]), 'fleet') end
  if whole == math.huge and whole_fleet == math.huge then return end
  local held = read(KEYS[8], 'worker:' .. worker, 'queue:' .. queue_name)
  room, room_fleet = whole - total_of(held[1]), whole_fleet - total_of(held[2])
  if whole_fleet == 0 then at_most(0, 'kv_fleet') end
  if whole == 0 then at_most(0, 'kv') end
end

-- Lists ----------------------------------------------------------------------------------------------------------------

local function length_of(key)
  local length = redis.pcall('LLEN', key)
  if type(length) == 'number' then return length end
  heal(key, 'list')  -- whatever somebody put there
  return 0
end

-- A waiting list as this call goes through it. `stays`: ids before the next one that stay in it, from its head on;
-- `heads`: ids at its head that are to go. `is_short`: it doesn't reach to the first position, and is looked at anew.
local function open_list(tenant)
  local key = list_of(prefix, queue_name, tenant.name)
  local is_short = first > 0 and length_of(key) <= first
  return {key = key, tenant = tenant.name, score = tenant.score, before = tenant.before, stays = is_short and 0 or first,
    is_short = is_short, heads = 0, looked = 0, unread = 0, taken = 0}
end

-- The tenants of flat names and scores, the one served least first. One with a score that can't be starts beside that.
local function ranked(found)
  local tenants, odd = {}, {}
  for i = 1, #found, 2 do
    local score = tonumber(found[i + 1])
    local is_sane = score and math.abs(score) <= MAX_SCORE  -- false for NaN
    local into = is_sane and tenants or odd
    into[#into + 1] = {name = found[i], score = is_sane and score or 0, before = score}
  end
  if #odd == 0 then return tenants end
  local least = tenants[1] and tenants[1].score or 0
  for i = 1, #odd do odd[i].score = least end
  for i = 1, #tenants do odd[#odd + 1] = tenants[i] end
  return odd
end

-- Every tenant that takes part, at most so many; the queue alone where there is none. And whether there are any.
local function tenants_of(at_most_tenants)
  local found = redis.pcall('ZRANGE', KEYS[7], 0, at_most_tenants - 1, 'WITHSCORES')
  if found.err then redis.call('DEL', KEYS[7]) end  -- whatever somebody put there
  if #found == 0 or #found == 2 and found[1] == '' then return {{name = '', score = 0, before = 0}}, false, #found > 0 end
  local tenants, has_own = ranked(found), false
  for i = 1, #tenants do has_own = has_own or tenants[i].name == '' end
  -- Plain RQ clients fill the queue's own list, and know of no score.
  local least = tenants[1].score
  if not has_own and redis.call('EXISTS', KEYS[1]) == 1 and redis.call('ZADD', KEYS[7], 'NX', least, '') == 1 then
    table.insert(tenants, 1, {name = '', score = least, before = least})
  end
  return tenants, true
end

admit()
local tenants, is_shared, is_alone = tenants_of(want > 0 and MAX_LOOKS or MAX_LISTS)
if want <= 0 then  -- most calls of a worker that has enough
  local length, is_further = 0, false
  for i = 1, #tenants do
    local more = length_of(list_of(prefix, queue_name, tenants[i].name))
    length, is_further = length + more, is_further or more > first
  end
  local gate = (want_gate == 'suspended' or length > 0) and want_gate or 'open'
  return {{}, {}, gate, length, now, is_further and first or length, limits}
end

local window = math.max(1, math.min(scan, math.floor(MAX_LOOKS / #tenants)))
local lists = {}
-- Those that are still to be gone through, from `turn` on, the one served least first.
local turns, turn = {}, 1

-- Whether there were any left to open.
local function open_more()
  turns, turn = {}, 1
  for i = #lists + 1, math.min(#lists + MAX_LISTS, #tenants) do
    local list = open_list(tenants[i])
    lists[i], turns[#turns + 1] = list, list
  end
  return #turns > 0
end

-- The next id of a list; nil at its end, or at that of the window. They are read some at a time: most calls want few.
local function next_id(list)
  if list.unread == 0 then
    local from, more = list.stays + list.heads, math.min(window - list.looked, math.max(want - taken, 16))
    list.ids, list.i = more > 0 and redis.pcall('LRANGE', list.key, from, from + more - 1) or {}, 0
    if list.ids.err then heal(list.key, 'list') end  -- whatever somebody put there
    list.unread = #list.ids
    if list.unread == 0 then return nil end
  end
  list.unread, list.looked, list.i = list.unread - 1, list.looked + 1, list.i + 1
  return list.ids[list.i]
end

local function pop_heads(list)
  if list.heads > 0 then redis.call('LPOP', list.key, list.heads) end
  list.heads = 0
end

-- Out of the list. Those at its head go together, before the first that stays: LREM would find a second copy of them.
local function take(list, id)
  if list.stays == 0 then list.heads = list.heads + 1 else redis.call('LREM', list.key, 1, id) end
end

local function skip(list)
  pop_heads(list)
  list.stays = list.stays + 1
end

-- After a job was taken: whoever is served least now is next.
local function pass_turn(list, kv_tokens)
  list.score = list.score + kv_tokens
  local i = turn
  while turns[i + 1] and turns[i + 1].score < list.score do
    turns[i] = turns[i + 1]
    i = i + 1
  end
  turns[i] = list
end

-- Jobs -----------------------------------------------------------------------------------------------------------------

-- All of rq.job.JobStatus.
local STATUSES = {created = 1, queued = 1, finished = 1, failed = 1, started = 1, deferred = 1, scheduled = 1, stopped = 1,
  canceled = 1, rate_limited = 1, ready_to_enqueue = 1}

-- RQ features that are not served, and the fields that ask for them; then the fields that are.
local UNSERVED = {'on_success', 'on_failure', 'on_stopped', 'webhooks', 'depends_on', 'repeat', 'rate_limit'}
local FIELDS = {'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'webhooks', 'dependency_ids',
  'repeats_left', 'rate_limit_key', 'status', 'model', 'schema', 'enqueued_ms', 'enqueued_at', 'attempts', 'result_ttl',
  'failure_ttl', 'started_at', 'crashes', 'tenant', 'task', 'tokens', 'tokens_exact', 'max_tokens', 'blocked_ms'}

-- What is known of a job whose payload has `size` bytes. (All at once: field by field a table takes three times as long.)
local function named(v, key, size)
  local tokens = count_of(v[20])
  return {key = key, bytes = size, asked = v, status = v[8], model = v[9], schema = v[10], enqueued_ms = v[11],
    enqueued_at = v[12], attempts = v[13], result_ttl = v[14], failure_ttl = v[15], started_at = v[16], crashes = v[17],
    tenant = v[18], task = v[19], tokens_exact = v[21], max_tokens = v[22], blocked_ms = v[23], data = v[24],
    prompt_tokens = tokens > 0 and tokens or math.ceil(size / 4),  -- of English, a token has about four bytes
    refused = '', is_requeued = false, num_crashes = 0}
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

-- Ends what is no job and would never end: another kind of key, or a hash with a status or model that can't be.
local function end_malformed(list, id, is_hash)
  local key = prefix .. ':job:' .. id
  if not is_hash then redis.call('DEL', key) end  -- nobody could tell what it was to be
  heal(KEYS[6], 'zset')
  take(list, id)
  bury(prefix, KEYS[6], id, {iso = iso, now = now / 1000, ttl = 31536000, exception = ARGV[13], worker = worker,
    execution = '', crashes = 0}, read(key, 'groups')[1], {})
end

local function refusal(f)
  if f.bytes > max_payload then return 'size' end
  for i = 1, #UNSERVED do
    if f.asked[i] and f.asked[i] ~= '' then return UNSERVED[i] end
  end
  return ''
end

local function payload_of(f)
  return f.data or f.bytes <= max_payload and redis.call('HGET', f.key, 'data') or ''
end

-- In how large a company, itself included, a job may be that lost so many workers.
local function company_of(crashes)
  local known = math.min(crashes, tonumber(ARGV[24]))
  return known > 0 and tonumber(ARGV[NUM_ARGS + known]) or math.huge
end

-- Reservations ---------------------------------------------------------------------------------------------------------

-- Task -> output tokens to reserve.
local expected_output = {}
for i = NUM_ARGS + tonumber(ARGV[24]) + 1, #ARGV, 2 do expected_output[ARGV[i]] = tonumber(ARGV[i + 1]) end

-- KV tokens that a job takes, in whole blocks.
local function need_of(tokens, max_tokens, task)
  max_tokens = count_of(max_tokens)
  if max_tokens == 0 then max_tokens = DEFAULT_MAX_TOKENS end  -- nobody has said
  return math.ceil((tokens + math.min(max_tokens, expected_output[task or ''] or max_tokens)) / block) * block
end

-- KV tokens to reserve for a job; or nil, whose room is too small, and what it would have to be.
local function reservation(f)
  if f.refused ~= '' or f.model == '*' then return 0 end  -- no engine will see it
  local need, least = need_of(f.prompt_tokens, f.max_tokens, f.task), nil
  if need > whole or need > whole_fleet then
    if f.tokens_exact == '1' or math.min(whole, whole_fleet) < block then return 0 end
    least = block
  end
  if (least or need) > room_fleet then return nil, 'kv_fleet', least or need end
  if (least or need) > room then return nil, 'kv', least or need end
  return least and math.floor(math.min(need, room, room_fleet) / block) * block or need
end

-- Head of line: how many may pass a job that doesn't fit, the first such one of its list; nil: none, the call ends.
local function passes_left(list, f, gate)
  local since = math.min(tonumber(f.blocked_ms) or now, now)
  local passed, held_for, held_until = unpack(redis.call('HMGET', f.key, 'passed', 'held_for', 'held_until'))
  list.num_passed = count_of(passed)
  local left = MAX_PASSES - list.num_passed
  if not f.blocked_ms then redis.call('HSET', f.key, 'blocked_ms', now) end
  if now - since <= PATIENCE * 1000 and left > 0 then return left end
  if gate == 'kv_fleet' then return nil end
  local held = (tonumber(held_until) or 0) - now / 1000
  if held_for and held_for ~= worker and held > 0 and held <= PATIENCE then return math.huge end
  redis.call('HSET', f.key, 'held_for', worker, 'held_until', now / 1000 + PATIENCE)
  return nil
end

-- Few fields while jobs of others or such as don't fit are in the way: whether this one is to be passed over, too.
local function is_in_the_way(list, key)
  local f = read(key, 'status', 'model', 'schema', 'tokens', 'max_tokens', 'task')
  if f[1] ~= 'queued' then return false end
  if is_foreign(f[2], f[3]) then return true end
  local tokens = count_of(f[4])
  if not list.misfit or not f[2] or tokens == 0 then return false end
  local need = need_of(tokens, f[5], f[6])
  return need <= math.min(whole, whole_fleet) and need > math.min(room, room_fleet)
end

-- What is under a job's key: its fields by name, with `bytes`, those of its payload; or nil and why not.
local function look(list, id)
  if not string.match(id, '^[%w_-]+$') then return nil, 'gone' end
  local key = prefix .. ':job:' .. id
  if list.stays > 0 and is_in_the_way(list, key) then return nil, 'in the way' end
  local size = redis.pcall('HSTRLEN', key, 'data')
  if type(size) == 'table' then return nil, 'no hash' end
  -- The payload in the same call, but not while jobs that don't fit are in the way.
  FIELDS[24] = size <= max_payload and not list.misfit and 'data' or ''
  local f = named(redis.call('HMGET', key, unpack(FIELDS)), key, size)
  if not STATUSES[f.status] or f.status == 'queued' and f.model and not is_name(f.model) then
    return nil, redis.call('EXISTS', key) == 1 and 'malformed' or 'gone'
  end
  if f.status ~= 'queued' then return nil, 'gone' end  -- cancelled, deleted, expired, or a second copy of one that runs
  if is_foreign(f.model, f.schema) then return nil, 'in the way' end
  return f
end

-- Leasing --------------------------------------------------------------------------------------------------------------

-- Shows a short field of a job; what is longer is none of ours.
local function short(raw) return string.sub(raw or '', 1, 64) end

local function lease(list, id, f, kv_tokens)
  local execution = string.format('%014x%04x', now_us, taken) .. call_id
  local member = id .. ':' .. execution
  local record = prefix .. ':execution:' .. member
  take(list, id)
  redis.call('HSET', f.key, 'status', 'started', 'started_at', iso, 'last_heartbeat', iso, 'worker_name', worker,
    'attempts', f.attempts + 1)
  if f.is_requeued and f.crashes then redis.call('HDEL', f.key, 'crashes') end
  if f.blocked_ms then redis.call('HDEL', f.key, 'blocked_ms', 'passed', 'held_for', 'held_until') end
  -- A plain RQ client may have given it a time to wait, and a requeued one still has that of the dead letter.
  if f.is_requeued or not f.enqueued_ms then redis.call('PERSIST', f.key) end
  redis.call('ZADD', KEYS[2], expiry, member)
  redis.call('HSET', record, 'id', execution, 'job_id', id, 'created_at', now / 1000, 'last_heartbeat', now / 1000,
    'worker_name', worker, 'kv_tokens', kv_tokens, unpack(is_shared and {'tenant', list.tenant} or {}))
  redis.call('EXPIRE', record, RECORD_TTL)
  redis.pcall('ZADD', prefix .. ':executions:' .. id, now / 1000 + RECORD_TTL, execution)  -- for RQ's tools alone
  redis.call('EXPIRE', prefix .. ':executions:' .. id, RECORD_TTL)
  redis.call('SADD', KEYS[3], member)
  taken, list.taken = taken + 1, list.taken + 1
  leased[taken] = {id, execution, payload_of(f), short(f.enqueued_ms), short(f.enqueued_at), f.attempts + 1, short(f.result_ttl),
    short(f.failure_ttl), f.refused, f.num_crashes, tenant_of(f.tenant), short(f.task), count_of(f.max_tokens),
    f.prompt_tokens, kv_tokens}
end

-- What a job brings along: RQ's requeue empties started_at, a hand-back doesn't, so that a job that somebody requeued has
-- all its attempts again.
local function count_up(f)
  f.is_requeued = f.started_at == ''
  f.attempts = f.is_requeued and 0 or count_of(f.attempts)
  f.num_crashes = f.is_requeued and 0 or count_of(f.crashes)
end

-- Why a job that fits can't be leased in this call; nil: it can.
local function is_too_much(f)
  if in_flight + taken + 1 > math.min(company, company_of(f.num_crashes)) then return 'company' end
  if taken > 0 and f.prompt_tokens > prompt_tokens then return 'prefill' end
end

-- Nobody else is served in this call: room is kept for the job of `list` that doesn't fit.
local function shut(list)
  is_shut = list.misfit_gate == 'kv_fleet'
  stopped = is_shut and 'kv_fleet' or 'head'
end

-- A job that doesn't fit stays. Those behind it may pass, if any could fit.
local function pass_over(list, f, gate, need)
  misfit_gate = misfit_gate or gate
  if not list.misfit then
    list.misfit, list.misfit_gate, list.misfit_need, list.passes = f.key, gate, need, passes_left(list, f, gate)
    if not list.passes then
      shut(list)
    elseif list.passes < math.huge then
      foremost = foremost or list
    end
  end
  if not stopped and math.min(room, room_fleet) < block then stopped = gate end
  skip(list)
end

local function count_pass(list)
  list.passes, list.num_passed, list.has_passed = list.passes - 1, list.num_passed + 1, true
  if list.passes <= 0 then shut(list) end
end

-- Whether the tenant of a job that doesn't fit is so far behind that room is saved for it.
local function is_saved_from(list)
  return foremost and list.score - foremost.score > foremost.misfit_need
end

-- A job of which it isn't known what it needs stays, too.
local function ask_about(list, id, f)
  unknown[#unknown + 1] = id
  unknown[#unknown + 1] = payload_of(f)
  list.is_undecided = true
  skip(list)
end

local function book(f, kv_tokens)
  company = math.min(company, company_of(f.num_crashes))
  prompt_tokens = prompt_tokens - f.prompt_tokens
  room, room_fleet = room - kv_tokens, room_fleet - kv_tokens
  add(totals, 'queue:' .. queue_name, kv_tokens)
  add(totals, 'worker:' .. worker, kv_tokens)
end

-- Leases one job, or passes over it, or ends the call (`stopped`).
local function serve(list, id, f)
  local size = f.bytes <= max_payload and f.bytes or 0  -- of a larger one nothing is read
  if size > bytes and (taken > 0 or #unknown > 0) then
    stopped = 'open'
    return
  end
  if not f.model then
    bytes = bytes - size
    return ask_about(list, id, f)
  end
  count_up(f)
  f.refused = refusal(f)
  local kv_tokens, gate, need = reservation(f)
  if not kv_tokens then return pass_over(list, f, gate, need) end
  if kv_tokens > 0 and is_saved_from(list) then
    stopped = foremost.misfit_gate
    return
  end
  stopped = is_too_much(f)
  if stopped then return end
  bytes = bytes - size
  book(f, kv_tokens)
  lease(list, id, f, kv_tokens)
  if list.misfit then count_pass(list) end
  if foremost and foremost ~= list then count_pass(foremost) end
  clock = list.score
  pass_turn(list, kv_tokens)
end

local function serve_next(list)
  local id = next_id(list)
  if not id then
    turn = turn + 1
    return
  end
  local f, why = look(list, id)
  if f then
    serve(list, id, f)
  elseif why == 'in the way' then
    skip(list)
  elseif why == 'gone' then
    take(list, id)
  else
    end_malformed(list, id, why == 'malformed')
  end
end

while taken < want and not stopped and (turns[turn] or taken == 0 and open_more()) do serve_next(turns[turn]) end
settle(prefix, totals)

-- The end of the call --------------------------------------------------------------------------------------------------

-- Jobs in all lists, and the first position at which a job may be that nobody has looked at.
local function measure()
  local length, next_position = 0, math.huge
  for _, list in ipairs(lists) do
    pop_heads(list)
    list.length = length_of(list.key)
    length = length + list.length
    if not list.is_short and list.stays < list.length then next_position = math.min(next_position, list.stays) end
  end
  if misfit_gate then return length, 0 end
  return length, next_position < math.huge and next_position or length
end

-- Writes the scores. An empty list goes once nobody who waits was served less. A tenant of whom this worker could serve
-- nothing saves up no turns either.
local function write_scores()
  local least = tenants[#lists + 1] and tenants[#lists + 1].score or math.huge
  for _, list in ipairs(lists) do
    if list.length > 0 then least = math.min(least, list.score) end
  end
  for _, list in ipairs(lists) do
    local is_unserved = taken > 0 and list.looked > 0 and list.taken == 0 and list.stays >= list.length
    if list.length == 0 and list.score <= least then
      redis.call('ZREM', KEYS[7], list.tenant)
    else
      if is_unserved and not list.misfit and not list.is_undecided then list.score = math.max(list.score, clock) end
      if list.score ~= list.before then redis.call('ZADD', KEYS[7], list.score, list.tenant) end
    end
  end
end

local length, next_position = measure()
if is_shared then write_scores() end
if is_alone and length == 0 then redis.call('ZREM', KEYS[7], '') end  -- or it would look as if something waited
for _, list in ipairs(lists) do
  if list.has_passed then redis.call('HSET', list.misfit, 'passed', list.num_passed) end
end
local gate = stopped or 'open'
if want_gate == 'suspended' or not stopped and taken >= want and length > 0 then gate = want_gate end
if gate == 'open' and taken < want then gate = misfit_gate or 'open' end
if taken > 0 then
  redis.call('EXPIRE', KEYS[3], RECORD_TTL)
  -- To whoever else waits for work: a worker that takes some and leaves some passes the token on.
  local is_fleets = gate == 'fleet' or gate == 'kv_fleet' or is_shut
  if length > 0 and not is_fleets then wake(prefix, queue_name, model) end
end
return {leased, unknown, gate, length, now, next_position, limits}
