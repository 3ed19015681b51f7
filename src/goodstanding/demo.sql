-- The demo's data and what its page does to it, by name. It all runs as the owner of the host's tables.

-- name: seed
-- 3,000 users and some 40,000 sessions, the same ones every time; only the times follow the clock.
-- Twelve of them, the cast, have histories made for the page: around every threshold and beyond both bounds.
create function pg_temp.dice(what text) returns double precision
language sql immutable
return (hashtextextended(what, 42) & 4294967295) / 4294967296.0;

create function pg_temp.pick(choices text[], what text) returns text
language sql immutable
return choices[1 + floor(pg_temp.dice(what) * array_length(choices, 1))::int];

create function pg_temp.venue(what text) returns text
language sql immutable
return pg_temp.pick(
    array['Corner Café', 'Harbour Bar', 'City Gym', 'Book Garden', 'Night Market', 'Old Mill', 'Rooftop', 'Jazz Cellar'],
    'venue ' || what
);

create temporary table cast_member on commit drop as
select
    ('00000000-0000-4000-8000-' || lpad(place::text, 12, '0'))::uuid as id, place, display_name, completed, no_shows
from (
    values
        (1, 'Amara Okafor', 24, 1),
        (2, 'Lena Fischer', 15, 0),
        (3, 'Ravi Menon', 11, 1),
        (4, 'Mateo Cruz', 9, 0),
        (5, 'Sofia Rossi', 6, 2),
        (6, 'Ines Duarte', 3, 0),
        (7, 'Zara Ahmed', 1, 1),
        (8, 'Noah Kim', 0, 0),
        (9, 'Tom Baker', 2, 3),
        (10, 'Olga Petrova', 4, 6),
        (11, 'Yuki Tanaka', 1, 4),
        (12, 'Liam Walsh', 0, 9)
) as planned (place, display_name, completed, no_shows);

-- How often somebody stays away decides the badge: most people come, some do not care.
create temporary table person on commit drop as
select
    number,
    md5('user ' || number)::uuid as id,
    case
        when pg_temp.dice('kind ' || number) < 0.60 then 0.03
        when pg_temp.dice('kind ' || number) < 0.84 then 0.18
        else 0.70
    end as absence
from generate_series(1, 2988) as number;

insert into public.user_profiles (id, display_name, created_at)
select id, display_name, now() - interval '200 days' from cast_member
union all
select
    id,
    pg_temp.pick(
        array[
            'Ada', 'Ben', 'Chloe', 'Diego', 'Emma', 'Farid', 'Grace', 'Hugo', 'Iris', 'Jonas', 'Kofi', 'Leila', 'Marco',
            'Nina', 'Omar', 'Paula', 'Quinn', 'Rosa', 'Sven', 'Tara', 'Umut', 'Vera', 'Wanda', 'Xenia', 'Yara', 'Zeno'
        ], 'first ' || number
    ) || ' ' || chr(65 + floor(pg_temp.dice('last ' || number) * 26)::int) || '.',
    now() - interval '200 days' * pg_temp.dice('since ' || number)
from person;

-- A few are in many matches, most in a few.
create temporary table pairing on commit drop as
select
    md5('match ' || drawn.number)::uuid as id,
    drawn.number,
    one.id as user1_id,
    two.id as user2_id,
    one.absence as absence1,
    two.absence as absence2
from (
    select
        number,
        1 + floor(2988 * pg_temp.dice('one ' || number) ^ 1.6)::int as number1,
        1 + floor(2988 * pg_temp.dice('two ' || number) ^ 1.3)::int as number2
    from generate_series(1, 9950) as number
) as drawn
join person as one on one.number = drawn.number1
join person as two
    on two.number = case when drawn.number2 <> drawn.number1 then drawn.number2 else 1 + drawn.number1 % 2988 end;

insert into public.wingman_matches (id, user1_id, user2_id, created_at)
select id, user1_id, user2_id, now() - interval '190 days' from pairing;

insert into public.wingman_sessions (
    id, match_id, venue_name, scheduled_time, status, completed_at,
    user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1, notes, created_at
)
select
    md5('session ' || label)::uuid,
    match_id,
    pg_temp.venue(label),
    meeting,
    status,
    case when status = 'completed' then meeting + interval '90 minutes' end,
    case
        when status = 'completed' then case when flags < 0.90 then true when flags > 0.97 then null else false end
        when status = 'no_show' then case when came1 then true when flags > 0.8 then null else false end
        else false
    end,
    case
        when status = 'completed' then case when flags < 0.82 or flags between 0.90 and 0.98 then true else false end
        when status = 'no_show' then case when came2 then true when flags > 0.8 then null else false end
        else false
    end,
    case when flags < 0.3 then 'Private: ' || pg_temp.pick(array['talked for hours', 'too loud', 'lovely'], label) end,
    meeting - interval '3 days'
from (
    select
        label,
        match_id,
        came1,
        came2,
        pg_temp.dice('flags ' || label) as flags,
        case
            when fate < 0.06 then 'scheduled'
            when fate < 0.07 then 'in_progress'
            when fate < 0.20 then 'cancelled'
            when came1 and came2 then 'completed'
            else 'no_show'
        end as status,
        case
            when fate < 0.06 then now() + interval '14 days' * pg_temp.dice('when ' || label)
            when fate < 0.07 then now() - interval '1 hour' * pg_temp.dice('when ' || label)
            else now() - interval '1 day' - interval '180 days' * pg_temp.dice('when ' || label)
        end as meeting
    from (
        select
            label,
            pairing.id as match_id,
            pg_temp.dice('fate ' || label) as fate,
            pg_temp.dice('came1 ' || label) >= absence1 as came1,
            pg_temp.dice('came2 ' || label) >= absence2 as came2
        from pairing
        cross join lateral generate_series(1, 1 + floor(pg_temp.dice('how many ' || number) * 7)::int) as turn
        cross join lateral (select number || '/' || turn as label) as named
    ) as thrown
) as told;

-- The cast meets other people than one another, so that one card on the page changes at a time.
create temporary table meeting on commit drop as
select
    cast_member.id as user1_id,
    person.id as user2_id,
    md5('cast match ' || place || '/' || turn)::uuid as match_id,
    place || '/' || turn as label,
    turn <= completed as came,
    now() - interval '1 day' - interval '150 days' * pg_temp.dice('cast when ' || place || '/' || turn) as meeting
from cast_member
cross join lateral generate_series(1, completed + no_shows) as turn
join person on person.number = 1000 + place * 100 + turn;

insert into public.wingman_matches (id, user1_id, user2_id, created_at)
select match_id, user1_id, user2_id, meeting - interval '5 days' from meeting;

insert into public.wingman_sessions (
    id, match_id, venue_name, scheduled_time, status, completed_at,
    user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1, created_at
)
select
    md5('cast session ' || label)::uuid,
    match_id,
    pg_temp.venue('cast ' || label),
    meeting,
    case when came then 'completed' else 'no_show' end,
    case when came then meeting + interval '90 minutes' end,
    came,
    true,
    meeting - interval '3 days'
from meeting;

analyze public.user_profiles, public.wingman_matches, public.wingman_sessions;

-- name: verdicts
-- The verdicts of a support team: on a quarter of the cancellations and on a few no-shows. Once.
insert into reputation.attributions (session_id, at_fault, reason, said_by)
select
    drawn.id,
    case
        when drawn.fault < 0.45 then 'user1'
        when drawn.fault < 0.85 then 'user2'
        when drawn.fault < 0.90 then 'both'
        else 'nobody'
    end,
    'Both users were asked.',
    'support'
from (
    select
        id,
        status,
        (hashtextextended(id::text, 1) & 4294967295) / 4294967296.0 as chosen,
        (hashtextextended(id::text, 2) & 4294967295) / 4294967296.0 as fault
    from public.wingman_sessions
    where status in ('cancelled', 'no_show')
        and match_id not in (
            select id from public.wingman_matches where user1_id::text like '00000000-0000-4000-8000-0000000000__'
        )
) as drawn
where drawn.chosen < case drawn.status when 'cancelled' then 0.25 else 0.05 end
    and not exists (select from reputation.attributions)

-- name: numbers
-- What there is to see.
select
    (select count(*) from public.user_profiles) as users,
    (select count(*) from public.wingman_sessions) as sessions

-- name: cast
-- The users on the page.
select id::text as user_id, display_name
from public.user_profiles
where id::text like '00000000-0000-4000-8000-0000000000__'
order by id

-- name: match
-- One of a user's matches; no row when there is none.
select
    match.id::text as match_id,
    match.user1_id = $1::uuid as is_user1,
    partner.id::text as partner_id,
    partner.display_name as partner_name
from public.wingman_matches as match
join public.user_profiles as partner
    on partner.id = case when match.user1_id = $1::uuid then match.user2_id else match.user1_id end
where match.user1_id = $1::uuid or match.user2_id = $1::uuid
order by random()
limit 1

-- name: new_match
-- Match a user with somebody; no row when there is no such user.
insert into public.wingman_matches (user1_id, user2_id)
select known.id, somebody.id
from public.user_profiles as known
cross join lateral (
    select other.id from public.user_profiles as other where other.id <> known.id order by random() limit 1
) as somebody
where known.id = $1::uuid
returning id

-- name: book
-- Book a session for a match.
insert into public.wingman_sessions (match_id, venue_name, scheduled_time)
values ($1::uuid, 'Demo Bar', now())
returning id::text

-- name: finish
-- Tell how a session ended, as the host app does.
update public.wingman_sessions
set
    status = $2::text,
    user1_completed_confirmed_by_user2 = $3::boolean,
    user2_completed_confirmed_by_user1 = $4::boolean,
    completed_at = case when $2::text = 'completed' then now() end
where id = $1::uuid
