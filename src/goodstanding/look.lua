-- Look a user up, and lease whom nobody knows: who finds neither value nor lease is to load.
-- KEYS: value, lease.  ARGV: token, life of the lease in ms.
-- Returns the value and whose lease is out then, if any: one's own token where it was got.
local found = redis.call('MGET', KEYS[1], KEYS[2])
if not found[1] and not found[2] then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
  found[2] = ARGV[1]
end
return found
