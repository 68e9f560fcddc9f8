-- What the scripts of a job's ledger share; put in front of each of them.
--
-- KEYS[1]  exec-count:{<namespace>:<job id>}, a hash, the job's record:
--            v          the format of the record, 1
--            spot       the number of executors on spot
--            on-demand  the number of executors on on-demand
--            policy     words with a space between them, each "<key>=<value>": spot-ratio, a decimal or "off" for a job
--                       that is opted out, and on-demand-base; and others, unless they say their default
--            driver     the name of the pod that drives the job, if it is known
--            released   the last releases, the newest first, each "<at, ms> <uid>" after its length and a colon
--            term       the term of the last reconcile
--            spot-state whether spot is open to the job: not there if it is; "starved <since, ms> <retry at, ms>" if it
--                       is closed; "probing <since, ms> <executor>" if one executor probes it
--            avoid      the instance types that new spot executors should avoid, with a space between them
--            kept-until when both keys will expire at the earliest, in ms
--            estimated  1 if the counts are an estimate, because a large ledger had lost them
--            counting   the term in which a reconciler began to count all entries; 0 once an entry has changed since then
--            wait:<executor>  for each entry without a uid, when it was placed, in ms
-- KEYS[2]  exec-pods:{<namespace>:<job id>}, a hash: executor -> "<capacity> <placed at, ms> <uid, or ->"
-- ARGV[1]  of every script except peek and get: how long both keys are kept after this call at least, in ms; at most one
--          and a half times as long
--
-- While a slot moves from one node of a cluster to another, a script may not use a key after its last field was removed: the
-- key is then the other node's. So scripts count entries before they remove some, and not after it.
--
-- A newer version may add fields to the record and words to the policy, and may raise v. This version keeps them.
local call = redis.call
local FORMAT = 1
local ONE = 1000000000

-- What an entry counts as. An entry that no script wrote counts as on-demand.
local function capacity_of(entry)
  return string.sub(entry, 1, 5) == 'spot ' and 'spot' or 'on-demand'
end

-- When an entry was placed, and its pod's uid. An entry that no script wrote was placed long ago.
local function rest_of(entry)
  local placed_at, uid = string.match(entry, '^%S+ (%d+) (.*)$')
  return placed_at or '0', uid or '-'
end

-- The server's clock, in ms, as text.
local function now()
  local time = call('TIME')
  return time[1] .. string.sub('00000' .. time[2], -6, -4)
end

-- The whole number in a text; nil if it is none, or so large that a Lua number would not be exact.
local function whole(text)
  return text and #text <= 15 and string.match(text, '^%d+$') and tonumber(text) or nil
end

-- The spot ratio, in billionths or 'off', and the on-demand base in a policy; nil for one that is missing or invalid. Up
-- to nine decimal places, the nearest whole number is exact. All numbers from here on are whole and, up to nine million
-- executors in a job, below 2^53, up to which a Lua number is exact.
local function read_policy(policy)
  if not policy or policy == '' then return nil, nil end
  -- As this version writes it, for speed; else wherever the words are.
  local ratio, base = string.match(policy, '^spot%-ratio=(%S+) on%-demand%-base=(%S+)')
  if not ratio then
    ratio = string.match(' ' .. policy, ' spot%-ratio=(%S+)')
    base = string.match(' ' .. policy, ' on%-demand%-base=(%S+)')
  end
  base = whole(base)
  base = base and base <= 1000000 and base or nil
  if ratio == 'off' then return ratio, base end
  ratio = tonumber(ratio)
  ratio = ratio and math.floor(ratio * ONE + 0.5)
  return ratio and ratio >= 0 and ratio <= ONE and ratio or nil, base
end

-- Whether a text is a policy that can be applied.
local function is_policy(text)
  local ratio, base = read_policy(text)
  return ratio and base and true or false
end

-- A stored policy with the words of another one in place of its own. Words with other keys stay, because a newer
-- version may need them; what is not a word is dropped, and so are defaults, which keeps the text of most jobs short.
local function merge_policies(stored, words)
  local merged, new, word_and_key = {}, {}, '(([^%s=]+)=%S*)'
  -- In here, because most calls of the scripts merge nothing.
  local is_default = {
    ['max-executors-per-node=0'] = true,
    ['max-pool-share=1'] = true,
    ['spot-fallback-seconds=0'] = true,
    ['spot-retry-seconds=300'] = true,
  }
  local function add(word)
    if not is_default[word] then merged[#merged + 1] = word end
  end
  for word, key in string.gmatch(words, word_and_key) do new[key] = word end
  for word, key in string.gmatch(stored or '', word_and_key) do
    if new[key] ~= 'merged' then add(new[key] or word) end
    if new[key] then new[key] = 'merged' end
  end
  for word, key in string.gmatch(words, word_and_key) do
    if new[key] ~= 'merged' then add(word) end
  end
  return table.concat(merged, ' ')
end

-- The record, in this order: spot, on-demand, the policy's text, its format, the driver, and the fields in `more`.
local function read_record(...)
  return call('HMGET', KEYS[1], 'spot', 'on-demand', 'policy', 'v', 'driver', ...)
end

-- The state of spot: nil if it is open, else 'starved' and when it was closed and when the next executor may probe it, or
-- 'probing' and when it was closed and the executor. A text that no script wrote counts as open.
local function read_spot_state(text)
  local state, since, rest = string.match(text or '', '^(%l+) (%d+) (.+)$')
  if not whole(since) then return nil end
  if state == 'starved' then
    local retry_at = whole(rest)
    if retry_at then return state, since, retry_at end
  elseif state == 'probing' then
    return state, since, rest
  end
end

-- Whether a call that names this driver, or nothing, is for another ledger, because this one belongs to another driver.
-- The ledger whose job id ends with a slash and the driver's name is this driver's in any case.
local function belongs_to_another(record, driver)
  local owner = record[5]
  if not owner or owner == driver or not driver or driver == '' then return false end
  local own = '/' .. driver .. '}'
  return string.sub(KEYS[1], -#own) ~= own
end

-- The entries that are counted one by one. A larger ledger that has lost its counts gets an estimate, because no script
-- may keep the server busy; the reconciler then goes through all entries, and corrects it.
local MAX_COUNTED = 512

-- The counts of these entries.
local function count(entries)
  local spot = 0
  for _, entry in ipairs(entries) do
    if capacity_of(entry) == 'spot' then spot = spot + 1 end
  end
  return spot, #entries - spot
end

-- The number on spot, on on-demand, and whether that is an estimate, from the entries.
local function recount(number)
  if number <= MAX_COUNTED then
    local spot, on_demand = count(call('HVALS', KEYS[2]))
    return spot, on_demand, false
  end
  local page, sample = call('HSCAN', KEYS[2], 0, 'COUNT', MAX_COUNTED)[2], {}
  for i = 2, #page, 2 do sample[#sample + 1] = page[i] end
  -- A hash from which most entries have gone may have nothing in its first places.
  if #sample == 0 then return 0, number, true end
  local spot = math.floor(number * count(sample) / #sample + 0.5)
  return spot, number - spot, true
end

-- The stored counts; nil if one of them is missing.
local function stored_counts(record)
  local spot, on_demand = whole(record[1]), whole(record[2])
  if spot and on_demand then return spot, on_demand end
end

-- The number on spot, on on-demand, whether that is an estimate, and whether they had to be taken anew. They are not
-- stored if the record was evicted, or edited by hand.
local function counts_of(record)
  local spot, on_demand = stored_counts(record)
  if spot then return spot, on_demand, false, false end
  local is_estimate
  spot, on_demand, is_estimate = recount(call('HLEN', KEYS[2]))
  return spot, on_demand, is_estimate, true
end

-- Stores both counts, and that they are an estimate, with the format of the record, which is never lowered. `counting` is
-- the record's field.
local function write_counts(spot, on_demand, format, is_estimate, counting)
  local fields = { 'v', format or FORMAT, 'on-demand', on_demand, 'spot', spot }
  local function put(field, value)
    fields[#fields + 1] = field
    fields[#fields + 1] = value
  end
  if is_estimate then put('estimated', 1) end
  if counting and counting ~= '0' then put('counting', 0) end
  call('HSET', KEYS[1], unpack(fields))
end

-- Calls `visit` with the uid, the time and the text of each release in the record's field. Each is stored after its
-- length, because a uid may be any text.
local function each_release(released, visit)
  released = released or ''
  local at = 1
  while true do
    local length, first = string.match(released, '^(%d+):()', at)
    if not length then return end
    at = first + length
    local release = string.sub(released, first, at - 1)
    local time, uid = string.match(release, '^(%d+) (.*)$')
    if time then visit(uid, tonumber(time), release) end
  end
end

-- Whether one number is larger than another, both as texts of digits without leading zeros: a Lua number is exact up to
-- 2^53 only.
local function is_later(term, other) return #term > #other or #term == #other and term > other end

-- The term of the last reconcile, as text without leading zeros; '0' for one that no reconciler wrote: it is no number,
-- later than the largest that a Lease can reach, or too far ahead of the caller's. And whether it was such a one.
local MAX_TERM, MAX_AHEAD = '1000000000', 1000000
local function stored_term(callers)
  local stored = call('HGET', KEYS[1], 'term')
  if not stored then return '0', false end
  local term = string.match(stored, '^0*(%d+)$')
  if not term or is_later(term, MAX_TERM) or tonumber(term) - tonumber(callers) > MAX_AHEAD then return '0', true end
  return term, false
end

-- How long both keys are kept, in ms, and until when, if this call has to renew that; nil if the time that is left is
-- enough. They are renewed for longer than this call asks for, so that few calls have to. `kept_until` is the record's
-- field; `is_new` if one of the keys may be new, and so have no time to expire yet.
local function renewal(kept_until, is_new, time)
  local ttl = tonumber(ARGV[1])
  local left = (whole(kept_until) or 0) - tonumber(time)
  local longest = math.floor(ttl * 1.5)
  if is_new or left < ttl or left > longest then return longest, string.format('%.0f', tonumber(time) + longest) end
end

-- Keeps both keys equally long, because one without the other would mean nothing: see renewal. `is_empty` if there is no
-- entry, and so no second key.
local function touch(kept_until, is_new, is_empty, time)
  local keep, keep_until = renewal(kept_until, is_new, time or now())
  if not keep then return end
  if not is_empty then call('PEXPIRE', KEYS[2], keep) end
  if call('PEXPIRE', KEYS[1], keep) == 1 then
    -- A server without free memory may refuse it. Then the next call renews again.
    redis.pcall('HSET', KEYS[1], 'kept-until', keep_until)
  end
end
