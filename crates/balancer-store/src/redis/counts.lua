-- The counts of the job's executors.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
--
-- Returns  {the number on spot, the number on on-demand}, or nil if there is no ledger; a newer version may append
--          more
local spot, on_demand, policy, format, recounted = read_record()
if spot + on_demand == 0 and not is_policy(policy) then return nil end
if recounted then write_counts(spot, on_demand, format) end
touch()
return { spot, on_demand }
