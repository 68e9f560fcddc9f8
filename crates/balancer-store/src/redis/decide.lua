-- Decides what place and peek return; put in front of both. It writes nothing.
--
-- ARGV[2]  the executor
-- ARGV[3]  the capacity that the pod requires, or nothing
-- ARGV[4]  the words of a policy that the executor states itself, or nothing
-- ARGV[5]  the job's policy as the caller knows it, or nothing
--          (3 to 5 may be left out if all of them are nothing)
--
-- Returns  nil if a policy is needed, else words in one text, which costs its reader less than an array: spot or
--          on-demand; 1 if the executor is new or 0 if it was in the ledger; the number on spot; the number on
--          on-demand, both with this executor. A newer version may append more words.

-- Where the next executor goes: first the base; beyond it to spot, as long as spot's share of the executors beyond
-- the base is not above the ratio.
local function decide(spot, on_demand, ratio, base)
  if on_demand < base or ratio == 0 then return 'on-demand' end
  if spot * ONE <= ratio * (spot + on_demand - base) then return 'spot' end
  return 'on-demand'
end

local spot, on_demand, policy, format, recounted = read_record()
local ratio, base = read_policy(policy)
local has_policy = ratio and base

local before = call('HGET', KEYS[2], ARGV[2])
before = before and capacity_of(before)

local capacity = before
if ARGV[3] then
  if ARGV[3] ~= '' then capacity = ARGV[3] end
  if not has_policy then ratio, base = read_policy(ARGV[5]) end
  local own_ratio, own_base = read_policy(ARGV[4])
  ratio, base = own_ratio or ratio, own_base or base
end
if not capacity and ratio and base then
  capacity = decide(spot, on_demand, ratio, base)
end

local outcome
if capacity then
  if before == 'spot' then spot = spot - 1 elseif before then on_demand = on_demand - 1 end
  if capacity == 'spot' then spot = spot + 1 else on_demand = on_demand + 1 end
  outcome = capacity .. (before and ' 0 ' or ' 1 ') .. spot .. ' ' .. on_demand
end
