-- The job's executors as counted.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
--
-- Returns  {the number on spot, the number on on-demand}, or nil where there is no ledger
local spot, on_demand, ratio, base, recounted = noted()
if spot + on_demand == 0 and not (ratio and base) then return nil end
if recounted then
  call('HSET', KEYS[1], 'on-demand', on_demand, 'spot', spot)
end
touch()
return { spot, on_demand }
