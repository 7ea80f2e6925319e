#!lua flags=allow-oom
-- Writes down what a job's payload says of which worker it needs: of a plain RQ client's job, or of one whose schema
-- turned out to be too new.
-- KEYS none: one job key is made for each id
-- ARGV 1 key prefix, 2 queue name, then per job: id, model ('*': any worker may take it, to refuse it), schema version,
--      prompt tokens (0: not known), output tokens at most (0: not known), task or ''
-- Returns how many were adopted.
local adopted = 0
local UNKNOWN = {['0'] = true, [''] = true}
for i = 3, #ARGV, 6 do
  local key = ARGV[1] .. ':job:' .. ARGV[i]
  local status = read(key, 'status')[1]
  if status == 'queued' or status == 'started' then
    local known = redis.call('HSETNX', key, 'model', ARGV[i + 1])
    if ARGV[i + 2] ~= '1' then known = redis.call('HSET', key, 'schema', ARGV[i + 2]) end
    adopted = adopted + known
    for k, field in ipairs({'tokens', 'max_tokens', 'task'}) do
      local value = ARGV[i + 2 + k]
      if not UNKNOWN[value] then redis.call('HSETNX', key, field, value) end
    end
    wake(ARGV[1], ARGV[2], ARGV[i + 1])
  end
end
return adopted
