-- Makes the ledger equal to the job's state in the cluster, unless it was reconciled in a later term. Removes entries
-- without a live executor: at once if the reconciler has seen the pod (its uid is known), else once the placement is
-- the grace old. Adds live executors of known capacity that are missing, unless they were released so recently that
-- they may still be shown as live; such a pod does not become the pod of an entry that waits for its own either. The
-- counts are taken anew.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the grace, in ms
-- ARGV[3]  the words of a policy that the job's driver states, or nothing; each replaces the stored one
-- ARGV[4]  the term, a whole number
-- ARGV[5]  'ended' if neither a driver nor an executor is left: the policy then goes with the last entry; else nothing
-- ARGV[6]  how long a released pod may still be shown as live, in ms
-- ARGV[7..]  three for each live executor: its name, the uid of its pod, its capacity or nothing
--
-- Returns  {missing executors added, stale entries removed, wrong capacities corrected, the number on spot, the number
--          on on-demand, in how many ms the job needs another reconcile, because the first entry that waits for its
--          pod will have waited for the grace, or the first released pod will no longer be excused; left out if there
--          is neither}; or, with nothing changed, the later term, as text

-- Compared as texts, because a Lua number is exact up to 2^53 only. A stored term that is not a whole number is none.
local term = ARGV[4]
local stored_term = string.match(call('HGET', KEYS[1], 'term') or '', '^%d+$') or '0'
if #stored_term > #term or #stored_term == #term and stored_term > term then return stored_term end

local missing, stale, wrong_capacity = 0, 0, 0
local time = now()
local grace = tonumber(ARGV[2])

local live = {}
for i = 7, #ARGV, 3 do live[ARGV[i]] = true end

-- How long an entry may still wait for its pod; nil if it may not.
local function waits_for(entry)
  local placed_at, uid = rest_of(entry)
  local left = grace - math.max(0, tonumber(time) - tonumber(placed_at))
  return uid == '-' and left > 0 and left or nil
end

-- How long released pods may still be shown as live. A release in the future, by a clock that went back, is no reason
-- to wait.
local going = {}
each_release(function(uid, at)
  local age = tonumber(time) - at
  local left = math.min(tonumber(ARGV[6]), grace) - age
  if age >= 0 and left > 0 then going[uid] = left end
end)

local entries, remove, add, recheck_after = {}, {}, {}, nil
local pods = call('HGETALL', KEYS[2])
for i = 1, #pods, 2 do
  local executor, entry = pods[i], pods[i + 1]
  local left = not live[executor] and waits_for(entry)
  if live[executor] or left then
    entries[executor] = entry
    if left then recheck_after = math.min(left, recheck_after or left) end
  else
    remove[#remove + 1] = executor
    stale = stale + 1
  end
end

for i = 7, #ARGV, 3 do
  local executor, uid, capacity = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local before, after = entries[executor], nil
  local has_pod = before and select(2, rest_of(before)) ~= '-'
  if going[uid] and not has_pod then
    recheck_after = math.min(going[uid], recheck_after or going[uid])
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
    add[#add + 1] = executor
    add[#add + 1] = after
  end
end

-- In parts, because a Lua call takes some thousand arguments at most; an even number, so that pairs stay together.
local function in_parts(command, arguments)
  for first = 1, #arguments, 1000 do
    call(command, KEYS[2], unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end
in_parts('HDEL', remove)
in_parts('HSET', add)

local total, spot = 0, 0
for _, entry in pairs(entries) do
  total = total + 1
  if capacity_of(entry) == 'spot' then spot = spot + 1 end
end

local record = call('HMGET', KEYS[1], 'policy', 'v')
local policy = record[1]
if ARGV[3] ~= '' then policy = merge_policies(policy, ARGV[3]) end
-- A part of a policy is none.
local has_policy = is_policy(policy) and not (total == 0 and ARGV[5] == 'ended')
if total == 0 and not has_policy then
  -- Then there is no ledger. The other key went with its last entry.
  call('DEL', KEYS[1])
else
  call('HSET', KEYS[1], 'v', record[2] or FORMAT, 'on-demand', total - spot, 'spot', spot, 'term', term)
  if has_policy and policy ~= record[1] then call('HSET', KEYS[1], 'policy', policy) end
  touch()
end
return { missing, stale, wrong_capacity, spot, total - spot, recheck_after }
