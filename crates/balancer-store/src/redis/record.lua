-- The job's record: the counts of its executors, its policy, and what else placements follow.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
--
-- Returns  {the number on spot, the number on on-demand, the policy or nil, the state of spot or nil, the instance types
--          to avoid or nil}, or nil if there is no ledger; a newer version may append more
local record = read_record('spot-state', 'avoid')
local spot, on_demand, recounted = counts_of(record)
local policy = record[3]
if spot + on_demand == 0 and not is_policy(policy) then return nil end
if recounted then write_counts(spot, on_demand, record[4]) end
touch()
return { spot, on_demand, policy, record[6], record[7] }
