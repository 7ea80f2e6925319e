#!lua flags=no-writes
-- Counts part of a group's members by job status ('' for a job that is gone, 'canceled' for one that left the group).
-- KEYS 1 group members
-- ARGV 1 key prefix, 2 group id, 3 first rank, 4 last rank
-- Returns a flat list: status, count, ...
local counts, flat = {}, {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], ARGV[3], ARGV[4])) do
  local f = redis.call('HMGET', ARGV[1] .. ':job:' .. job_of(member), 'status', 'groups')
  local status = f[1] or ''
  local running = status == 'queued' or status == 'started' or status == 'scheduled' or status == 'deferred'
  if running and not string.find(' ' .. (f[2] or '') .. ' ', ' ' .. ARGV[2] .. ' ', 1, true) then status = 'canceled' end
  counts[status] = (counts[status] or 0) + 1
end
for status, count in pairs(counts) do flat[#flat + 1] = status; flat[#flat + 1] = count end
return flat
