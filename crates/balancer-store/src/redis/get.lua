-- Everything that the ledger holds, at one moment. It writes nothing, and keeps neither key longer.
--
-- KEYS: as at the top of shared.lua; no ARGV
--
-- Returns  {policy or nil, released or nil, term or nil, {executor, entry, executor, entry ...}}; a newer version may
--          append more
local record = redis.call('HMGET', KEYS[1], 'policy', 'released', 'term')
return { record[1], record[2], record[3], redis.call('HGETALL', KEYS[2]) }
