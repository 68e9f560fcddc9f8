-- What the scripts of a job's ledger share; put in front of each of them.
--
-- KEYS[1]  exec-count:{<namespace>:<job id>}, a hash: on-demand, spot, ratio, base; released, the last
--          releases, the newest first, each "<at, ms> <uid>" behind its length; and term, the one in which
--          it was last reconciled
-- KEYS[2]  exec-pods:{<namespace>:<job id>}, a hash: executor -> "<capacity> <placed at, ms> <uid, or ->"
-- ARGV[1]  of every script but peek and get: how long both keys live after this touch, in ms
local call = redis.call

-- What an entry counts as. One that no script wrote counts as on-demand.
local function capacity_of(entry)
  return string.sub(entry, 1, 5) == 'spot ' and 'spot' or 'on-demand'
end

-- When an entry was placed, and its pod's uid. One that no script wrote was placed long ago.
local function rest_of(entry)
  local placed_at, uid = string.match(entry, '^%S+ (%d+) (.*)$')
  return placed_at or '0', uid or '-'
end

-- The server's clock, in ms, as text.
local function now()
  local time = call('TIME')
  return time[1] .. string.sub('00000' .. time[2], -6, -4)
end

-- The noted counts and policy: spot, on-demand, ratio, base; and whether the counts had to be taken
-- anew. They are right as long as both are there and their sum is the number of entries. It is not
-- where one key was evicted, or edited by hand; taking them from the entries is the one thing that
-- costs more the larger the job is.
local function noted()
  local count = call('HMGET', KEYS[1], 'spot', 'on-demand', 'ratio', 'base')
  local spot, on_demand = tonumber(count[1]) or 0, tonumber(count[2]) or 0
  local right = spot + on_demand == call('HLEN', KEYS[2]) and count[1] and count[2]
  if not right then
    local entries = call('HVALS', KEYS[2])
    spot = 0
    for _, entry in ipairs(entries) do
      if capacity_of(entry) == 'spot' then spot = spot + 1 end
    end
    on_demand = #entries - spot
  end
  return spot, on_demand, count[3], count[4], not right
end

-- Calls `see` with the uid and the time of each release that is remembered, and with all of it as it is
-- written. Each is behind its length, since a uid may hold any text.
local function each_release(see)
  local released, at = call('HGET', KEYS[1], 'released') or '', 1
  while true do
    local length, first = string.match(released, '^(%d+):()', at)
    if not length then return end
    at = first + length
    local release = string.sub(released, first, at - 1)
    local time, uid = string.match(release, '^(%d+) (.*)$')
    if time then see(uid, tonumber(time), release) end
  end
end

-- Both keys live on together: one without the other would mean nothing.
local function touch()
  call('PEXPIRE', KEYS[1], ARGV[1])
  call('PEXPIRE', KEYS[2], ARGV[1])
end
