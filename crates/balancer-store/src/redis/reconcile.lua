-- Makes the ledger equal to the job's state in the cluster, unless it was reconciled in a later term. Removes entries
-- without a live executor: at once if the reconciler has seen the pod (its uid is known), else once the placement is
-- the grace old. If the clock was set back behind a placement, its age starts again at zero. Adds live executors of
-- known capacity that are missing, unless they were released so recently that they may still be shown as live; such a
-- pod does not become the pod of an entry that waits for its own either. In a job that is opted out only those that state
-- a ratio of their own are added. The counts are taken anew.
--
-- What goes is removed before anything is written, because a server without free memory refuses to write, unless the
-- script has removed something. Nothing is written without a change.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the grace, in ms
-- ARGV[3]  the words of a policy that the job's driver states, or nothing; each replaces the stored one, and what
--          another driver has stored is dropped
-- ARGV[4]  the term, a whole number
-- ARGV[5]  'ended' if neither a driver nor an executor is left: the policy then goes with the last entry; else nothing
-- ARGV[6]  how long a released pod may still be shown as live, in ms
-- ARGV[7]  the age from which a placement without a pod is reported as unconfirmed, in ms
-- ARGV[8]  how many of them are reported at most
-- ARGV[9]  the name of the pod that drives the job, or nothing; it replaces the stored one
-- ARGV[10..]  three for each live executor: its name, the uid of its pod, its capacity or nothing, and '+' if it states
--          a ratio of its own
--
-- Returns  {missing executors added, stale entries removed, wrong capacities corrected, the number on spot, the number
--          on on-demand, in how many ms the job needs another reconcile or -1, the policy or '', what was invalid: 'term',
--          'type' or '', {placed at, executor, placed at, executor ... of the unconfirmed placements, the oldest first},
--          the state of spot or nil, the instance types to avoid or nil}; or, with nothing changed, the later term, as text
--
-- The job needs another reconcile when the first entry that waits for its pod becomes unconfirmed or will have waited for
-- the grace, or the first released pod will no longer be excused.

-- Anything other than two hashes, which no script wrote, is dropped: the cluster has everything that a ledger holds.
local fault = ''
for _, key in ipairs(KEYS) do
  local length = redis.pcall('HLEN', key)
  if type(length) == 'table' and length.err then
    if not string.find(length.err, 'WRONGTYPE', 1, true) then return length end
    call('DEL', key)
    fault = 'type'
  end
end

local term = ARGV[4]
local stored, is_invalid = stored_term(term)
if is_later(stored, term) then return stored end
if is_invalid then fault = 'term' end

local record = read_record('term', 'released', 'spot-state', 'avoid')
-- What another driver wanted is no policy of this one.
local is_handed_over = ARGV[9] ~= '' and record[5] and record[5] ~= ARGV[9]
local policy = not is_handed_over and record[3] or nil
local stored_ratio, stored_base = read_policy(policy)
local is_opted_out = (read_policy(ARGV[3]) or stored_base and stored_ratio) == 'off'

local missing, stale, wrong_capacity = 0, 0, 0
local time = now()
local grace, confirm_after = tonumber(ARGV[2]), tonumber(ARGV[7])

local live = {}
for i = 10, #ARGV, 3 do live[ARGV[i]] = true end

-- The age of an entry that may still wait for its pod; nil if it may not.
local function waiting_age(placed_at, uid)
  local age = math.max(0, tonumber(time) - tonumber(placed_at))
  return uid == '-' and age < grace and age or nil
end

-- How long released pods may still be shown as live. A release in the future, by a clock that went back, is no reason
-- to wait.
local excused = {}
each_release(record[7], function(uid, at)
  local age = tonumber(time) - at
  local left = math.min(tonumber(ARGV[6]), grace) - age
  if age >= 0 and left > 0 then excused[uid] = left end
end)

local entries, remove, add, recheck_after, unconfirmed = {}, {}, {}, nil, {}
local function recheck(left) recheck_after = math.min(left, recheck_after or left) end
local pods = call('HGETALL', KEYS[2])
for i = 1, #pods, 2 do
  local executor, entry = pods[i], pods[i + 1]
  local age
  if not live[executor] then
    local placed_at, uid = rest_of(entry)
    age = waiting_age(placed_at, uid)
    if age and tonumber(placed_at) > tonumber(time) then
      placed_at = time
      entry = capacity_of(entry) .. ' ' .. time .. ' -'
      add[#add + 1] = executor
      add[#add + 1] = entry
    end
    if age and age >= confirm_after then
      unconfirmed[#unconfirmed + 1] = { placed_at, executor }
    end
  end
  if live[executor] or age then
    entries[executor] = entry
    if age then recheck((age < confirm_after and math.min(confirm_after, grace) or grace) - age) end
  else
    remove[#remove + 1] = executor
    stale = stale + 1
  end
end

for i = 10, #ARGV, 3 do
  local executor, uid, capacity = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local states_ratio = string.sub(capacity, -1) == '+'
  if states_ratio then capacity = string.sub(capacity, 1, -2) end
  local before, after = entries[executor], nil
  local has_pod = before and select(2, rest_of(before)) ~= '-'
  if excused[uid] and not has_pod then
    recheck(excused[uid])
    after = before
  elseif before then
    local known = capacity_of(before)
    if capacity == '' then capacity = known end
    if capacity ~= known then wrong_capacity = wrong_capacity + 1 end
    after = capacity .. ' ' .. rest_of(before) .. ' ' .. uid
  elseif capacity ~= '' and (states_ratio or not is_opted_out) then
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

if ARGV[3] ~= '' then policy = merge_policies(policy, ARGV[3]) end
-- A part of a policy is none.
local has_policy = is_policy(policy) and not (total == 0 and ARGV[5] == 'ended')
local spot_state, avoid = record[8], record[9]
if total == 0 and not has_policy then
  spot_state, avoid = false, false
  -- Then there is no ledger. The other key went with its last entry.
  call('DEL', KEYS[1])
else
  if record[3] and is_handed_over and not has_policy then call('HDEL', KEYS[1], 'policy') end
  if not record[4] or record[2] ~= tostring(total - spot) or record[1] ~= tostring(spot) or record[6] ~= term then
    call('HSET', KEYS[1], 'v', record[4] or FORMAT, 'on-demand', total - spot, 'spot', spot, 'term', term)
  end
  if has_policy and policy ~= record[3] then call('HSET', KEYS[1], 'policy', policy) end
  if ARGV[9] ~= '' and ARGV[9] ~= record[5] then call('HSET', KEYS[1], 'driver', ARGV[9]) end
  touch()
end

table.sort(unconfirmed, function(a, b)
  if a[1] ~= b[1] then return is_later(b[1], a[1]) end
  return a[2] < b[2]
end)
local reported = {}
for i = 1, math.min(#unconfirmed, tonumber(ARGV[8])) do
  reported[#reported + 1] = unconfirmed[i][1]
  reported[#reported + 1] = unconfirmed[i][2]
end
return { missing, stale, wrong_capacity, spot, total - spot, recheck_after or -1, has_policy and policy or '', fault,
  reported, spot_state, avoid }
