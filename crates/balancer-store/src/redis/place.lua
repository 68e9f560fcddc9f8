-- Decides an executor's capacity and adds the executor, in one step. Called again for the same executor, it returns
-- the same capacity and counts the executor once. The pod may be a new one of that name, so its uid is unknown again.
--
-- The usual call runs five commands: HMGET, HGET, TIME, and HSET of each key.
--
-- KEYS, ARGV[1], ARGV[2..7], returns: as at the top of shared.lua and decide.lua
local fields = {}
local function put(field, value)
  fields[#fields + 1] = field
  fields[#fields + 1] = value
end

time = time or now()
local is_first = spot + on_demand == (capacity and not before and 1 or 0)
if capacity then
  call('HSET', KEYS[2], ARGV[2], capacity .. ' ' .. time .. ' -')
  put('wait:' .. ARGV[2], time)
  if recounted or before and before ~= capacity then
    put('spot', spot)
    put('on-demand', on_demand)
    if is_estimate then put('estimated', 1) end
  elseif not before then
    put(capacity, capacity == 'spot' and spot or on_demand)
  end
  if record[9] and record[9] ~= '0' and before ~= capacity then put('counting', 0) end
  if probing then put('spot-state', probing) end
end
if stores then
  if stores_policy then put('policy', merge_policies(policy, looked_up)) end
  -- Once in the life of a ledger.
  if driver and driver ~= '' and not record[5] then put('driver', driver) end
  if not format and #fields > 0 then put('v', FORMAT) end
end
if #fields > 0 then
  local keep, keep_until = renewal(record[8], is_first or recounted, time)
  if keep then put('kept-until', keep_until) end
  call('HSET', KEYS[1], unpack(fields))
  if keep then
    call('PEXPIRE', KEYS[1], keep)
    call('PEXPIRE', KEYS[2], keep)
  end
else
  touch(record[8], false, is_first, time)
end
return outcome
