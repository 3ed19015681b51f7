-- Changes, tallies, and the functions that turn the one into the other.
--
-- A user's counts are tally + pending changes, in one snapshot. Where that is not certain the user is recounted from
-- the sessions (reputation.counts), and so every read is exact; what is written here decides only how much it costs.
-- A user is recounted while one of these holds:
--   * there is no tally of the policy's present version (nobody counted the user yet, or everybody is to be recounted);
--   * a mark of the user, of any session, or of everybody is pending;
--   * the user is in reputation.recounts (the mark was folded, and nobody has counted the user since).

-- What the tallies mean; one row. A new version makes every tally void.
create table reputation.policy (
    the_only boolean primary key default true check (the_only),
    completed_rule text not null check (completed_rule in ('any', 'own', 'both')),
    unattributed_no_show text not null check (unattributed_no_show in ('unconfirmed', 'both', 'nobody')),
    unattributed_cancelled text not null check (unattributed_cancelled in ('unconfirmed', 'both', 'nobody')),
    version bigint not null default 1
);
insert into reputation.policy (completed_rule, unattributed_no_show, unattributed_cancelled)
values ('any', 'unconfirmed', 'nobody');

-- Appended by the triggers in the writers' own transactions: a session of this match was old and became new; a status of
-- null: it was not there. That is all. Who is concerned, and what it means for them, is found by who reads it: so a
-- writer looks up nothing, neither users nor verdict nor policy, and whatever these are by then holds for it.
-- included1, included2: that user of the match was counted after it, so for him it means nothing any more.
-- No key, foreign or primary: there is nothing that a writer could wait for, and one index is all that it pays for.
create table reputation.changes (
    changed_at timestamptz not null default clock_timestamp(),
    match_id uuid,
    session_id uuid,
    old_confirmed1 boolean,
    old_confirmed2 boolean,
    new_confirmed1 boolean,
    new_confirmed2 boolean,
    included1 boolean,
    included2 boolean,
    old_status text,
    new_status text
);
create index changes_match on reputation.changes (match_id);

-- Appended in the same way, where no difference would be right: count again this user, or whoever is in this session;
-- neither: everybody. Whose session it is, is found by who folds the mark: so a verdict holds wherever its session has
-- gone by then. Until then everybody is recounted, as long as the next fold takes.
-- recount: false when nobody is to be counted, and only what is cached is to be forgotten.
create table reputation.marks (
    changed_at timestamptz not null default clock_timestamp(),
    user_id uuid,
    session_id uuid,
    recount boolean not null default true
);
create index marks_user on reputation.marks (user_id);

-- Rows come and go. What is left of those that are gone is cleared away early and without a pause; the files never
-- shrink, for that would take a lock which the host's writers meet.
do $$
declare
    appended text;
begin
    foreach appended in array array['changes', 'marks'] loop
        execute pg_catalog.format(
            'alter table reputation.%I set (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0,'
            ' autovacuum_vacuum_cost_delay = 0, vacuum_index_cleanup = on, vacuum_truncate = off)', appended
        );
        -- Without a key, a publication FOR ALL TABLES would refuse the deletes.
        execute pg_catalog.format('alter table reputation.%I replica identity full', appended);
    end loop;
end
$$;

create table reputation.tallies (
    user_id uuid primary key,
    completed bigint not null,
    no_shows bigint not null,
    policy_version bigint not null
) with (fillfactor = 80);

-- Users whose marks were folded, and who are to be counted again.
create table reputation.recounts (
    user_id uuid primary key
);

-- How far the upkeep of the tallies is; one row. Whoever changes tallies, recounts or the policy locks it first: fold,
-- recount and rebuild happen one after the other, and each sees what the one before it did. No writer of the host's
-- and no read ever touches it.
-- counting: everybody is being counted, in the order of the ids; counted_to: up to here that is done.
-- folded_to: the last match of the last full batch; the next one goes on from there, so nobody waits for two rounds.
create table reputation.upkeep (
    the_only boolean primary key default true check (the_only),
    counting boolean not null default false,
    counted_to uuid,
    folded_to uuid not null default '00000000-0000-0000-0000-000000000000'
);
insert into reputation.upkeep default values;

alter table reputation.policy enable row level security;
alter table reputation.changes enable row level security;
alter table reputation.marks enable row level security;
alter table reputation.tallies enable row level security;
alter table reputation.recounts enable row level security;
alter table reputation.upkeep enable row level security;

-- What every pending change means for each user of its match: under the present policy, with the newest verdict, for
-- the users that the match has in the caller's snapshot.
create function reputation.effects()
returns table (
    change tid, match_id uuid, user_id uuid, number integer, changed_at timestamptz, completed integer, no_shows integer
)
language sql
stable
as $$
    select
        side.change, side.match_id, side.user_id, side.number, side.changed_at,
        coalesce((meaning.new = 1)::integer - (meaning.old = 1)::integer, 0),
        coalesce((meaning.new = -1)::integer - (meaning.old = -1)::integer, 0)
    from reputation.policy
    cross join (
        select
            change.ctid as change, change.match_id, change.session_id, change.changed_at,
            one.number, one.user_id, one.included,
            change.old_status, one.old_own, one.old_other, change.new_status, one.new_own, one.new_other
        from reputation.changes as change
        join public.wingman_matches as match on match.id = change.match_id
        cross join lateral (
            values
                (
                    1, match.user1_id, change.included1,
                    change.old_confirmed1, change.old_confirmed2, change.new_confirmed1, change.new_confirmed2
                ),
                (
                    2, match.user2_id, change.included2,
                    change.old_confirmed2, change.old_confirmed1, change.new_confirmed2, change.new_confirmed1
                )
        ) as one (number, user_id, included, old_own, old_other, new_own, new_other)
    ) as side
    left join lateral (
        select newest.at_fault
        from reputation.attributions as newest
        where newest.session_id = side.session_id
            and (side.old_status in ('no_show', 'cancelled') or side.new_status in ('no_show', 'cancelled'))
        order by newest.id desc
        limit 1
    ) as verdict on true
    left join lateral (
        select
            reputation.outcome(
                side.old_status, side.old_own, side.old_other, side.number, verdict.at_fault,
                policy.completed_rule, policy.unattributed_no_show, policy.unattributed_cancelled
            ) as old,
            reputation.outcome(
                side.new_status, side.new_own, side.new_other, side.number, verdict.at_fault,
                policy.completed_rule, policy.unattributed_no_show, policy.unattributed_cancelled
            ) as new
        offset 0 -- a fence: worked out once, not once per use
    ) as meaning on side.included is not true
    where policy.the_only
$$;

-- The triggers' functions run in the host's own statements, so nothing in them may fail or wait: they insert, and read
-- nothing of the host's. That nothing changes is found in here: a trigger with a WHEN clause on columns would make the
-- host's ALTER TABLE on them fail.

-- A session was inserted, updated or deleted: append what it was and what it is. In an INSERT every field of OLD is
-- null, in a DELETE every one of NEW.
-- The one function that every write of a session pays for, so the one without settings of its own (they are a fourth of
-- its cost). The search_path is the caller's, so nothing in here may depend on it: every name, operator and type is
-- qualified; what cannot be (IN, LIKE, IS DISTINCT FROM, CASE x WHEN) is not used. Few and short conditions: each is
-- made ready anew in every transaction. The constants of type regclass have an expression made anew when the host
-- alters a column's type, where a session that has used it before would else fail.
create function reputation.session_changed() returns trigger
language plpgsql
volatile
security definer
as $$
begin
    if new.status::pg_catalog.text operator(pg_catalog.=) old.status::pg_catalog.text
        and (new.user1_completed_confirmed_by_user2 is true)
            operator(pg_catalog.=) (old.user1_completed_confirmed_by_user2 is true)
        and (new.user2_completed_confirmed_by_user1 is true)
            operator(pg_catalog.=) (old.user2_completed_confirmed_by_user1 is true)
        and new.match_id operator(pg_catalog.=) old.match_id
        and new.id operator(pg_catalog.=) old.id
        and 'public.wingman_sessions'::pg_catalog.regclass is not null
    then
        return null;
    end if;
    if (
        new.status::pg_catalog.text operator(pg_catalog.=) any ('{completed,no_show,cancelled}'::pg_catalog.text[])
        or old.status::pg_catalog.text operator(pg_catalog.=) any ('{completed,no_show,cancelled}'::pg_catalog.text[])
    ) is not true
        or 'public.wingman_sessions'::pg_catalog.regclass is null
    then
        return null;
    end if;
    if new.match_id operator(pg_catalog.<>) old.match_id or new.id operator(pg_catalog.<>) old.id then
        -- Moved, or given another id: gone there, come here.
        insert into reputation.changes (match_id, session_id, old_status, old_confirmed1, old_confirmed2)
        select
            old.match_id, old.id,
            old.status, old.user1_completed_confirmed_by_user2, old.user2_completed_confirmed_by_user1
        where 'public.wingman_sessions'::pg_catalog.regclass is not null;
        insert into reputation.changes (match_id, session_id, new_status, new_confirmed1, new_confirmed2)
        select
            new.match_id, new.id,
            new.status, new.user1_completed_confirmed_by_user2, new.user2_completed_confirmed_by_user1
        where 'public.wingman_sessions'::pg_catalog.regclass is not null;
        return null;
    end if;
    insert into reputation.changes (
        match_id, session_id, old_status, old_confirmed1, old_confirmed2, new_status, new_confirmed1, new_confirmed2
    )
    select
        coalesce(new.match_id, old.match_id), coalesce(new.id, old.id),
        old.status, old.user1_completed_confirmed_by_user2, old.user2_completed_confirmed_by_user1,
        new.status, new.user1_completed_confirmed_by_user2, new.user2_completed_confirmed_by_user1
    where 'public.wingman_sessions'::pg_catalog.regclass is not null;
    return null;
end
$$;

-- A match was inserted, its users were rewritten, or it was deleted: everybody concerned is counted again, when the
-- transactions of the time have ended. For an ordinary new match that is nobody. But one may come again under the id of
-- one that was deleted, while changes of that one's sessions are pending; and what is pending cannot be told by an old
-- snapshot, nor where sessions may come before their match.
create function reputation.match_changed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
    if tg_op = 'INSERT'
        and pg_catalog.current_setting('transaction_isolation') = 'read committed'
        and pg_catalog.current_setting('session_replication_role') = 'origin'
        and not exists (select from reputation.changes as pending where pending.match_id = new.id)
    then
        return null;
    elsif tg_op = 'UPDATE'
        and (new.id, new.user1_id, new.user2_id) is not distinct from (old.id, old.user1_id, old.user2_id)
    then
        return null;
    end if;
    insert into reputation.marks (user_id)
    select distinct side.user_id
    from (values (old.user1_id), (old.user2_id), (new.user1_id), (new.user2_id)) as side (user_id)
    where side.user_id is not null;
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
        insert into reputation.marks (user_id)
        select one.user_id
        from (values (old.id), (new.id)) as one (user_id)
        where one.user_id is not null;
    end if;
    return null;
end
$$;

-- A verdict was recorded: a tally may have the session as it was judged before.
create function reputation.attributed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into reputation.marks (session_id) values (new.session_id);
    return null;
end
$$;
create trigger marks_session after insert on reputation.attributions
    for each row execute function reputation.attributed();
alter table reputation.attributions enable always trigger marks_session;

-- One of the host's tables was emptied.
create function reputation.everybody_changed() returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into reputation.marks default values;
    return null;
end
$$;

-- Whether every trigger on the host's tables is there and fires always. One that was disabled and enabled again fires
-- only at the origin: what happened in between is unknown, so that counts as missing until `migrate` puts it right.
-- One row; no definer of its own, so that it becomes a part of the query that asks.
create function reputation.tracked() returns table (tracked boolean)
language sql
stable
as $$
    select pg_catalog.count(*) = 12
    from pg_catalog.pg_trigger as ours
    where ours.tgrelid in (
            'public.user_profiles'::pg_catalog.regclass, 'public.wingman_matches'::pg_catalog.regclass, 'public.wingman_sessions'::pg_catalog.regclass
        )
        and ours.tgname like 'goodstanding\_%'
        and ours.tgenabled = 'A'
$$;

-- The exact counts of every known user of the list at the statement's snapshot; an unknown user has no row.
-- Stable, so that every query in here has the caller's snapshot: tally and changes always belong together.
-- The changes of a user with few matches are looked up by these; whoever has many looks at all changes that wait.
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
    few constant integer := 50; -- matches
    recounted uuid[] := read_counts.user_ids;
    changing uuid[] := '{}';
    with_many uuid[] := '{}';
    answered record;
begin
    select policy.version into present
    from reputation.policy
    cross join reputation.tracked() as triggers
    where policy.the_only
        and triggers.tracked
        and policy.completed_rule = read_counts.completed_rule
        and policy.unattributed_no_show = read_counts.unattributed_no_show
        and policy.unattributed_cancelled = read_counts.unattributed_cancelled
        and not exists (
            select from reputation.marks as everybody where everybody.user_id is null and everybody.recount
        );
    if present is not null then
        recounted := '{}';
        for answered in
            select
                known.id,
                tally.completed,
                tally.no_shows,
                tally.user_id is not null and marked.mark is null and folded.mark is null as tallied,
                pg_catalog.cardinality(theirs.matches) > few as many,
                case
                    when pg_catalog.cardinality(theirs.matches) > few then exists (
                        select from reputation.changes as change
                        join public.wingman_matches as match on match.id = change.match_id
                        where known.id in (match.user1_id, match.user2_id)
                    )
                    else exists (
                        select from reputation.changes as change where change.match_id = any (theirs.matches)
                    )
                end as changing
            from public.user_profiles as known
            left join reputation.tallies as tally on tally.user_id = known.id and tally.policy_version = present
            left join lateral (
                select 1 as mark from reputation.marks where marks.user_id = known.id and marks.recount limit 1
            ) as marked on true
            left join lateral (
                select 1 as mark from reputation.recounts where recounts.user_id = known.id limit 1
            ) as folded on true
            left join lateral (
                select array(
                    select as_user1.id from public.wingman_matches as as_user1 where as_user1.user1_id = known.id
                    union all
                    select as_user2.id from public.wingman_matches as as_user2 where as_user2.user2_id = known.id
                    limit few + 1
                ) as matches
                offset 0 -- a fence: looked up once, not once per use
            ) as theirs on true
            where known.id = any (read_counts.user_ids)
        loop
            user_id := answered.id;
            completed := answered.completed;
            no_shows := answered.no_shows;
            if not answered.tallied then
                recounted := recounted || answered.id;
            elsif answered.changing then
                changing := changing || answered.id;
                if answered.many then
                    with_many := with_many || answered.id;
                end if;
            else
                return next;
            end if;
        end loop;
    end if;
    if changing <> '{}' then
        return query
        select
            tally.user_id,
            tally.completed + coalesce(pending.completed, 0),
            tally.no_shows + coalesce(pending.no_shows, 0)
        from reputation.tallies as tally
        cross join lateral (
            select case
                when tally.user_id = any (with_many) then array(
                    select match.id
                    from reputation.changes as change
                    join public.wingman_matches as match on match.id = change.match_id
                    where tally.user_id in (match.user1_id, match.user2_id)
                )
                else array(
                    select as_user1.id from public.wingman_matches as as_user1 where as_user1.user1_id = tally.user_id
                    union all
                    select as_user2.id from public.wingman_matches as as_user2 where as_user2.user2_id = tally.user_id
                )
            end as matches
            offset 0
        ) as theirs
        cross join lateral (
            select pg_catalog.sum(effect.completed) as completed, pg_catalog.sum(effect.no_shows) as no_shows
            from reputation.effects() as effect
            where effect.match_id = any (theirs.matches) and effect.user_id = tally.user_id
        ) as pending
        where tally.user_id = any (changing);
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

-- Fold `batch` pending changes, in rounds through the matches, and as many marks; say whose counts they concern.
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
    chosen tid[];
    chosen_marks tid[];
    again boolean;
begin
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        raise exception using errcode = 'GS001', message = 'reputation.fold needs READ COMMITTED: it looks again after it waited';
    end if;
    if not reputation.pending() then
        return query select 0::bigint, false, '{}'::uuid[], null::timestamptz;
        return;
    end if;
    select upkeep.* into state from reputation.upkeep where upkeep.the_only for no key update;
    -- A caller that freezes before its commit must not hold up whoever takes its place.
    perform pg_catalog.set_config('idle_in_transaction_session_timeout', '1000', true);
    chosen := array(
        select ahead.ctid from reputation.changes as ahead
        where ahead.match_id >= state.folded_to
        order by ahead.match_id
        limit greatest(1, fold.batch)
    );
    if pg_catalog.cardinality(chosen) = greatest(1, fold.batch) then
        update reputation.upkeep set folded_to = last.match_id
        from reputation.changes as last
        where upkeep.the_only and last.ctid = chosen[pg_catalog.cardinality(chosen)];
    elsif state.folded_to <> '00000000-0000-0000-0000-000000000000' then
        update reputation.upkeep set folded_to = default where upkeep.the_only;
    end if;
    chosen := chosen || array(
        select behind.ctid from reputation.changes as behind
        where behind.match_id < state.folded_to
        order by behind.match_id
        limit greatest(1, fold.batch) - pg_catalog.cardinality(chosen)
    );
    chosen_marks := array(
        select mark.ctid from reputation.marks as mark
        where mark.session_id is null
        order by mark.user_id desc
        limit greatest(1, fold.batch)
    );
    -- Changes are folded only where all the sessions are told of whose verdicts this snapshot shows to their effects.
    with judging as materialized (
        select mark.ctid
        from reputation.marks as mark
        where mark.user_id is null and mark.session_id is not null
        limit greatest(1, fold.batch)
    ),
    all_told as materialized (
        select (select pg_catalog.count(*) from judging) = pg_catalog.count(*) as so
        from (
            select
            from reputation.marks as mark
            where mark.user_id is null and mark.session_id is not null
            limit greatest(1, fold.batch) + 1
        ) as judgements
    ),
    summed as materialized (
        select
            effect.user_id,
            pg_catalog.sum(effect.completed) as completed,
            pg_catalog.sum(effect.no_shows) as no_shows
        from reputation.effects() as effect
        where effect.change = any (chosen) and (select all_told.so from all_told)
        group by effect.user_id
    ),
    taken as (
        delete from reputation.changes as change
        where change.ctid = any (chosen) and (select all_told.so from all_told)
        returning change.changed_at
    ),
    marked as (
        delete from reputation.marks as mark where mark.ctid = any (chosen_marks)
        returning mark.user_id, mark.recount, mark.changed_at
    ),
    judged as (
        delete from reputation.marks as mark where mark.ctid = any (array(select judging.ctid from judging))
        returning mark.session_id, mark.changed_at
    ),
    -- Who has such a session, and who had it when the tally was written.
    concerned as materialized (
        select distinct side.user_id
        from (
            select session.match_id
            from judged
            join public.wingman_sessions as session on session.id = judged.session_id
            union
            select change.match_id
            from reputation.changes as change
            where exists (select from judged)
                and (change.session_id in (select judged.session_id from judged)) is true -- hashed, not joined
        ) as theirs
        join public.wingman_matches as match on match.id = theirs.match_id
        cross join lateral (values (match.user1_id), (match.user2_id)) as side (user_id)
    ),
    added as (
        update reputation.tallies as tally
        set completed = tally.completed + summed.completed, no_shows = tally.no_shows + summed.no_shows
        from summed
        where tally.user_id = summed.user_id and (summed.completed <> 0 or summed.no_shows <> 0)
    ),
    due as (
        insert into reputation.recounts (user_id)
        select marked.user_id from marked where marked.recount and marked.user_id is not null
        union
        select concerned.user_id from concerned
        on conflict on constraint recounts_pkey do nothing
    )
    select
        (select count(*) from taken) + pg_catalog.cardinality(chosen_marks) + (select count(*) from judged),
        exists (select from marked where marked.user_id is null),
        array(
            select summed.user_id from summed
            union
            select marked.user_id from marked where marked.user_id is not null
            union
            select concerned.user_id from concerned
        ),
        least(
            (select min(taken.changed_at) from taken),
            (select min(marked.changed_at) from marked),
            (select min(judged.changed_at) from judged)
        ),
        exists (select from marked where marked.user_id is null and marked.recount)
    into folded, everybody, user_ids, oldest, again;
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
    return exists (select from reputation.changes) or exists (select from reputation.marks);
end
$$;

-- The exact counts of every known user from one id to another. Planned anew for each range, in the settings that
-- whoever calls it has: by index for few users, by reading everything once for many.
create function reputation.counts_between(
    first uuid,
    last uuid,
    completed_rule text,
    unattributed_no_show text,
    unattributed_cancelled text
) returns table (user_id uuid, completed bigint, no_shows bigint)
language plpgsql
stable
set plan_cache_mode = force_custom_plan
as $$
begin
    return query
    select
        counted.user_id,
        pg_catalog.count(*) filter (where counted.outcome = 1),
        pg_catalog.count(*) filter (where counted.outcome = -1)
    from (
        select known.id as user_id, true as known, null::smallint as outcome
        from public.user_profiles as known
        where known.id between counts_between.first and counts_between.last
        union all
        select ended.user_id, false, ended.outcome
        from (
            select match.user_id, session.outcome
            from (
                select as_user1.id, 1 as side, as_user1.user1_id as user_id
                from public.wingman_matches as as_user1
                where as_user1.user1_id between counts_between.first and counts_between.last
                union all
                select as_user2.id, 2 as side, as_user2.user2_id as user_id
                from public.wingman_matches as as_user2
                where as_user2.user2_id between counts_between.first and counts_between.last
            ) as match
            join lateral reputation.outcomes(
                match.side, counts_between.completed_rule,
                counts_between.unattributed_no_show, counts_between.unattributed_cancelled
            ) as session on session.match_id = match.id
            offset 0 -- a fence: worked out once, not once per use
        ) as ended
    ) as counted
    group by counted.user_id
    having pg_catalog.bool_or(counted.known);
end
$$;

-- Count at most `batch` users again: those whose marks were folded, then the next in turn while everybody is counted.
-- recounted: how many; none: nobody is left; counting: more of everybody is left.
-- Nobody's counts change by it, so nothing is to be invalidated: that is for the fold of the changes, which stay.
create function reputation.recount(batch integer)
returns table (recounted integer, counting boolean)
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
    first_in_turn uuid;
    last_in_turn uuid;
    chosen uuid[];
    many constant integer := 100000; -- users: to read every session once is cheaper than to look for each of theirs
begin
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        raise exception using errcode = 'GS001', message = 'reputation.recount needs READ COMMITTED: it looks again after it waited';
    end if;
    if not exists (select from reputation.recounts)
        and not (select upkeep.counting from reputation.upkeep where upkeep.the_only)
    then
        return query select 0, false;
        return;
    end if;
    select upkeep.* into state from reputation.upkeep where upkeep.the_only for no key update;
    perform pg_catalog.set_config('idle_in_transaction_session_timeout', '1000', true);
    select policy.* into strict rules from reputation.policy where policy.the_only;

    if state.counting then
        -- The first comparison is what the index is asked for: one that might be null would have it read from its start.
        first_in_turn := (
            select known.id from public.user_profiles as known
            where known.id >= coalesce(state.counted_to, '00000000-0000-0000-0000-000000000000')
                and known.id is distinct from state.counted_to
            order by known.id
            limit 1
        );
        last_in_turn := (
            select turn.id
            from (
                select known.id from public.user_profiles as known
                where known.id >= first_in_turn
                order by known.id
                limit greatest(1, recount.batch)
            ) as turn
            order by turn.id desc
            limit 1
        );
        state.counting := exists (select from public.user_profiles as known where known.id > last_in_turn);
        state.counted_to := coalesce(last_in_turn, state.counted_to);
    end if;
    chosen := array(
        select ready.user_id from reputation.recounts as ready
        where (ready.user_id between first_in_turn and last_in_turn) is not true
        limit greatest(1, recount.batch)
    );

    if recount.batch >= many then
        perform
            pg_catalog.set_config('enable_seqscan', 'on', true),
            pg_catalog.set_config('enable_hashjoin', 'on', true),
            pg_catalog.set_config('work_mem', '64MB', true);
    end if;

    -- One statement, so one snapshot, also of the functions that it calls: what it counts, and the changes that this
    -- count includes, which mean nothing to these users from then on. Marks stay: there may be some that it does not see.
    with due as materialized (
        -- Ranges of ids that have no user in common: the turn, and one for each of the chosen.
        select turn.first, turn.last
        from rows from (
            pg_catalog.unnest(chosen || first_in_turn), pg_catalog.unnest(chosen || last_in_turn)
        ) as turn (first, last)
        where turn.first is not null
    ),
    counted as materialized (
        select fresh.user_id, fresh.completed, fresh.no_shows
        from reputation.counts(
            chosen, rules.completed_rule, rules.unattributed_no_show, rules.unattributed_cancelled
        ) as fresh
        union all
        select fresh.user_id, fresh.completed, fresh.no_shows
        from reputation.counts_between(
            first_in_turn, last_in_turn,
            rules.completed_rule, rules.unattributed_no_show, rules.unattributed_cancelled
        ) as fresh
        where first_in_turn is not null
    ),
    included as (
        update reputation.changes as change
        set
            included1 = change.included1 or waiting.as_user1,
            included2 = change.included2 or waiting.as_user2
        from (
            select
                waits.change,
                pg_catalog.bool_or(theirs.side = 1) as as_user1,
                pg_catalog.bool_or(theirs.side = 2) as as_user2
            from (
                select as_user1.id, 1 as side
                from due
                join public.wingman_matches as as_user1
                    on as_user1.user1_id >= due.first and as_user1.user1_id <= due.last
                union all
                select as_user2.id, 2 as side
                from due
                join public.wingman_matches as as_user2
                    on as_user2.user2_id >= due.first and as_user2.user2_id <= due.last
            ) as theirs
            cross join lateral (
                select pending.ctid as change
                from reputation.changes as pending
                where pending.match_id = theirs.id
                offset 0 -- a fence: looked up for each match, however many wait
            ) as waits
            where exists (select from reputation.changes)
            group by waits.change
        ) as waiting
        where change.ctid = waiting.change
    ),
    written as (
        insert into reputation.tallies as tally (user_id, completed, no_shows, policy_version)
        select counted.user_id, counted.completed, counted.no_shows, rules.version
        from counted
        order by counted.user_id
        on conflict on constraint tallies_pkey do update set
            completed = excluded.completed, no_shows = excluded.no_shows, policy_version = excluded.policy_version
    ),
    gone as (
        delete from reputation.tallies as tally
        using due
        where tally.user_id >= due.first and tally.user_id <= due.last
            and (select known.id from public.user_profiles as known where known.id = tally.user_id) is null -- no join
    ),
    finished as (
        delete from reputation.recounts as ready
        using due
        where ready.user_id >= due.first and ready.user_id <= due.last
    )
    select
        pg_catalog.cardinality(chosen)
        + pg_catalog.count(*) filter (where counted.user_id between first_in_turn and last_in_turn)
    into recounted
    from counted;

    update reputation.upkeep set
        counting = state.counting,
        counted_to = state.counted_to
    where upkeep.the_only;
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
    -- No mark: everybody is being counted as it is, and everybody's cached reputation is to be dropped.
    insert into reputation.marks (recount) values (false);
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
        (select triggers.tracked from reputation.tracked() as triggers),
        exists (
            select from reputation.policy
            where policy.completed_rule = status.completed_rule
                and policy.unattributed_no_show = status.unattributed_no_show
                and policy.unattributed_cancelled = status.unattributed_cancelled
        ),
        upkeep.counting,
        exists (select from reputation.recounts),
        reputation.pending()
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
