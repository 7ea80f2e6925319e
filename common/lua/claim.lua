#!lua flags=allow-oom
-- Registers a worker under its name, unless a live one has it.
-- KEYS 1 the worker, 2 all workers, then the workers of each of its queues
-- ARGV 1 incarnation, 2 incarnation of a former holder of the name that is known to be dead, or '', 3 lease ttl (s),
--      4 worker ttl (s), then RQ's fields and values
-- Returns { 1 } or { 0, seconds until the name is free if its holder is dead }.
-- A record without alive_until is a stock worker's, alive until RQ forgets it or it has signed off.
local now = now_ms() / 1000
local f = read(KEYS[1], 'incarnation', 'alive_until', 'death', 'birth')
if f[4] and not f[3] and f[1] ~= ARGV[1] and (ARGV[2] == '' or f[1] ~= ARGV[2]) then
  local alive_until = tonumber(f[2] or '')
  local left = alive_until and alive_until - now or redis.call('TTL', KEYS[1])
  if left > 0 then return {0, math.ceil(math.min(left, 86400))} end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'alive_until', now + tonumber(ARGV[3]))
redis.call('EXPIRE', KEYS[1], ARGV[4])
for k = 2, #KEYS do redis.call('SADD', KEYS[k], KEYS[1]) end
return {1}
