-- Corrects the entries of the executors that the call names, unless the ledger was reconciled in a later term. An entry
-- whose executor is gone is removed: at once if the reconciler has seen the pod (its uid is known), else once the placement
-- is the grace old. If the clock was set back behind a placement, its age starts again at zero. A live executor of known
-- capacity that is missing is added, unless it was released so recently that it may still be shown as live; such a pod
-- does not become the pod of an entry that waits for its own either. In a job that is opted out only those that state a
-- ratio of their own are added. Other entries stay as they are. The call costs as much as it has names: a ledger of up
-- to 512 entries is counted anew, and the counts of a larger one are changed by what was corrected.
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
-- ARGV[7]  how many placements that wait for their pods are reported at most
-- ARGV[8]  the name of the pod that drives the job, or nothing; it replaces the stored one
-- ARGV[9]  the number of executors that are gone; their names follow
-- then     three for each live executor: its name, the uid of its pod, its capacity or nothing, and '+' if it states a
--          ratio of its own
--
-- Returns  {missing executors added, stale entries removed, wrong capacities corrected, the number on spot, the number
--          on on-demand, 1 if both are exact or 0, in how many ms the first released pod will no longer be excused or -1,
--          the policy or '', what was invalid: 'term', 'type' or '', 1 if more placements wait than are reported or 0,
--          {placed at, age in ms, executor, ... of the placements that wait, the oldest first}, the state of spot or nil,
--          the instance types to avoid or nil}; or, with nothing changed, the later term, as text

-- Anything other than two hashes, which no script wrote, is dropped: the cluster has everything that a ledger holds.
local fault, number = '', 0
for at, key in ipairs(KEYS) do
  local length = redis.pcall('HLEN', key)
  if type(length) == 'table' and length.err then
    if not string.find(length.err, 'WRONGTYPE', 1, true) then return length end
    call('UNLINK', key)
    fault = 'type'
  elseif at == 2 then
    number = length
  end
end

local term = ARGV[4]
local stored, is_invalid = stored_term(term)
if is_later(stored, term) then return stored end
if is_invalid then fault = 'term' end

local record = read_record('term', 'released', 'spot-state', 'avoid', 'kept-until', 'estimated', 'counting')
-- What another driver wanted is no policy of this one.
local is_handed_over = ARGV[8] ~= '' and record[5] and record[5] ~= ARGV[8]
local policy = not is_handed_over and record[3] or nil
local stored_ratio, stored_base = read_policy(policy)
local is_opted_out = (read_policy(ARGV[3]) or stored_base and stored_ratio) == 'off'

local missing, stale, wrong_capacity = 0, 0, 0
local time, grace = now(), tonumber(ARGV[2])

-- By how much the corrections change the counts.
local more = { spot = 0, ['on-demand'] = 0 }
-- Entries to remove and to write, and how many of these are new; fields of the record to remove, and those that say which
-- executors still wait, with their values.
local remove, write, added, forget, waits, waiting_since = {}, {}, 0, {}, {}, {}
local function correct(executor, before, after)
  if before then
    more[capacity_of(before)] = more[capacity_of(before)] - 1
  else
    added = added + 1
  end
  if after then
    more[capacity_of(after)] = more[capacity_of(after)] + 1
    write[#write + 1] = executor
    write[#write + 1] = after
  else
    remove[#remove + 1] = executor
  end
end

-- How old a placement is that waits for its pod, and the time of it: now if the clock was set back.
local function age_of(placed_at)
  local age = tonumber(time) - tonumber(placed_at)
  if age < 0 then return 0, time end
  return age, placed_at
end

-- The values of fields, by their names; in parts, because a Lua call takes some thousand arguments at most.
local function values_of(key, names)
  local values = {}
  for first = 1, #names, 1000 do
    local last = math.min(first + 999, #names)
    local found = call('HMGET', key, unpack(names, first, last))
    for at = first, last do values[names[at]] = found[at - first + 1] or nil end
  end
  return values
end

local first_live = 10 + tonumber(ARGV[9])
local names = {}
for i = 10, first_live - 1 do names[#names + 1] = ARGV[i] end
for i = first_live, #ARGV, 3 do names[#names + 1] = ARGV[i] end
local entries = values_of(KEYS[2], names)

for i = 10, first_live - 1 do
  local executor = ARGV[i]
  local entry = entries[executor]
  if entry then
    local placed_at, uid = rest_of(entry)
    local age, since = age_of(placed_at)
    if uid ~= '-' or age >= grace then
      correct(executor, entry, nil)
      forget[#forget + 1] = 'wait:' .. executor
      stale = stale + 1
    else
      local field = 'wait:' .. executor
      waits[#waits + 1] = field
      waiting_since[field] = since
    end
  end
end

-- How long released pods may still be shown as live. A release in the future, by a clock that went back, is no reason
-- to wait.
local excused = {}
each_release(record[7], function(uid, at)
  local age = tonumber(time) - at
  local left = math.min(tonumber(ARGV[6]), grace) - age
  if age >= 0 and left > 0 then excused[uid] = left end
end)

local recheck_after
for i = first_live, #ARGV, 3 do
  local executor, uid, capacity = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local states_ratio = string.sub(capacity, -1) == '+'
  if states_ratio then capacity = string.sub(capacity, 1, -2) end
  local before = entries[executor]
  local placed_at, known_uid = nil, '-'
  if before then placed_at, known_uid = rest_of(before) end
  if excused[uid] and known_uid == '-' then
    recheck_after = math.min(excused[uid], recheck_after or excused[uid])
  elseif before then
    local known = capacity_of(before)
    if capacity == '' then capacity = known end
    if capacity ~= known then wrong_capacity = wrong_capacity + 1 end
    local after = capacity .. ' ' .. placed_at .. ' ' .. uid
    if after ~= before then correct(executor, before, after) end
    entries[executor] = after
    if known_uid == '-' then forget[#forget + 1] = 'wait:' .. executor end
  elseif capacity ~= '' and (states_ratio or not is_opted_out) then
    entries[executor] = capacity .. ' ' .. time .. ' ' .. uid
    correct(executor, nil, entries[executor])
    missing = missing + 1
  end
end

-- The even number keeps pairs together.
local function in_parts(command, key, arguments)
  for first = 1, #arguments, 1000 do
    call(command, key, unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end
local before = number
number = before + added - #remove
in_parts('HDEL', KEYS[1], forget)
-- The key may not be emptied before it is written to.
if before == #remove then in_parts('HSET', KEYS[2], write) end
in_parts('HDEL', KEYS[2], remove)
if before ~= #remove then in_parts('HSET', KEYS[2], write) end

local spot, on_demand = stored_counts(record)
if before == 0 then spot, on_demand = 0, 0 end
local is_right = spot and spot + on_demand == before
local is_estimate = before > 0 and record[11] and true or false
if is_right then spot, on_demand = spot + more.spot, on_demand + more['on-demand'] end
if number == 0 then
  spot, on_demand, is_estimate = 0, 0, false
elseif number <= MAX_COUNTED or not is_right or spot < 0 or on_demand < 0 then
  spot, on_demand, is_estimate = recount(number)
end

if ARGV[3] ~= '' then policy = merge_policies(policy, ARGV[3]) end
-- A part of a policy is none.
local has_policy = is_policy(policy) and not (number == 0 and ARGV[5] == 'ended')
if number == 0 and not has_policy then
  -- Then there is no ledger. The other key went with its last entry.
  call('UNLINK', KEYS[1])
  return { missing, stale, wrong_capacity, 0, 0, 1, recheck_after or -1, '', fault, 0, {}, false, false }
end

if record[3] and is_handed_over and not has_policy then call('HDEL', KEYS[1], 'policy') end
if record[11] and not is_estimate then call('HDEL', KEYS[1], 'estimated') end
local fields = {}
local function put(field, value)
  fields[#fields + 1] = field
  fields[#fields + 1] = value
end
-- Another version may have placed an executor, and not stored that it waits.
local stored_waits = values_of(KEYS[1], waits)
for _, field in ipairs(waits) do
  if stored_waits[field] ~= waiting_since[field] then put(field, waiting_since[field]) end
end
if record[12] and record[12] ~= '0' and (added > 0 or #remove > 0 or wrong_capacity > 0) then put('counting', 0) end
if not record[4] or record[2] ~= tostring(on_demand) or record[1] ~= tostring(spot) or record[6] ~= term then
  put('v', record[4] or FORMAT)
  put('on-demand', on_demand)
  put('spot', spot)
  put('term', term)
end
if is_estimate and not record[11] then put('estimated', 1) end
if has_policy and policy ~= record[3] then put('policy', policy) end
if ARGV[8] ~= '' and ARGV[8] ~= record[5] then put('driver', ARGV[8]) end
in_parts('HSET', KEYS[1], fields)

-- The oldest placements that wait, of those that a bounded step finds. In a hash from which most fields have gone, the first
-- step may find none.
local most, oldest, more_wait = tonumber(ARGV[7]), {}, false
local function is_earlier(a, b)
  if a[2] ~= b[2] then return is_later(b[2], a[2]) end
  return a[1] < b[1]
end
-- Not table.sort of all: a thousand comparisons in Lua take longer than a hundred placements.
local function keep_oldest(placement)
  local at = #oldest
  if at == most then
    more_wait = true
    if not is_earlier(placement, oldest[at]) then return end
  else
    at = at + 1
  end
  while at > 1 and is_earlier(placement, oldest[at - 1]) do
    oldest[at] = oldest[at - 1]
    at = at - 1
  end
  oldest[at] = placement
end
local cursor, steps = '0', 0
repeat
  local scanned = call('HSCAN', KEYS[1], cursor, 'MATCH', 'wait:*', 'COUNT', 512)
  cursor, steps = scanned[1], steps + 1
  for i = 1, #scanned[2], 2 do
    keep_oldest({ string.sub(scanned[2][i], #'wait:' + 1), scanned[2][i + 1] })
  end
until cursor == '0' or #oldest > 0 or steps == 8
if cursor ~= '0' then more_wait = true end
local lost, anew, reported = {}, {}, {}
names = {}
for i, placement in ipairs(oldest) do names[i] = placement[1] end
entries = number > 0 and values_of(KEYS[2], names) or {}
for _, executor in ipairs(names) do
  local placed_at, uid = nil, nil
  if entries[executor] then placed_at, uid = rest_of(entries[executor]) end
  if uid ~= '-' then
    lost[#lost + 1] = 'wait:' .. executor
  else
    local age, since = age_of(placed_at)
    if since ~= placed_at then
      anew[#anew + 1] = executor
      anew[#anew + 1] = capacity_of(entries[executor]) .. ' ' .. since .. ' -'
    end
    reported[#reported + 1] = { executor, since, age }
  end
end
in_parts('HDEL', KEYS[1], lost)
in_parts('HSET', KEYS[2], anew)
table.sort(reported, is_earlier)
local waiting = {}
for _, placement in ipairs(reported) do
  waiting[#waiting + 1] = placement[2]
  waiting[#waiting + 1] = placement[3]
  waiting[#waiting + 1] = placement[1]
end

touch(record[10], before == 0 or not is_right, number == 0, time)
return { missing, stale, wrong_capacity, spot, on_demand, is_estimate and 0 or 1, recheck_after or -1,
  has_policy and policy or '', fault, more_wait and 1 or 0, waiting, record[8], record[9] }
