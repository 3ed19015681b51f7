"""The doctor finds what is wrong, names it in one line, and gives nothing away."""

import pytest
import redis

from goodstanding import doctor, tallies
from goodstanding.changes import SessionLedger
from goodstanding.doctor import Finding, Status, examine
from goodstanding.embedded import Postgres, Valkey
from goodstanding.migrate import upgrade
from goodstanding.settings import Settings, load_settings

from .conftest import SERVICE, Database, command, connect

SECRET = "an-hs256-secret-of-at-least-32-bytes"


def settings(**options: object) -> Settings:
    """Build settings in which only what a test sets could be wrong."""
    return load_settings(**{"jwt_secret": SECRET, "jwt_issuer": "https://issuer.example", **options})


async def about(name: str, checked: Settings) -> list[tuple[str, str]]:
    """Give status and message of the findings of one name."""
    return [(finding.status.value, finding.message) for finding in await examine(checked) if finding.name == name]


async def test_a_sound_installation_has_one_warning(database: Database, redis_url: str) -> None:
    """With everything in order only the host app's own policy is warned of, by its name."""
    async with SessionLedger.open(database.service_url) as ledger:
        assert await ledger.lead() is not None
        findings = await examine(settings(database_url=database.service_url, redis_url=redis_url))
    assert [
        "database",
        "login",
        "schema",
        "rights",
        "privacy",
        "indexes",
        "covering indexes",
        "row security",
        "participants",
        "participants",
        "relay",
        "redis",
        "redis writes",
        "redis memory",
        "tokens",
    ] == [finding.name for finding in findings]
    assert [
        f'authenticated may UPDATE public.{table} (policy "{policy}"): people can rewrite their own outcomes'
        for table, policy in (
            ("wingman_sessions", "Participants can update their sessions"),
            ("wingman_matches", "Users can update their matches"),
        )
    ] == [finding.message for finding in findings if finding.status is Status.WARNING]
    assert Status.FAILURE not in {finding.status for finding in findings}


async def test_a_relay_should_lead(database: Database) -> None:
    """Somebody must carry changes, over a connection that keeps its session; another lock, or database, is not it."""
    checked = settings(database_url=database.service_url)
    async with connect(database.service_url) as other, connect(database.superuser_url.rpartition("/")[0]) as elsewhere:
        await other.execute("select pg_advisory_lock($1::bigint)", tallies.LEAD + 1)
        await elsewhere.execute("select pg_advisory_lock($1::bigint)", tallies.LEAD)
        [(status, message)] = await about("relay", checked)
    assert "warning" == status
    assert message.startswith("none leads")
    async with SessionLedger.open(database.service_url) as ledger:
        await ledger.lead()
        assert [("ok", "one leads")] == await about("relay", checked)
    pooled = settings(database_url=database.service_url, database_transaction_pooler=True)
    [(status, message)] = await about("relay", pooled)
    assert "warning" == status
    assert "GOODSTANDING_RELAY_DATABASE_URL" in message
    apart = settings(
        database_url=database.service_url,
        database_transaction_pooler=True,
        relay_database_url="postgresql://me@127.0.0.1:1/x",
    )
    assert ["failure"] == [status for status, _ in await about("relay", apart)]


async def test_a_redis_whose_channels_are_forbidden_is_a_failure(database: Database, redis_url: str) -> None:
    """Who may not publish cannot tell anybody of a change."""
    with redis.Redis.from_url(redis_url) as client:
        client.acl_setuser("default", enabled=True, keys=["*"], channels=[], reset_channels=True)
        try:
            checked = settings(database_url=database.service_url, redis_url=redis_url)
            assert [("failure", "are refused (NoPermissionError): nothing is cached")] == await about(
                "redis writes", checked
            )
        finally:
            client.acl_setuser("default", enabled=True, keys=["*"], channels=["*"])


async def test_no_secret_and_no_address_is_shown(database: Database, redis_url: str) -> None:
    """Neither what works nor what does not shows a password, a token's secret or an URL; each finding is one line."""
    for checked in (
        settings(database_url=database.service_url, redis_url=redis_url),
        settings(database_url="postgresql://me:hidden@127.0.0.1:1/x", redis_url="redis://:hidden@127.0.0.1:1/0"),
        settings(database_url="postgresql://me:hidden@nowhere.invalid/x", redis_url="redis+sentinel://:hidden@x:1/s/0"),
    ):
        for finding in await examine(checked):
            assert "\n" not in finding.message
            for hidden in ("hidden", SECRET, "://", "127.0.0.1", database.service_url.partition("@")[0][-10:]):
                assert hidden not in finding.message


async def test_servers_that_are_away_are_failures() -> None:
    """Nobody at the address: one failure each, and the other checks go on."""
    findings = await examine(settings(database_url="postgresql://me@127.0.0.1:1/x", redis_url="redis://127.0.0.1:1/0"))
    assert [
        ("database", Status.FAILURE),
        ("relay", Status.FAILURE),
        ("redis", Status.FAILURE),
        ("tokens", Status.OK),
    ] == [(finding.name, finding.status) for finding in findings]


async def test_servers_that_hang_are_failures(
    postgres: Postgres, valkey: Valkey, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers nothing does not hold up the doctor."""
    monkeypatch.setattr(doctor, "_SECONDS", 1.0)
    postgres.pause()
    valkey.pause()
    try:
        findings = await examine(settings(database_url=database.service_url, redis_url=redis_url))
    finally:
        valkey.resume()
        postgres.resume()
    assert ["database", "relay", "redis"] == [finding.name for finding in findings if finding.status is Status.FAILURE]


async def test_what_is_not_set_is_said() -> None:
    """Without settings the database is missing, the cache is memory and nobody could call."""
    assert {
        Finding("database", Status.FAILURE, "GOODSTANDING_DATABASE_URL: is required (or DATABASE_URL)"),
        Finding("redis", Status.OK, "none: each process caches in its own memory"),
        Finding(
            "tokens",
            Status.FAILURE,
            "GOODSTANDING_JWT_SECRET: one of JWT_SECRET and JWKS_URL is required, or nobody could ever call",
        ),
    } == set(await examine(load_settings()))


async def test_a_database_without_the_schema(bare_database: Database) -> None:
    """The command that mends it is named."""
    checked = settings(database_url=bare_database.service_url)
    assert [("failure", "not installed: run goodstanding migrate")] == await about("schema", checked)
    assert [] == await about("rights", checked)


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("Goodstanding, version 0", "version 0, this program needs 2: run goodstanding migrate"),
        ("Goodstanding, version 99", "version 99 is newer than this program's 2: upgrade the program"),
        ("something else", "the schema reputation is not this product's, or its comment was changed"),
    ],
)
async def test_a_schema_of_another_version(database: Database, comment: str, message: str) -> None:
    """Older, newer and foreign are told apart."""
    async with database.owner() as owner:
        await command(owner, "comment on schema reputation is %L", comment)
    assert [("failure", message)] == await about("schema", settings(database_url=database.service_url))


async def test_a_login_without_the_role(database: Database) -> None:
    """The missing grant is spelled out, for the one function that is missing too."""
    checked = settings(database_url=database.service_url)
    async with database.owner() as owner:
        await owner.execute("revoke execute on function reputation.most_active(integer) from goodstanding_service")
        assert [
            (
                "failure",
                f"{SERVICE} cannot call reputation.most_active: grant goodstanding_service to {SERVICE}",
            )
        ] == await about("rights", checked)
        await owner.execute("revoke usage on schema reputation from goodstanding_service")
    names = ("counts", "attribute", "most_active", "read_counts", "pending", "fold", "recount", "status")
    functions = ", ".join(f"reputation.{name}" for name in names)
    assert [("failure", f"{SERVICE} cannot call {functions}: grant goodstanding_service to {SERVICE}")] == await about(
        "rights", checked
    )


async def test_logins_that_can_do_too_much(database: Database) -> None:
    """The owner and the superuser work, and are warned of."""
    owner, superuser = settings(database_url=database.owner_url), settings(database_url=database.superuser_url)
    assert [("ok", "host_owner bypasses nothing")] == await about("login", owner)
    assert [("warning", "postgres is a superuser: serve with a mere member of goodstanding_service")] == await about(
        "login", superuser
    )
    for checked in (owner, superuser):
        [(status, message)] = await about("privacy", checked)
        assert status == "warning"
        for column in ("notes", "venue_name", "scheduled_time"):
            assert f"public.wingman_sessions.{column}" in message
        assert "reputation.attributions.reason" in message


async def test_a_single_private_column_is_noticed(database: Database) -> None:
    """A grant of one column is enough for the warning to name it."""
    async with database.owner() as owner:
        await command(owner, "grant select (notes) on public.wingman_sessions to %I", SERVICE)
    assert [
        ("warning", f"{SERVICE} can read public.wingman_sessions.notes: serve with a login that cannot")
    ] == await about("privacy", settings(database_url=database.service_url))


async def test_missing_and_unusable_indexes(database: Database) -> None:
    """An absent, a partial and a wrongly ordered index are all no index; the covering ones will do."""
    checked = settings(database_url=database.service_url)
    async with database.owner() as owner:
        await owner.execute("""
            drop index public.idx_wingman_matches_user1, public.idx_wingman_matches_user2;
            drop index public.idx_wingman_sessions_match;
            create index on public.wingman_matches (user2_id) where status = 'accepted';
            create index on public.wingman_sessions (status, match_id);
        """)
    columns = "public.wingman_matches.user1_id, public.wingman_matches.user2_id, public.wingman_sessions.match_id"
    assert [("failure", f"no valid index on {columns}: every count scans the whole table")] == await about(
        "indexes", checked
    )
    assert [("ok", "0 of 3 (optional: they halve a recount)")] == await about("covering indexes", checked)
    await upgrade(database.owner_url, covering_indexes=True)
    assert [("ok", "every look-up of a count has its index")] == await about("indexes", checked)
    assert [("ok", "all are there")] == await about("covering indexes", checked)


async def test_an_invalid_covering_index(database: Database) -> None:
    """What an interrupted build left is named, with the command that mends it."""
    await upgrade(database.owner_url, covering_indexes=True)
    async with connect(database.superuser_url) as admin:
        await admin.execute(
            "update pg_index set indisvalid = false where indexrelid = 'public.goodstanding_matches_user2'::regclass"
        )
    assert [
        ("warning", "goodstanding_matches_user2 is invalid: run goodstanding migrate --covering-indexes")
    ] == await about("covering indexes", settings(database_url=database.service_url))


async def test_row_security_that_binds_the_owner(database: Database) -> None:
    """FORCE is found, and so is a table that was given to another owner."""
    checked = settings(database_url=database.service_url)
    async with connect(database.superuser_url) as admin:
        await admin.execute("alter table public.wingman_matches force row level security")
        await admin.execute("alter table public.user_profiles owner to postgres")
    [(status, message)] = await about("row security", checked)
    assert status == "failure"
    assert "wingman_matches" in message
    assert "user_profiles" in message
    assert "wingman_sessions" not in message


async def test_every_way_to_rewrite_an_outcome_is_named(database: Database) -> None:
    """Each command, the roles that have it and the policies that let them; column grants and switched-off RLS too."""
    checked = settings(database_url=database.service_url)
    async with database.owner() as owner:
        await owner.execute("""
            drop policy "Participants can update their sessions" on public.wingman_sessions;
            drop policy "Users can update their matches" on public.wingman_matches;
        """)
        assert [("ok", "cannot rewrite their own outcomes")] == await about("participants", checked)
        await owner.execute("""
            create policy "all of it" on public.wingman_sessions to authenticated using (true);
            create policy "for everybody" on public.wingman_sessions for delete using (true);
            create policy "narrower" on public.wingman_sessions as restrictive for update using (false);
            alter table public.wingman_matches disable row level security;
            revoke update, delete on public.wingman_matches from anon, authenticated;
            grant update (user1_id) on public.wingman_matches to anon;
        """)
        assert [
            ("UPDATE public.wingman_sessions", "authenticated may", '(policy "all of it")'),
            ("INSERT public.wingman_sessions", "authenticated may", '(policy "all of it")'),
            (
                "DELETE public.wingman_sessions",
                "anon, authenticated may",
                '(policy "all of it", policy "for everybody")',
            ),
            ("UPDATE public.wingman_matches", "anon may", "(row-level security is off)"),
        ] == [
            (what, who, how)
            for _, message in await about("participants", checked)
            for who, what, how in [_parts(message)]
        ]
        await owner.execute("""
            drop policy "all of it" on public.wingman_sessions;
            create policy "notes" on public.wingman_sessions for update to authenticated using (true);
            revoke update on public.wingman_sessions from authenticated;
            grant update (notes) on public.wingman_sessions to authenticated;
            revoke delete on public.wingman_sessions from anon, authenticated;
            revoke update (user1_id) on public.wingman_matches from anon;
        """)
        assert [("ok", "cannot rewrite their own outcomes")] == await about("participants", checked)


async def test_a_redis_that_takes_no_writes(valkey: Valkey, redis_url: str) -> None:
    """A replica is found by its refusal."""
    with redis.Redis.from_url(redis_url) as client:
        client.replicaof("127.0.0.1", "1")
        try:
            assert [("failure", "are refused (ReadOnlyError): nothing is cached")] == await about(
                "redis writes", settings(redis_url=redis_url)
            )
        finally:
            client.replicaof("NO", "ONE")
    assert valkey.running


async def test_a_redis_that_may_fill_up(redis_url: str) -> None:
    """A limit without eviction is warned of, a limit with one is named."""
    checked = settings(redis_url=redis_url)
    assert [("ok", "is not limited")] == await about("redis memory", checked)
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", 100_000_000)
        [(status, message)] = await about("redis memory", checked)
        assert status == "warning"
        assert "allkeys-lru" in message
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert [("ok", "is limited, evicted by allkeys-lru")] == await about("redis memory", checked)


async def test_the_probe_leaves_nothing(redis_url: str) -> None:
    """The doctor's own key is gone when it is done."""
    await examine(settings(redis_url=redis_url))
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


async def test_weak_token_settings() -> None:
    """What is allowed and unwise is a warning that names the setting."""
    assert [("warning", "is not checked: set GOODSTANDING_JWT_ISSUER")] == await about(
        "issuer", settings(jwt_issuer="")
    )
    open_to_all = settings(environment="development", dev_auth=True, public_reads=True, jwt_secret="")
    assert [("warning", "GOODSTANDING_DEV_AUTH lets anyone act as anyone")] == await about("development", open_to_all)
    assert [("warning", "reputations are readable without a token")] == await about("public reads", open_to_all)
    assert [("warning", "neither JWT_SECRET nor JWKS_URL is set: no caller with a token is known")] == await about(
        "tokens", open_to_all
    )


async def test_keys_are_fetched_as_the_service_does() -> None:
    """A key set that is not there is a failure, and one over plain HTTP a warning."""
    checked = settings(jwt_secret="", jwks_url="http://127.0.0.1:1/keys")
    assert [
        ("warning", "travel unprotected: GOODSTANDING_JWKS_URL is not https"),
        ("failure", "GOODSTANDING_JWKS_URL gives no usable key"),
    ] == await about("keys", checked)
    assert [("ok", "JWKS; aud authenticated")] == await about("tokens", checked)


def _parts(message: str) -> tuple[str, str, str]:
    who, _, rest = message.partition(" may ")
    what, _, how = rest.partition(" (")
    return f"{who} may", what, f"({how.partition(')')[0]})"
