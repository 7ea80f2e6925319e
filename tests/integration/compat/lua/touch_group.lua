#!lua
-- Says that a group's producer is alive; opens the group, or seals it when the producer is done.
-- KEYS 1 group, 2 group members, 3 group done
-- ARGV 1 name of the queue that a new group is of, 2 group ttl (s), 3 '1' to seal, '0' to open, '' to leave it as it is
-- Returns 1.
local now = now_ms()
redis.call('HSETNX', KEYS[1], 'created_ms', now)
redis.call('HSETNX', KEYS[1], 'queue', ARGV[1])
redis.call('HSET', KEYS[1], 'ttl', ARGV[2], 'seen_ms', now)
if ARGV[3] == '1' then redis.call('HSET', KEYS[1], 'sealed_ms', now) end
if ARGV[3] == '0' then redis.call('HDEL', KEYS[1], 'sealed_ms') end
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ARGV[2]) end
return 1
