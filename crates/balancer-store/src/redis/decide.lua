-- Decides what place and peek return; put in front of both. It writes nothing.
--
-- ARGV[2]  the executor
-- ARGV[3]  the name of the pod that drives the job, or nothing
-- ARGV[4]  the capacity that the pod requires, or nothing
-- ARGV[5]  the words of a policy that the executor states itself, or nothing
-- ARGV[6]  the job's policy as the caller knows it, or nothing
-- ARGV[7]  'existing' if the job may not get a ledger, else left out
--          (3 to 6 may be left out if they and all after them are nothing)
--
-- Returns  nil if a policy is needed, else words in one text, which costs its reader less than an array. With nothing
--          changed: "other" if the ledger belongs to another driver, "none" if the job has no ledger and may not get one.
--          "off" if the job is opted out, with "new" if it gets a ledger for its policy. Else: spot or on-demand; 1 if the
--          executor is new or 0 if it was in the ledger; the number on spot; the number on on-demand, both with this
--          executor. Then any of these: "new" if the job had no ledger; "closed" if the ratio would have sent the
--          executor to spot, and spot is closed; and for an executor on spot "probe" if it probes spot, "cap=<n>" if n
--          executors of the job may run on one node, "unknown" if no policy says how many, and "avoid=<type>,<type>" with
--          the instance types to avoid. A newer version may append more words.

-- Where the next executor goes: first the base; beyond it to spot, as long as spot's share of the executors beyond
-- the base is not above the ratio.
local function decide(spot, on_demand, ratio, base)
  if on_demand < base or ratio == 0 then return 'on-demand' end
  if spot * ONE <= ratio * (spot + on_demand - base) then return 'spot' end
  return 'on-demand'
end

-- How many executors may run on one node, in the words of a policy; nil if they do not say so.
local function cap_in(words)
  -- Most policies do not, which costs little to find out.
  if not words or not string.find(words, 'max-executors-per-node=', 1, true) then return nil end
  local cap = whole(string.match(' ' .. words, ' max%-executors%-per%-node=(%S+)'))
  return cap and cap <= 1000000 and cap or nil
end

local driver, required, own_policy, looked_up = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local record = read_record('spot-state', 'avoid', 'kept-until', 'counting')
if belongs_to_another(record, driver) then return 'other' end

local spot, on_demand, is_estimate, recounted = counts_of(record)
local policy, format = record[3], record[4]
local ratio, base = read_policy(policy)
local has_policy = ratio and base
if not has_policy then ratio, base = read_policy(looked_up) end
local is_new_job = not has_policy and spot + on_demand == 0
local may_create = ARGV[7] ~= 'existing'
local stores_policy = not has_policy and looked_up and looked_up ~= ''

local before = call('HGET', KEYS[2], ARGV[2])
before = before and capacity_of(before)
-- Counts that leave this entry out were edited.
if before and (before == 'spot' and spot or on_demand) == 0 then
  spot, on_demand, is_estimate = recount(call('HLEN', KEYS[2]))
  recounted = true
end

local capacity, is_decided = before, false
if required then
  if required ~= '' then capacity = required end
  local own_ratio, own_base = read_policy(own_policy)
  ratio, base = own_ratio or ratio, own_base or base
end

-- What is returned, and whether the policy and the driver are stored: not without a ledger to store them in. And the time,
-- if it was needed, and the new state of spot, if this executor becomes the probe.
local outcome, stores, more, time, probing
if not before and ratio == 'off' then
  local creates = is_new_job and may_create and stores_policy
  capacity, outcome, stores = nil, creates and 'off new' or 'off', creates or not is_new_job
elseif is_new_job and not may_create then
  capacity, outcome = nil, 'none'
elseif not capacity and ratio and base then
  capacity, is_decided = decide(spot, on_demand, ratio, base), true
end
if capacity == 'spot' and record[6] then
  local state, since, detail = read_spot_state(record[6])
  if state == 'probing' and detail == ARGV[2] then
    more = ' probe'
  elseif state and is_decided then
    local is_closed
    if state == 'starved' then
      time = now()
      -- If the clock was set back behind the time at which spot was closed, the retry time says nothing.
      is_closed = tonumber(time) >= tonumber(since) and tonumber(time) < detail
    else
      -- A probe that has left the ledger, or spot, will not find out about spot.
      local probe = call('HGET', KEYS[2], detail)
      is_closed = probe and capacity_of(probe) == 'spot'
    end
    if is_closed then
      capacity, more = 'on-demand', ' closed'
    else
      more, probing = ' probe', 'probing ' .. since .. ' ' .. ARGV[2]
    end
  end
end
if capacity == 'spot' then
  local jobs = has_policy and policy or looked_up
  local cap = cap_in(own_policy) or cap_in(jobs)
  if cap then
    if cap > 0 then more = (more or '') .. ' cap=' .. cap end
  elseif not jobs or jobs == '' then
    more = (more or '') .. ' unknown'
  end
  local avoid = record[7]
  -- A text that no script wrote counts as none.
  if avoid and #avoid <= 512 and string.find(avoid, '^[%w._ -]+$') then
    more = (more or '') .. ' avoid=' .. string.gsub(avoid, ' ', ',')
  end
end
if capacity then
  if before == 'spot' then spot = spot - 1 elseif before then on_demand = on_demand - 1 end
  if capacity == 'spot' then spot = spot + 1 else on_demand = on_demand + 1 end
  outcome = capacity .. (before and ' 0 ' or ' 1 ') .. spot .. ' ' .. on_demand .. (is_new_job and ' new' or '')
    .. (more or '')
  stores = true
end
