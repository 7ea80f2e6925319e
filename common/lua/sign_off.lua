#!lua flags=allow-oom
-- Takes a dead worker off RQ's lists, unless another has taken its name.
-- KEYS 1 the worker, 2 all workers, 3 the queue's workers, 4 the worker's executions, 5 engine cards
-- ARGV 1 worker, 2 incarnation, 3 now (ISO)
-- Returns 1, or 0 if the name is another's.
local own = redis.call('HGET', KEYS[1], 'incarnation')
if own and own ~= ARGV[2] then return 0 end
redis.call('SREM', KEYS[2], KEYS[1])
redis.call('SREM', KEYS[3], KEYS[1])
redis.call('DEL', KEYS[4])
redis.call('HDEL', KEYS[5], ARGV[1])
if own then
  redis.call('HSET', KEYS[1], 'death', ARGV[3])
  redis.call('EXPIRE', KEYS[1], 60)  -- as RQ does
end
return 1
