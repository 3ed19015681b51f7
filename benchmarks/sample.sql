-- `sample.users` users, each in `sample.matches` matches from each side, of two sessions: 10,000 and 5 make 10,000 users
-- with 20 sessions each, 100,000 and 2 make 100,000 with 8.
-- The ids are computed, so that a benchmark can name them: md5 of `user-` and a number from 0.

insert into public.user_profiles (id)
select md5('user-' || number)::uuid from generate_series(0, current_setting('sample.users')::integer - 1) as number;

insert into public.wingman_matches (id, user1_id, user2_id)
select
    md5('match-' || number || '-' || step)::uuid,
    md5('user-' || number)::uuid,
    md5('user-' || (number + step * 37) % current_setting('sample.users')::integer)::uuid
from
    generate_series(0, current_setting('sample.users')::integer - 1) as number,
    generate_series(1, current_setting('sample.matches')::integer) as step;

insert into public.wingman_sessions (
    match_id, status, scheduled_time, user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1
)
select
    match.id,
    case when spread < 0.70 then 'completed' when spread < 0.80 then 'no_show'
        when spread < 0.90 then 'cancelled' else 'scheduled' end,
    now() - interval '1 day' * (1 + 300 * spread),
    random() < 0.8,
    random() < 0.8
from public.wingman_matches as match, generate_series(1, 2),
lateral (select random() as spread where match.id is not null) as drawn;

vacuum analyze public.user_profiles, public.wingman_matches, public.wingman_sessions;
