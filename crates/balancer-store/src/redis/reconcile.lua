-- Makes the ledger what the cluster says. Struck are entries with no live executor: at once where the
-- pod had been seen (its uid is known), else once the placement is the grace old. Entered are live
-- executors of known capacity that are missing. The counts are taken anew.
--
-- KEYS, ARGV[1]: as at the top of shared.lua
-- ARGV[2]  the grace, in ms
-- ARGV[3]  the ratio of the job's policy, or nothing
-- ARGV[4]  the base of it; there if and only if ARGV[3] is
-- ARGV[5..]  three for each live executor: its name, the uid of its pod, its capacity or nothing
--
-- Returns  {missing ones entered, stale ones struck, wrong capacities corrected}
local missing, stale, wrong_capacity = 0, 0, 0
local time = now()
local grace = tonumber(ARGV[2])

local live = {}
for i = 5, #ARGV, 3 do live[ARGV[i]] = true end

local function waits(entry)
  local placed_at, uid = rest_of(entry)
  return uid == '-' and math.max(0, tonumber(time) - tonumber(placed_at)) < grace
end

local entries, strike, enter = {}, {}, {}
local pods = call('HGETALL', KEYS[2])
for i = 1, #pods, 2 do
  local executor, entry = pods[i], pods[i + 1]
  if live[executor] or waits(entry) then
    entries[executor] = entry
  else
    strike[#strike + 1] = executor
    stale = stale + 1
  end
end

for i = 5, #ARGV, 3 do
  local executor, uid, capacity = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local before, after = entries[executor], nil
  if before then
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
-- A job of which nothing is known stays unknown.
if total > 0 or call('EXISTS', KEYS[1]) == 1 then
  call('HSET', KEYS[1], 'on-demand', total - spot, 'spot', spot)
end
if ARGV[3] ~= '' then
  call('HSET', KEYS[1], 'ratio', ARGV[3], 'base', ARGV[4])
end
if total == 0 and not call('HGET', KEYS[1], 'ratio') then
  call('HDEL', KEYS[1], 'released')
end
touch()
return { missing, stale, wrong_capacity }
