-- Stores the job's policy; the newest wins.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the policy
--
-- Returns  nil
local record = call('HMGET', KEYS[1], 'policy', 'v')
call('HSET', KEYS[1], 'v', record[2] or FORMAT, 'policy', merge_policies(record[1], ARGV[2]))
touch()
