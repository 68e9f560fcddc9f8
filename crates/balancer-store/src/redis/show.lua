-- All that the ledger holds, at one moment. It writes nothing and prolongs no life.
--
-- KEYS: as at the top of shared.lua; no ARGV
--
-- Returns  {ratio or nil, base or nil, released or nil, {executor, entry, executor, entry ...}}
local policy = redis.call('HMGET', KEYS[1], 'ratio', 'base', 'released')
return { policy[1], policy[2], policy[3], redis.call('HGETALL', KEYS[2]) }
