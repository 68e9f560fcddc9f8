-- Stores the reconciler's heartbeat.
--
-- KEYS[1]  exec-heartbeat, a string
-- ARGV[1]  how long it is kept, in ms: as long as a ledger that nobody calls
-- ARGV[2]  the heartbeat
--
-- Returns  the heartbeat stored before, or nil
local before = redis.pcall('GET', KEYS[1])
-- Another type, which no script wrote, is replaced.
if type(before) == 'table' then
  if not string.find(before.err, 'WRONGTYPE', 1, true) then return before end
  before = false
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
return before
