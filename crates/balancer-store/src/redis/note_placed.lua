-- Adds jobs of which executors were placed to a set, for the reconciler.
--
-- KEYS[1]  exec-placed, a set of jobs, each "<namespace>:<job id>"
-- ARGV[1]  how long it is kept after this call, in ms
-- ARGV[2]  how many jobs it holds at most: nobody may be there to take them
-- ARGV[3..]  the jobs
--
-- Returns  nil
local number = redis.pcall('SCARD', KEYS[1])
if type(number) == 'table' then
  if not string.find(number.err, 'WRONGTYPE', 1, true) then return number end
  redis.call('UNLINK', KEYS[1])
  number = 0
end
for i = 3, math.min(#ARGV, 2 + tonumber(ARGV[2]) - number) do redis.call('SADD', KEYS[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
