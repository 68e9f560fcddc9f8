-- All that the ledger holds, at one moment. It writes nothing and prolongs no life.
--
-- KEYS: as at the top of shared.lua; no ARGV
--
-- Returns  {ratio or nil, base or nil, released or nil, term or nil, {executor, entry, executor, entry ...}}
local noted = redis.call('HMGET', KEYS[1], 'ratio', 'base', 'released', 'term')
return { noted[1], noted[2], noted[3], noted[4], redis.call('HGETALL', KEYS[2]) }
