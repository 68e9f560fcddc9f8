-- Takes some of the jobs of which executors were placed.
--
-- KEYS[1]  exec-placed, as in note_placed.lua
-- ARGV[1]  how many
--
-- Returns  the jobs
local jobs = redis.pcall('SPOP', KEYS[1], ARGV[1])
if jobs.err and string.find(jobs.err, 'WRONGTYPE', 1, true) then
  redis.call('UNLINK', KEYS[1])
  return {}
end
return jobs
