#!lua flags=allow-oom
-- A small write, after which WAITAOF or WAIT on the same connection waits for all that the server took before it.
-- KEYS 1 barrier
-- ARGV 1 its ttl (ms)
-- Returns 1.
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
return 1
