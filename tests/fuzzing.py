"""What must hold for any bytes that reach a parser; tests/fuzz.py looks for bytes for which it does not."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Final
from uuid import UUID

from starlette.requests import Request

from goodstanding.api import _body
from goodstanding.auth import MAX_KEYS, NOBODY, Authenticator, Caller, Role, TokenVerifier, client_address, parse_keys
from goodstanding.data import parse_session_id, parse_user_id
from goodstanding.entry import Entry, Rejection, decode, encode
from goodstanding.errors import (
    BadRequestError,
    InvalidInputError,
    InvalidSessionIdError,
    InvalidUserIdError,
    PayloadTooLargeError,
    UnauthorizedError,
)
from goodstanding.responses import AttributionRequest, BatchRequest

_SECRET: Final = "a secret of the fuzzers, and of nobody else at all"
_USER: Final = parse_user_id("3f2b8c1e-9d4a-4c6b-8e5f-1a2b3c4d5e6f")
_POLICY: Final = "0123456789ab"
_NOW: Final = datetime(2026, 5, 1, tzinfo=UTC)
_VERIFIER: Final = TokenVerifier(
    secret=_SECRET, key_set=None, audience="authenticated", issuer="", clock=lambda: _NOW, cache_size=10
)
_AUTHENTICATOR: Final = Authenticator(_VERIFIER, dev_auth=True, trusted_proxies=())
_PROXIES: Final = (ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8"))
_LOOP: Final = asyncio.new_event_loop()
_CLAIMS: Final = {"sub": "mallory", "aud": "authenticated", "role": "authenticated", "exp": 4_000_000_000}


def entry(data: bytes) -> None:
    """Reject a cached text, or read what, byte for byte, it is written for."""
    read = decode(data, user_id=_USER, policy=_POLICY)
    if isinstance(read, Entry):
        assert data == encode(read, user_id=_USER, policy=_POLICY)
        assert (read.data is None) is (read.body is None)
    else:
        assert isinstance(read, Rejection)


def user_id(data: bytes) -> None:
    """Refuse a text, or read the UUID that the standard library reads, in lower case."""
    text = data.decode("utf-8", "surrogateescape")
    for parse, error in ((parse_user_id, InvalidUserIdError), (parse_session_id, InvalidSessionIdError)):
        try:
            parsed = parse(text)
        except error:
            continue
        assert text.lower() == parsed == str(UUID(text))


def token(data: bytes) -> None:
    """Refuse whatever stands in a token's place unsigned, always in the same way."""
    try:
        _VERIFIER.verify(data.decode("latin-1"))
    except UnauthorizedError:
        return
    # Nobody but the holder of the secret can have made it.
    message, _, signature = data.rpartition(b".")
    assert _encoded(hmac.new(_SECRET.encode(), message, hashlib.sha256).digest()) == signature


def claims(data: bytes) -> None:
    """Refuse what a signed token says, or give the caller whom it says."""
    header, _, payload = data.partition(b"\n")
    message = _encoded(header or b'{"alg":"HS256"}') + b"." + _encoded(payload)
    signed = message + b"." + _encoded(hmac.new(_SECRET.encode(), message, hashlib.sha256).digest())
    try:
        caller = _VERIFIER.verify(signed.decode())
    except UnauthorizedError:
        return
    told = json.loads(payload)
    assert isinstance(caller, Caller)
    assert caller.subject == told.get("sub")
    assert caller.role == (told["role"] if told["role"] in set(Role) else Role.ANONYMOUS)
    assert told["exp"] > _NOW.timestamp()


def headers(data: bytes) -> None:
    """Refuse what headers say of the caller, or give one; an address is an address."""
    lines = [line.partition(b":")[::2] for line in data.split(b"\n")]
    try:
        caller = _AUTHENTICATOR.caller(lines)
    except (UnauthorizedError, BadRequestError):
        caller = NOBODY
    assert caller.role in {Role.ANONYMOUS, Role.AUTHENTICATED}
    for peer in ("127.0.0.1", "192.0.2.1"):
        told = client_address(lines, peer, _PROXIES)
        assert str(ip_address(told)) == told
        assert peer in {told, "127.0.0.1"}
    assert _AUTHENTICATOR.rate_key(caller, lines, "127.0.0.1")


def key_set(data: bytes) -> None:
    """Refuse what a key server answers, or give public keys that are as they should be."""
    try:
        keys = parse_keys(data)
    except ValueError:
        return
    assert len(keys) <= MAX_KEYS
    assert {algorithm for algorithm, _ in keys} <= {"ES256", "RS256"}


def body(data: bytes) -> None:
    """Refuse a body with a 4xx, or read what fits the contract; however it is cut into pieces."""
    cut = len(data) // 2
    for model in (BatchRequest, AttributionRequest):
        messages = [
            {"type": "http.request", "body": data[:cut], "more_body": True},
            {"type": "http.request", "body": data[cut:], "more_body": False},
        ]

        async def receive(messages: list[dict[str, object]] = messages) -> dict[str, object]:
            return messages.pop(0)

        request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
        try:
            read = _LOOP.run_until_complete(_body(request, model))
        except (BadRequestError, PayloadTooLargeError, InvalidInputError):
            continue
        if isinstance(read, BatchRequest):
            assert 1 <= len(read.user_ids) <= 100
        if isinstance(read, AttributionRequest):
            assert 1 <= len(read.reason) <= 1000
            assert "\x00" not in read.reason
            assert read.reason.encode()


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _signed() -> bytes:
    message = _encoded(b'{"alg":"HS256"}') + b"." + _encoded(json.dumps(_CLAIMS).encode())
    return message + b"." + _encoded(hmac.new(_SECRET.encode(), message, hashlib.sha256).digest())


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "entry": entry,
    "user_id": user_id,
    "token": token,
    "claims": claims,
    "headers": headers,
    "key_set": key_set,
    "body": body,
}

_ENTRY: Final = (
    b'{"score":7,"badge_color":"green","completed_sessions":8,"no_shows":1,'
    b'"cache_timestamp":"2026-11-22T16:39:00.123456Z","user_id":"%s","policy":"%s"}'
) % (_USER.encode(), _POLICY.encode())
_JWK: Final = (
    b'{"kty":"EC","crv":"P-256","kid":"a","use":"sig","alg":"ES256","key_ops":["verify"],'
    b'"x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}'
)

SEEDS: Final[Mapping[str, tuple[bytes, ...]]] = {
    "entry": (
        _ENTRY,
        encode(Entry(None, _NOW), user_id=_USER, policy=_POLICY),
        _ENTRY.replace(b"2026-11-22", b"2026-02-30"),
        _ENTRY.replace(b"7", b"-0"),
        _ENTRY.replace(b"T16", b"T24"),
        _ENTRY + b"\n",
        _ENTRY.replace(b'"score":7', b'"score":7e0'),
    ),
    "user_id": (
        _USER.encode(),
        _USER.upper().encode(),
        b"{%s}" % _USER.encode(),
        b"urn:uuid:" + _USER.encode(),
        _USER.encode() + b"\n",
        _USER.replace("1", "\uff11").encode(),
        b"\xff" * 36,
    ),
    "token": (_signed(), b"..", b"a.b.c", _signed() + b"=", b"\xff.\xff.\xff", b"eyJhbGciOiJub25lIn0.e30."),
    "claims": (
        b"\n" + json.dumps(_CLAIMS).encode(),
        b'{"alg":"HS256"}\n' + json.dumps(_CLAIMS | {"role": "service_role", "aud": ["authenticated"]}).encode(),
        b'{"alg":"HS256","crit":["exp"]}\n{}',
        b'{"alg":"none"}\n{}',
        b'\n{"exp":1e400,"role":"anon","sub":"\\ud800"}',
        b"\n" + b"[" * 5000,
        b"\n" + json.dumps(_CLAIMS | {"exp": 10**400}).encode(),
    ),
    "headers": (
        b"authorization:Bearer " + _signed(),
        b"x-test-user-id:alice",
        b"x-test-user-id:\xff\xfe",
        b"x-forwarded-for:192.0.2.1, 10.0.0.1\nx-forwarded-for:[2001:db8::1]:443",
        b"x-forwarded-for:::ffff:1.2.3.4%eth0,127.0.0.1",
        b"authorization:Bearer\nauthorization:Basic x",
    ),
    "key_set": (
        b'{"keys":[%s]}' % _JWK,
        b'{"keys":[%s]}' % _JWK.replace(b'"use"', b'"d":"AA","use"'),
        b'{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"},{"kty":"oct","k":"AA"},5]}',
        b'{"keys":[%s]}' % _JWK.replace(b"f83", b"AAA"),
        b"[" * 5000,
        b"\xff\xfe",
    ),
    "body": (
        b'{"user_ids":["3f2b8c1e-9d4a-4c6b-8e5f-1a2b3c4d5e6f"]}',
        b'{"at_fault":"user1","reason":"user2 waited"}',
        b'{"at_fault":"both","reason":"\\u0000"}',
        b'{"at_fault":"nobody","reason":"\\ud83d\\ude00 \\ud800"}',
        b'{"at_fault":"user2","reason":"\xc3\xa9","reason":" "}',
        b"[" * 5000,
        b'{"user_ids":[1e999,NaN,null]}',
    ),
}
