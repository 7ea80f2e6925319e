#!lua flags=allow-oom
-- Takes a dead worker off the lists of its queues, unless another has taken its name.
-- KEYS 1 the worker, 2 all workers, 3 the worker's executions, then of its queues first each one's workers, then each
--      one's engine cards, then each one's loads
-- ARGV 1 worker, 2 incarnation, 3 now (ISO)
-- Returns 1, or 0 if the name is another's.
local own = redis.call('HGET', KEYS[1], 'incarnation')
if own and own ~= ARGV[2] then return 0 end
redis.call('SREM', KEYS[2], KEYS[1])
redis.call('DEL', KEYS[3])
local num_queues = (#KEYS - 3) / 3
for k = 4, #KEYS do
  if k <= 3 + num_queues then redis.call('SREM', KEYS[k], KEYS[1]) else redis.call('HDEL', KEYS[k], ARGV[1]) end
end
if own then
  redis.call('HSET', KEYS[1], 'death', ARGV[3])
  redis.call('EXPIRE', KEYS[1], 60)  -- as RQ does
end
return 1
