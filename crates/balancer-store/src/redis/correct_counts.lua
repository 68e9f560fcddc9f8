-- Replaces the counts by those that a listing of all entries has found, unless the ledger was reconciled in a later
-- term, the counts have changed since, or the number of entries is another one.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the term, a whole number
-- ARGV[3]  the number on spot before, ARGV[4] the number on on-demand before
-- ARGV[5]  the number on spot that was found, ARGV[6] the number on on-demand that was found
--
-- Returns  1 if the counts are those that were found, else 0
local stored = stored_term(ARGV[2])
if is_later(stored, ARGV[2]) then return 0 end
local record = read_record('kept-until', 'estimated')
local is_same = record[1] == ARGV[3] and record[2] == ARGV[4]
local number = call('HLEN', KEYS[2])
if not is_same or tonumber(ARGV[5]) + tonumber(ARGV[6]) ~= number then return 0 end
if record[7] then call('HDEL', KEYS[1], 'estimated') end
if ARGV[3] ~= ARGV[5] or ARGV[4] ~= ARGV[6] then write_counts(ARGV[5], ARGV[6], record[4]) end
touch(record[6], false, number == 0)
return 1
