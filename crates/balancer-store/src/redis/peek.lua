-- What place would return, with nothing written and neither key kept longer: for a dry run.
--
-- KEYS, ARGV[2..7], returns: as at the top of shared.lua and decide.lua; ARGV[1] is not used
return outcome
