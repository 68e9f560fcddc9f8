-- Notes the reconciler's mark.
--
-- KEYS[1]  exec-reconciler, a string
-- ARGV[1]  how long it lives, in ms: as long as a ledger that nobody touches
-- ARGV[2]  the mark
--
-- Returns  the mark noted before, or nil
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
return before
