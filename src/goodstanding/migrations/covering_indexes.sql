-- Indexes on the host's tables that answer a count without touching the tables. They halve a recount and cost the host
-- its HOT updates (every change of a status then writes index entries too), so they are an option.
-- Only what a count needs is in them: no note, no venue, no time.

-- name: goodstanding_matches_user1
create index concurrently if not exists goodstanding_matches_user1
    on public.wingman_matches (user1_id) include (id);

-- name: goodstanding_matches_user2
create index concurrently if not exists goodstanding_matches_user2
    on public.wingman_matches (user2_id) include (id);

-- name: goodstanding_sessions_match
create index concurrently if not exists goodstanding_sessions_match
    on public.wingman_sessions (match_id)
    include (id, status, user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1);
