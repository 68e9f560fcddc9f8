-- The usual placement, put in front of all that place.lua needs: the job has a policy of a ratio and a base alone, its counts
-- are stored, spot is open, and the executor states at most a ratio of its own. It does exactly what the rest would do, in two
-- thirds of the time, because the server builds the functions of a script anew in each call. Whatever it does not know, it
-- leaves to the rest.
do
  local call = redis.call
  local required, own, looked_up = ARGV[4], ARGV[5], ARGV[6]
  if (not required or required == '') and (not looked_up or looked_up == '') then
    local record = call('HMGET', KEYS[1], 'spot', 'on-demand', 'policy', 'v', 'driver', 'spot-state', 'avoid', 'kept-until',
      'counting')
    local ratio, base = string.match(record[3] or '', '^spot%-ratio=([%d.]+) on%-demand%-base=(%d+)$')
    local own_ratio = own and own ~= '' and (string.match(own, '^spot%-ratio=([%d.]+)$') or '-')
    ratio = ratio and tonumber(ratio)
    own_ratio = not own_ratio and ratio or tonumber(own_ratio)
    local spot, on_demand, kept_until = record[1], record[2], record[8]
    local driver = ARGV[3]
    if ratio and ratio <= 1 and own_ratio and own_ratio <= 1 and base and #base <= 6 and record[4] and not record[6] and not record[7]
      and (not record[9] or record[9] == '0')
      and (not driver or driver == '' or driver == record[5])
      and spot and on_demand and #spot <= 15 and #on_demand <= 15 and string.find(spot, '^%d+$')
      and string.find(on_demand, '^%d+$')
      and kept_until and #kept_until <= 15 and string.find(kept_until, '^%d+$') then
      spot, on_demand, base = tonumber(spot), tonumber(on_demand), tonumber(base)
      local time = call('TIME')
      time = time[1] .. string.sub('00000' .. time[2], -6, -4)
      local left, ttl = tonumber(kept_until) - tonumber(time), tonumber(ARGV[1])
      local entry = call('HGET', KEYS[2], ARGV[2])
      local before = entry and (string.sub(entry, 1, 5) == 'spot ' and 'spot' or 'on-demand')
      if left >= ttl and left <= math.floor(ttl * 1.5) and spot + on_demand > 0
        and not (before and (before == 'spot' and spot or on_demand) == 0) then
        local capacity = before
        if not before then
          ratio = math.floor(own_ratio * 1000000000 + 0.5)
          if on_demand < base or ratio == 0 or spot * 1000000000 > ratio * (spot + on_demand - base) then
            capacity, on_demand = 'on-demand', on_demand + 1
          else
            capacity, spot = 'spot', spot + 1
          end
        end
        call('HSET', KEYS[2], ARGV[2], capacity .. ' ' .. time .. ' -')
        if before then
          call('HSET', KEYS[1], 'wait:' .. ARGV[2], time)
        else
          call('HSET', KEYS[1], 'wait:' .. ARGV[2], time, capacity, capacity == 'spot' and spot or on_demand)
        end
        return capacity .. (before and ' 0 ' or ' 1 ') .. spot .. ' ' .. on_demand
      end
    end
  end
end
