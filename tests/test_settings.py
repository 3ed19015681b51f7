"""Settings: names, fallbacks, bounds, and one clear line for a wrong value."""

from typing import Final

import pytest

from goodstanding.errors import ConfigurationError
from goodstanding.policy import LEGACY, STANDARD, Blame
from goodstanding.settings import PREFIX, Settings, load_settings

SECRET: Final = "a shared secret of more than 32 bytes"
FALLBACKS: Final = {
    "DATABASE_URL": ("database_url", "postgresql://db.example/app"),
    "REDIS_URL": ("redis_url", "redis://cache.example:6379/1"),
    "SUPABASE_JWT_SECRET": ("jwt_secret", SECRET),
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{field.upper()}", raising=False)
    for name in FALLBACKS:
        monkeypatch.delenv(name, raising=False)


def refusal(**overrides: object) -> str:
    """Give the line with which a configuration is refused."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**overrides)
    assert "\n" not in caught.value.detail
    return caught.value.detail


def value(settings: Settings, field: str) -> object:
    """Read a setting, a secret one too."""
    content = getattr(settings, field)
    return content.get_secret_value() if hasattr(content, "get_secret_value") else content


def test_nothing_needs_to_be_set() -> None:
    """The defaults are those of production: closed, checked, five minutes of cache."""
    settings = load_settings()
    expected = ("production", False, False, False, 300, 600, 60, "authenticated", "standard")
    assert expected == (
        settings.environment,
        settings.dev_auth,
        settings.public_reads,
        settings.metrics_public,
        settings.cache_ttl_seconds,
        settings.read_limit_per_minute,
        settings.admin_limit_per_minute,
        settings.jwt_audience,
        settings.policy,
    )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("environment", "development", "development"),
        ("database_url", "postgres://db.example/app", "postgres://db.example/app"),
        ("redis_url", "rediss+sentinel://a:1,b:2/main/0", "rediss+sentinel://a:1,b:2/main/0"),
        ("redis_url", "redis+cluster://a:1", "redis+cluster://a:1"),
        ("jwks_url", "https://project.example/jwks.json", "https://project.example/jwks.json"),
        ("jwt_secret", SECRET, SECRET),
        ("public_reads", "true", True),
        ("cache_ttl_seconds", "30", 30),
        ("memory_seconds", "0", 0),
        ("relay", "false", False),
        ("relay_database_url", "postgres://db.example:5432/app", "postgres://db.example:5432/app"),
        ("relay_poll_ms", "1000", 1000),
        ("read_limit_per_minute", "1000000", 1_000_000),
        ("trusted_proxies", "10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
        ("trusted_proxies", "", ()),
        ("cors_origins", "https://app.example,http://localhost:3000", ("https://app.example", "http://localhost:3000")),
        ("cors_origins", "*", ("*",)),
        ("policy", "legacy", "legacy"),
        ("max_score", "50", 50),
        ("log_format", "console", "console"),
    ],
)
def test_a_setting_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: object
) -> None:
    """Each setting is read under GOODSTANDING_ and its name in capitals."""
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    assert expected == value(load_settings(), name)


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_the_host_s_own_names_are_fallbacks(monkeypatch: pytest.MonkeyPatch, fallback: str) -> None:
    """What a host app calls its database, Redis and secret is taken unless ours is set; an empty one is none."""
    field, text = FALLBACKS[fallback]
    monkeypatch.setenv(fallback, text)
    assert text == value(load_settings(), field)
    monkeypatch.setenv(f"{PREFIX}{field.upper()}", "")
    assert text == value(load_settings(), field)
    monkeypatch.setenv(f"{PREFIX}{field.upper()}", text.replace("example", "other") + "1")
    assert text.replace("example", "other") + "1" == value(load_settings(), field)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("environment", "staging"),
        ("database_url", "mysql://db.example"),
        ("database_url", "postgresql://db.example:port/app"),
        ("database_url", "postgresql://[::1"),
        ("database_pool_size", "0"),
        ("database_pool_size", "many"),
        ("load_deadline_ms", "49"),
        ("redis_url", "http://cache.example"),
        ("redis_url", "cache.example:6379"),
        ("redis_deadline_ms", "0"),
        ("cache_ttl_seconds", "301"),
        ("cache_ttl_seconds", "0"),
        ("unknown_ttl_seconds", "31"),
        ("stale_ttl_seconds", "3601"),
        ("jwt_secret", "too short"),
        ("jwks_url", "ftp://project.example"),
        ("jwks_url", "https://"),
        ("jwks_url", "https://project.example:port/"),
        ("jwks_refresh_seconds", "4"),
        ("read_limit_per_minute", "0"),
        ("admin_limit_per_minute", "-1"),
        ("trusted_proxies", "10.0.0.0/8,localhost"),
        ("trusted_proxies", "10.0.0.0/33"),
        ("cors_origins", "app.example"),
        ("cors_origins", "https://app.example/path"),
        ("cors_origins", "https://[app"),
        ("policy", "strict"),
        ("completed_rule", "all"),
        ("unattributed_no_show", "user1"),
        ("min_score", "low"),
        ("log_level", "loud"),
        ("dev_auth", "maybe"),
    ],
)
def test_a_wrong_value_stops_the_start_with_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    """A value that is not accepted is refused under the name of its variable and without being repeated."""
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    line = refusal()
    assert line.startswith(f"{PREFIX}{name.upper()}: ")
    assert f"'{text}'" not in line


@pytest.mark.parametrize(
    ("fallback", "text"), [("DATABASE_URL", "mysql://user:hunter2@db"), ("REDIS_URL", "x:hunter2")]
)
def test_a_wrong_secret_is_never_repeated(monkeypatch: pytest.MonkeyPatch, fallback: str, text: str) -> None:
    """A refused URL, which may hold a password, does not appear in the line that refuses it."""
    monkeypatch.setenv(fallback, text)
    line = refusal()
    assert fallback in line
    assert "hunter2" not in line


def test_secrets_do_not_show() -> None:
    """Printing the settings shows neither URLs nor the token secret."""
    settings = load_settings(
        database_url="postgresql://user:hunter2@db", redis_url="redis://:hunter2@r", jwt_secret=SECRET
    )
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter2" not in text
        assert SECRET not in text


def test_the_development_bypass_cannot_start_in_production() -> None:
    """DEV_AUTH stops the start in every environment but development."""
    assert refusal(dev_auth=True).startswith("GOODSTANDING_DEV_AUTH: would let anyone act as anyone")
    assert refusal(dev_auth=True, environment="production").startswith("GOODSTANDING_DEV_AUTH: ")
    assert load_settings(dev_auth=True, environment="development").dev_auth


def test_the_policy_is_built_from_its_preset_and_options() -> None:
    """The named policy holds, with every option that is set replaced."""
    assert STANDARD == load_settings().reputation_policy()
    assert LEGACY == load_settings(policy="legacy").reputation_policy()
    mixed = load_settings(policy="legacy", unattributed_cancelled="nobody", gold_at=15).reputation_policy()
    assert (Blame.NOBODY, Blame.BOTH, 15) == (mixed.unattributed_cancelled, mixed.unattributed_no_show, mixed.gold_at)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"min_score": 30}, "MIN_SCORE"), ({"green_at": 11}, "GREEN_AT"), ({"max_score": -6}, "MIN_SCORE")],
)
def test_policy_options_that_contradict_each_other_are_refused(options: dict[str, int], name: str) -> None:
    """A policy that cannot be is refused under the name of an option at fault."""
    assert refusal(**options).startswith(f"{PREFIX}{name}: ")


@pytest.mark.parametrize(
    ("url", "told", "expected"),
    [
        ("postgresql://db.example/app", None, False),
        ("postgresql://db.example:5432/app", None, False),
        ("postgresql://db.example:6543/postgres", None, True),
        ("postgresql://db.example:6432/app", None, True),
        ("postgresql://db.example:6543/postgres", False, False),
        ("postgresql://db.example:5432/app", True, True),
        ("", None, False),
    ],
)
def test_a_pooler_in_transaction_mode_is_known_by_its_port(url: str, told: bool | None, expected: object) -> None:  # noqa: FBT001 - a case of the table
    """Supabase's and PgBouncer's ports mean a pooler, unless the setting says otherwise."""
    settings = load_settings(database_url=url, database_transaction_pooler=told)
    assert expected is settings.uses_transaction_pooler()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"database_url": "postgresql://db.example:5432/app"}, "postgresql://db.example:5432/app"),
        ({"database_url": "postgresql://db.example:6543/app"}, None),
        ({"database_url": "postgresql://db.example/app", "database_transaction_pooler": True}, None),
        ({}, None),
        (
            {"database_url": "postgresql://a.example:6543/app", "relay_database_url": "postgresql://a.example/app"},
            "postgresql://a.example/app",
        ),
        (
            {"database_url": "postgresql://a.example/app", "relay_database_url": "postgresql://b.example/app"},
            "postgresql://b.example/app",
        ),
    ],
)
def test_sessions_are_kept_where_no_pooler_is(settings: dict[str, object], expected: str | None) -> None:
    """The relay takes its own URL, else that of the service, unless a pooler stands there."""
    assert expected == load_settings(**settings).session_database()


def test_what_a_command_needs_is_asked_for_by_name() -> None:
    """A missing database or a missing way to recognise callers is one line that names the setting."""
    settings = load_settings()
    with pytest.raises(ConfigurationError, match=r"^GOODSTANDING_DATABASE_URL: is required"):
        settings.require_database()
    with pytest.raises(ConfigurationError, match=r"^GOODSTANDING_JWT_SECRET: one of JWT_SECRET and JWKS_URL"):
        settings.require_tokens()
    assert "postgresql://db" == load_settings(database_url="postgresql://db").require_database()


@pytest.mark.parametrize(
    "overrides",
    [
        {"jwt_secret": SECRET},
        {"jwks_url": "https://project.example/jwks.json"},
        {"dev_auth": True, "environment": "development"},
        {"public_reads": True},
    ],
)
def test_any_way_to_recognise_callers_is_enough(overrides: dict[str, object]) -> None:
    """A secret, published keys, the bypass or public reads let the service start."""
    load_settings(**overrides).require_tokens()


def test_overrides_win_and_unknown_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command line says wins over the environment; a name that does not exist is an error."""
    monkeypatch.setenv("GOODSTANDING_CACHE_TTL_SECONDS", "20")
    assert 10 == load_settings(cache_ttl_seconds=10).cache_ttl_seconds
    assert "GOODSTANDING_CACHE_TTL" == refusal(cache_ttl=10).partition(":")[0]


def test_settings_are_frozen() -> None:
    """Settings are read once; nobody changes them afterwards."""
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.dev_auth = True  # type: ignore[misc] # what mypy refuses is what is tried


def test_every_setting_is_described() -> None:
    """Each setting has a sentence of its own, from which the reference is made."""
    for name, field in Settings.model_fields.items():
        assert (field.description or "").rstrip().endswith("."), name
