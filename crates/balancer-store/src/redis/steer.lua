-- Changes what later placements of the job follow, unless the ledger was reconciled in a later term.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the term, a whole number
-- ARGV[3]  'close' to close spot, 'open' to open it, or 'avoid' to replace the instance types to avoid
-- ARGV[4]  for 'close': how long no executor probes spot, in ms; for 'avoid': the types, with a space between them, or
--          nothing
--
-- Returns  1; nil if there is no ledger; or, with nothing changed, the later term, as text
local stored = stored_term(ARGV[2])
if is_later(stored, ARGV[2]) then return stored end

local record = read_record('spot-state', 'kept-until')
local is_empty = call('HLEN', KEYS[2]) == 0
if is_empty and not is_policy(record[3]) then return nil end
local field, value = 'spot-state', nil
if ARGV[3] == 'close' then
  local time = tonumber(now())
  local _, since = read_spot_state(record[6])
  value = string.format('starved %.0f %.0f', math.min(tonumber(since) or time, time), time + tonumber(ARGV[4]))
elseif ARGV[3] == 'avoid' then
  field, value = 'avoid', ARGV[4] ~= '' and ARGV[4] or nil
end
if value then
  call('HSET', KEYS[1], 'v', record[4] or FORMAT, field, value)
else
  call('HDEL', KEYS[1], field)
end
touch(record[7], false, is_empty)
return 1
