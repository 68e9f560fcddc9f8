-- Replaces the counts by those that a listing of all entries has found, unless the ledger was reconciled in a later term, an
-- entry has come, gone or moved to the other capacity since begin_count.lua, or the number of entries is another one.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the term, a whole number
-- ARGV[3]  the number on spot that was found, ARGV[4] the number on on-demand that was found
--
-- Returns  1 if the counts are those that were found, else 0
if is_later(stored_term(ARGV[2]), ARGV[2]) then return 0 end
local record = read_record('kept-until', 'counting')
if record[7] ~= ARGV[2] or tonumber(ARGV[3]) + tonumber(ARGV[4]) ~= call('HLEN', KEYS[2]) then return 0 end
call('HDEL', KEYS[1], 'estimated', 'counting')
if record[1] ~= ARGV[3] or record[2] ~= ARGV[4] then write_counts(ARGV[3], ARGV[4], record[4]) end
touch(record[6], false, false)
return 1
