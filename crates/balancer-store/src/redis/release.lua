-- Removes an executor. An entry with another uid stays, because a newer pod has taken the name. An entry of unknown
-- uid stays if this uid was released before: one pod's deletion is reviewed several times, and a review may come after
-- the next pod's placement, whose uid is not known yet. Without a uid, only an entry of unknown uid is removed.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the executor
-- ARGV[3]  the name of the pod that drives the job, or nothing; left out if nothing follows
-- ARGV[4]  the uid of its pod; left out if unknown
-- ARGV[5]  how many released uids are stored; left out with it
--
-- Returns  1 if the executor counted as spot, 0 if it counted as on-demand, nil if nothing was removed; "other", with
--          nothing changed, if the ledger belongs to another driver
local record = read_record('released')
if belongs_to_another(record, ARGV[3]) then return 'other' end
local uid = ARGV[4]

-- The stored releases with this one in front, and whether it was among them before.
local function with_this_one()
  local this = now() .. ' ' .. uid
  local releases, number, most, again = { #this .. ':' .. this }, 1, tonumber(ARGV[5]), false
  each_release(record[6], function(before, _, release)
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
if known == uid or known == '-' and not again then
  local spot, on_demand = counts_of(record)
  local left = spot + on_demand
  if entry then
    removed = capacity_of(entry) == 'spot' and 1 or 0
    left = left - 1
    call('HDEL', KEYS[2], ARGV[2])
    write_counts(spot - removed, on_demand - (1 - removed), record[4])
  end
  -- There is no ledger without a policy and executors. The other key went with its last entry.
  if left == 0 and not is_policy(record[3]) then
    call('DEL', KEYS[1])
  elseif released then
    call('HSET', KEYS[1], 'released', released)
  end
end
touch()
return removed
