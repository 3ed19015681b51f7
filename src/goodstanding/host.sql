-- The host app's side, as WingmanMatch has it on Supabase: roles, auth.uid(), tables, row-level policies.
-- For the demo, the tests and the benchmarks; a real host app has all of this already.
-- Run once, by a superuser, in a database that `host_owner` owns. The tables then belong to host_owner, who is
-- no superuser, as on Supabase.

do $$
begin
    if not exists (select from pg_roles where rolname = 'host_owner') then
        create role host_owner createrole nologin;
    end if;
    if not exists (select from pg_roles where rolname = 'anon') then
        create role anon nologin noinherit;
    end if;
    if not exists (select from pg_roles where rolname = 'authenticated') then
        create role authenticated nologin noinherit;
    end if;
    if not exists (select from pg_roles where rolname = 'service_role') then
        create role service_role nologin noinherit bypassrls;
    end if;
exception
    when duplicate_object or unique_violation then
        null; -- roles belong to the whole server, and another database was quicker
end
$$;

create schema auth;
grant usage on schema auth to host_owner, anon, authenticated, service_role;

-- Who is asking: PostgREST hands the token's claims over in a setting.
create function auth.uid() returns uuid
language sql stable
return nullif(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')::uuid;

set role host_owner;

create table public.user_profiles (
    id uuid primary key default gen_random_uuid(),
    display_name text,
    created_at timestamptz not null default now()
);

create table public.wingman_matches (
    id uuid primary key default gen_random_uuid(),
    user1_id uuid not null references public.user_profiles (id) on delete cascade,
    user2_id uuid not null references public.user_profiles (id) on delete cascade,
    status varchar(50) not null default 'accepted',
    user1_reputation int default 0,
    user2_reputation int default 0,
    created_at timestamptz not null default now(),
    constraint wingman_matches_two_users check (user1_id <> user2_id)
);
create index idx_wingman_matches_user1 on public.wingman_matches (user1_id);
create index idx_wingman_matches_user2 on public.wingman_matches (user2_id);

create table public.wingman_sessions (
    id uuid primary key default gen_random_uuid(),
    match_id uuid not null references public.wingman_matches (id) on delete cascade,
    user1_challenge_id uuid,
    user2_challenge_id uuid,
    venue_name varchar(200),
    scheduled_time timestamptz,
    status varchar(50) not null default 'scheduled',
    completed_at timestamptz,
    user1_completed_confirmed_by_user2 boolean default false,
    user2_completed_confirmed_by_user1 boolean default false,
    notes text,
    created_at timestamptz not null default now(),
    constraint wingman_sessions_status
        check (status in ('scheduled', 'in_progress', 'completed', 'cancelled', 'no_show'))
);
create index idx_wingman_sessions_match on public.wingman_sessions (match_id);
create index idx_wingman_sessions_status on public.wingman_sessions (status);
create index idx_wingman_sessions_scheduled on public.wingman_sessions (scheduled_time);

-- Supabase grants everything to its three roles; the row-level policies are what protects the rows.
grant usage on schema public to anon, authenticated, service_role;
grant all on public.user_profiles, public.wingman_matches, public.wingman_sessions
to anon, authenticated, service_role;

alter table public.user_profiles enable row level security;
alter table public.wingman_matches enable row level security;
alter table public.wingman_sessions enable row level security;

create policy "Users can view own profile" on public.user_profiles
for select to authenticated using (id = auth.uid());
create policy "Users can update own profile" on public.user_profiles
for update to authenticated using (id = auth.uid());

create policy "Users can view their matches" on public.wingman_matches
for select to authenticated using (auth.uid() in (user1_id, user2_id));
create policy "Users can update their matches" on public.wingman_matches
for update to authenticated using (auth.uid() in (user1_id, user2_id));

create policy "Participants can view their sessions" on public.wingman_sessions
for select to authenticated using (
    exists (
        select from public.wingman_matches as m
        where m.id = match_id and auth.uid() in (m.user1_id, m.user2_id)
    )
);
-- WingmanMatch really lets participants write every column of their sessions, their own outcome too:
-- `goodstanding doctor` warns of it.
create policy "Participants can update their sessions" on public.wingman_sessions
for update to authenticated using (
    exists (
        select from public.wingman_matches as m
        where m.id = match_id and auth.uid() in (m.user1_id, m.user2_id)
    )
);

reset role;
