#!lua flags=allow-oom
-- Sets fields of one hash, also when Redis is full: workers, who make room in it, must be known while it is.
-- KEYS 1 the hash
-- ARGV 1 ttl (s) or '' to leave it as it is, then fields and values
-- Returns 1.
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
if ARGV[1] ~= '' then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return 1
