-- Makes the ledger what the cluster says, unless it was reconciled in a later term. Struck are entries
-- with no live executor: at once where the pod had been seen (its uid is known), else once the placement
-- is the grace old. Entered are live executors of known capacity that are missing, unless they were
-- released so recently that they may still be seen to live; nor does such a one become the pod of an entry
-- that waits for its own. The counts are taken anew.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the grace, in ms
-- ARGV[3]  the ratio that the job's driver asks for, or nothing; it replaces the noted one
-- ARGV[4]  the base that it asks for, or nothing; likewise
-- ARGV[5]  the term, a whole number
-- ARGV[6]  'ended' where neither a driver nor an executor is left: the policy then goes with the last
--          entry; else nothing
-- ARGV[7..]  three for each live executor: its name, the uid of its pod, its capacity or nothing
--
-- Returns  {missing ones entered, stale ones struck, wrong capacities corrected, the number on spot, the
--          number on on-demand, in how many ms the first one that waits for its pod will have waited for
--          the grace, or the first released one that still lives will have had its time to go; left out
--          where none waits}; or, with nothing changed, the later term, as text

-- Compared as texts, since a Lua number is exact up to 2^53 only. What is no whole number is no term.
local term = ARGV[5]
local noted_term = string.match(call('HGET', KEYS[1], 'term') or '', '^%d+$') or '0'
if #noted_term > #term or #noted_term == #term and noted_term > term then return noted_term end

local missing, stale, wrong_capacity = 0, 0, 0
local time = now()
local grace = tonumber(ARGV[2])

local live = {}
for i = 7, #ARGV, 3 do live[ARGV[i]] = true end

-- How long an entry may still wait for its pod, if at all.
local function waits_for(entry)
  local placed_at, uid = rest_of(entry)
  local left = grace - math.max(0, tonumber(time) - tonumber(placed_at))
  return uid == '-' and left > 0 and left or nil
end

-- Of releases, how long the pods may still be seen to live (JobLedger::GOES_WITHIN). One that is yet to be,
-- by a clock that went back, is no reason to wait.
local going = {}
each_release(function(uid, at)
  local age = tonumber(time) - at
  local left = math.min(2000, grace) - age
  if age >= 0 and left > 0 then going[uid] = left end
end)

local entries, strike, enter, waits = {}, {}, {}, nil
local pods = call('HGETALL', KEYS[2])
for i = 1, #pods, 2 do
  local executor, entry = pods[i], pods[i + 1]
  local left = not live[executor] and waits_for(entry)
  if live[executor] or left then
    entries[executor] = entry
    if left then waits = math.min(left, waits or left) end
  else
    strike[#strike + 1] = executor
    stale = stale + 1
  end
end

for i = 7, #ARGV, 3 do
  local executor, uid, capacity = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local before, after = entries[executor], nil
  local seen = before and select(2, rest_of(before)) ~= '-'
  if going[uid] and not seen then
    waits = math.min(going[uid], waits or going[uid])
    after = before
  elseif before then
    local known = capacity_of(before)
    if capacity == '' then capacity = known end
    if capacity ~= known then wrong_capacity = wrong_capacity + 1 end
    after = capacity .. ' ' .. rest_of(before) .. ' ' .. uid
  elseif capacity ~= '' then
    after = capacity .. ' ' .. time .. ' ' .. uid
    missing = missing + 1
  end
  if after ~= before then
    entries[executor] = after
    enter[#enter + 1] = executor
    enter[#enter + 1] = after
  end
end

-- In parts, since a Lua call takes some thousand arguments at most; even, so that pairs stay together.
local function in_parts(command, arguments)
  for first = 1, #arguments, 1000 do
    call(command, KEYS[2], unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end
in_parts('HDEL', strike)
in_parts('HSET', enter)

local total, spot = 0, 0
for _, entry in pairs(entries) do
  total = total + 1
  if capacity_of(entry) == 'spot' then spot = spot + 1 end
end

local policy = call('HMGET', KEYS[1], 'ratio', 'base')
local ratio = ARGV[3] ~= '' and ARGV[3] or policy[1]
local base = ARGV[4] ~= '' and ARGV[4] or policy[2]
-- Half of a policy is none.
local has_policy = ratio and base and not (total == 0 and ARGV[6] == 'ended')
if total == 0 and not has_policy then
  -- Then there is no ledger. The other key went with its last entry.
  call('DEL', KEYS[1])
else
  call('HSET', KEYS[1], 'on-demand', total - spot, 'spot', spot, 'term', term)
  if has_policy then call('HSET', KEYS[1], 'ratio', ratio, 'base', base) end
  touch()
end
return { missing, stale, wrong_capacity, spot, total - spot, waits }
