-- Take the triggers off the host's tables; the counts are then recounted on every load.

set local lock_timeout = '400ms';
lock table public.user_profiles, public.wingman_matches, public.wingman_sessions in access exclusive mode;
set local lock_timeout = 0;

drop trigger if exists goodstanding_session_inserted on public.wingman_sessions;
drop trigger if exists goodstanding_session_updated on public.wingman_sessions;
drop trigger if exists goodstanding_session_deleted on public.wingman_sessions;
drop trigger if exists goodstanding_sessions_truncated on public.wingman_sessions;
drop trigger if exists goodstanding_match_inserted on public.wingman_matches;
drop trigger if exists goodstanding_match_updated on public.wingman_matches;
drop trigger if exists goodstanding_match_deleted on public.wingman_matches;
drop trigger if exists goodstanding_matches_truncated on public.wingman_matches;
drop trigger if exists goodstanding_user_inserted on public.user_profiles;
drop trigger if exists goodstanding_user_updated on public.user_profiles;
drop trigger if exists goodstanding_user_deleted on public.user_profiles;
drop trigger if exists goodstanding_users_truncated on public.user_profiles;
