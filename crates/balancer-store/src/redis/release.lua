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
local record = read_record('released', 'kept-until', 'counting')
if belongs_to_another(record, ARGV[3]) then return 'other' end
local uid = ARGV[4]

local time = now()

-- The stored releases with this one in front, and whether it was among them before.
local function with_this_one()
  local this = time .. ' ' .. uid
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
local removed, is_empty = nil, not entry and call('HLEN', KEYS[2]) == 0
if known == uid or known == '-' and not again then
  if entry then
    local spot, on_demand, is_estimate = counts_of(record)
    is_empty = call('HLEN', KEYS[2]) == 1
    removed = capacity_of(entry) == 'spot' and 1 or 0
    call('HDEL', KEYS[2], ARGV[2])
    if known == '-' then call('HDEL', KEYS[1], 'wait:' .. ARGV[2]) end
    write_counts(math.max(0, spot - removed), math.max(0, on_demand - (1 - removed)), record[4], is_estimate, record[8])
  end
  -- There is no ledger without a policy and executors. The other key went with its last entry.
  if is_empty and not is_policy(record[3]) then
    call('UNLINK', KEYS[1])
    return removed
  elseif released then
    call('HSET', KEYS[1], 'released', released)
  end
end
touch(record[7], false, is_empty, time)
return removed
