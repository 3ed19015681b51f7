-- Store a loaded value, but only while the lease under which it was loaded still holds.
-- KEYS: value, lease, last known good.  ARGV: token, text, life in ms, life of the good copy in ms (0: none).
-- Returns 1 when stored, 0 when the lease was gone: an invalidation, a newer load or the deadline came first.
if redis.pcall('GET', KEYS[2]) ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if ARGV[4] == '0' then
  redis.call('DEL', KEYS[3])
else
  redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[4])
end
redis.call('DEL', KEYS[2])
return 1
