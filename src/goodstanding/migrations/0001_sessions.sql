-- What a session means for a user, the verdicts on sessions, and the three functions that the service may call.
-- SQLSTATE GS001 marks what the operator can mend; its message is meant to be read.

do $$
declare
    missing text;
begin
    -- What the functions below need of the host's tables, and nothing that they do not.
    select pg_catalog.format('public.%s.%s (%s)', needed.table_name, needed.column_name, needed.types[1]) into missing
    from (
        values
            ('user_profiles', 'id', array['uuid']),
            ('wingman_matches', 'id', array['uuid']),
            ('wingman_matches', 'user1_id', array['uuid']),
            ('wingman_matches', 'user2_id', array['uuid']),
            ('wingman_sessions', 'id', array['uuid']),
            ('wingman_sessions', 'match_id', array['uuid']),
            ('wingman_sessions', 'scheduled_time', array['timestamptz', 'timestamp', 'date']),
            ('wingman_sessions', 'status', array['varchar', 'text']),
            ('wingman_sessions', 'user1_completed_confirmed_by_user2', array['bool']),
            ('wingman_sessions', 'user2_completed_confirmed_by_user1', array['bool'])
    ) as needed (table_name, column_name, types)
    where not exists (
        select from pg_catalog.pg_attribute as existing
        join pg_catalog.pg_type as type on type.oid = existing.atttypid
        where existing.attrelid = pg_catalog.to_regclass('public.' || needed.table_name)
            and existing.attname = needed.column_name
            and (type.typname = any (needed.types) or needed.column_name = 'status' and type.typtype = 'e')
            and not existing.attisdropped
    )
    limit 1;
    if missing is not null then
        raise exception using errcode = 'GS001', message =
            pg_catalog.format('the host app''s column %s does not exist here: is this the right database?', missing);
    end if;

    select host.relname into missing
    from pg_catalog.pg_class as host
    where host.oid in (
            pg_catalog.to_regclass('public.user_profiles'),
            pg_catalog.to_regclass('public.wingman_matches'),
            pg_catalog.to_regclass('public.wingman_sessions')
        )
        and not pg_catalog.pg_has_role(host.relowner, 'USAGE')
    limit 1;
    if missing is not null then
        raise exception using errcode = 'GS001', message =
            pg_catalog.format('migrate must run as the owner of public.%s', missing);
    end if;

    if pg_catalog.to_regnamespace('reputation') is not null then
        raise exception using errcode = 'GS001', message =
            'a schema named reputation exists already and is not this product''s';
    end if;
    if not pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE') then
        raise exception using errcode = 'GS001', message =
            'migrate needs the right CREATE on this database, for the schema reputation';
    end if;

    -- A role belongs to the whole cluster: another database may have made it, or be making it right now.
    if pg_catalog.to_regrole('goodstanding_service') is null then
        begin
            create role goodstanding_service nologin;
        exception
            when duplicate_object or unique_violation then
                null;
            when insufficient_privilege then
                raise exception using errcode = 'GS001', message =
                    'migrate may not create roles: have an administrator run '
                    '"create role goodstanding_service nologin" once, or grant CREATEROLE';
        end;
    end if;
    if exists (
        select from pg_catalog.pg_roles as service
        where service.rolname = 'goodstanding_service'
            and (service.rolsuper or service.rolbypassrls or service.rolcreaterole)
    ) then
        raise exception using errcode = 'GS001', message =
            'the role goodstanding_service exists and may bypass every right; drop it or take that from it';
    end if;
end
$$;

create schema reputation;
-- Where the service's login, which may not read the table below, sees the version.
comment on schema reputation is 'Goodstanding, version 1';

create table reputation.migrations (
    version integer primary key,
    name text not null,
    applied_at timestamptz not null default clock_timestamp()
);
alter table reputation.migrations enable row level security;

-- What a session means for one of its users: 1 completed, -1 no-show, 0 neither; so never both.
-- own: the flag by which the other one confirmed this user; other: the flag by which this user confirmed the other one.
-- side: 1 for user1, 2 for user2; at_fault: the newest verdict on the session, or null.
-- The last three are the policy's options. One expression without table access, so the planner can inline it;
-- a standard body, so its operators are bound here and no search_path can change them.
create function reputation.outcome(
    status text,
    own boolean,
    other boolean,
    side integer,
    at_fault text,
    completed_rule text,
    unattributed_no_show text,
    unattributed_cancelled text
) returns smallint
language sql
immutable
parallel safe
return case
    when status = 'completed' then
        case when
            case completed_rule
                when 'any' then own is true or other is true
                when 'own' then own is true
                when 'both' then own is true and other is true
            end
        then 1::smallint else 0::smallint end
    when status in ('no_show', 'cancelled') then
        case when
            case
                when at_fault is not null then
                    at_fault = 'both' or at_fault = case side when 1 then 'user1' when 2 then 'user2' end
                else
                    case case status when 'no_show' then unattributed_no_show else unattributed_cancelled end
                        when 'both' then true
                        when 'unconfirmed' then own is not true
                        when 'nobody' then false
                    end
            end
        then (-1)::smallint else 0::smallint end
    else 0::smallint
end;

-- Who was at fault for a session, by whom it was said, and why. The highest id of a session is its newest verdict.
-- Deliberately no foreign key to the host's table: its deletes never wait for us, and the log outlives the session.
create table reputation.attributions (
    id bigint generated always as identity primary key,
    session_id uuid not null,
    at_fault text not null check (at_fault in ('user1', 'user2', 'both', 'nobody')),
    reason text not null check (length(reason) between 1 and 1000),
    said_by text not null check (length(said_by) between 1 and 1000),
    said_at timestamptz not null default clock_timestamp()
);
create index attributions_newest on reputation.attributions (session_id, id desc) include (at_fault);
alter table reputation.attributions enable row level security;

create function reputation.refuse_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using errcode = 'restrict_violation', message =
        pg_catalog.format('reputation.%s is append-only: record a newer verdict instead', tg_table_name);
end
$$;
create trigger append_only before update or delete or truncate on reputation.attributions
    for each statement execute function reputation.refuse_change();
alter table reputation.attributions enable always trigger append_only;

-- What every session means for one of the two users of its match. It has no settings and no definer of its own, so that
-- it becomes a part of the query that asks.
create function reputation.outcomes(
    side integer,
    completed_rule text,
    unattributed_no_show text,
    unattributed_cancelled text
) returns table (match_id uuid, outcome smallint)
language sql
stable
as $$
    select
        session.match_id,
        reputation.outcome(
            session.status::text,
            case outcomes.side
                when 1 then session.user1_completed_confirmed_by_user2
                else session.user2_completed_confirmed_by_user1
            end,
            case outcomes.side
                when 1 then session.user2_completed_confirmed_by_user1
                else session.user1_completed_confirmed_by_user2
            end,
            outcomes.side,
            verdict.at_fault,
            outcomes.completed_rule, outcomes.unattributed_no_show, outcomes.unattributed_cancelled
        )
    from public.wingman_sessions as session
    left join lateral (
        select newest.at_fault
        from reputation.attributions as newest
        where newest.session_id = session.id and session.status::text in ('no_show', 'cancelled')
        order by newest.id desc
        limit 1
    ) as verdict on true
$$;

-- The functions below run with their owner's rights, so they trust nothing of their caller's session: search_path is
-- fixed and every name is qualified. row_security = off makes a policy that would hide rows an error, never a wrong
-- count. Their bodies are strings, so that the host app may go on altering its columns' types.

-- The exact counts of every known user of the list; an unknown user has no row.
-- Planned once per connection and by index alone, whatever the statistics say: an absent or stale estimate must not
-- turn a look-up of twenty rows into a scan of everybody's, nor start the JIT compiler for it.
create function reputation.counts(
    user_ids uuid[],
    completed_rule text,
    unattributed_no_show text,
    unattributed_cancelled text
) returns table (user_id uuid, completed bigint, no_shows bigint)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
begin
    return query
    select known.id, tally.completed, tally.no_shows
    from public.user_profiles as known
    cross join lateral (
        select
            pg_catalog.count(*) filter (where counted.outcome = 1) as completed,
            pg_catalog.count(*) filter (where counted.outcome = -1) as no_shows
        from (
            select ended.outcome
            from (
                select as_user1.id, 1 as side
                from public.wingman_matches as as_user1
                where as_user1.user1_id = known.id
                union all
                select as_user2.id, 2 as side
                from public.wingman_matches as as_user2
                where as_user2.user2_id = known.id
            ) as match
            join lateral reputation.outcomes(
                match.side, counts.completed_rule, counts.unattributed_no_show, counts.unattributed_cancelled
            ) as ended on ended.match_id = match.id
            offset 0 -- a fence: worked out once, not once per use
        ) as counted
    ) as tally
    where known.id = any (counts.user_ids);
end
$$;

-- Append a verdict and give the session's two users; no row when there is no such session.
create function reputation.attribute(session_id uuid, at_fault text, reason text, said_by text)
returns table (user1_id uuid, user2_id uuid)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    return query
    with known as (
        select session.id, match.user1_id, match.user2_id
        from public.wingman_sessions as session
        join public.wingman_matches as match on match.id = session.match_id
        where session.id = attribute.session_id
    ),
    verdict as (
        insert into reputation.attributions (session_id, at_fault, reason, said_by)
        select known.id, attribute.at_fault, attribute.reason, attribute.said_by
        from known
        returning attributions.session_id
    )
    select known.user1_id, known.user2_id
    from known
    join verdict on verdict.session_id = known.id;
end
$$;

-- Users with the most sessions from a month ago onwards, most first: 1 to 1,000,000 of them, to warm a cache for.
create function reputation.most_active(how_many integer) returns setof uuid
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    return query
    with recent as (
        select match.user1_id, match.user2_id
        from public.wingman_sessions as session
        join public.wingman_matches as match on match.id = session.match_id
        where session.scheduled_time >= pg_catalog.now() - interval '30 days'
    )
    select active.user_id
    from (
        select recent.user1_id as user_id from recent
        union all
        select recent.user2_id from recent
    ) as active
    group by active.user_id
    order by pg_catalog.count(*) desc, active.user_id
    limit greatest(1, least(most_active.how_many, 1000000));
end
$$;

-- Nobody but the service calls them, and the service does nothing else. A host's default privileges may have granted
-- more than PostgreSQL's own defaults do.
revoke all on all functions in schema reputation from public;
do $$
declare
    reader name;
begin
    for reader in
        select existing.rolname from pg_catalog.pg_roles as existing
        where existing.rolname in ('anon', 'authenticated', 'service_role')
    loop
        execute pg_catalog.format('revoke all on schema reputation from %I', reader);
        execute pg_catalog.format('revoke all on all tables in schema reputation from %I', reader);
        execute pg_catalog.format('revoke all on all sequences in schema reputation from %I', reader);
        execute pg_catalog.format('revoke all on all functions in schema reputation from %I', reader);
    end loop;
end
$$;
grant usage on schema reputation to goodstanding_service;
grant execute on function
    reputation.counts(uuid[], text, text, text),
    reputation.attribute(uuid, text, text, text),
    reputation.most_active(integer)
to goodstanding_service;

insert into reputation.migrations (version, name) values (1, 'sessions');
