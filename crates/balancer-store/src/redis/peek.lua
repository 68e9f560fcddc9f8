-- What place would answer, with nothing written and no life prolonged: for a dry run.
--
-- KEYS, ARGV[2..7], returns: as at the top of shared.lua and decide.lua; ARGV[1] means nothing here
return answer
