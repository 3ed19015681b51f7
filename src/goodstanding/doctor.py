"""What works and what does not, one line each: the database, the rights, the indexes, Redis and the tokens."""

import asyncio
import re
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import asyncpg
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError, ResponseError

from goodstanding import tallies
from goodstanding.auth import KeySet
from goodstanding.cache import connect
from goodstanding.errors import ConfigurationError
from goodstanding.history import named_queries
from goodstanding.migrate import COVERING_INDEXES, MIGRATIONS
from goodstanding.settings import Settings

if TYPE_CHECKING:
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_SECONDS: Final = 5.0
_OLDEST_POSTGRES: Final = 14
_OLDEST_REDIS: Final = (6, 2)
_OLDEST_VALKEY: Final = (7, 2)
_FUNCTIONS: Final = ("counts", "attribute", "most_active", "read_counts", "pending", "fold", "recount", "status")
_QUERIES: Final = named_queries((files("goodstanding") / "doctor.sql").read_text(encoding="utf-8"))
_PROBE_KEY: Final = "reputation:doctor"
_PROBE_CHANNEL: Final = "goodstanding:doctor"


class Status(StrEnum):
    """How bad a finding is; a failure means that something does not work."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: one line for people, without secrets or addresses."""

    name: str
    status: Status
    message: str


async def examine(settings: Settings) -> list[Finding]:
    """Check everything; whatever is broken is a finding, never an exception. Ends within half a minute."""
    return [
        *await _database(settings),
        *await _relay(settings),
        *await _redis(settings),
        *await _tokens(settings),
    ]


async def _database(settings: Settings) -> list[Finding]:
    try:
        url = settings.require_database()
    except ConfigurationError as error:
        return [_failure("database", error.detail)]
    connection: _Connection | None = None
    try:
        async with asyncio.timeout(_SECONDS):
            connection = await asyncpg.connect(url, statement_cache_size=0)
            [server] = await connection.fetch(_QUERIES["server"])
            rights = [await _rights(connection, server["login"])] if server["installed"] else []
            return [
                _version(server),
                _login(server),
                _schema(server),
                *rights,
                *await _tables(connection, server["login"]),
                *await _participants(connection),
            ]
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
        return [_failure("database", f"PostgreSQL does not answer as it should ({type(error).__name__})")]
    finally:
        if connection is not None:
            connection.terminate()


def _version(server: asyncpg.Record) -> Finding:
    if server["major"] < _OLDEST_POSTGRES:
        return _failure("database", f"PostgreSQL {server['version']} is too old: {_OLDEST_POSTGRES} is the oldest")
    return _ok("database", f"PostgreSQL {server['version']}")


def _login(server: asyncpg.Record) -> Finding:
    if server["is_superuser"] or server["bypasses_rls"]:
        kind = "a superuser" if server["is_superuser"] else "a login that bypasses row-level security"
        return _warning("login", f"{server['login']} is {kind}: serve with a mere member of goodstanding_service")
    return _ok("login", f"{server['login']} bypasses nothing")


def _schema(server: asyncpg.Record) -> Finding:
    newest = MIGRATIONS[-1].version
    if not server["installed"]:
        return _failure("schema", "not installed: run goodstanding migrate")
    found = re.search(r"\d+$", server["installed_version"] or "")
    if found is None:
        return _failure("schema", "the schema reputation is not this product's, or its comment was changed")
    version = int(found[0])
    if version < newest:
        return _failure("schema", f"version {version}, this program needs {newest}: run goodstanding migrate")
    if version > newest:
        return _failure("schema", f"version {version} is newer than this program's {newest}: upgrade the program")
    return _ok("schema", f"version {version}")


async def _rights(connection: "_Connection", login: str) -> Finding:
    missing = await _names(connection, "missing_rights", _FUNCTIONS)
    if missing:
        return _failure("rights", f"{login} cannot call {missing}: grant goodstanding_service to {login}")
    return _ok("rights", f"{login} can call what the service calls")


async def _tables(connection: "_Connection", login: str) -> list[Finding]:
    readable = await _names(connection, "readable")
    unindexed = await _names(connection, "unindexed")
    hidden = await _names(connection, "hidden")
    return [
        _warning("privacy", f"{login} can read {readable}: serve with a login that cannot")
        if readable
        else _ok("privacy", f"{login} can read no notes, venues, times or reasons"),
        _failure("indexes", f"no valid index on {unindexed}: every count scans the whole table")
        if unindexed
        else _ok("indexes", "every look-up of a count has its index"),
        await _covering(connection),
        _failure("row security", f"hides {hidden} from the functions' owner (FORCE, or another owner): counts fail")
        if hidden
        else _ok("row security", "hides nothing from the counts"),
    ]


async def _covering(connection: "_Connection") -> Finding:
    rows = await connection.fetch(_QUERIES["covering_indexes"], list(COVERING_INDEXES))
    invalid = ", ".join(row["name"] for row in rows if not row["valid"])
    if invalid:
        return _warning("covering indexes", f"{invalid} is invalid: run goodstanding migrate --covering-indexes")
    if len(rows) < len(COVERING_INDEXES):
        return _ok("covering indexes", f"{len(rows)} of {len(COVERING_INDEXES)} (optional: they halve a recount)")
    return _ok("covering indexes", "all are there")


async def _participants(connection: "_Connection") -> list[Finding]:
    ways: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for row in await connection.fetch(_QUERIES["rewritable"]):
        roles, policies = ways.setdefault((row["table_name"], row["command"]), (set(), set()))
        roles.add(row["role"])
        policies.add("row-level security is off" if row["policy"] is None else f'policy "{row["policy"]}"')
    if not ways:
        return [_ok("participants", "cannot rewrite their own outcomes")]
    return [
        _warning(
            "participants",
            f"{', '.join(sorted(roles))} may {command} {table} ({', '.join(sorted(policies))}): "
            "people can rewrite their own outcomes",
        )
        for (table, command), (roles, policies) in ways.items()
    ]


async def _relay(settings: Settings) -> list[Finding]:
    """Look whether a relay could lead over this connection, and whether one does."""
    url = settings.session_database()
    if url is None:
        pooled = settings.uses_transaction_pooler()
        message = "none can run behind this pooler: set GOODSTANDING_RELAY_DATABASE_URL"
        return [_warning("relay", message)] if pooled else []
    connection: _Connection | None = None
    try:
        async with asyncio.timeout(_SECONDS):
            connection = await asyncpg.connect(url, statement_cache_size=0)
            if await connection.fetchval(tallies.QUERIES["led"], tallies.LEAD):
                return [_ok("relay", "one leads")]
            return [_warning("relay", "none leads: does any process serve, with GOODSTANDING_RELAY and its Redis?")]
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
        return [_failure("relay", f"PostgreSQL does not answer as it should ({type(error).__name__})")]
    finally:
        if connection is not None:
            connection.terminate()


async def _names(connection: "_Connection", query: str, *values: object) -> str:
    return ", ".join(row["name"] for row in await connection.fetch(_QUERIES[query], *values))


async def _redis(settings: Settings) -> list[Finding]:
    url = settings.redis_url.get_secret_value()
    if not url:
        return [_ok("redis", "none: each process caches in its own memory")]
    try:
        client = connect(url, deadline=_SECONDS / 2)
        try:
            async with asyncio.timeout(_SECONDS):
                # All of it: some servers do not take several sections.
                info = await client.info()
                return [_redis_version(info), await _redis_writes(client), _redis_memory(info)]
        finally:
            await client.aclose()
    except (RedisError, OSError, ValueError) as error:
        return [_failure("redis", f"does not answer as it should ({type(error).__name__})")]


def _redis_version(info: dict[str, Any]) -> Finding:
    product, oldest = ("Valkey", _OLDEST_VALKEY) if "valkey_version" in info else ("Redis", _OLDEST_REDIS)
    version = str(info.get(f"{product.lower()}_version", "0"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < oldest:
        return _failure("redis", f"{product} {version} is too old: {'.'.join(map(str, oldest))} is the oldest")
    return _ok("redis", f"{product} {version}")


async def _redis_writes(client: "Redis | RedisCluster") -> Finding:
    try:
        await client.set(_PROBE_KEY, "", px=1000)
        await client.delete(_PROBE_KEY)
        await client.publish(_PROBE_CHANNEL, "")
    except ResponseError as error:
        return _failure("redis writes", f"are refused ({type(error).__name__}): nothing is cached")
    return _ok("redis writes", "are taken")


def _redis_memory(info: dict[str, Any]) -> Finding:
    limit, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", "noeviction"))
    if limit and policy == "noeviction":
        return _warning("redis memory", "is limited and nothing is evicted: set maxmemory-policy to allkeys-lru")
    return _ok("redis memory", f"is limited, evicted by {policy}" if limit else "is not limited")


async def _tokens(settings: Settings) -> list[Finding]:
    try:
        settings.require_tokens()
    except ConfigurationError as error:
        return [_failure("tokens", error.detail)]
    findings = []
    kinds = (("HS256 by a shared secret", settings.jwt_secret.get_secret_value()), ("JWKS", settings.jwks_url))
    taken = " and ".join(kind for kind, given in kinds if given)
    if taken:
        findings.append(_ok("tokens", f"{taken}; aud {settings.jwt_audience}"))
    else:
        findings.append(_warning("tokens", "neither JWT_SECRET nor JWKS_URL is set: no caller with a token is known"))
    if taken and not settings.jwt_issuer:
        findings.append(_warning("issuer", "is not checked: set GOODSTANDING_JWT_ISSUER"))
    if settings.jwks_url:
        findings.extend(await _keys(settings))
    if settings.dev_auth:
        findings.append(_warning("development", "GOODSTANDING_DEV_AUTH lets anyone act as anyone"))
    if settings.public_reads:
        findings.append(_warning("public reads", "reputations are readable without a token"))
    return findings


async def _keys(settings: Settings) -> list[Finding]:
    findings = []
    if settings.jwks_url.startswith("http://"):
        findings.append(_warning("keys", "travel unprotected: GOODSTANDING_JWKS_URL is not https"))
    async with KeySet(settings.jwks_url, refresh_seconds=settings.jwks_refresh_seconds) as key_set:
        if key_set.ready:
            findings.append(_ok("keys", "were fetched"))
        else:
            findings.append(_failure("keys", "GOODSTANDING_JWKS_URL gives no usable key"))
    return findings


def _ok(name: str, message: str) -> Finding:
    return Finding(name, Status.OK, message)


def _warning(name: str, message: str) -> Finding:
    return Finding(name, Status.WARNING, message)


def _failure(name: str, message: str) -> Finding:
    return Finding(name, Status.FAILURE, message)
