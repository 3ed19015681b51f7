-- Every query of the service, by name; those that keep the tallies are in tallies.sql. The service's role can call
-- these functions and nothing else.

-- name: counts
-- Exact counts of the known users among those asked for; an unknown user has no row. The driver knows text[] by itself;
-- what uuid[] is it would ask over every new connection, in six round trips and as long as thirty counts take.
select user_id, completed, no_shows from reputation.read_counts($1::text[]::uuid[], $2::text, $3::text, $4::text)

-- name: attribute
-- Append a verdict; the session's two users, or no row when there is no such session.
select user1_id, user2_id from reputation.attribute($1::uuid, $2::text, $3::text, $4::text)

-- name: most_active
-- Users with the most sessions lately, most first.
select user_id from reputation.most_active($1::integer) as user_id

-- name: status
-- How the tallies are, seen from a policy's meaning.
select tracked, same_policy, counting, waiting, pending from reputation.status($1::text, $2::text, $3::text)

-- name: ping
-- Whether counts could be answered now: the server, the schema and the rights, without reading anybody's rows.
select
from reputation.read_counts('{}'::uuid[], 'any', 'unconfirmed', 'nobody')
full join reputation.counts('{}'::uuid[], 'any', 'unconfirmed', 'nobody') using (user_id)
