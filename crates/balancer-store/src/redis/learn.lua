-- Stores the policy of the job's driver; the newest wins, and takes over a ledger without executors. It is not stored for
-- a driver without a name, nor if the ledger has executors and does not name its driver: nobody could say whose it is. The
-- stored policy is then dropped, unless the ledger has executors of a driver that it names, so that the next placement
-- asks for one.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the policy
-- ARGV[3]  the driver's name, or nothing if it is not known yet; left out if nothing follows
-- ARGV[4]  'existing' if the job may not get a ledger, else left out
--
-- Returns  1 if the job had no ledger, 0 if it had one, nil if it has none and may not get one; "unstored" if the policy
--          was not stored; "other", with nothing changed, if the ledger has executors of another driver
local record, driver = read_record('kept-until'), ARGV[3] or ''
local has_executors = call('HLEN', KEYS[2]) > 0
if has_executors and belongs_to_another(record, driver) then return 'other' end
local policy, owner = record[3], record[5]
if driver == '' or has_executors and not owner then
  if not has_executors then
    -- There is no ledger without a policy and executors.
    call('UNLINK', KEYS[1])
    return 'unstored'
  elseif not owner and policy then
    call('HDEL', KEYS[1], 'policy')
  end
  touch(record[6], false, false)
  return 'unstored'
end
local is_new_job = not is_policy(policy) and not has_executors
if is_new_job and ARGV[4] == 'existing' then return nil end
call('HSET', KEYS[1], 'v', record[4] or FORMAT, 'policy', merge_policies(policy, ARGV[2]))
if not has_executors and owner ~= driver then call('HSET', KEYS[1], 'driver', driver) end
touch(record[6], is_new_job, not has_executors)
return is_new_job and 1 or 0
