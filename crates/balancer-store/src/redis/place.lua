-- Decides and enters an executor, in one step. Asked again for the same executor it gives the same
-- answer and counts once; the pod may be a new one by that name, so its uid is unknown again.
--
-- KEYS, ARGV[1], ARGV[2..7], returns: as at the top of shared.lua and decide.lua
if capacity then
  call('HSET', KEYS[2], ARGV[2], capacity .. ' ' .. now() .. ' -')
  if recounted or before and before ~= capacity then
    call('HSET', KEYS[1], 'on-demand', on_demand, 'spot', spot)
  elseif not before then
    call('HSET', KEYS[1], capacity, capacity == 'spot' and spot or on_demand)
  end
  if not has_policy and ARGV[6] and ARGV[6] ~= '' then
    call('HSET', KEYS[1], 'ratio', ARGV[6], 'base', ARGV[7])
  end
end
touch()
return answer
