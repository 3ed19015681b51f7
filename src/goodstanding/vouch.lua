-- Say something only where this server's run is the one that was vouched for, or vouch for it.
-- KEYS: where the vouched run's name is kept.  ARGV: a run to vouch for (empty: none), channel, message (empty: none).
-- Returns 1 when this run is vouched for, else its name. A server that does not tell its run, or not us, always has the same.
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or 'unknown'
if ARGV[1] == run then
  redis.call('SET', KEYS[1], run)
end
if redis.pcall('GET', KEYS[1]) ~= run then
  return run
end
if ARGV[3] ~= '' then
  redis.call('PUBLISH', ARGV[2], ARGV[3])
end
return 1
