#!lua flags=allow-oom
-- Counts one more failure in a row of a machine's engine.
-- KEYS 1 machines
-- ARGV 1 machine, 2 phase ("start", "run"), 3 reason, 4 failures at most, 5 ttl of the records (s)
-- Returns how many failures of that phase there are.
local failures = count_of(read(KEYS[1], ARGV[2] .. ':' .. ARGV[1])[1]) + 1
redis.call('HSET', KEYS[1], ARGV[2] .. ':' .. ARGV[1], failures, 'failed_at:' .. ARGV[1], now_ms() / 1000,
  'reason:' .. ARGV[1], ARGV[3], 'max:' .. ARGV[1], ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return failures
