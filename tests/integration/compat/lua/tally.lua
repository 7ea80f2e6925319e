#!lua flags=no-writes
-- Counts part of a group's members by job status.
-- KEYS 1 group members
-- ARGV 1 key prefix, 2 group id, 3 first rank, 4 last rank
-- Returns a flat list: RQ's status, count, ... A job that is gone counts as '', one that the group has left as 'canceled'.
-- Keys of jobs are made here from the members.
local counts, flat = {}, {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], ARGV[3], ARGV[4])) do
  local f = redis.call('HMGET', ARGV[1] .. ':job:' .. job_of(member), 'status', 'groups')
  local status = f[1] or ''
  local held = string.find(' ' .. (f[2] or '') .. ' ', ' ' .. ARGV[2] .. ' ', 1, true)
  if is_live(status) and not held then status = 'canceled' end
  counts[status] = (counts[status] or 0) + 1
end
for status, count in pairs(counts) do flat[#flat + 1] = status; flat[#flat + 1] = count end
return flat
