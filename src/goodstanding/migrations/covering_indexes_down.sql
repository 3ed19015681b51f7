-- name: goodstanding_matches_user1
drop index concurrently if exists public.goodstanding_matches_user1;

-- name: goodstanding_matches_user2
drop index concurrently if exists public.goodstanding_matches_user2;

-- name: goodstanding_sessions_match
drop index concurrently if exists public.goodstanding_sessions_match;
