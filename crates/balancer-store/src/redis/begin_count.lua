-- Stores that a reconciler begins to count all entries, unless there is none or the ledger was reconciled in a later term:
-- see correct_counts.lua.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the term, a whole number
local record = read_record('kept-until')
if is_later(stored_term(ARGV[2]), ARGV[2]) or call('HLEN', KEYS[2]) == 0 then return end
call('HSET', KEYS[1], 'v', record[4] or FORMAT, 'counting', ARGV[2])
touch(record[6], not record[4], false)
