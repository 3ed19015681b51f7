"""Every setting, read from the environment once and validated before anything starts."""

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from goodstanding.errors import ConfigurationError
from goodstanding.policy import ReputationPolicy

PREFIX: Final = "GOODSTANDING_"
_TRANSACTION_POOLER_PORTS: Final = frozenset({6432, 6543})
_HOST: Final = r"(?:\[[0-9a-fA-F:.]+\]|[^\[\],:/?#@]+)(?::[0-9]{1,5})?"
_REDIS_URL: Final = re.compile(
    rf"""
        rediss?://(?:[^@/]*@)?(?:{_HOST})?(?:/[0-9]*)?(?:\?.*)?
        | unix://.+
        | rediss?\+sentinel://(?:[^@/]*@)?{_HOST}(?:,{_HOST})*/[^/?]+(?:/[0-9]*)?
        | rediss?\+cluster://(?:[^@/]*@)?{_HOST}/?0?(?:\?.*)?
    """,
    re.VERBOSE | re.ASCII,
)
_Listed = Annotated[tuple[str, ...], NoDecode]


def _name(field: str, *fallbacks: str) -> AliasChoices:
    return AliasChoices(f"{PREFIX}{field.upper()}", *fallbacks)


class Settings(BaseSettings):
    """The service's configuration. Environment names are `GOODSTANDING_` and the field's name in capitals.

    Build it with `load_settings()`, which turns a wrong value into one line that names it.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    environment: Annotated[
        Literal["production", "development"],
        Field(description="`development` allows what must never run in production, such as DEV_AUTH."),
    ] = "production"

    database_url: Annotated[
        SecretStr,
        Field(
            validation_alias=_name("database_url", "DATABASE_URL"),
            description="PostgreSQL of the host app, as a member of the role goodstanding_service.",
        ),
    ] = SecretStr("")
    database_pool_size: Annotated[
        int, Field(ge=1, le=200, description="Connections to PostgreSQL per process; also the cap on concurrent loads.")
    ] = 10
    database_transaction_pooler: Annotated[
        bool | None,
        Field(
            description="The URL leads to a pooler in transaction mode (PgBouncer, Supabase port 6543). "
            "Unset: true when the port is 6543 or 6432."
        ),
    ] = None
    relay: Annotated[
        bool,
        Field(
            description="Whether this process may carry changes to the caches. One of the fleet does it; without any, "
            "only what was computed within the last 1.5 seconds is served from a cache."
        ),
    ] = True
    relay_database_url: Annotated[
        SecretStr,
        Field(
            description="PostgreSQL for the relay, over connections that keep their session: not a pooler in "
            "transaction mode. Empty: the database URL."
        ),
    ] = SecretStr("")
    relay_poll_ms: Annotated[
        int, Field(ge=1, le=1000, description="How often an idle relay looks for changes, in milliseconds.")
    ] = 15
    load_deadline_ms: Annotated[
        int, Field(ge=50, le=10_000, description="Longest wait for PostgreSQL, in milliseconds; also the lease's life.")
    ] = 1000

    redis_url: Annotated[
        SecretStr,
        Field(
            validation_alias=_name("redis_url", "REDIS_URL"),
            description="Redis or Valkey: redis://, rediss://, unix://, "
            "redis+sentinel://host:port,host:port/service/db or redis+cluster://host:port. "
            "Empty: the cache is this process's memory.",
        ),
    ] = SecretStr("")
    redis_deadline_ms: Annotated[
        int, Field(ge=1, le=1000, description="Longest wait for one Redis operation, in milliseconds.")
    ] = 50
    cache_ttl_seconds: Annotated[int, Field(ge=1, le=300, description="Life of a cached reputation, in seconds.")] = 300
    unknown_ttl_seconds: Annotated[
        int, Field(ge=1, le=30, description="How long an unknown user is remembered as unknown, in seconds.")
    ] = 30
    stale_ttl_seconds: Annotated[
        int,
        Field(
            ge=0,
            le=3600,
            description="How long a last known good copy may stand in while PostgreSQL is away, in seconds; 0: never.",
        ),
    ] = 3600
    cache_wait_ms: Annotated[
        int,
        Field(
            ge=0,
            le=2000,
            description="Longest wait for another process's load of the same user, in milliseconds; in any case at "
            "most half of the load deadline.",
        ),
    ] = 200
    memory_entries: Annotated[
        int, Field(ge=100, le=10_000_000, description="Most users kept in a process's memory, with or without Redis.")
    ] = 100_000
    memory_seconds: Annotated[
        int,
        Field(
            ge=0,
            le=300,
            description="How long a process may keep in memory what it read from Redis, in seconds; a change "
            "evicts it at once. 0: not at all.",
        ),
    ] = 10

    jwt_secret: Annotated[
        SecretStr,
        Field(
            validation_alias=_name("jwt_secret", "SUPABASE_JWT_SECRET"),
            description="Shared secret of HS256 tokens, at least 32 bytes.",
        ),
    ] = SecretStr("")
    jwks_url: Annotated[str, Field(description="Where the public keys of ES256 and RS256 tokens are published.")] = ""
    jwks_refresh_seconds: Annotated[
        int, Field(ge=5, le=3600, description="Interval at which the public keys are fetched, in seconds.")
    ] = 60
    jwt_audience: Annotated[str, Field(min_length=1, description="Required `aud` of a token.")] = "authenticated"
    jwt_issuer: Annotated[str, Field(description="Required `iss` of a token; empty: not checked.")] = ""
    dev_auth: Annotated[
        bool,
        Field(description="Development only: the header X-Test-User-ID counts as an authenticated user."),
    ] = False
    public_reads: Annotated[bool, Field(description="Open the single read to callers without a token.")] = False
    metrics_public: Annotated[bool, Field(description="Open /metrics to callers without a token.")] = False

    read_limit_per_minute: Annotated[
        int, Field(ge=1, le=1_000_000, description="Reads per caller and minute, over the whole fleet.")
    ] = 600
    admin_limit_per_minute: Annotated[
        int, Field(ge=1, le=1_000_000, description="Administrative calls per caller and minute, over the whole fleet.")
    ] = 60
    streams_per_caller: Annotated[
        int, Field(ge=1, le=10_000, description="Streams that one caller may have open in one process.")
    ] = 20
    streams_per_process: Annotated[int, Field(ge=1, le=100_000, description="Streams that one process holds open.")] = (
        5000
    )
    trusted_proxies: Annotated[
        _Listed,
        Field(description="Addresses or networks whose X-Forwarded-For is believed, separated by commas."),
    ] = ()
    cors_origins: Annotated[
        _Listed, Field(description="Origins allowed by CORS, separated by commas; `*` allows all.")
    ] = ()

    policy: Annotated[Literal["standard", "legacy"], Field(description="The named policy to start from.")] = "standard"
    completed_rule: Annotated[
        Literal["any", "own", "both"] | None,
        Field(description="Policy option: whose confirmation completes a session."),
    ] = None
    unattributed_no_show: Annotated[
        Literal["unconfirmed", "both", "nobody"] | None,
        Field(description="Policy option: who is at fault for a no-show without a recorded verdict."),
    ] = None
    unattributed_cancelled: Annotated[
        Literal["unconfirmed", "both", "nobody"] | None,
        Field(description="Policy option: who is at fault for a cancellation without a recorded verdict."),
    ] = None
    min_score: Annotated[int | None, Field(description="Policy option: lowest score.")] = None
    max_score: Annotated[int | None, Field(description="Policy option: highest score.")] = None
    gold_at: Annotated[int | None, Field(description="Policy option: lowest score of a gold badge.")] = None
    green_at: Annotated[int | None, Field(description="Policy option: lowest score of a green badge.")] = None

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least severe log line that is written.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "json", "console"],
        Field(description="`auto` is readable on a terminal and JSON everywhere else."),
    ] = "auto"

    @field_validator("trusted_proxies", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for part in value:
            try:
                ipaddress.ip_network(part, strict=False)
            except ValueError:
                message = "must hold IP addresses or networks, separated by commas"
                raise ValueError(message) from None
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for part in value:
            url = _split_url(part)
            if part != "*" and (url is None or url.scheme not in {"http", "https"} or url.path or not url.netloc):
                message = "must hold origins such as https://app.example, separated by commas, or *"
                raise ValueError(message)
        return value

    @field_validator("database_url", "relay_database_url")
    @classmethod
    def _database(cls, value: SecretStr) -> SecretStr:
        url = _split_url(value.get_secret_value())
        if value.get_secret_value() and (url is None or url.scheme not in {"postgres", "postgresql"}):
            message = "must start with postgresql://"
            raise ValueError(message)
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if text and _REDIS_URL.fullmatch(text) is None:
            message = (
                "must be like redis://host:port/0, rediss://host:port/0, unix:///path, "
                "redis+sentinel://host:port,host:port/service/0 or redis+cluster://host:port"
            )
            raise ValueError(message)
        return value

    @field_validator("jwks_url")
    @classmethod
    def _jwks(cls, value: str) -> str:
        url = _split_url(value)
        if value and (url is None or url.scheme not in {"http", "https"} or not url.hostname):
            message = "must be an http:// or https:// address"
            raise ValueError(message)
        return value

    @field_validator("jwt_secret")
    @classmethod
    def _secret(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value().encode()) < 32:  # noqa: PLR2004 - RFC 7518, section 3.2
            message = "must be at least 32 bytes long (RFC 7518, section 3.2)"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dev_auth and self.environment != "development":
            message = (
                f"{PREFIX}DEV_AUTH: would let anyone act as anyone; it is allowed only with "
                f"{PREFIX}ENVIRONMENT=development"
            )
            raise ConfigurationError(message)
        try:
            self.reputation_policy()
        except ConfigurationError as error:
            message = f"{PREFIX}{error.detail.partition(' ')[0].upper()}: {error.detail}"
            raise ConfigurationError(message) from None
        return self

    def reputation_policy(self) -> ReputationPolicy:
        """Give the policy that these settings describe; raises ConfigurationError."""
        return ReputationPolicy.preset(
            self.policy,
            completed_rule=self.completed_rule,
            unattributed_no_show=self.unattributed_no_show,
            unattributed_cancelled=self.unattributed_cancelled,
            min_score=self.min_score,
            max_score=self.max_score,
            gold_at=self.gold_at,
            green_at=self.green_at,
        )

    def uses_transaction_pooler(self) -> bool:
        """Tell whether PostgreSQL is reached through a pooler that keeps no session."""
        if self.database_transaction_pooler is not None:
            return self.database_transaction_pooler
        url = _split_url(self.database_url.get_secret_value())
        return url is not None and url.port in _TRANSACTION_POOLER_PORTS

    def session_database(self) -> str | None:
        """Give the URL of a database that keeps sessions, which relay and NOTIFY need; None: there is none."""
        url = self.relay_database_url.get_secret_value()
        if not url and not self.uses_transaction_pooler():
            url = self.database_url.get_secret_value()
        return url or None

    def require_database(self) -> str:
        """Give the database URL; raises ConfigurationError when there is none."""
        url = self.database_url.get_secret_value()
        if not url:
            message = f"{PREFIX}DATABASE_URL: is required (or DATABASE_URL)"
            raise ConfigurationError(message)
        return url

    def require_tokens(self) -> None:
        """Raise ConfigurationError when no caller could ever be recognised."""
        if not (self.jwt_secret.get_secret_value() or self.jwks_url or self.dev_auth or self.public_reads):
            message = f"{PREFIX}JWT_SECRET: one of JWT_SECRET and JWKS_URL is required, or nobody could ever call"
            raise ConfigurationError(message)


def _split_url(text: str) -> Any:  # noqa: ANN401 - urllib's result types are private
    try:
        url = urlsplit(text)
        url.port  # noqa: B018 - reading it validates it
    except ValueError:
        return None
    return url


def load_settings(**overrides: object) -> Settings:
    """Read the settings from the environment; raises ConfigurationError, one line that names the wrong one.

    `overrides` win over the environment; their names are the fields' names.
    """
    try:
        return Settings(**cast("Mapping[str, Any]", overrides))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = str(first["loc"][0]) if first["loc"] else ""
        name = place if place.isupper() else f"{PREFIX}{place.upper()}"
        message = f"{name}: {first['msg'].removeprefix('Value error, ')}"
        raise ConfigurationError(message) from None
