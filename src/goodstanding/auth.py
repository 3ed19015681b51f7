"""Who is asking: bearer tokens, the published keys that sign them, and the address a trusted proxy vouches for."""

import asyncio
import hashlib
import json
import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, Self, TypeGuard

import httpx2
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import HMACAlgorithm
from jwt.utils import base64url_decode

from goodstanding.data import Clock
from goodstanding.errors import (
    BadRequestError,
    ConfigurationError,
    GoodstandingError,
    TemporarilyUnavailableError,
    UnauthorizedError,
)
from goodstanding.metrics import DEPENDENCY_UP
from goodstanding.settings import PREFIX, Settings

MAX_TOKEN_LENGTH: Final = 8192
MAX_KEY_SET_BYTES: Final = 65_536
MAX_KEYS: Final = 32

Headers = Iterable[tuple[bytes, bytes]]
"""Raw headers as ASGI hands them over: names in lower case, values untouched."""

PublicKey = EllipticCurvePublicKey | RSAPublicKey
Keys = Mapping[tuple[str, str | None], PublicKey]
"""Public keys by the algorithm they are for and their `kid`, if they have one."""

Signed = tuple[str, str | None, PublicKey]
"""How a token was signed: the algorithm and `kid` that it names, and the published key that this was."""

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network

_log = structlog.get_logger("goodstanding")
_jws = jwt.PyJWS(algorithms=["HS256", "ES256", "RS256"], options={"enforce_minimum_key_length": True})
_SUBJECT: Final = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}")
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_RSA_BITS: Final = range(2048, 8193)
_LAST_SECOND: Final = int(datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp())
_CLIENT_HOST_BITS: Final = 64


class Role(StrEnum):
    """What a caller may do, as far as a token says it."""

    ANONYMOUS = "anonymous"
    AUTHENTICATED = "authenticated"
    SERVICE_ROLE = "service_role"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking; `subject` is 1 to 255 characters, or None where no token named one.

    Until `expires` the token holds, if there is one, and as long as what it was `signed` with is published; neither
    makes another caller.
    """

    role: Role
    subject: str | None
    expires: datetime | None = field(default=None, compare=False)
    signed: "Signed | None" = field(default=None, compare=False)


NOBODY: Final = Caller(Role.ANONYMOUS, None)


class KeySet:
    """The public keys published at a JWKS address, fetched on a timer and never because a token asks for one.

    An async context manager that owns its refresh task. Entering waits for the first fetch, at most
    `deadline_seconds`, and never fails because of it. A fetch that fails keeps the last good keys.
    All durations are in seconds; `chance` gives numbers in [0, 1) that spread the fleet's fetches by +-10 %.
    """

    def __init__(
        self,
        url: str,
        *,
        refresh_seconds: float,
        deadline_seconds: float = 5.0,
        first_retry_seconds: float = 1.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._url = url
        self._refresh_seconds = refresh_seconds
        self._deadline_seconds = deadline_seconds
        self._first_retry_seconds = first_retry_seconds
        self._chance = chance
        self._keys: Keys | None = None
        self._degraded: bool | None = None
        self._stack = AsyncExitStack()

    @classmethod
    def from_settings(cls, settings: Settings) -> Self | None:
        """Build the key set that the settings name, or None where they name none."""
        if not settings.jwks_url:
            return None
        return cls(settings.jwks_url, refresh_seconds=settings.jwks_refresh_seconds)

    @property
    def ready(self) -> bool:
        """Whether keys have been loaded at least once."""
        return self._keys is not None

    @property
    def degraded(self) -> bool:
        """Whether the latest fetch failed, or none has been made."""
        return self._degraded is not False

    @property
    def keys(self) -> Keys | None:
        """The keys in force, None before the first good fetch; another object exactly when they change."""
        return self._keys

    def find(self, algorithm: str, kid: str | None) -> PublicKey:
        """Give the key for a token; a token without `kid` is served only where there is no choice.

        Raises UnauthorizedError where no key fits, TemporarilyUnavailableError before the first good fetch.
        """
        if self._keys is None:
            raise TemporarilyUnavailableError
        fitting = [key for (name, key_id), key in self._keys.items() if name == algorithm and kid in {None, key_id}]
        if len(fitting) != 1:
            raise UnauthorizedError
        return fitting[0]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx2.AsyncClient(follow_redirects=False))
            await self._refresh(client)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(group.create_task(self._keep_fresh(client)).cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _keep_fresh(self, client: httpx2.AsyncClient) -> None:
        retry_seconds = self._first_retry_seconds
        while True:
            if self.ready:
                pause = self._refresh_seconds
            else:
                pause = min(retry_seconds, self._refresh_seconds)
                retry_seconds *= 2
            await asyncio.sleep(pause * (0.9 + 0.2 * self._chance()))
            await self._refresh(client)

    async def _refresh(self, client: httpx2.AsyncClient) -> None:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                keys = parse_keys(await self._fetch(client))
        except Exception as error:  # noqa: BLE001 - whatever ails the other end, the last good keys stay in force
            self._note(degraded=True, reason=type(error).__name__)
            return
        self._note(degraded=False, keys=len(keys))
        if keys != self._keys:
            self._keys = keys
            _log.info("jwks_keys_changed", keys=len(keys))

    async def _fetch(self, client: httpx2.AsyncClient) -> bytes:
        # Undecoded, and read in pieces: a small compressed answer could unpack into any size.
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        async with client.stream("GET", self._url, headers=headers) as response:
            if response.status_code != httpx2.codes.OK:
                message = "the answer is not a key set"
                raise ValueError(message)
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MAX_KEY_SET_BYTES:
                    message = "the key set is too large"
                    raise ValueError(message)
        return bytes(body)

    def _note(self, *, degraded: bool, **fields: object) -> None:
        DEPENDENCY_UP.labels("jwks").set(0 if degraded else 1)
        if degraded is not self._degraded:
            self._degraded = degraded
            if degraded:
                _log.warning("jwks_unavailable", **fields)
            else:
                _log.info("jwks_available", **fields)


def parse_keys(document: bytes) -> Keys:
    """Read a JWKS document (RFC 7517); raises ValueError unless it is one of at most 32 keys.

    A key that does not fit is left out, as RFC 7517 asks: symmetric ones, private ones, other curves and uses.
    Of two keys for the same algorithm and `kid` the first one counts.
    """
    try:
        published = json.loads(document)["keys"]
    except (TypeError, KeyError, RecursionError):
        published = None
    if not isinstance(published, list) or len(published) > MAX_KEYS:
        message = f"not a key set of at most {MAX_KEYS} keys"
        raise ValueError(message)
    keys: dict[tuple[str, str | None], PublicKey] = {}
    for entry in published:
        fitting = _public_key(entry)
        if fitting is not None:
            keys.setdefault(*fitting)
    return keys


def _public_key(jwk: object) -> tuple[tuple[str, str | None], PublicKey] | None:
    if not isinstance(jwk, dict):
        return None
    algorithm = _algorithm(jwk)
    if algorithm is None:
        return None
    try:
        parsed = jwt.PyJWK(jwk, algorithm)
    except Exception:  # noqa: BLE001 - a key that cannot be built, for whatever reason, is no key
        return None
    kid, key = parsed.key_id, parsed.key
    strong = isinstance(key, EllipticCurvePublicKey) or (isinstance(key, RSAPublicKey) and key.key_size in _RSA_BITS)
    return ((algorithm, kid), key) if strong and isinstance(kid, str | None) else None


def _algorithm(jwk: dict[str, Any]) -> str | None:
    """Name the algorithm that a published key is for, or None where anything it declares speaks against it."""
    match jwk:
        case {"kty": "EC", "crv": "P-256"}:
            algorithm = "ES256"
        case {"kty": "RSA"}:
            algorithm = "RS256"
        case _:
            return None
    operations = jwk.get("key_ops", ["verify"])
    fits = (
        _PRIVATE_MEMBERS.isdisjoint(jwk)
        and jwk.get("use", "sig") == "sig"
        and jwk.get("alg", algorithm) == algorithm
        and isinstance(operations, list)
        and "verify" in operations
    )
    return algorithm if fits else None


class TokenVerifier:
    """Turns a JSON Web Token into the caller it proves; remembers up to `cache_size` tokens by their digest.

    HS256 is checked with the shared secret only, ES256 and RS256 with published keys only, and nothing else is
    accepted. Belongs to one event loop. Raises ConfigurationError for a secret that is a public key.
    """

    def __init__(
        self,
        *,
        secret: str,
        key_set: KeySet | None,
        audience: str,
        issuer: str,
        clock: Clock,
        cache_size: int = 10_000,
    ) -> None:
        self._secret = _hmac_secret(secret)
        self._key_set = key_set
        self._audience = audience
        self._issuer = issuer
        self._clock = clock
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, tuple[datetime, Caller]] = OrderedDict()
        self._cached_under: Keys | None = None

    def verify(self, token: str) -> Caller:
        """Give the caller that the token proves.

        Raises UnauthorizedError, always the same, for a token that does not hold, and
        TemporarilyUnavailableError while the keys it needs have never been loaded.
        """
        if len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            raise UnauthorizedError
        known = self.known(token.encode())
        if known is not None:
            return known
        claims, signed = self._signed_claims(token)
        expires = self._lifetime(claims, self._clock().timestamp())
        caller = self._caller(claims, expires, signed)
        self._cache[hashlib.sha256(token.encode()).digest()] = (expires, caller)
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return caller

    @property
    def keys(self) -> object:
        """The published keys; another object when they change."""
        return self._key_set.keys if self._key_set is not None else None

    def holds(self, caller: Caller) -> bool:
        """Tell whether the keys in force would prove this caller again; until when his token holds he knows himself."""
        if caller.signed is None or self._key_set is None:
            return True
        algorithm, kid, key = caller.signed
        try:
            return self._key_set.find(algorithm, kid) == key
        except GoodstandingError:
            return False

    def known(self, token: bytes) -> Caller | None:
        """Give the caller whom a token proved before, while it holds."""
        if self._key_set is not None and self._key_set.keys is not self._cached_under:
            self._cache.clear()
            self._cached_under = self._key_set.keys
        digest = hashlib.sha256(token).digest()
        known = self._cache.get(digest)
        if known is None:
            return None
        if self._clock() >= known[0]:
            del self._cache[digest]
            return None
        self._cache.move_to_end(digest)
        return known[1]

    def _signed_claims(self, token: str) -> tuple[dict[str, Any], Signed | None]:
        if "=" in token:
            # PyJWT takes padded segments, RFC 7515 does not: one token has one spelling.
            raise UnauthorizedError
        try:
            # Read leniently only to choose the key; PyJWT reads the same header again, strictly.
            header = json.loads(base64url_decode(token.partition(".")[0]))
            key = self._key(header)
            claims = json.loads(_jws.decode(token, key, algorithms=[header["alg"]]))
        except GoodstandingError:
            raise
        except Exception:  # noqa: BLE001 - whatever a hostile token makes the libraries raise: it does not hold
            raise UnauthorizedError from None
        if not isinstance(claims, dict):
            raise UnauthorizedError
        return claims, None if isinstance(key, bytes) else (header["alg"], header.get("kid"), key)

    def _key(self, header: dict[str, Any]) -> PublicKey | bytes:
        match header:
            case {"crit": _} | {"b64": _}:
                raise UnauthorizedError
            case {"alg": "HS256"} if self._secret:
                return self._secret
            case {"alg": "ES256" | "RS256" as algorithm} if self._key_set is not None:
                return self._key_set.find(algorithm, header.get("kid"))
            case _:
                raise UnauthorizedError

    def _lifetime(self, claims: dict[str, Any], now: float) -> datetime:
        expires, not_before = claims.get("exp"), claims.get("nbf", 0)
        if not _is_date(expires) or not _is_date(not_before) or not _is_date(claims.get("iat", 0)):
            raise UnauthorizedError
        if now >= expires or now < not_before:
            raise UnauthorizedError
        # Rounded down to the second: a cached token may live shorter than its `exp`, never longer.
        return datetime.fromtimestamp(min(int(expires), _LAST_SECOND), UTC)

    def _caller(self, claims: dict[str, Any], expires: datetime, signed: Signed | None) -> Caller:
        role = claims.get("role")
        if not isinstance(role, str) or (self._issuer and claims.get("iss") != self._issuer):
            raise UnauthorizedError
        # Supabase's own service_role keys carry neither; what a token does carry is checked like anybody's.
        optional = role == Role.SERVICE_ROLE
        if not ((optional and "aud" not in claims) or _names(claims.get("aud"), self._audience)):
            raise UnauthorizedError
        subject = claims.get("sub")
        if not ((optional and "sub" not in claims) or _is_subject(subject)):
            raise UnauthorizedError
        known = role in {Role.AUTHENTICATED, Role.SERVICE_ROLE}
        return Caller(Role(role) if known else Role.ANONYMOUS, subject, expires, signed)


def _hmac_secret(secret: str) -> bytes | None:
    if not secret:
        return None
    try:
        return HMACAlgorithm(hashlib.sha256).prepare_key(secret)
    except jwt.InvalidKeyError:
        message = f"{PREFIX}JWT_SECRET: must be a shared secret, not a public key; publish keys at {PREFIX}JWKS_URL"
        raise ConfigurationError(message) from None


def _is_date(value: object) -> TypeGuard[int | float]:
    """Tell whether a claim is a NumericDate (RFC 7519): a finite number, which in JSON no boolean is."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_subject(value: object) -> bool:
    return isinstance(value, str) and _SUBJECT.fullmatch(value) is not None


def _names(audience: object, expected: str) -> bool:
    if isinstance(audience, list):
        return expected in audience and all(isinstance(one, str) for one in audience)
    return audience == expected


class Authenticator:
    """Tells from a request's raw headers who is asking.

    `dev_auth` lets the header X-Test-User-ID stand for an authenticated user: development only.
    """

    def __init__(self, verifier: TokenVerifier, *, dev_auth: bool, trusted_proxies: Iterable[str]) -> None:
        self._verifier = verifier
        self._dev_auth = dev_auth
        self._trusted = tuple(ip_network(text, strict=False) for text in trusted_proxies)

    @classmethod
    def from_settings(cls, settings: Settings, *, clock: Clock, key_set: KeySet | None) -> Self:
        """Build the authenticator that the settings describe; the key set stays its opener's."""
        verifier = TokenVerifier(
            secret=settings.jwt_secret.get_secret_value(),
            key_set=key_set,
            audience=settings.jwt_audience,
            issuer=settings.jwt_issuer,
            clock=clock,
        )
        return cls(
            verifier,
            dev_auth=settings.dev_auth and settings.environment == "development",
            trusted_proxies=settings.trusted_proxies,
        )

    def caller(self, headers: Headers) -> Caller:
        """Give the caller; a request that claims nothing comes from nobody.

        Raises UnauthorizedError for a claim that does not hold, BadRequestError for two of them, and
        TemporarilyUnavailableError while the keys that a token needs have never been loaded.
        """
        credentials = _single(headers, b"authorization")
        if credentials is not None:
            scheme, _, token = credentials.partition(b" ")
            if scheme.lower() != b"bearer":
                raise UnauthorizedError
            return self._verifier.verify(token.strip(b" ").decode("latin-1"))
        if self._dev_auth:
            return _test_user(_single(headers, b"x-test-user-id"))
        return NOBODY

    @property
    def keys(self) -> object:
        """What signatures are checked with at present; another object when that changes."""
        return self._verifier.keys

    def holds(self, caller: Caller) -> bool:
        """Tell whether what signatures are checked with at present would prove this caller again."""
        return self._verifier.holds(caller)

    def known(self, credentials: bytes) -> Caller | None:
        """Give the caller whom an Authorization header proved before; None: ask `caller`."""
        scheme, _, token = credentials.partition(b" ")
        return self._verifier.known(token.strip(b" ")) if scheme.lower() == b"bearer" else None

    def rate_key(self, caller: Caller, headers: Headers, peer: str | None) -> str:
        """Give the name under which a caller's requests are counted: the subject, else the address.

        An IPv6 address counts as its /64, of which every client owns a whole one. The result holds personal data.
        """
        if caller.subject is not None:
            return f"subject:{caller.subject}"
        address = client_address(headers, peer, self._trusted)
        parsed = _parse_hop(address)
        if isinstance(parsed, IPv6Address):
            return f"network:{int(parsed) >> _CLIENT_HOST_BITS:x}"
        return f"address:{address}"


def _test_user(header: bytes | None) -> Caller:
    if header is None:
        return NOBODY
    subject = header.decode("utf-8", "surrogateescape")
    if not _is_subject(subject):
        raise UnauthorizedError
    return Caller(Role.AUTHENTICATED, subject)


def _single(headers: Headers, name: bytes) -> bytes | None:
    values = [value for key, value in headers if key == name]
    if len(values) > 1:
        raise BadRequestError
    return values[0] if values else None


def client_address(headers: Headers, peer: str | None, trusted_proxies: Sequence[_Network]) -> str:
    """Give the address of the nearest hop that nobody trusted vouches further for; never raises.

    X-Forwarded-For is read from the right and believed hop by hop, as long as the hop that reports is a trusted
    proxy; a malformed entry ends the walk. A peer without an IP address (a Unix socket) is one client: `unknown`.
    """
    nearest = _parse_hop(peer or "")
    if nearest is None:
        return peer or "unknown"
    if _is_trusted(nearest, trusted_proxies):
        reported = b",".join(value for name, value in headers if name == b"x-forwarded-for")
        for text in reversed(reported.decode("latin-1").split(",")):
            hop = _parse_hop(text.strip(" \t"))
            if hop is None:
                break
            nearest = hop
            if not _is_trusted(hop, trusted_proxies):
                break
    return str(nearest)


def _is_trusted(address: _Address, networks: Sequence[_Network]) -> bool:
    return any(address in network for network in networks)


@lru_cache(maxsize=4096)
def _parse_hop(text: str) -> _Address | None:
    """Read `192.0.2.1`, `192.0.2.1:443`, `2001:db8::1` or `[2001:db8::1]:443`; one address has one spelling."""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or (port and not _is_port(port)):
            return None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        if not _is_port(f":{port}"):
            return None
    else:
        host = text
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or IPv6Address(int(address))
    return address


def _is_port(text: str) -> bool:
    return re.fullmatch(r":[0-9]{1,5}", text) is not None
