-- What keeps the tallies, by name. The first three are the service's, `led` is anybody's; the others need the tables' owner.

-- name: pending
-- Whether a change waits to be folded; cheap enough to ask many times a second.
select reputation.pending()

-- name: fold
-- Fold pending changes; commit once nobody can be served what was known before.
select folded, everybody, user_ids, oldest from reputation.fold($1::integer)

-- name: recount
-- Count again whoever is due.
select recounted, counting from reputation.recount($1::integer)

-- name: led
-- Whether anybody in this database holds an advisory lock: that by which a relay leads.
select exists (
    select from pg_catalog.pg_locks as held
    where held.locktype = 'advisory'
        and held.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
        and (held.classid::bigint << 32) + held.objid::bigint = $1::bigint
        and held.objsubid = 1
        and held.granted
) as led

-- name: unlimited
-- Let the statements of this transaction take as long as they need.
set local statement_timeout = 0

-- name: rebuild
-- Let the tallies mean a policy, and have everybody counted again.
select reputation.rebuild($1::text, $2::text, $3::text)

-- name: mark
-- Have one user counted again, as a trigger would; no row when there is no such user.
insert into reputation.marks (user_id)
select known.id from public.user_profiles as known where known.id = $1::uuid
returning user_id

-- name: how_many
-- How many users there are.
select count(*) from public.user_profiles

-- name: policy
-- What the tallies mean.
select completed_rule, unattributed_no_show, unattributed_cancelled from reputation.policy

-- name: hold
-- Keep the host's tables from being emptied or altered until the transaction ends; nothing else waits for it.
lock table public.user_profiles, public.wingman_matches, public.wingman_sessions in access share mode

-- name: compare
-- The next users in the order of their ids whose tally, with what is pending, is compared with a recount.
with checked as (
    select array(
        select known.id
        from public.user_profiles as known
        where $1::uuid is null or known.id > $1::uuid
        order by known.id
        limit $2::integer
    ) as ids
)
select counted.user_id, read.user_id is null or (read.completed, read.no_shows) is distinct from (counted.completed, counted.no_shows) as differs
from checked
cross join lateral reputation.counts(checked.ids, $3::text, $4::text, $5::text) as counted
left join lateral reputation.read_counts(array[counted.user_id], $3::text, $4::text, $5::text) as read on true
order by counted.user_id
