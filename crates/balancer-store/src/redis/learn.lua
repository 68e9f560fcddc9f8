-- Notes the job's policy; the newest wins.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the ratio, a decimal from 0 to 1 with up to nine places
-- ARGV[3]  the base
--
-- Returns  nil
call('HSET', KEYS[1], 'ratio', ARGV[2], 'base', ARGV[3])
touch()
