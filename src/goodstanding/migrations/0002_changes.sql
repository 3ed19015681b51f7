-- Changes, tallies, and the functions that turn the one into the other.
--
-- A user's counts are tally + pending changes, in one snapshot. Where that is not certain the user is recounted from
-- the sessions (reputation.counts), and so every read is exact; what is written here decides only how much it costs.
-- A user is recounted while one of these holds:
--   * there is no tally of the policy's present version (nobody counted the user yet, or everybody is to be recounted);
--   * a change of the user, or of everybody, is pending whose policy_version is not the present one (null: a mark);
--   * the user is in reputation.recounts (the mark was folded, and the transactions it is about may still be running).

-- What the tallies mean; one row. Every trigger reads it, so it is written by a rebuild and by nothing else.
-- A new version makes every tally, and every change computed under an older one, void.
create table reputation.policy (
    the_only boolean primary key default true check (the_only),
    completed_rule text not null check (completed_rule in ('any', 'own', 'both')),
    unattributed_no_show text not null check (unattributed_no_show in ('unconfirmed', 'both', 'nobody')),
    unattributed_cancelled text not null check (unattributed_cancelled in ('unconfirmed', 'both', 'nobody')),
    version bigint not null default 1
);
insert into reputation.policy (completed_rule, unattributed_no_show, unattributed_cancelled)
values ('any', 'unconfirmed', 'nobody');

-- Appended by the triggers in the writers' own transactions. user_id null: everybody.
-- policy_version null: a mark, "count the user again"; else the version under which the two differences were computed.
-- No key, foreign or primary: there is nothing that a writer could wait for, and one index is all that it pays for.
create table reputation.changes (
    user_id uuid,
    completed_delta smallint not null default 0,
    no_show_delta smallint not null default 0,
    policy_version bigint,
    changed_at timestamptz not null default clock_timestamp()
);
create index changes_user on reputation.changes (user_id);
-- Rows come and go. What is left of those that are gone is cleared away early and without a pause; the file never
-- shrinks, for that would take a lock which the host's writers meet.
alter table reputation.changes set (
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_cost_delay = 0,
    vacuum_index_cleanup = on,
    vacuum_truncate = off
);
-- Without a key, a publication FOR ALL TABLES would refuse the deletes.
alter table reputation.changes replica identity full;

create table reputation.tallies (
    user_id uuid primary key,
    completed bigint not null,
    no_shows bigint not null,
    policy_version bigint not null
) with (fillfactor = 80);

-- Users whose marks were folded. They are counted again when the barrier of that generation has passed (0: at once).
create table reputation.recounts (
    user_id uuid primary key,
    generation bigint not null
);
create index recounts_generation on reputation.recounts (generation);

-- How far the upkeep of the tallies is; one row. Whoever changes tallies, recounts or the policy locks it first: fold,
-- recount and rebuild happen one after the other, and each sees what the one before it did. No writer of the host's
-- and no read ever touches it.
-- generation: the newest barrier; waiting_for: the transactions that it still waits for (none: it has passed).
-- counting: everybody is being counted, in the order of the ids; counted_to: up to here that is done.
-- folded_to: the last user of the last full batch; the next one goes on from there, so nobody waits for two rounds.
create table reputation.upkeep (
    the_only boolean primary key default true check (the_only),
    generation bigint not null default 0,
    waiting_for text[] not null default '{}',
    counting boolean not null default false,
    counted_to uuid,
    folded_to uuid not null default '00000000-0000-0000-0000-000000000000'
);
insert into reputation.upkeep default values;

alter table reputation.policy enable row level security;
alter table reputation.changes enable row level security;
alter table reputation.tallies enable row level security;
alter table reputation.recounts enable row level security;
alter table reputation.upkeep enable row level security;

-- The triggers' functions run in the host's own statements, so nothing in them may fail or wait: they insert, and read
-- by index. They have row_security on, where everything else has it off: should the host put these tables' owner under
-- policies too (FORCE ROW LEVEL SECURITY), a match may be hidden from us, and that must not become the writer's error.
-- Everybody is then marked. That nothing changes is found in here: a trigger with a WHEN clause on columns would make
-- the host's ALTER TABLE on them fail.

-- Mark everybody who is in one of these matches.
create function reputation.mark_matches(match_ids uuid[]) returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = on
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
begin
    insert into reputation.changes (user_id)
    select side.user_id
    from public.wingman_matches as match
    cross join lateral (values (match.user1_id), (match.user2_id)) as side (user_id)
    where match.id = any (mark_matches.match_ids);
    if not found and pg_catalog.row_security_active('public.wingman_matches'::regclass) then
        insert into reputation.changes default values;
    end if;
end
$$;

-- A session was inserted, updated or deleted: append the difference for each of its two users. In an INSERT every field
-- of OLD is null, in a DELETE every one of NEW. A match that is not there is being deleted in this very transaction:
-- its own trigger marks both users.
create function reputation.session_changed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = on
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
    user1 uuid;
    user2 uuid;
    version bigint;
    completed_rule text;
    unattributed_no_show text;
    unattributed_cancelled text;
    verdict text;
    old1 integer;
    old2 integer;
    new1 integer;
    new2 integer;
begin
    -- Few and simple conditions: each expression is made ready anew in every transaction.
    if tg_op = 'UPDATE' and (new.match_id <> old.match_id or new.id <> old.id) then
        -- Verdicts and rewritten matches in other open transactions were resolved without knowing of the move.
        perform reputation.mark_matches(array[old.match_id, new.match_id]);
        return null;
    end if;
    if coalesce(
        new.status::text not in ('completed', 'no_show', 'cancelled')
        and old.status::text not in ('completed', 'no_show', 'cancelled')
        or new.status = old.status
        and new.user1_completed_confirmed_by_user2 is not distinct from old.user1_completed_confirmed_by_user2
        and new.user2_completed_confirmed_by_user1 is not distinct from old.user2_completed_confirmed_by_user1,
        coalesce(new.status, old.status)::text not in ('completed', 'no_show', 'cancelled')
    ) then
        return null;
    end if;
    -- One look for all that is needed: starting a statement costs more than what it does.
    select
        match.user1_id, match.user2_id,
        policy.version, policy.completed_rule, policy.unattributed_no_show, policy.unattributed_cancelled,
        case when old.status::text in ('no_show', 'cancelled') or new.status::text in ('no_show', 'cancelled') then (
            select newest.at_fault
            from reputation.attributions as newest
            where newest.session_id = coalesce(new.id, old.id)
            order by newest.id desc
            limit 1
        ) end
    into user1, user2, version, completed_rule, unattributed_no_show, unattributed_cancelled, verdict
    from public.wingman_matches as match
    left join reputation.policy on policy.the_only
    where match.id = coalesce(new.match_id, old.match_id);
    -- A snapshot older than the triggers finds no policy, and nothing else that it sees is to be trusted.
    if version is null then
        if found or pg_catalog.row_security_active('public.wingman_matches'::regclass) then
            insert into reputation.changes default values;
        end if;
        return null;
    end if;
    old1 := reputation.outcome(
        old.status::text, old.user1_completed_confirmed_by_user2, old.user2_completed_confirmed_by_user1,
        1, verdict, completed_rule, unattributed_no_show, unattributed_cancelled);
    old2 := reputation.outcome(
        old.status::text, old.user2_completed_confirmed_by_user1, old.user1_completed_confirmed_by_user2,
        2, verdict, completed_rule, unattributed_no_show, unattributed_cancelled);
    new1 := reputation.outcome(
        new.status::text, new.user1_completed_confirmed_by_user2, new.user2_completed_confirmed_by_user1,
        1, verdict, completed_rule, unattributed_no_show, unattributed_cancelled);
    new2 := reputation.outcome(
        new.status::text, new.user2_completed_confirmed_by_user1, new.user1_completed_confirmed_by_user2,
        2, verdict, completed_rule, unattributed_no_show, unattributed_cancelled);
    -- Also when the difference is nought: it need not be so under the policy that a rebuild is just bringing in.
    insert into reputation.changes (user_id, completed_delta, no_show_delta, policy_version)
    values
        (user1, (new1 = 1)::integer - (old1 = 1)::integer, (new1 = -1)::integer - (old1 = -1)::integer, version),
        (user2, (new2 = 1)::integer - (old2 = 1)::integer, (new2 = -1)::integer - (old2 = -1)::integer, version);
    return null;
end
$$;

-- A match's users were rewritten, or it was deleted. Its sessions may be changing in transactions that see the old
-- users, so differences would be wrong: everybody concerned is counted again, when those transactions have ended.
create function reputation.match_changed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'DELETE'
        or new.id is distinct from old.id
        or new.user1_id is distinct from old.user1_id
        or new.user2_id is distinct from old.user2_id
    then
        insert into reputation.changes (user_id)
        select distinct side.user_id
        from (values (old.user1_id), (old.user2_id), (new.user1_id), (new.user2_id)) as side (user_id)
        where side.user_id is not null;
    end if;
    return null;
end
$$;

-- A user was created, deleted or given another id: what is known of the old and of the new one is no longer true.
create function reputation.user_changed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if new.id is distinct from old.id then
        insert into reputation.changes (user_id)
        select side.user_id
        from (values (old.id), (new.id)) as side (user_id)
        where side.user_id is not null;
    end if;
    return null;
end
$$;

-- A verdict was recorded. A transaction that changes the session now does not see it, so no difference would be right.
create function reputation.attributed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = on
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
begin
    perform reputation.mark_matches(
        array(select session.match_id from public.wingman_sessions as session where session.id = new.session_id)
    );
    return null;
end
$$;
create trigger marks_users after insert on reputation.attributions
    for each row execute function reputation.attributed();
alter table reputation.attributions enable always trigger marks_users;

-- One of the host's tables was emptied.
create function reputation.everybody_changed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into reputation.changes default values;
    return null;
end
$$;

-- Whether every trigger on the host's tables is there and fires always. One that was disabled and enabled again fires
-- only at the origin: what happened in between is unknown, so that counts as missing until `migrate` puts it right.
create function reputation.tracked() returns boolean
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    return (
        select pg_catalog.count(*) = 11
        from pg_catalog.pg_trigger as ours
        where ours.tgrelid in (
                'public.user_profiles'::regclass, 'public.wingman_matches'::regclass, 'public.wingman_sessions'::regclass
            )
            and ours.tgname like 'goodstanding\_%'
            and ours.tgenabled = 'A'
    );
end
$$;

-- The exact counts of every known user of the list at the statement's snapshot; an unknown user has no row.
-- Stable, so that every query in here has the caller's snapshot: tally and changes always belong together.
create function reputation.read_counts(
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
set enable_bitmapscan = off
set jit = off
as $$
declare
    present bigint; -- the version that a tally must have; null when no tally can answer
    recounted uuid[] := read_counts.user_ids;
    answered record;
begin
    select policy.version into present
    from reputation.policy
    where policy.the_only
        and policy.completed_rule = read_counts.completed_rule
        and policy.unattributed_no_show = read_counts.unattributed_no_show
        and policy.unattributed_cancelled = read_counts.unattributed_cancelled
        and not exists (
            select from reputation.changes as everybody
            where everybody.user_id is null and everybody.policy_version is distinct from policy.version
        );
    if present is not null and reputation.tracked() then
        recounted := '{}';
        for answered in
            select
                known.id,
                tally.completed + pending.completed as completed,
                tally.no_shows + pending.no_shows as no_shows,
                tally.user_id is not null and pending.certain as certain
            from public.user_profiles as known
            left join reputation.tallies as tally
                on tally.user_id = known.id
                and tally.policy_version = present
                and not exists (select from reputation.recounts as later where later.user_id = known.id)
            left join lateral (
                select
                    coalesce(pg_catalog.sum(change.completed_delta), 0)::bigint as completed,
                    coalesce(pg_catalog.sum(change.no_show_delta), 0)::bigint as no_shows,
                    pg_catalog.count(*) filter (where change.policy_version is distinct from present) = 0 as certain
                from reputation.changes as change
                where change.user_id = known.id
            ) as pending on tally.user_id is not null
            where known.id = any (read_counts.user_ids)
        loop
            if answered.certain then
                user_id := answered.id;
                completed := answered.completed;
                no_shows := answered.no_shows;
                return next;
            else
                recounted := recounted || answered.id;
            end if;
        end loop;
    end if;
    if recounted <> '{}' then
        return query
        select counted.user_id, counted.completed, counted.no_shows
        from reputation.counts(
            recounted, read_counts.completed_rule, read_counts.unattributed_no_show, read_counts.unattributed_cancelled
        ) as counted;
    end if;
end
$$;

-- The transactions of this database that are running now, ours aside: also those that have written nothing yet, whose
-- snapshot may be old already. Other databases and autovacuum cannot write the host's tables.
create function reputation.running() returns text[]
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    return array(
        select held.virtualxid
        from pg_catalog.pg_locks as held
        where held.locktype = 'virtualxid'
            and held.mode = 'ExclusiveLock'
            and held.granted
            and held.pid <> pg_catalog.pg_backend_pid()
            and not exists (
                select from pg_catalog.pg_stat_activity as elsewhere
                where elsewhere.pid = held.pid
                    and (
                        elsewhere.datname <> pg_catalog.current_database()
                        or elsewhere.datname is not null and elsewhere.usesysid is null
                    )
            )
    );
end
$$;

-- Transactions prepared for a two-phase commit in this database: they run on without a process.
create function reputation.prepared() returns text[]
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    return array(
        select 'prepared ' || two_phase.transaction
        from pg_catalog.pg_prepared_xacts as two_phase
        where two_phase.database = pg_catalog.current_database()
    );
end
$$;

-- What is left of a set of transactions that `running` gave; empty when each of them has ended.
-- A transaction that is prepared is among the prepared ones before it is no longer among the running ones. Which of
-- them it is cannot be told, so all that are prepared at that moment are waited for.
create function reputation.still_running(transactions text[]) returns text[]
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
declare
    remaining text[];
begin
    if not exists (select from pg_catalog.unnest(transactions) as one (name) where one.name not like 'prepared %') then
        return array(
            select pg_catalog.unnest(transactions) intersect select pg_catalog.unnest(reputation.prepared())
        );
    end if;
    remaining := array(
        select pg_catalog.unnest(transactions) intersect select pg_catalog.unnest(reputation.running())
    );
    if remaining = '{}' then
        remaining := reputation.prepared();
    end if;
    return remaining;
end
$$;

-- Fold `batch` pending changes, in rounds through the users, and as many of those that concern everybody or begin the
-- next round, into the tallies; say whose counts they concern.
-- Call it in a transaction of its own, READ COMMITTED, and commit when nobody can still serve what was known before:
-- until then every read sees the changes as pending. everybody: some concerned all users.
create function reputation.fold(batch integer)
returns table (folded bigint, everybody boolean, user_ids uuid[], oldest timestamptz)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
    state reputation.upkeep;
    present bigint;
    ahead tid[];
    again boolean;
begin
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        raise exception using errcode = 'GS001', message = 'reputation.fold needs READ COMMITTED: it looks again after it waited';
    end if;
    if not exists (select from reputation.changes) then
        return query select 0::bigint, false, '{}'::uuid[], null::timestamptz;
        return;
    end if;
    select upkeep.* into state from reputation.upkeep where upkeep.the_only for no key update;
    -- A caller that freezes before its commit must not hold up whoever takes its place.
    perform pg_catalog.set_config('idle_in_transaction_session_timeout', '1000', true);
    select policy.version into strict present from reputation.policy where policy.the_only;
    ahead := array(
        select pending.ctid from reputation.changes as pending
        where pending.user_id >= state.folded_to
        order by pending.user_id
        limit greatest(1, fold.batch)
    );
    if pg_catalog.cardinality(ahead) = greatest(1, fold.batch) then
        update reputation.upkeep set folded_to = last.user_id
        from reputation.changes as last
        where upkeep.the_only and last.ctid = ahead[pg_catalog.cardinality(ahead)];
    elsif state.folded_to <> '00000000-0000-0000-0000-000000000000' then
        update reputation.upkeep set folded_to = default where upkeep.the_only;
    end if;
    with taken as (
        delete from reputation.changes as change
        where change.ctid = any (
            ahead
            || array(
                select behind.ctid from reputation.changes as behind
                where behind.user_id < state.folded_to
                order by behind.user_id
                limit greatest(1, fold.batch) - pg_catalog.cardinality(ahead)
            )
            || array(
                select everybodys.ctid from reputation.changes as everybodys
                where everybodys.user_id is null
                limit greatest(1, fold.batch)
            )
        )
        returning change.*
    ),
    summed as (
        select
            taken.user_id,
            pg_catalog.sum(taken.completed_delta)::bigint as completed,
            pg_catalog.sum(taken.no_show_delta)::bigint as no_shows,
            pg_catalog.bool_or(taken.policy_version is distinct from present) as marked
        from taken
        group by taken.user_id
    ),
    added as (
        update reputation.tallies as tally
        set completed = tally.completed + summed.completed, no_shows = tally.no_shows + summed.no_shows
        from summed
        where tally.user_id = summed.user_id
            and not summed.marked
            and (summed.completed <> 0 or summed.no_shows <> 0)
    ),
    marked as (
        -- The barrier of the next generation is raised later than now, so after the marks' own transactions ended.
        insert into reputation.recounts as later (user_id, generation)
        select summed.user_id, state.generation + 1 from summed where summed.marked and summed.user_id is not null
        on conflict on constraint recounts_pkey do update set generation = excluded.generation
    )
    select
        (select pg_catalog.count(*) from taken),
        coalesce(pg_catalog.bool_or(summed.user_id is null), false),
        coalesce(pg_catalog.array_agg(summed.user_id) filter (where summed.user_id is not null), '{}'),
        (select min(taken.changed_at) from taken),
        coalesce(pg_catalog.bool_or(summed.user_id is null and summed.marked), false)
    into folded, everybody, user_ids, oldest, again
    from summed;
    if again then
        update reputation.policy set version = policy.version + 1 where policy.the_only;
        update reputation.upkeep set counting = true, counted_to = null where upkeep.the_only;
    end if;
    return next;
end
$$;

-- Whether a change waits to be folded. The relay asks many times a second, so by the index: it skips what is known to
-- be gone, where a scan of the table would look at all that a vacuum has not cleared away yet.
create function reputation.pending() returns boolean
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
    return exists (select from reputation.changes);
end
$$;

-- Count at most `batch` users again: those whose barrier has passed, then the next in turn while everybody is counted.
-- recounted: how many; waiting: some are left whose transactions are still running; counting: more of everybody is left.
-- Nobody's counts change by it, so nothing is to be invalidated: that is for the fold of the changes, which stay.
create function reputation.recount(batch integer)
returns table (recounted integer, waiting boolean, counting boolean)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
    rules reputation.policy;
    state reputation.upkeep;
    passed bigint;
    chosen uuid[];
    next_in_turn uuid[] := '{}';
begin
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        raise exception using errcode = 'GS001', message = 'reputation.recount needs READ COMMITTED: it looks again after it waited';
    end if;
    if not exists (select from reputation.recounts)
        and not (select upkeep.counting from reputation.upkeep where upkeep.the_only)
    then
        return query select 0, false, false;
        return;
    end if;
    select upkeep.* into state from reputation.upkeep where upkeep.the_only for no key update;
    perform pg_catalog.set_config('idle_in_transaction_session_timeout', '1000', true);
    select policy.* into strict rules from reputation.policy where policy.the_only;

    state.waiting_for := reputation.still_running(state.waiting_for);
    if state.waiting_for = '{}'
        and exists (select from reputation.recounts as later where later.generation > state.generation)
        and not exists (select from reputation.recounts as ready where ready.generation <= state.generation)
    then
        state.generation := state.generation + 1;
        state.waiting_for := reputation.running();
    end if;
    passed := case when state.waiting_for = '{}' then state.generation else state.generation - 1 end;

    chosen := array(
        select ready.user_id from reputation.recounts as ready
        where ready.generation <= passed
        order by ready.generation
        limit greatest(1, recount.batch)
    );
    if state.counting then
        next_in_turn := array(
            select known.id from public.user_profiles as known
            where state.counted_to is null or known.id > state.counted_to
            order by known.id
            limit greatest(1, recount.batch)
        );
        state.counting := pg_catalog.cardinality(next_in_turn) = greatest(1, recount.batch);
        state.counted_to := coalesce(next_in_turn[pg_catalog.cardinality(next_in_turn)], state.counted_to);
    end if;

    -- One statement, so one snapshot: what it counts, and the differences that this count includes, which become nought.
    -- Marks stay: what they are about may not be over.
    with due as (
        select distinct due.user_id from pg_catalog.unnest(chosen || next_in_turn) as due (user_id)
    ),
    counted as (
        select fresh.user_id, fresh.completed, fresh.no_shows
        from reputation.counts(
            chosen || next_in_turn,
            rules.completed_rule, rules.unattributed_no_show, rules.unattributed_cancelled
        ) as fresh
    ),
    included as (
        update reputation.changes as change
        set completed_delta = 0, no_show_delta = 0, policy_version = rules.version
        from due
        where change.user_id = due.user_id and change.policy_version is not null
    ),
    written as (
        insert into reputation.tallies as tally (user_id, completed, no_shows, policy_version)
        select counted.user_id, counted.completed, counted.no_shows, rules.version from counted
        on conflict on constraint tallies_pkey do update set
            completed = excluded.completed, no_shows = excluded.no_shows, policy_version = excluded.policy_version
    ),
    gone as (
        delete from reputation.tallies as tally
        using due
        where tally.user_id = due.user_id
            and not exists (select from counted where counted.user_id = due.user_id)
    ),
    finished as (
        delete from reputation.recounts as ready
        using due
        where ready.user_id = due.user_id and ready.generation <= passed
    )
    select pg_catalog.count(*) into recounted from due;

    update reputation.upkeep set
        generation = state.generation,
        waiting_for = state.waiting_for,
        counting = state.counting,
        counted_to = state.counted_to
    where upkeep.the_only;
    waiting := exists (select from reputation.recounts);
    counting := state.counting;
    return next;
end
$$;

-- Let the tallies mean this from now on, and have everybody counted again. No trigger and no read waits for it.
create function reputation.rebuild(completed_rule text, unattributed_no_show text, unattributed_cancelled text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    perform from reputation.upkeep where upkeep.the_only for no key update;
    update reputation.policy set
        completed_rule = rebuild.completed_rule,
        unattributed_no_show = rebuild.unattributed_no_show,
        unattributed_cancelled = rebuild.unattributed_cancelled,
        version = policy.version + 1
    where policy.the_only;
    update reputation.upkeep set counting = true, counted_to = null where upkeep.the_only;
    -- Of the version that is present now: nobody is marked by it, everybody's cached reputation is dropped.
    insert into reputation.changes (policy_version) select policy.version from reputation.policy where policy.the_only;
end
$$;

-- How the tallies are. tracked: the triggers are there; same_policy: they mean what these three options mean;
-- counting: everybody is being counted; waiting: somebody is still to be recounted; pending: some change is.
create function reputation.status(completed_rule text, unattributed_no_show text, unattributed_cancelled text)
returns table (tracked boolean, same_policy boolean, counting boolean, waiting boolean, pending boolean)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
    return query
    select
        reputation.tracked(),
        exists (
            select from reputation.policy
            where policy.completed_rule = status.completed_rule
                and policy.unattributed_no_show = status.unattributed_no_show
                and policy.unattributed_cancelled = status.unattributed_cancelled
        ),
        upkeep.counting,
        exists (select from reputation.recounts),
        exists (select from reputation.changes)
    from reputation.upkeep;
end
$$;

revoke all on all functions in schema reputation from public;
do $$
declare
    reader name;
begin
    for reader in
        select existing.rolname from pg_catalog.pg_roles as existing
        where existing.rolname in ('anon', 'authenticated', 'service_role')
    loop
        execute pg_catalog.format('revoke all on all tables in schema reputation from %I', reader);
        execute pg_catalog.format('revoke all on all sequences in schema reputation from %I', reader);
        execute pg_catalog.format('revoke all on all functions in schema reputation from %I', reader);
    end loop;
end
$$;
grant execute on function
    reputation.read_counts(uuid[], text, text, text),
    reputation.pending(),
    reputation.fold(integer),
    reputation.recount(integer),
    reputation.status(text, text, text)
to goodstanding_service;

comment on schema reputation is 'Goodstanding, version 2';

insert into reputation.migrations (version, name) values (2, 'changes');
