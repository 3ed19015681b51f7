-- The triggers on the host's tables. They are the one thing of ours there, and `migrate --without-triggers` leaves
-- them out. Running this again replaces them and has everybody counted again: what happened while one was missing or
-- disabled is unknown.

-- A writer that holds one of the tables is waited for only this long, so that no other writer queues up behind us for
-- longer; shorter than deadlock_timeout, so that no writer ever becomes the victim of a deadlock with us.
set local lock_timeout = '400ms';
lock table public.user_profiles, public.wingman_matches, public.wingman_sessions in share row exclusive mode;
set local lock_timeout = 0;

create or replace trigger goodstanding_session_inserted after insert on public.wingman_sessions
    for each row execute function reputation.session_changed();
create or replace trigger goodstanding_session_updated after update on public.wingman_sessions
    for each row execute function reputation.session_changed();
create or replace trigger goodstanding_session_deleted after delete on public.wingman_sessions
    for each row execute function reputation.session_changed();
create or replace trigger goodstanding_sessions_truncated after truncate on public.wingman_sessions
    for each statement execute function reputation.everybody_changed();

create or replace trigger goodstanding_match_inserted after insert on public.wingman_matches
    for each row execute function reputation.match_changed();
create or replace trigger goodstanding_match_updated after update on public.wingman_matches
    for each row execute function reputation.match_changed();
create or replace trigger goodstanding_match_deleted after delete on public.wingman_matches
    for each row execute function reputation.match_changed();
create or replace trigger goodstanding_matches_truncated after truncate on public.wingman_matches
    for each statement execute function reputation.everybody_changed();

create or replace trigger goodstanding_user_inserted after insert on public.user_profiles
    for each row execute function reputation.user_changed();
create or replace trigger goodstanding_user_updated after update on public.user_profiles
    for each row execute function reputation.user_changed();
create or replace trigger goodstanding_user_deleted after delete on public.user_profiles
    for each row execute function reputation.user_changed();
create or replace trigger goodstanding_users_truncated after truncate on public.user_profiles
    for each statement execute function reputation.everybody_changed();

-- Always: also for rows that arrive by logical replication or under session_replication_role = replica.
alter table public.wingman_sessions enable always trigger goodstanding_session_inserted;
alter table public.wingman_sessions enable always trigger goodstanding_session_updated;
alter table public.wingman_sessions enable always trigger goodstanding_session_deleted;
alter table public.wingman_sessions enable always trigger goodstanding_sessions_truncated;
alter table public.wingman_matches enable always trigger goodstanding_match_inserted;
alter table public.wingman_matches enable always trigger goodstanding_match_updated;
alter table public.wingman_matches enable always trigger goodstanding_match_deleted;
alter table public.wingman_matches enable always trigger goodstanding_matches_truncated;
alter table public.user_profiles enable always trigger goodstanding_user_inserted;
alter table public.user_profiles enable always trigger goodstanding_user_updated;
alter table public.user_profiles enable always trigger goodstanding_user_deleted;
alter table public.user_profiles enable always trigger goodstanding_users_truncated;

-- Nobody was writing these tables a moment ago, so whatever happens from now on is told.
do $$
declare
    rules reputation.policy;
begin
    select policy.* into strict rules from reputation.policy where policy.the_only;
    perform reputation.rebuild(rules.completed_rule, rules.unattributed_no_show, rules.unattributed_cancelled);
end
$$;
