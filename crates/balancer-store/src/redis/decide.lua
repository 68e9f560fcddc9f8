-- The answer to a placing; put in front of place and peek. It writes nothing.
--
-- ARGV[2]  the executor
-- ARGV[3]  the capacity that it is pinned to, or nothing
-- ARGV[4]  the ratio that it states itself, a decimal, or nothing
-- ARGV[5]  the base that it states itself, or nothing
-- ARGV[6]  the ratio of the job's policy as the caller knows it, or nothing
-- ARGV[7]  the base of it; there if and only if ARGV[6] is
--          (3 to 7 may be left out where none of them tells anything)
--
-- Returns  nil where a policy is needed, or one number, which is cheaper to read than four:
--          1 for spot, 0 for on-demand; + 2 if the executor was known; + 4 x the number on spot,
--          + 4 x 2^24 x the number on on-demand, both with this executor

local ONE = 1000000000

-- A ratio and a base as whole numbers, the ratio in billionths; nil for what is none. With up to nine
-- places the nearest whole number is the exact one. From there on all numbers are whole and below
-- 2^53, where a Lua number is exact, up to nine million executors in a job.
local function read(ratio, base)
  ratio, base = tonumber(ratio), tonumber(base)
  ratio = ratio and math.floor(ratio * ONE + 0.5)
  return ratio and ratio >= 0 and ratio <= ONE and ratio or nil, base and base >= 0 and base or nil
end

-- Where the next executor goes. The base first; past it spot, as long as spot's share of the executors
-- past the base is not above the ratio.
local function decide(spot, on_demand, ratio, base)
  if on_demand < base or ratio == 0 then return 'on-demand' end
  if spot * ONE <= ratio * (spot + on_demand - base) then return 'spot' end
  return 'on-demand'
end

local spot, on_demand, ratio, base, recounted = noted()
ratio, base = read(ratio, base)
local has_policy = ratio and base

local before = call('HGET', KEYS[2], ARGV[2])
before = before and capacity_of(before)

local capacity = before
if ARGV[3] then
  if ARGV[3] ~= '' then capacity = ARGV[3] end
  if not has_policy then ratio, base = read(ARGV[6], ARGV[7]) end
  local own_ratio, own_base = read(ARGV[4], ARGV[5])
  ratio, base = own_ratio or ratio, own_base or base
end
if not capacity and ratio and base then
  capacity = decide(spot, on_demand, ratio, base)
end

local answer
if capacity then
  if before == 'spot' then spot = spot - 1 elseif before then on_demand = on_demand - 1 end
  if capacity == 'spot' then spot = spot + 1 else on_demand = on_demand + 1 end
  answer = (capacity == 'spot' and 1 or 0) + (before and 2 or 0) + 4 * (spot + 16777216 * on_demand)
end
