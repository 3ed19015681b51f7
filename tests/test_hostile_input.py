"""Whatever a client sends to `goodstanding serve`, it gets a 4xx in the contract's form: one table, over sockets."""

import base64
import hashlib
import hmac
import json
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import httpx2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from goodstanding import api, create_app
from goodstanding.embedded import Postgres, Valkey
from goodstanding.main import utc_now
from tests.serving import (
    ATTRIBUTION,
    BATCH,
    GONE,
    INVALIDATE,
    NIL,
    SECRET,
    SINGLE,
    Backend,
    client_of_command,
    environment_of,
    free_port,
    open_backend,
    raw_exchange,
    serving,
    token,
    wait_until,
)

OpenAPI: TypeAlias = dict[str, Any]
_MARK: Final = "evilmark"
"""Part of every input that could be echoed; no answer may hold it."""
_JSON: Final = ("Content-Type", "application/json")
_CODES: Final = {
    400: {"bad_request"},
    401: {"unauthorized"},
    403: {"forbidden"},
    404: {"not_found", "user_not_found", "session_not_found"},
    405: {"method_not_allowed"},
    408: {"request_timeout"},
    413: {"payload_too_large"},
    415: {"unsupported_media_type"},
    422: {"invalid_input", "invalid_user_id", "invalid_session_id"},
    431: {"headers_too_large"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One request and the status it must get; `raw` is sent as it is."""

    name: str
    status: int
    path: str | bytes = SINGLE.format(NIL)
    method: str = "GET"
    headers: tuple[tuple[str | bytes, str | bytes], ...] = ()
    body: bytes = b""
    role: str | None = "authenticated"
    length: bool = True
    raw: bytes = b""

    def request(self) -> bytes:
        """Write the request as it goes over the wire."""
        if self.raw:
            return self.raw
        headers = [("Host", "app.example"), ("Connection", "close"), *self.headers]
        if self.role is not None:
            headers.append(("Authorization", f"Bearer {token(self.role)}"))
        if self.length and (self.body or self.method == "POST"):
            headers.append(("Content-Length", str(len(self.body))))
        lines = b"".join(b"%s: %s\r\n" % (_raw(name), _raw(value)) for name, value in headers)
        return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (self.method.encode(), _raw(self.path), lines, self.body)


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _id(name: str, text: str | bytes, status: int = 422) -> Row:
    return Row(f"id: {name}", status, b"/api/user/reputation/" + _raw(text))


def _query(name: str, text: str, status: int = 422) -> Row:
    return Row(f"query: {name}", status, f"{SINGLE.format(NIL)}?{text}")


def _batch(name: str, body: str | bytes, status: int) -> Row:
    return Row(f"batch: {name}", status, BATCH, "POST", (_JSON,), _raw(body))


def _verdict(name: str, body: object, status: int = 422) -> Row:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Row(f"verdict: {name}", status, ATTRIBUTION.format(GONE), "POST", (_JSON,), text, "service_role")


def _typed(name: str, status: int, *values: str | bytes) -> Row:
    body = json.dumps({"user_ids": [NIL]}).encode()
    return Row(f"type: {name}", status, BATCH, "POST", tuple(("Content-Type", value) for value in values), body)


def _authorized(name: str, *values: str | bytes, status: int = 401) -> Row:
    headers = tuple(("Authorization", value) for value in values)
    return Row(f"token: {name}", status, headers=headers, role=None)


def _trailed(name: str, line: str, status: int) -> Row:
    """Make a row whose chunks are fine and are followed by a line such as a head has."""
    body = f"{len(_ONE):x}\r\n{_ONE}\r\n0\r\n{line}\r\n\r\n".encode()
    return Row(f"trailer: {name}", status, BATCH, "POST", _CHUNKED, body, role=None, length=False)


def _forged(name: str, header: object = None, claims: object = None, *, status: int = 401) -> Row:
    """Make a row of a token that is signed with the right secret, whatever it says."""
    default: dict[str, object] = {
        "sub": "mallory",
        "aud": "authenticated",
        "role": "authenticated",
        "exp": 4_000_000_000,
    }
    head = {"alg": "HS256", "typ": "JWT"} | header if isinstance(header, dict) else header or {"alg": "HS256"}
    body = (
        {key: value for key, value in (default | claims).items() if value is not ...}
        if isinstance(claims, dict)
        else claims
    )
    parts = [_encoded(json.dumps(part).encode()) for part in (head, default if body is None else body)]
    signature = hmac.new(SECRET.encode(), b".".join(parts), hashlib.sha256).digest()
    return _authorized(name, b"Bearer " + b".".join([*parts, _encoded(signature)]), status=status)


def _encoded(part: bytes) -> bytes:
    return base64.urlsafe_b64encode(part).rstrip(b"=")


_CHUNKED: Final = (_JSON, ("Transfer-Encoding", "chunked"))
_VERDICT: Final = {"at_fault": "user1", "reason": _MARK}
_ONE: Final = json.dumps({"user_ids": [NIL]})
_HEX: Final = NIL.replace("-", "")

ROWS: Final = [
    # Ids.
    _id("nil", NIL, 404),
    _id("greatest", "f" * 8 + "-ffff-ffff-ffff-" + "f" * 12, 404),
    _id("nobody's", GONE, 404),
    _id("nobody's, in capitals", "ABCDEFAB-CDEF-4ABC-8DEF-ABCDEFABCDEF", 404),
    _id("braces", f"%7B{GONE}%7D"),
    _id("raw braces", f"{{{GONE}}}"),
    _id("urn", f"urn:uuid:{GONE}"),
    _id("no hyphens", _HEX),
    _id("misplaced hyphens", "1111-11112222-4333-8444-555555555555"),
    _id("only hyphens", "-" * 36),
    _id("one digit short", GONE[:-1]),
    _id("one digit more", GONE + "5"),
    _id("no hexadecimal digit", GONE[:-1] + "g"),
    _id("full-width digits", "%EF%BC%91" * 8 + GONE[8:]),
    _id("arabic digits", "%D9%A1" * 8 + GONE[8:]),
    _id("superscript digits", "%C2%B2" * 8 + GONE[8:]),
    _id("a cyrillic a", "%D0%B0" + GONE[1:]),
    _id("another hyphen", GONE.replace("-", "%E2%80%90")),
    _id("a soft hyphen", GONE + "%C2%AD"),
    _id("a zero-width space", GONE + "%E2%80%8B"),
    _id("a right-to-left mark", "%E2%80%8F" + GONE),
    _id("an emoji", "%F0%9F%98%80"),
    _id("a trailing newline", GONE + "%0A"),
    _id("a leading newline", "%0A" + GONE),
    _id("a trailing CRLF", GONE + "%0D%0A"),
    _id("a header of its own", GONE + f"%0D%0ASet-Cookie:%20{_MARK}=1"),
    _id("a trailing space", GONE + "%20"),
    _id("a leading space", "%20" + GONE),
    _id("a plus", "+" + GONE),
    _id("NUL behind", GONE + "%00"),
    _id("NUL before", "%00" + GONE),
    _id("NUL alone", "%00"),
    _id("invalid UTF-8", "%FF%FE" + GONE),
    _id("an overlong slash", GONE + "%C0%AF"),
    _id("a surrogate", "%ED%A0%80"),
    _id("a lone percent sign", "%"),
    _id("a broken escape", "%zz" + _MARK),
    _id("encoded twice", GONE.replace("-", "%252D")),
    _id("a parent folder", ".."),
    _id("an encoded parent folder", "%2e%2e"),
    _id("a path", "..%2F..%2F" + _MARK, 404),
    _id("a raw path", "../../" + _MARK, 404),
    _id("a backslash path", "..%5C..%5C" + _MARK),
    _id("empty", "", 404),
    _id("a slash behind", GONE + "/", 404),
    _id("an encoded slash behind", GONE + "%2F", 404),
    _id("SQL", f"1'%20or%20'1'='1';--{_MARK}"),
    _id("a shell", f"$(id){_MARK}"),
    _id("a template", f"%7B%7B7*7%7D%7D{_MARK}"),
    _id("a look-up", f"$%7Bjndi:ldap://{_MARK}%7D", 404),
    _id("a script", f"%3Cscript%3E{_MARK}%3C%2Fscript%3E", 404),
    _id("an image", f"%3Cimg%20src=x%20onerror={_MARK}%3E"),
    _id("a glob", "*"),
    _id("a word", "null"),
    _id("another word", "batch", 405),
    _id("a number", "0"),
    _id("a negative number", "-1"),
    _id("a great number", "1e999"),
    _id("a path parameter", GONE + f";{_MARK}=1"),
    _id("two ids", f"{GONE},{NIL}"),
    _id("a comment", f"{GONE}%23"),
    _id("a Redis pattern", "%2A%7D:lease"),
    _id("8 KB", _MARK * 1000),
    _id("60 KB", "a" * 60_000, 431),
    Row("id: bytes beyond ASCII", 400, b"/api/user/reputation/\xff\xfe"),
    Row("id: to invalidate", 422, INVALIDATE.format(_MARK), "POST", role="service_role"),
    Row("id: to invalidate, a newline", 422, INVALIDATE.format(GONE + "%0A"), "POST", role="service_role"),
    Row("id: to invalidate, a wildcard", 422, INVALIDATE.format("*"), "POST", role="service_role"),
    Row(
        "id: of a session",
        422,
        ATTRIBUTION.format(_MARK),
        "POST",
        (_JSON,),
        json.dumps(_VERDICT).encode(),
        "service_role",
    ),
    Row(
        "id: of a session, in braces",
        422,
        ATTRIBUTION.format(f"%7B{GONE}%7D"),
        "POST",
        (_JSON,),
        json.dumps(_VERDICT).encode(),
        "service_role",
    ),
    # Queries.
    _query("a word", f"use_cache={_MARK}"),
    _query("one", "use_cache=1"),
    _query("capitals", "use_cache=TRUE"),
    _query("empty", "use_cache="),
    _query("no value", "use_cache"),
    _query("a space", "use_cache=%20true"),
    _query("a newline", "use_cache=true%0A"),
    _query("NUL", "use_cache=true%00"),
    _query("invalid UTF-8", "use_cache=%FF"),
    _query("twice", "use_cache=true&use_cache=false"),
    _query("8 KB", "use_cache=" + "t" * 8000),
    _query("another name", f"{_MARK}=1", 404),
    _query("a list", "use_cache[]=false", 404),
    _query("1,000 parameters", "&".join(f"p{number}=1" for number in range(1000)), 404),
    _query("5,000 parameters", "&".join(f"p{number}=1" for number in range(5000)), 431),
    _query("ampersands", "&" * 5000, 404),
    _query("an override", "_method=DELETE", 404),
    _query("a token", f"access_token={_MARK}", 404),
    # Streams.
    *(
        Row(f"stream: {name}", 422, f"/api/user/reputation/stream{query}")
        for name, query in {
            "nobody": "",
            "an empty id": "?user_id=",
            "a word": f"?user_id={_MARK}",
            "a newline behind": f"?user_id={NIL}%0A",
            "one id of two": f"?user_id={NIL}&user_id={_MARK}",
            "a list": f"?user_id={NIL},{GONE}",
            "another name": f"?user_ids={NIL}",
            "51 users": "?" + "&".join(f"user_id={NIL[:-2]}{number:02}" for number in range(51)),
        }.items()
    ),
    # Bodies of a batch.
    _batch("empty", "", 400),
    _batch("a space", " ", 400),
    _batch("a brace", "{", 400),
    _batch("truncated", _ONE[:-3], 400),
    _batch("followed by something", _ONE + _MARK, 400),
    _batch("two documents", _ONE + _ONE, 400),
    _batch("a trailing comma", _ONE[:-1] + ",}", 400),
    _batch("single quotes", _ONE.replace('"', "'"), 400),
    _batch("a comment", f"/* {_MARK} */" + _ONE, 400),
    _batch("a form", f"user_ids={_MARK}", 400),
    _batch("XML", f"<?xml version='1.0'?><{_MARK}/>", 400),
    _batch("a byte order mark", b"\xef\xbb\xbf" + _ONE.encode(), 400),
    _batch("invalid UTF-8", b'{"user_ids":["\xff"]}', 400),
    _batch("an overlong letter", b'{"user_ids":["\xc1\xa1"]}', 400),
    _batch("UTF-16", _ONE.encode("utf-16"), 400),
    _batch("UTF-32", _ONE.encode("utf-32"), 400),
    _batch("a lone surrogate", r'{"user_ids":["\ud800"]}', 400),
    _batch("a surrogate pair the wrong way", r'{"user_ids":["\ude00\ud83d"]}', 400),
    _batch("a raw control character", '{"user_ids":["\x01"]}', 400),
    _batch("NUL bytes", b"\x00" * 100, 400),
    _batch("nesting of 30,000 arrays", "[" * 30_000 + "]" * 30_000, 400),
    _batch("nesting of 10,000 objects", '{"a":' * 10_000, 400),
    _batch("nesting of 100,000", "[" * 100_000, 413),
    _batch("nesting inside", f'{{"user_ids":{"[" * 150}{"]" * 150}}}', 422),
    _batch("a megabyte", '{"user_ids":["' + "a" * 1_000_000 + '"]}', 413),
    _batch("ten megabytes", b" " * 10_000_000, 413),
    _batch("a byte too long", _ONE + " " * (65_537 - len(_ONE)), 413),
    _batch("a number of 10,000 digits", f'{{"user_ids":[{"1" * 10_000}]}}', 400),
    _batch("a string of 60 KB", f'{{"user_ids":["{"a" * 60_000}"]}}', 422),
    _batch("NaN", "NaN", 422),
    _batch("NaN inside", '{"user_ids":[NaN]}', 422),
    _batch("infinity", '{"user_ids":[Infinity]}', 422),
    _batch("minus infinity", '{"user_ids":[-Infinity]}', 422),
    _batch("1e999", '{"user_ids":[1e999]}', 422),
    _batch("null", "null", 422),
    _batch("a number", "1", 422),
    _batch("a string", f'"{_MARK}"', 422),
    _batch("true", "true", 422),
    _batch("an array", json.dumps([NIL]), 422),
    _batch("an empty object", "{}", 422),
    _batch("another member", json.dumps({"ids": [NIL]}), 422),
    _batch("an extra member", json.dumps({"user_ids": [NIL], _MARK: 1}), 422),
    _batch("a prototype", json.dumps({"user_ids": [NIL], "__proto__": {}}), 422),
    _batch("the last of two lists counts", f'{{"user_ids":["{NIL}"],"user_ids":["{_MARK}"]}}', 422),
    _batch("ids: null", '{"user_ids":null}', 422),
    _batch("ids: a string", f'{{"user_ids":"{NIL}"}}', 422),
    _batch("ids: a number", '{"user_ids":5}', 422),
    _batch("ids: an object", f'{{"user_ids":{{"0":"{NIL}"}}}}', 422),
    _batch("no ids", '{"user_ids":[]}', 422),
    _batch("101 ids", json.dumps({"user_ids": [NIL] * 101}), 422),
    _batch("1,500 ids", json.dumps({"user_ids": [NIL] * 1500}), 422),
    _batch("30,000 numbers", json.dumps({"user_ids": [1] * 20_000}), 422),
    _batch("id: a number", '{"user_ids":[5]}', 422),
    _batch("id: null", '{"user_ids":[null]}', 422),
    _batch("id: true", '{"user_ids":[true]}', 422),
    _batch("id: an array", f'{{"user_ids":[["{NIL}"]]}}', 422),
    _batch("id: an object", '{"user_ids":[{}]}', 422),
    _batch("id: empty", '{"user_ids":[""]}', 422),
    _batch("id: a word", json.dumps({"user_ids": [_MARK]}), 422),
    _batch("id: in braces", json.dumps({"user_ids": [f"{{{NIL}}}"]}), 422),
    _batch("id: no hyphens", json.dumps({"user_ids": [_HEX]}), 422),
    _batch("id: a newline", json.dumps({"user_ids": [NIL + "\n"]}), 422),
    _batch("id: NUL", json.dumps({"user_ids": [NIL + "\x00"]}), 422),
    _batch("id: full-width digits", json.dumps({"user_ids": [NIL.translate({48: 0xFF10})]}), 422),
    _batch("id: a quote", json.dumps({"user_ids": [f'{NIL}":null,"{_MARK}']}), 422),
    # Verdicts.
    _verdict("nobody's session", _VERDICT, 404),
    _verdict("an emoji", {"at_fault": "both", "reason": "😀" * 1000}, 404),
    _verdict("no fault", {"reason": _MARK}),
    _verdict("no reason", {"at_fault": "user1"}),
    _verdict("another fault", {"at_fault": _MARK, "reason": "x"}),
    _verdict("fault in capitals", {"at_fault": "USER1", "reason": "x"}),
    _verdict("fault with a newline", {"at_fault": "user1\n", "reason": "x"}),
    _verdict("fault null", {"at_fault": None, "reason": "x"}),
    _verdict("two faults", {"at_fault": ["user1", "user2"], "reason": "x"}),
    _verdict("fault 1", {"at_fault": 1, "reason": "x"}),
    _verdict("an empty reason", _VERDICT | {"reason": ""}),
    _verdict("a blank reason", _VERDICT | {"reason": " \n\t"}),
    _verdict("a reason of 1,001 characters", _VERDICT | {"reason": "x" * 1001}),
    _verdict("a reason with NUL", _VERDICT | {"reason": f"{_MARK}\x00"}),
    _verdict("a reason that is a number", _VERDICT | {"reason": 5}),
    _verdict("a reason that is null", _VERDICT | {"reason": None}),
    _verdict("a reason that is a list", _VERDICT | {"reason": [_MARK]}),
    _verdict("a reason with a lone surrogate", rb'{"at_fault":"user1","reason":"\udfff"}', 400),
    _verdict("said by somebody else", _VERDICT | {"said_by": "admin"}),
    _verdict("an array", [_VERDICT]),
    _verdict("empty", b"", 400),
    # Content types.
    _typed("text", 415, "text/plain"),
    _typed("a form", 415, "application/x-www-form-urlencoded"),
    _typed("several parts", 415, "multipart/form-data; boundary=x"),
    _typed("almost JSON", 415, "application/jsonx"),
    _typed("another JSON", 415, "application/problem+json"),
    _typed("JSON behind text", 415, "text/plain; application/json"),
    _typed("two in one", 415, "application/json, text/plain"),
    _typed("empty", 415, ""),
    _typed("a wildcard", 415, "*/*"),
    _typed("bytes beyond ASCII", 415, b"\xff\xfe"),
    _typed("8 KB", 415, "a" * 8000),
    _typed("two headers", 400, "application/json", "application/json"),
    _typed("two different headers", 400, "application/json", "text/plain"),
    # Authorization.
    _authorized("none"),
    _authorized("empty", ""),
    _authorized("no token", "Bearer"),
    _authorized("a blank token", "Bearer   "),
    _authorized("another scheme", f"Basic {_MARK}"),
    _authorized("another scheme with a good token", f"Token {token()}"),
    _authorized("a word", f"Bearer {_MARK}"),
    _authorized("dots", "Bearer ..."),
    _authorized("two dots", "Bearer .."),
    _authorized("four parts", f"Bearer {token()}.x"),
    _authorized("two tokens", f"Bearer {token()} {token()}"),
    _authorized("two with a comma", f"Bearer {token()}, Bearer {token()}"),
    _authorized("two headers", f"Bearer {token()}", f"Bearer {token()}", status=400),
    _authorized("two headers, one basic", f"Bearer {token()}", "Basic x", status=400),
    _authorized("two headers, one empty", f"Bearer {token()}", "", status=400),
    _authorized("10 KB", "Bearer " + "a" * 10_000),
    _authorized("10 KB of dots", "Bearer " + "." * 10_000),
    _authorized("10 KB behind a good token", f"Bearer {token()}" + "a" * 10_000),
    _authorized("60 KB behind a good token", f"Bearer {token()}" + "a" * 60_000, status=431),
    _authorized("bytes beyond ASCII", b"Bearer \xff\xfe\xfd"),
    _authorized("full-width letters", b"Bearer \xef\xbd\x81\xef\xbc\x8e\xef\xbd\x81\xef\xbc\x8e\xef\xbd\x81"),
    _authorized("NUL", b"Bearer a\x00b", status=400),
    _authorized("a tab", f"Bearer\t{token()}"),
    _authorized("a folded line", b"Bearer a\r\n b", status=400),
    _authorized("padding", f"Bearer {token()}="),
    _authorized("a signature cut off", "Bearer " + token().rpartition(".")[0] + "."),
    _authorized("another letter in the signature", "Bearer " + token()[:-8] + "AAAAAAAA"),
    _authorized("JSON", 'Bearer {"role":"service_role"}'),
    _authorized("base64 of nothing", "Bearer AA.AA.AA"),
    _authorized("another secret", f"Bearer {token(secret='x' * 40)}"),
    _forged("well formed", status=404),
    _forged("alg none", {"alg": "none"}),
    _forged("alg None", {"alg": "None"}),
    _forged("alg nOnE", {"alg": "nOnE"}),
    _forged("alg empty", {"alg": ""}),
    _forged("alg null", {"alg": None}),
    _forged("alg a list", {"alg": ["HS256"]}),
    _forged("alg HS512", {"alg": "HS512"}),
    _forged("alg RS256", {"alg": "RS256"}),
    _forged("alg ES256 with a kid of its own", {"alg": "ES256", "kid": "../../../dev/null"}),
    _forged("kid an object", {"kid": {"a": 1}}),
    _forged("a critical extension", {"crit": ["exp"]}),
    _forged("an unencoded payload", {"b64": False}),
    _forged("a key of its own", {"jku": "http://evil.example", "jwk": {"kty": "oct", "k": "AA"}}, status=404),
    _forged("a header that is a list", ["HS256"]),
    _forged("a header that is a number", 5),
    _forged("claims that are a list", claims=[1]),
    _forged("claims that are a string", claims=_MARK),
    _forged("claims that are null", claims=0),
    _forged("no exp", claims={"exp": ...}),
    _forged("exp null", claims={"exp": None}),
    _forged("exp a string", claims={"exp": "4000000000"}),
    _forged("exp true", claims={"exp": True}),
    _forged("exp NaN", claims={"exp": float("nan")}),
    _forged("exp infinite", claims={"exp": float("inf")}),
    _forged("exp in the past", claims={"exp": 1}),
    _forged("exp negative", claims={"exp": -(10**30)}),
    _forged("exp 1e308", claims={"exp": 1e308}, status=404),
    _forged("exp of 400 digits", claims={"exp": 10**400}, status=404),
    _forged("not yet", claims={"nbf": int(utc_now().timestamp()) + 3600}),
    _forged("nbf a string", claims={"nbf": "soon"}),
    _forged("iat an object", claims={"iat": {}}),
    _forged("no aud", claims={"aud": ...}),
    _forged("aud null", claims={"aud": None}),
    _forged("another aud", claims={"aud": _MARK}),
    _forged("aud a list with a number", claims={"aud": ["authenticated", 1]}),
    _forged("aud an object", claims={"aud": {"authenticated": 1}}),
    _forged("no sub", claims={"sub": ...}),
    _forged("sub empty", claims={"sub": ""}),
    _forged("sub a number", claims={"sub": 5}),
    _forged("sub a list", claims={"sub": ["mallory"]}),
    _forged("sub NUL", claims={"sub": "a\x00"}),
    _forged("sub a newline", claims={"sub": "a\nb"}),
    _forged("sub a lone surrogate", claims={"sub": "\ud800"}),
    _forged("sub 1 KB", claims={"sub": "a" * 1000}),
    _forged("no role", claims={"role": ...}),
    _forged("role a list", claims={"role": ["service_role"]}),
    _forged("role null", claims={"role": None}),
    _forged("another role", claims={"role": _MARK}, status=403),
    _forged("anon", claims={"role": "anon"}, status=403),
    _forged("role with a space", claims={"role": "authenticated "}, status=403),
    _forged("nested claims", claims={"deep": json.loads("[" * 200 + "]" * 200)}, status=404),
    # Methods, and attempts to be another one.
    Row("method: PUT", 405, method="PUT"),
    Row("method: DELETE", 405, method="DELETE"),
    Row("method: PATCH", 405, method="PATCH"),
    Row("method: TRACE", 405, method="TRACE"),
    Row("method: PROPFIND", 405, method="PROPFIND"),
    Row("method: PURGE", 405, method="PURGE"),
    Row("method: an unknown one", 400, method="EVIL"),
    Row("method: lower case", 400, method="get"),
    Row("method: overridden by a header", 404, headers=(("X-HTTP-Method-Override", "DELETE"),)),
    Row("method: not made GET by a header", 405, method="POST", headers=(("X-HTTP-Method-Override", "GET"),)),
    Row("method: not made GET by another header", 405, method="POST", headers=(("X-Method-Override", "GET"),)),
    # The rest of HTTP.
    Row("path: rewritten by a header", 404, headers=(("X-Original-URL", "/metrics"), ("X-Rewrite-URL", "/metrics"))),
    Row("path: absolute", 404, f"http://evil.example{SINGLE.format(NIL)}"),
    Row("path: absolute, and none", 400, "http://evil.example"),
    Row("path: two slashes", 404, f"/{SINGLE.format(NIL)}"),
    Row("path: a fragment", 404, SINGLE.format(NIL) + "#" + _MARK),
    Row("path: a space", 400, SINGLE.format(NIL) + f" {_MARK}"),
    Row("path: capitals", 404, SINGLE.format(NIL).upper()),
    Row("path: dots", 404, f"/api/./user/reputation/{NIL}"),
    Row("path: a newline behind", 404, "/nope%0A" + _MARK),
    Row("length: not a number", 400, headers=(("Content-Length", "evil"),)),
    Row("length: negative", 400, headers=(("Content-Length", "-1"),)),
    Row("length: two of them", 400, headers=(("Content-Length", "0"), ("Content-Length", "5"))),
    Row("length: a list", 400, headers=(("Content-Length", "0, 0"),)),
    Row("length: a sign", 400, headers=(("Content-Length", "+0"),)),
    Row(
        "length: beside chunks",
        400,
        BATCH,
        "POST",
        (_JSON, ("Content-Length", "5"), ("Transfer-Encoding", "chunked")),
        b"0\r\n\r\n",
        length=False,
    ),
    Row(
        "chunks: a megabyte",
        413,
        BATCH,
        "POST",
        _CHUNKED,
        b"10000\r\n" + b"a" * 65_536 + b"\r\n" + b"f0000\r\n" + b"a" * 983_040 + b"\r\n0\r\n\r\n",
        length=False,
    ),
    Row(
        "chunks: one byte each",
        422,
        BATCH,
        "POST",
        _CHUNKED,
        b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"user_ids":["evilmark"]}') + b"0\r\n\r\n",
        length=False,
    ),
    Row("chunks: a size that is none", 400, BATCH, "POST", _CHUNKED, b"evil\r\n", length=False),
    Row("chunks: a negative size", 400, BATCH, "POST", _CHUNKED, b"-1\r\n", length=False),
    Row("chunks: a size of 20 digits", 400, BATCH, "POST", _CHUNKED, b"f" * 20 + b"\r\n", length=False),
    Row("chunks: more than the size", 400, BATCH, "POST", _CHUNKED, b"1\r\nabc\r\n0\r\n\r\n", length=False),
    Row("chunks: an extension of 2 MB", 413, BATCH, "POST", _CHUNKED, b"1;" + b"a" * 2_000_000, length=False),
    Row("chunks: spelt otherwise", 400, BATCH, "POST", (_JSON, ("Transfer-Encoding", "xchunked")), b"0\r\n\r\n"),
    Row("chunks: not last", 400, BATCH, "POST", (_JSON, ("Transfer-Encoding", "chunked, gzip")), b"0\r\n\r\n"),
    Row("chunks: twice", 400, BATCH, "POST", (*_CHUNKED, ("Transfer-Encoding", "chunked")), b"0\r\n\r\n"),
    _trailed("a token", f"Authorization: Bearer {token()}", 401),
    _trailed("a length", "Content-Length: 5", 400),
    Row("wire: no request", 400, raw=b"evilmark\r\n\r\n"),
    Row("wire: TLS", 400, raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500),
    Row("wire: HTTP/2", 400, raw=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    Row("wire: HTTP/0.9", 404, raw=b"GET /\r\n\r\n"),
    Row("wire: HTTP/9.9", 400, raw=b"GET / HTTP/9.9\r\nHost: a\r\n\r\n"),
    Row("wire: zeros", 400, raw=b"\x00" * 1000),
    Row("wire: Redis", 400, raw=b"*1\r\n$4\r\nPING\r\n"),
    Row("wire: only spaces", 400, raw=b" " * 1000),
    Row("wire: a target of 300 KB without an end", 431, raw=b"GET /" + b"a" * 300_000),
    Row("wire: a host and a port", 400, raw=b"CONNECT evil.example:443 HTTP/1.1\r\nHost: a\r\n\r\n"),
    Row("wire: an asterisk", 404, raw=b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    Row("header: a name that is none", 400, headers=((b"evil header", "x"),)),
    Row("header: 500 of them", 404, headers=tuple((f"X-{number}", _MARK) for number in range(500))),
    Row("header: 2,000 of them", 431, headers=tuple((f"X-{number}", _MARK) for number in range(2000))),
    Row("header: a name of 60 KB", 431, headers=(("X" * 60_000, "x"),)),
    Row("header: a megabyte", 431, headers=(("X-Mark", _MARK * 125_000),)),
    Row("header: a condition of 12 KB", 404, headers=(("If-None-Match", '"a",' * 3000),)),
    Row("header: a condition of 60 KB", 431, headers=(("If-None-Match", '"a",' * 15_000),)),
    Row("header: 60 KB to a health check", 431, "/health/live", headers=(("X", "x" * 60_000),), role=None),
    Row("header: a byte order mark", 400, headers=((b"\xef\xbb\xbfX", "x"),)),
    Row("header: a space before the colon", 400, headers=(("X-Mark ", _MARK),)),
    Row("header: no colon", 400, raw=b"GET / HTTP/1.1\r\nHost: a\r\nevilmark\r\n\r\n"),
    Row("header: a bare newline in a value", 400, headers=((b"X", b"a\nb"),)),
    Row("header: a bare return in a value", 400, headers=((b"X", b"a\rb"),)),
    Row("header: forwarded garbage", 404, headers=(("X-Forwarded-For", b"\xff, ,,,evilmark"),)),
    Row("header: an unknown expectation", 404, headers=(("Expect", _MARK),)),
    Row("header: an upgrade", 404, headers=(("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQAAP__"))),
    Row("header: a range", 404, headers=(("Range", "bytes=0-18446744073709551615"),)),
    Row("header: a development user", 401, headers=(("X-Test-User-ID", _MARK),), role=None),
    Row("header: a role of its own", 403, INVALIDATE.format(NIL), "POST", (("X-Role", "service_role"),)),
]


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(backend: Backend) -> Iterator[str]:
    """Give the address of the service as it runs in production: a process of its own."""
    port = free_port()
    variables = environment_of(backend.settings()) | {"GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000000"}
    with client_of_command("goodstanding", "serve", "--port", str(port), port=port, environment=variables) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def documented(url: str) -> OpenAPI:
    """Give the service's OpenAPI document."""
    document: OpenAPI = json.loads(raw_exchange(url, Row("", 200, "/openapi.json").request()).body)
    return document


@pytest.fixture(scope="module")
def mounted(backend: Backend) -> Iterator[str]:
    """Give the address of the service in this process, under a server that knows nothing of it."""
    with serving(create_app(backend.settings())) as address:
        yield address


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_hostile_input(url: str, row: Row) -> None:
    """The request gets its 4xx as a problem whose detail is a string, and nothing of it comes back."""
    answer = raw_exchange(url, row.request())
    assert row.status == answer.status, answer.body
    assert _MARK.encode() not in answer.body
    assert _MARK not in str(answer.headers)
    assert "application/problem+json" == answer.headers["content-type"]
    told = json.loads(answer.body)
    assert ["type", "title", "status", "detail", "code"] == list(told)
    assert row.status == told["status"]
    assert isinstance(told["detail"], str)
    assert told["code"] in _CODES[row.status]
    assert len(answer.body) < 300


_LEAF: Final = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    # Escaped in JSON, these are no text that could be encoded.
    | st.sampled_from([NIL, NIL.upper(), "user1", "nobody", "", "\x00", "\ud800", 10**400])
)
_WORD: Final = st.sampled_from(["user_ids", "at_fault", "reason", "__proto__", ""]) | st.text(max_size=8)
_ANY: Final = st.recursive(
    _LEAF, lambda parts: st.lists(parts, max_size=5) | st.dictionaries(_WORD, parts, max_size=5), max_leaves=30
)
_NEARLY: Final = st.fixed_dictionaries(
    {}, optional={"user_ids": st.lists(_ANY, max_size=3) | _ANY, "at_fault": _ANY, "reason": _ANY, "more": _ANY}
)


@pytest.mark.parametrize(("path", "route"), [(BATCH, BATCH), (ATTRIBUTION, ATTRIBUTION.format("{session_id}"))])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(told=_ANY | _NEARLY, wrapped=st.sampled_from([0, 0, 0, 1, 200]))
@example(told={"user_ids": [NIL]}, wrapped=0)
@example(told={"at_fault": "nobody", "reason": "seen"}, wrapped=0)
def test_whatever_json_comes(url: str, documented: OpenAPI, path: str, route: str, told: object, wrapped: int) -> None:
    """A body of any shape and depth gets a status that its route documents, and none that blames the service."""
    body = ("[" * wrapped + json.dumps(told) + "]" * wrapped).encode()
    row = Row("", 0, path.format(GONE), "POST", (_JSON,), body, "service_role")
    answer = raw_exchange(url, row.request())
    assert str(answer.status) in documented["paths"][route]["post"]["responses"]
    assert answer.status < 500
    if answer.status >= 400:
        assert "application/problem+json" == answer.headers["content-type"]
        assert json.loads(answer.body)["code"] in _CODES[answer.status]


def test_the_table_is_a_table() -> None:
    """Every row has a name of its own, and there are enough of them."""
    assert [] == [name for name, count in Counter(row.name for row in ROWS).items() if count > 1]
    assert 200 <= len(ROWS)


_FINE: Final = [
    _batch("the whole 64 KiB", _ONE + " " * (65_536 - len(_ONE)), 200),
    _batch("escaped letters", _ONE.replace("user", r"\u0075ser"), 200),
    _batch("the last of two lists counts", f'{{"user_ids":["{_MARK}"],"user_ids":["{NIL}"]}}', 200),
    _typed("none", 200),
    _typed("with a charset", 200, "application/json; charset=utf-8"),
    _typed("with nothing behind the semicolon", 200, "application/json;"),
    _typed("in capitals", 200, "APPLICATION/JSON"),
    Row("a body that nobody asked for", 200, "/health/live", body=b"[" * 10_000),
]


@pytest.mark.parametrize("row", _FINE, ids=[row.name for row in _FINE])
def test_unusual_and_fine(url: str, row: Row) -> None:
    """What is unusual and still well formed is answered."""
    assert row.status == raw_exchange(url, row.request()).status


_UNFINISHED: Final = Row("", 0, BATCH, "POST", (_JSON, ("Content-Length", "100")), b'{"user', length=False)


def test_a_body_that_does_not_arrive(mounted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that stays away is 408 after a while: it does not hold the request for ever."""
    monkeypatch.setattr(api, "_BODY_SECONDS", 0.1)
    answer = raw_exchange(mounted, _UNFINISHED.request())
    assert 408 == answer.status
    assert "request_timeout" == json.loads(answer.body)["code"]


def test_a_client_that_goes_away_is_no_error_of_ours(mounted: str) -> None:
    """A client that hangs up in the middle of its body is counted as a bad request, and nothing is logged."""

    def refused() -> float:
        labels = {"route": BATCH, "method": "POST", "status": "400", "source": "none"}
        return REGISTRY.get_sample_value("goodstanding_http_request_seconds_count", labels) or 0.0

    before = refused()
    address = httpx2.URL(mounted)
    with capture_logs() as lines:
        with socket.create_connection((address.host, address.port or 80)) as connection:
            connection.sendall(_UNFINISHED.request())
        wait_until(lambda: refused() == before + 1)
    assert [] == [line for line in lines if line["log_level"] == "error"]


def test_the_service_is_well_afterwards(url: str) -> None:
    """After all of that the service is ready, as soon as a relay leads."""
    ready = Row("", 200, "/health/ready").request()
    wait_until(lambda: raw_exchange(url, ready).body == b'{"status":"ready","degraded":[]}')
