-- What `goodstanding doctor` asks the database: catalogues only, which every login may read. Nothing in the schema
-- reputation is named as an object: without the right to use the schema that would be an error instead of an answer.

-- name: server
select
    pg_catalog.current_setting('server_version_num')::integer / 10000 as major,
    pg_catalog.current_setting('server_version') as version,
    current_user::text as login,
    (select rolsuper from pg_catalog.pg_roles where rolname = current_user) as is_superuser,
    (select rolbypassrls from pg_catalog.pg_roles where rolname = current_user) as bypasses_rls,
    pg_catalog.to_regnamespace('reputation') is not null as installed,
    pg_catalog.obj_description(pg_catalog.to_regnamespace('reputation'), 'pg_namespace') as installed_version

-- name: missing_rights
-- The service's functions that this login cannot call.
select 'reputation.' || needed.name as name
from pg_catalog.unnest($1::text[]) as needed (name)
where not exists (
    select from pg_catalog.pg_proc as function
    join pg_catalog.pg_namespace as namespace on namespace.oid = function.pronamespace
    where namespace.nspname = 'reputation'
        and function.proname = needed.name
        and pg_catalog.has_schema_privilege(namespace.oid, 'USAGE')
        and pg_catalog.has_function_privilege(function.oid, 'EXECUTE')
)

-- name: readable
-- Private columns that this login can read itself.
select pg_catalog.concat_ws('.', private.schema_name, private.table_name, private.column_name) as name
from (
    values
        ('public', 'wingman_sessions', 'notes'),
        ('public', 'wingman_sessions', 'venue_name'),
        ('public', 'wingman_sessions', 'scheduled_time'),
        ('reputation', 'attributions', 'reason')
) as private (schema_name, table_name, column_name)
join pg_catalog.pg_namespace as namespace on namespace.nspname = private.schema_name
join pg_catalog.pg_class as relation
    on relation.relnamespace = namespace.oid
    and relation.relname = private.table_name
join pg_catalog.pg_attribute as existing
    on existing.attrelid = relation.oid
    and existing.attname = private.column_name
    and not existing.attisdropped
where pg_catalog.has_schema_privilege(namespace.oid, 'USAGE')
    and pg_catalog.has_column_privilege(relation.oid, existing.attnum, 'SELECT')

-- name: unindexed
-- Columns that a count looks up and that no valid index of the whole table begins with.
select needed.table_name || '.' || needed.column_name as name
from (
    values
        ('public.wingman_matches', 'user1_id'),
        ('public.wingman_matches', 'user2_id'),
        ('public.wingman_sessions', 'match_id')
) as needed (table_name, column_name)
where not exists (
    select from pg_catalog.pg_index as index
    join pg_catalog.pg_attribute as first_column
        on first_column.attrelid = index.indrelid
        and first_column.attnum = index.indkey[0]
    where index.indrelid = pg_catalog.to_regclass(needed.table_name)
        and first_column.attname = needed.column_name
        and index.indisvalid
        and index.indpred is null
)

-- name: covering_indexes
select relation.relname::text as name, index.indisvalid as valid
from pg_catalog.pg_index as index
join pg_catalog.pg_class as relation on relation.oid = index.indexrelid
where relation.relnamespace = 'public'::regnamespace and relation.relname = any ($1::text[])

-- name: hidden
-- Tables whose rows row-level security would hide from the functions' owner: every count would fail.
select pg_catalog.concat_ws('.', namespace.nspname, relation.relname) as name
from pg_catalog.pg_proc as function
join pg_catalog.pg_roles as owner on owner.oid = function.proowner
cross join pg_catalog.pg_class as relation
join pg_catalog.pg_namespace as namespace on namespace.oid = relation.relnamespace
where function.pronamespace = pg_catalog.to_regnamespace('reputation')
    and function.proname = 'counts'
    and (
        namespace.nspname = 'public' and relation.relname in ('user_profiles', 'wingman_matches', 'wingman_sessions')
        or namespace.nspname = 'reputation' and relation.relname = 'attributions'
    )
    and not (owner.rolsuper or owner.rolbypassrls)
    and relation.relrowsecurity
    and (relation.relforcerowsecurity or not pg_catalog.pg_has_role(owner.oid, relation.relowner, 'USAGE'))

-- name: rewritable
-- How the people themselves may write what decides about them: by which command, as which role, by which policy.
with written (table_name, command, letter, column_names) as (
    values
        (
            'public.wingman_sessions', 'UPDATE', 'w',
            array[
                'status', 'match_id', 'user1_completed_confirmed_by_user2', 'user2_completed_confirmed_by_user1'
            ]
        ),
        ('public.wingman_sessions', 'INSERT', 'a', array['match_id', 'status']),
        ('public.wingman_sessions', 'DELETE', 'd', null),
        ('public.wingman_matches', 'UPDATE', 'w', array['user1_id', 'user2_id']),
        ('public.wingman_matches', 'DELETE', 'd', null)
),
people (name, oid) as (
    select 'public'::name, 0::oid
    union all
    select rolname, oid from pg_catalog.pg_roles where rolname in ('anon', 'authenticated')
)
select
    written.table_name,
    written.command,
    people.name::text as role,
    case when relation.relrowsecurity then policy.polname::text end as policy
from written
join pg_catalog.pg_class as relation on relation.oid = pg_catalog.to_regclass(written.table_name)
cross join people
left join pg_catalog.pg_policy as policy
    on policy.polrelid = relation.oid
    and relation.relrowsecurity
    and policy.polpermissive
    and policy.polcmd in (written.letter, '*')
    and (
        0 = any (policy.polroles)
        or people.oid <> 0
        and exists (
            select from pg_catalog.unnest(policy.polroles) as member (oid)
            where pg_catalog.pg_has_role(people.oid, member.oid, 'USAGE')
        )
    )
where (policy.oid is not null or not relation.relrowsecurity)
    and case
        when written.command = 'DELETE' then
            pg_catalog.has_table_privilege(people.name, relation.oid, 'DELETE')
        else exists (
            select from pg_catalog.unnest(written.column_names) as column_name
            where pg_catalog.has_column_privilege(people.name, relation.oid, column_name, written.command)
        )
    end
order by written.table_name desc, written.command desc, people.name, policy.polname
