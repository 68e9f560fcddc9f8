-- The job's record: the counts of its executors, its policy, and what else placements follow.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
--
-- Returns  {the number on spot, the number on on-demand, the policy or nil, the state of spot or nil, the instance types
--          to avoid or nil}, or nil if there is no ledger; a newer version may append more
local record = read_record('spot-state', 'avoid', 'kept-until')
local number = call('HLEN', KEYS[2])
local policy = record[3]
if number == 0 and not is_policy(policy) then return nil end
local spot, on_demand = stored_counts(record)
local is_right = spot and spot + on_demand == number
if not is_right then
  local is_estimate
  spot, on_demand, is_estimate = recount(number)
  write_counts(spot, on_demand, record[4], is_estimate)
end
touch(record[8], not is_right, number == 0)
return { spot, on_demand, policy, record[6], record[7] }
