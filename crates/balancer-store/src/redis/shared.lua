-- What the scripts of a job's ledger share; put in front of each of them.
--
-- KEYS[1]  exec-count:{<namespace>:<job id>}, a hash, the job's record:
--            v          the format of the record, 1
--            spot       the number of executors on spot
--            on-demand  the number of executors on on-demand
--            policy     words with a space between them, each "<key>=<value>": spot-ratio and on-demand-base
--            released   the last releases, the newest first, each "<at, ms> <uid>" after its length and a colon
--            term       the term of the last reconcile
-- KEYS[2]  exec-pods:{<namespace>:<job id>}, a hash: executor -> "<capacity> <placed at, ms> <uid, or ->"
-- ARGV[1]  of every script except peek and get: how long both keys are kept after this call, in ms
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

-- The spot ratio, in billionths, and the on-demand base in a policy; nil for one that is missing or invalid. Up to
-- nine decimal places, the nearest whole number is exact. All numbers from here on are whole and, up to nine million
-- executors in a job, below 2^53, up to which a Lua number is exact.
local function read_policy(policy)
  if not policy or policy == '' then return nil, nil end
  -- As this version writes it, for speed; else wherever the words are.
  local ratio, base = string.match(policy, '^spot%-ratio=(%S+) on%-demand%-base=(%S+)')
  if not ratio then
    ratio = string.match(' ' .. policy, ' spot%-ratio=(%S+)')
    base = string.match(' ' .. policy, ' on%-demand%-base=(%S+)')
  end
  ratio, base = tonumber(ratio), tonumber(base)
  ratio = ratio and math.floor(ratio * ONE + 0.5)
  return ratio and ratio >= 0 and ratio <= ONE and ratio or nil, base and base >= 0 and base or nil
end

-- Whether a text is a policy that can be applied.
local function is_policy(text)
  local ratio, base = read_policy(text)
  return ratio and base and true or false
end

-- A stored policy with the words of another one in place of its own. Words with other keys stay, because a newer
-- version may need them; what is not a word is dropped.
local function merge_policies(stored, words)
  local merged, new, word_and_key = {}, {}, '(([^%s=]+)=%S*)'
  for word, key in string.gmatch(words, word_and_key) do new[key] = word end
  for word, key in string.gmatch(stored or '', word_and_key) do
    if new[key] ~= 'merged' then merged[#merged + 1] = new[key] or word end
    if new[key] then new[key] = 'merged' end
  end
  for word, key in string.gmatch(words, word_and_key) do
    if new[key] ~= 'merged' then merged[#merged + 1] = word end
  end
  return table.concat(merged, ' ')
end

-- The record: spot, on-demand, the policy's text, its format, and whether the counts had to be taken anew. The
-- stored counts are right as long as both are there and their sum is the number of entries. It is not if a key was
-- evicted or edited by hand; then they are counted from the entries, the only step whose cost grows with the job.
local function read_record()
  local record = call('HMGET', KEYS[1], 'spot', 'on-demand', 'policy', 'v')
  local spot, on_demand = tonumber(record[1]) or 0, tonumber(record[2]) or 0
  local right = spot + on_demand == call('HLEN', KEYS[2]) and record[1] and record[2]
  if not right then
    local entries = call('HVALS', KEYS[2])
    spot = 0
    for _, entry in ipairs(entries) do
      if capacity_of(entry) == 'spot' then spot = spot + 1 end
    end
    on_demand = #entries - spot
  end
  return spot, on_demand, record[3], record[4], not right
end

-- Stores both counts, with the format of the record, which is never lowered.
local function write_counts(spot, on_demand, format)
  call('HSET', KEYS[1], 'v', format or FORMAT, 'on-demand', on_demand, 'spot', spot)
end

-- Calls `visit` with the uid, the time and the text of each stored release. Each is stored after its length, because
-- a uid may be any text.
local function each_release(visit)
  local released, at = call('HGET', KEYS[1], 'released') or '', 1
  while true do
    local length, first = string.match(released, '^(%d+):()', at)
    if not length then return end
    at = first + length
    local release = string.sub(released, first, at - 1)
    local time, uid = string.match(release, '^(%d+) (.*)$')
    if time then visit(uid, tonumber(time), release) end
  end
end

-- Both keys are kept equally long: one without the other would mean nothing.
local function touch()
  call('PEXPIRE', KEYS[1], ARGV[1])
  call('PEXPIRE', KEYS[2], ARGV[1])
end
