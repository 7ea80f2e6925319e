#!lua flags=allow-oom
-- Writes down which model a plain RQ client's queued job asks for ('*': any worker may take it, to refuse it).
-- KEYS none: one job key is made for each id
-- ARGV 1 key prefix, 2 queue name, then per job: id, model
-- Returns how many were adopted.
local adopted = 0
for i = 3, #ARGV, 2 do
  local key = ARGV[1] .. ':job:' .. ARGV[i]
  if redis.call('HGET', key, 'status') == 'queued' then
    adopted = adopted + redis.call('HSETNX', key, 'model', ARGV[i + 1])
    wake(ARGV[1], ARGV[2], ARGV[i + 1])
  end
end
return adopted
