#!lua flags=no-writes
-- Reads where jobs stand and the newest result of each.
-- KEYS none: the keys of jobs and results are made from the ids
-- ARGV 1 key prefix, 2 group id or '', then the job ids
-- Returns per job: status or '', '1' if the group still holds it, description, RQ result type or '',
--   return value (base64) or '', exception (base64, zlib) or '', worker or '', attempts or '',
--   data of a job that ended without a return value or ''
local rows = {}
for i = 3, #ARGV do
  local f = redis.call('HMGET', ARGV[1] .. ':job:' .. ARGV[i], 'status', 'groups', 'description', 'attempts')
  local status, r, data = f[1] or '', {}, ''
  if status == 'finished' or status == 'failed' or status == 'stopped' then
    local newest = redis.call('XREVRANGE', ARGV[1] .. ':results:' .. ARGV[i], '+', '-', 'COUNT', 1)[1]
    for k = 1, newest and #newest[2] or 0, 2 do r[newest[2][k]] = newest[2][k + 1] end
  end
  if (status == 'canceled' or status == 'failed' or status == 'stopped') and not r.return_value then
    data = redis.call('HGET', ARGV[1] .. ':job:' .. ARGV[i], 'data') or ''
  end
  local mine = ARGV[2] == '' or string.find(' ' .. (f[2] or '') .. ' ', ' ' .. ARGV[2] .. ' ', 1, true)
  for _, value in ipairs({status, mine and '1' or '0', f[3] or '', r.type or '', r.return_value or '', r.exc_string or '',
      r.worker_name or '', f[4] or '', data}) do
    rows[#rows + 1] = value
  end
end
return rows
