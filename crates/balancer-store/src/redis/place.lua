-- Decides an executor's capacity and adds the executor, in one step. Called again for the same executor, it returns
-- the same capacity and counts the executor once. The pod may be a new one of that name, so its uid is unknown again.
--
-- KEYS, ARGV[1], ARGV[2..7], returns: as at the top of shared.lua and decide.lua
if capacity then
  call('HSET', KEYS[2], ARGV[2], capacity .. ' ' .. (time or now()) .. ' -')
  if recounted or not format or before and before ~= capacity then
    write_counts(spot, on_demand, format)
  elseif not before then
    call('HSET', KEYS[1], capacity, capacity == 'spot' and spot or on_demand)
  end
  if probing then call('HSET', KEYS[1], 'spot-state', probing) end
end
if stores then
  if stores_policy then
    call('HSET', KEYS[1], 'v', format or FORMAT, 'policy', merge_policies(policy, looked_up))
  end
  -- Once in the life of a ledger.
  if driver and driver ~= '' and not record[5] then call('HSET', KEYS[1], 'driver', driver) end
end
touch()
return outcome
