-- Strikes an executor. An entry known under another uid stays: a newer pod has taken the name. So does
-- one of unknown uid where this uid was released already: one pod's deletion is reviewed several
-- times, and a review may come after the next pod's placement, whose uid is not known yet.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the executor
-- ARGV[3]  the uid of its pod; left out where unknown
-- ARGV[4]  how many released uids are remembered; left out with it
--
-- Returns  1 where it counted as spot, 0 as on-demand, nil where nothing was struck
local uid = ARGV[3]

-- The releases remembered, with this one in front, and whether it was among them already.
local function with_this_one()
  local this = now() .. ' ' .. uid
  local remembered, number, most, again = { #this .. ':' .. this }, 1, tonumber(ARGV[4]), false
  each_release(function(before, _, release)
    if before == uid then
      again = true
    elseif number < most then
      number = number + 1
      remembered[number] = #release .. ':' .. release
    end
  end)
  return table.concat(remembered), again
end

local entry = call('HGET', KEYS[2], ARGV[2])
local known = '-'
if entry then local _, seen = rest_of(entry) known = seen end

local released, again
if uid then released, again = with_this_one() end
local struck
if not uid or known == uid or known == '-' and not again then
  local spot, on_demand, ratio, base = noted()
  local left = spot + on_demand
  if entry then
    struck = capacity_of(entry) == 'spot' and 1 or 0
    left = left - 1
    call('HDEL', KEYS[2], ARGV[2])
    call('HSET', KEYS[1], 'on-demand', on_demand - (1 - struck), 'spot', spot - struck)
  end
  -- Without policy and executors there is no ledger. The other key went with its last entry.
  if left == 0 and not (ratio and base) then
    call('DEL', KEYS[1])
  elseif released then
    call('HSET', KEYS[1], 'released', released)
  end
end
touch()
return struck
