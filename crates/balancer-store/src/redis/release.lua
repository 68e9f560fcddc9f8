-- Removes an executor. An entry with another uid stays, because a newer pod has taken the name. An entry of unknown
-- uid stays if this uid was released before: one pod's deletion is reviewed several times, and a review may come after
-- the next pod's placement, whose uid is not known yet.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the executor
-- ARGV[3]  the uid of its pod; left out if unknown
-- ARGV[4]  how many released uids are stored; left out with it
--
-- Returns  1 if the executor counted as spot, 0 if it counted as on-demand, nil if nothing was removed
local uid = ARGV[3]

-- The stored releases with this one in front, and whether it was among them before.
local function with_this_one()
  local this = now() .. ' ' .. uid
  local releases, number, most, again = { #this .. ':' .. this }, 1, tonumber(ARGV[4]), false
  each_release(function(before, _, release)
    if before == uid then
      again = true
    elseif number < most then
      number = number + 1
      releases[number] = #release .. ':' .. release
    end
  end)
  return table.concat(releases), again
end

local entry = call('HGET', KEYS[2], ARGV[2])
local known = '-'
if entry then local _, stored = rest_of(entry) known = stored end

local released, again
if uid then released, again = with_this_one() end
local removed
if not uid or known == uid or known == '-' and not again then
  local spot, on_demand, policy, format = read_record()
  local left = spot + on_demand
  if entry then
    removed = capacity_of(entry) == 'spot' and 1 or 0
    left = left - 1
    call('HDEL', KEYS[2], ARGV[2])
    write_counts(spot - removed, on_demand - (1 - removed), format)
  end
  -- There is no ledger without a policy and executors. The other key went with its last entry.
  if left == 0 and not is_policy(policy) then
    call('DEL', KEYS[1])
  elseif released then
    call('HSET', KEYS[1], 'released', released)
  end
end
touch()
return removed
