-- Decides an executor's capacity and adds the executor, in one step. Called again for the same executor, it returns
-- the same capacity and counts the executor once. The pod may be a new one of that name, so its uid is unknown again.
--
-- KEYS, ARGV[1], ARGV[2..5], returns: as at the top of shared.lua and decide.lua
if capacity then
  call('HSET', KEYS[2], ARGV[2], capacity .. ' ' .. now() .. ' -')
  if recounted or not format or before and before ~= capacity then
    write_counts(spot, on_demand, format)
  elseif not before then
    call('HSET', KEYS[1], capacity, capacity == 'spot' and spot or on_demand)
  end
  if not has_policy and ARGV[5] and ARGV[5] ~= '' then
    call('HSET', KEYS[1], 'policy', merge_policies(policy, ARGV[5]))
  end
end
touch()
return outcome
