-- Removes placements whose pods do not exist, as the API server has confirmed, unless the ledger was reconciled in a
-- later term. One that was placed again, or has its pod by now, stays.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the term, a whole number
-- ARGV[3..]  two for each placement: its time as reconcile.lua returned it, and the executor
--
-- Returns  {the placements removed, the number on spot, the number on on-demand}; or, with nothing changed, the later
--          term, as text
local stored = stored_term(ARGV[2])
if is_later(stored, ARGV[2]) then return stored end

local record = read_record('kept-until', 'counting')
local spot, on_demand, is_estimate = counts_of(record)
local number, removed = call('HLEN', KEYS[2]), 0
for i = 3, #ARGV, 2 do
  local entry = removed < number and call('HGET', KEYS[2], ARGV[i + 1])
  if entry then
    local placed_at, uid = rest_of(entry)
    if uid == '-' and placed_at == ARGV[i] then
      call('HDEL', KEYS[2], ARGV[i + 1])
      call('HDEL', KEYS[1], 'wait:' .. ARGV[i + 1])
      removed = removed + 1
      if capacity_of(entry) == 'spot' then spot = spot - 1 else on_demand = on_demand - 1 end
    end
  end
end
spot, on_demand = math.max(0, spot), math.max(0, on_demand)
-- There is no ledger without a policy and executors. The other key went with its last entry.
if removed == number and not is_policy(record[3]) then
  call('UNLINK', KEYS[1])
  return { removed, 0, 0 }
elseif removed > 0 then
  write_counts(spot, on_demand, record[4], is_estimate, record[7])
end
touch(record[6], false, removed == number)
return { removed, spot, on_demand }
