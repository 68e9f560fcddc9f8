-- Everything that the ledger holds, at one moment. It writes nothing, and keeps neither key longer.
--
-- KEYS: as at the top of shared.lua; no ARGV
--
-- Returns  {policy or nil, driver or nil, released or nil, term or nil, {executor, entry, executor, entry ...}, the state
--          of spot or nil, the instance types to avoid or nil}; a newer version may append more
local record = redis.call('HMGET', KEYS[1], 'policy', 'driver', 'released', 'term', 'spot-state', 'avoid')
return { record[1], record[2], record[3], record[4], redis.call('HGETALL', KEYS[2]), record[5], record[6] }
