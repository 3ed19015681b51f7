"""Who is asking: every rule for tokens, keys, the development bypass and the client's address."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from typing import Any, Final, Self, cast

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from goodstanding.auth import (
    MAX_KEY_SET_BYTES,
    MAX_KEYS,
    MAX_TOKEN_LENGTH,
    NOBODY,
    Authenticator,
    Caller,
    KeySet,
    Role,
    TokenVerifier,
    client_address,
    parse_keys,
)
from goodstanding.errors import (
    BadRequestError,
    ConfigurationError,
    TemporarilyUnavailableError,
    UnauthorizedError,
)
from goodstanding.settings import load_settings

NOW: Final = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SECRET: Final = "a shared secret that only this test knows"
SUBJECT: Final = "7b0c1f4e-3a52-4d3c-9a53-0f3a1c5f2d11"
ISSUER: Final = "https://project.example/auth/v1"
EC_KEY: Final = ec.generate_private_key(ec.SECP256R1())
RSA_KEY: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_SECONDS: Final = 10.0


class Time:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        """Give the moment at which the clock stands."""
        return self.now


def claims(**changes: object) -> dict[str, object]:
    """Give the claims of a good token; a change to `...` takes the claim away."""
    good = {"sub": SUBJECT, "role": "authenticated", "aud": "authenticated", "exp": NOW.timestamp() + 60, **changes}
    return {name: value for name, value in good.items() if value is not ...}


def signed(payload: object, *, header: object = None, key: str | bytes = SECRET) -> str:
    """Sign any text or value with HS256, also what no honest library would sign."""
    header = header if header is not None else {"alg": "HS256", "typ": "JWT"}
    segments = [part if isinstance(part, str) else json.dumps(part) for part in (header, payload)]
    unsigned = b".".join(_base64(text.encode("utf-8", "surrogatepass")) for text in segments)
    key = key.encode() if isinstance(key, str) else key
    return (unsigned + b"." + _base64(hmac.digest(key, unsigned, "sha256"))).decode()


def token(**changes: object) -> str:
    """Give a good HS256 token, apart from the changes."""
    return signed(claims(**changes))


def published(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, kid: str | None = "1", **changes: object) -> Any:  # noqa: ANN401 - JSON
    """Give the public half of a key as a JWK."""
    public = key.public_key()
    algorithm = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    jwk = json.loads(cast("Any", algorithm).to_jwk(public))
    return {**jwk, **({} if kid is None else {"kid": kid}), **changes}


def asymmetric(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, kid: str | None = "1", **changes: object) -> str:
    """Give a token signed with a private key."""
    algorithm = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
    return jwt.encode(claims(**changes), key, algorithm, headers={} if kid is None else {"kid": kid})


def verifier(
    *,
    secret: str = SECRET,
    key_set: KeySet | None = None,
    issuer: str = "",
    time: Time | None = None,
    cache_size: int = 100,
) -> TokenVerifier:
    """Build a verifier whose clock stands at NOW."""
    return TokenVerifier(
        secret=secret,
        key_set=key_set,
        audience="authenticated",
        issuer=issuer,
        clock=time or Time(),
        cache_size=cache_size,
    )


def refuses(text: str, by: TokenVerifier | None = None) -> bool:
    """Tell whether a token is refused in the one way in which every token is refused."""
    with pytest.raises(UnauthorizedError) as caught:
        (by or verifier()).verify(text)
    assert UnauthorizedError.default_detail == caught.value.detail
    assert caught.value.__cause__ is None
    return True


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


# What a token must say


def test_a_good_token_names_its_caller() -> None:
    """A good token gives its subject in the role authenticated."""
    assert Caller(Role.AUTHENTICATED, SUBJECT) == verifier().verify(token())


def test_a_caller_says_until_when_the_token_holds() -> None:
    """The caller has the token's end, rounded down to the second, from the cache too; it makes nobody another one."""
    checker = verifier()
    expires = NOW + timedelta(seconds=90)
    text = token(exp=expires.timestamp() + 0.5)
    assert [expires, expires] == [checker.verify(text).expires for _ in range(2)]
    assert checker.verify(text) == checker.verify(token())
    assert NOBODY.expires is None


@pytest.mark.parametrize(
    "changes",
    [
        {"nbf": NOW.timestamp()},
        {"iat": NOW.timestamp() + 3600},
        {"exp": 10**4000},
        {"exp": 1e300},
        {"exp": int(NOW.timestamp()) + 1},
        {"aud": ["other", "authenticated"]},
        {"sub": "ü" * 255},
        {"iss": "anyone"},
    ],
)
def test_unusual_but_valid_claims_are_accepted(changes: dict[str, object]) -> None:
    """A lifetime without end, several audiences, a long subject: what the rules allow is accepted."""
    assert Role.AUTHENTICATED is verifier().verify(token(**changes)).role


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": ...},
        {"exp": None},
        {"exp": True},
        {"exp": str(NOW.timestamp() + 60)},
        {"exp": [NOW.timestamp() + 60]},
        {"exp": NOW.timestamp()},
        {"exp": NOW.timestamp() - 0.001},
        {"exp": -(10**4000)},
        {"exp": float("nan")},
        {"exp": float("inf")},
        {"nbf": NOW.timestamp() + 1},
        {"nbf": "0"},
        {"nbf": False},
        {"nbf": None},
        {"nbf": 10**4000},
        {"iat": "yesterday"},
        {"iat": None},
        {"aud": ...},
        {"aud": None},
        {"aud": "other"},
        {"aud": "Authenticated"},
        {"aud": []},
        {"aud": ["other"]},
        {"aud": ["authenticated", 1]},
        {"aud": {"authenticated": True}},
        {"sub": ...},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": [SUBJECT]},
        {"sub": "x" * 256},
        {"sub": "line\nbreak"},
        {"sub": "nul\x00"},
        {"sub": "\ud800"},
        {"role": ...},
        {"role": None},
        {"role": 1},
        {"role": ["service_role"]},
    ],
)
def test_a_claim_that_is_wrong_or_of_the_wrong_type_refuses_the_token(changes: dict[str, object]) -> None:
    """Every claim that counts is checked strictly, its type included."""
    assert refuses(token(**changes))


@pytest.mark.parametrize("text", ["1e400", "NaN", "Infinity", "9" * 5000, "0x10", "1_000"])
def test_a_number_that_is_none_refuses_the_token(text: str) -> None:
    """A lifetime that JSON or Python cannot hold as a number refuses the token."""
    payload = json.dumps(claims(exp=0)).replace('"exp": 0', f'"exp": {text}')
    assert refuses(signed(payload))


@pytest.mark.parametrize("payload", ["", "null", "1", '"text"', "[]", "{", "[" * 5000, '{"a":' * 1000, "\x00", "{}x"])
def test_claims_must_be_one_json_object(payload: str) -> None:
    """Signed text that is not one JSON object is refused, however deep it goes."""
    assert refuses(signed(payload))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Caller(Role.SERVICE_ROLE, SUBJECT)),
        ({"sub": ...}, Caller(Role.SERVICE_ROLE, None)),
        ({"aud": ...}, Caller(Role.SERVICE_ROLE, SUBJECT)),
        ({"sub": ..., "aud": ...}, Caller(Role.SERVICE_ROLE, None)),
    ],
)
def test_a_service_key_may_lack_subject_and_audience(changes: dict[str, object], expected: Caller) -> None:
    """Only the role service_role may lack sub and aud, as Supabase's own keys do."""
    assert expected == verifier().verify(token(role="service_role", **changes))


@pytest.mark.parametrize("changes", [{"sub": ""}, {"sub": None}, {"aud": "other"}, {"aud": None}, {"exp": ...}])
def test_a_service_key_is_refused_for_what_it_carries_wrongly(changes: dict[str, object]) -> None:
    """A claim that a service key may lack is checked when it is there."""
    assert refuses(token(role="service_role", **changes))


@pytest.mark.parametrize("role", ["anon", "anonymous", "postgres", "", "Service_role", "service_role "])
def test_an_unknown_role_is_anonymous(role: str) -> None:
    """A role that means nothing here keeps its subject and gives no rights."""
    assert Caller(Role.ANONYMOUS, SUBJECT) == verifier().verify(token(role=role))


def test_an_anonymous_key_without_subject_is_refused() -> None:
    """A role other than service_role must carry sub and aud."""
    assert refuses(token(role="anon", sub=..., aud=...))


@pytest.mark.parametrize("issuer", [..., "", None, "https://other.example", ISSUER + "/", [ISSUER]])
def test_a_required_issuer_must_be_exact(issuer: object) -> None:
    """Where an issuer is set, a token of any other is refused, whatever its role."""
    assert refuses(token(iss=issuer), by=verifier(issuer=ISSUER))
    assert refuses(token(iss=issuer, role="service_role"), by=verifier(issuer=ISSUER))
    assert Role.AUTHENTICATED is verifier(issuer=ISSUER).verify(token(iss=ISSUER)).role


# How a token must be signed


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "HS384"},
        {"alg": "HS512"},
        {"alg": "hs256"},
        {"alg": "ES256"},
        {"alg": "RS256"},
        {"alg": None},
        {"alg": ["HS256"]},
        {"typ": "JWT"},
        {"alg": "HS256", "crit": ["exp"]},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "crit": ["b64"], "b64": True},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
        {"alg": "HS256", "b64": True},
        {"alg": "HS256", "kid": 7},
        {"alg": "HS256", "kid": None},
        [],
        "HS256",
        "null",
        '{"alg": "HS256"',
        "[" * 3000,
    ],
)
def test_a_header_that_asks_for_anything_else_refuses_the_token(header: object) -> None:
    """Only the algorithms that are configured count, and nothing critical is understood."""
    assert refuses(signed(claims(), header=header))


def test_an_unsigned_token_is_refused() -> None:
    """The algorithm `none` and an empty signature are refused."""
    unsigned = signed(claims(), header={"alg": "none"}).rpartition(".")[0] + "."
    assert refuses(unsigned)
    assert refuses(token().rpartition(".")[0] + ".")


def test_a_token_signed_with_another_secret_is_refused() -> None:
    """Another secret proves nothing."""
    assert refuses(signed(claims(), key="another secret of the same kind, just as long"))


def test_a_shared_secret_token_may_carry_a_key_id() -> None:
    """HS256 with a `kid`, as Supabase signs them, is checked with the shared secret."""
    text = signed(claims(), header={"alg": "HS256", "kid": "any"})
    assert SUBJECT == verifier().verify(text).subject


def test_without_a_secret_no_shared_secret_token_holds() -> None:
    """HS256 is refused where no secret is set, the empty secret included."""
    assert refuses(token(), by=verifier(secret=""))
    assert refuses(signed(claims(), key=b""), by=verifier(secret=""))


def test_a_public_key_is_no_secret() -> None:
    """A secret that is really a public key stops the start, in one line that names the setting."""
    pem = EC_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ConfigurationError, match=r"^GOODSTANDING_JWT_SECRET: must be a shared secret"):
        verifier(secret=pem)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "...", "a.b.c", "a.b.c.d.e", "é.b.c", " ", "\x00", "\ud800", "=.=.=", f" {token()}", f"{token()}="],
)
def test_text_that_is_no_token_is_refused(text: str) -> None:
    """Anything but three base64url segments is refused."""
    assert refuses(text)


def test_a_token_longer_than_the_bound_is_refused() -> None:
    """A token of 8192 characters holds, one character more does not."""
    room = MAX_TOKEN_LENGTH - len(token(padding=""))
    fitting = next(text for size in range(room, 0, -1) if len(text := token(padding="x" * (size * 3 // 4))) <= 8192)
    assert 8190 <= len(fitting)
    assert SUBJECT == verifier().verify(fitting).subject
    assert refuses(token(padding="x" * room))


_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_random_text_is_refused(text: str) -> None:
    """No text that was not signed gets any answer but the one."""
    assert refuses(text)


@given(st.lists(st.binary(max_size=60).map(lambda data: _base64(data).decode()), min_size=3, max_size=3))
def test_random_segments_are_refused(segments: list[str]) -> None:
    """No three segments of random bytes get any answer but the one."""
    assert refuses(".".join(segments))


@given(position=st.integers(min_value=0), character=st.characters(), length=st.integers(0, 3))
def test_a_mutated_token_is_refused(position: int, character: str, length: int) -> None:
    """A token with one character changed, put in or taken out is refused."""
    good = token()
    position %= len(good)
    mutated = good[:position] + character + good[position + length :]
    assert good == mutated or refuses(mutated)


@given(st.dictionaries(st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "sub", "role", "other"]), _JSON, max_size=4))
def test_signed_claims_of_any_type_never_break_the_verifier(changes: dict[str, object]) -> None:
    """Whatever a signed claim holds, the answer is a caller within bounds or the one refusal."""
    text = signed(claims(**changes))
    try:
        caller = verifier().verify(text)
    except UnauthorizedError:
        return
    assert caller.subject is None or 1 <= len(caller.subject) <= 255
    assert caller.subject is not None or caller.role is Role.SERVICE_ROLE


@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "jku", "x5u"]), _JSON) | _JSON)
def test_headers_of_any_type_never_break_the_verifier(header: object) -> None:
    """Whatever a header holds, a token that does not name a known algorithm is refused."""
    assert refuses(signed(claims(), header=header if header is not None else "null"))


# What is remembered


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List every token whose signature is really checked."""
    seen: list[str] = []
    original = jwt.PyJWS.decode

    def decode(self: jwt.PyJWS, text: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - passed through
        seen.append(text)
        return original(self, text, *args, **options)

    monkeypatch.setattr(jwt.PyJWS, "decode", decode)
    return seen


def test_a_token_is_checked_once(decoded: list[str]) -> None:
    """A token that came before is recognised without checking its signature again."""
    checker = verifier()
    assert checker.verify(token()) == checker.verify(token())
    assert [token()] == decoded


def test_a_remembered_token_ends_when_it_expires() -> None:
    """A token is refused from its `exp` on, to the fraction of a second, remembered or not."""
    time = Time()
    checker = verifier(time=time)
    text = token(exp=NOW.timestamp() + 60.5)
    for seconds in (0, 59.9, 60.1, 60.499):
        time.now = NOW + timedelta(seconds=seconds)
        assert SUBJECT == checker.verify(text).subject
    for seconds in (60.5, 61, 3600):
        time.now = NOW + timedelta(seconds=seconds)
        assert refuses(text, by=checker)


def test_only_so_many_tokens_are_remembered(decoded: list[str]) -> None:
    """Past the bound the token that was seen least recently is forgotten."""
    checker = verifier(cache_size=2)
    first, second, third = (token(sub=name) for name in ("first", "second", "third"))
    for text in (first, second, first, third, first, second):
        checker.verify(text)
    assert [first, second, third, second] == decoded


def test_a_refusal_is_not_remembered(decoded: list[str]) -> None:
    """A flood of bad tokens pushes no good one out."""
    checker = verifier(cache_size=1)
    checker.verify(token())
    for number in range(50):
        assert refuses(token(sub="", other=number), by=checker)
    checker.verify(token())
    assert 1 == decoded.count(token())


# The published keys


class KeyServer:
    """A small HTTP server on loopback that publishes what the test gives it, and counts what it is asked."""

    def __init__(self) -> None:
        self.requests = 0
        self.asked: Message | None = None
        self.answer: Callable[[BaseHTTPRequestHandler], None] = self.publishes()
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                server.asked = self.headers
                server.answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._handler = Handler
        self._bind(0)
        self.url = f"http://127.0.0.1:{self._http.server_port}/jwks.json"

    def _bind(self, port: int) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    def _close(self) -> None:
        self._http.shutdown()
        self._thread.join(_SECONDS)
        self._http.server_close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._close()

    @contextmanager
    def answering(self, how: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[None]:
        """Answer in another way for a while."""
        before, self.answer = self.answer, how
        yield
        self.answer = before

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse connections for a while; meanwhile nobody else gets the port."""
        port = self._http.server_port
        self._close()
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", port))
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            yield
            self._bind(port)
        self._thread.start()

    def publishes(self, *keys: object) -> Callable[[BaseHTTPRequestHandler], None]:
        """Answer with these keys."""
        return self.says(json.dumps({"keys": keys}).encode())

    def says(
        self, body: bytes, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        """Answer with this body."""

        def answer(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            for name, value in headers:
                request.send_header(name, value)
            request.send_header("content-length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)

        return answer

    def hangs(self, request: BaseHTTPRequestHandler) -> None:
        """Answer nothing until the test is over."""
        self.release.wait(_SECONDS)
        request.close_connection = True

    def drips(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one byte at a time, each well within any timeout of a single read."""
        request.send_response(200)
        request.end_headers()
        while not self.release.wait(0.02):
            try:
                request.wfile.write(b" ")
            except OSError:
                return

    def floods(self, request: BaseHTTPRequestHandler) -> None:
        """Answer without end."""
        request.send_response(200)
        request.end_headers()
        while not self.release.is_set():
            try:
                request.wfile.write(b" " * 65_536)
            except OSError:
                return


@pytest.fixture
def server() -> Iterator[KeyServer]:
    """Publish keys on loopback."""
    with KeyServer() as running:
        yield running


@asynccontextmanager
async def opened(
    server: KeyServer, *, refresh_seconds: float = 0.02, deadline_seconds: float = 5.0
) -> AsyncIterator[KeySet]:
    """Open a key set that refreshes often and always at the same pace."""
    key_set = KeySet(
        server.url,
        refresh_seconds=refresh_seconds,
        deadline_seconds=deadline_seconds,
        first_retry_seconds=0.01,
        chance=lambda: 0.5,
    )
    async with asyncio.timeout(4 * _SECONDS), key_set:
        yield key_set


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most a few seconds."""
    async with asyncio.timeout(_SECONDS):
        while not condition():  # noqa: ASYNC110 - the conditions are other threads' and objects', without an event
            await asyncio.sleep(0.005)


async def more_fetches(server: KeyServer, count: int = 2) -> None:
    """Wait until the server has been asked some more times."""
    enough = server.requests + count
    await until(lambda: server.requests >= enough)


@pytest.mark.parametrize("key", [EC_KEY, RSA_KEY], ids=["ES256", "RS256"])
async def test_a_token_signed_with_a_published_key_holds(
    server: KeyServer, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
) -> None:
    """ES256 and RS256 tokens are checked with the published key of their `kid`."""
    server.answer = server.publishes(published(key))
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        assert Caller(Role.AUTHENTICATED, SUBJECT) == checker.verify(asymmetric(key))
        assert refuses(asymmetric(key, "other"), by=checker)
        assert refuses(asymmetric(key, exp=NOW.timestamp()), by=checker)
        assert SUBJECT == checker.verify(token()).subject


async def test_a_token_without_key_id_holds_where_there_is_no_choice(server: KeyServer) -> None:
    """Without `kid` the one key of the algorithm is taken; of two, none."""
    other = ec.generate_private_key(ec.SECP256R1())
    server.answer = server.publishes(published(EC_KEY, None), published(RSA_KEY))
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        assert SUBJECT == checker.verify(asymmetric(EC_KEY, None)).subject
        assert SUBJECT == checker.verify(asymmetric(RSA_KEY, None)).subject
        server.answer = server.publishes(published(EC_KEY, None), published(other, "2"))
        await until(lambda: len(key_set.keys or ()) == 2 and ("ES256", "2") in (key_set.keys or ()))
        assert refuses(asymmetric(EC_KEY, None), by=checker)
        assert SUBJECT == checker.verify(asymmetric(other, "2")).subject


async def test_keys_are_asked_for_as_plain_json(server: KeyServer) -> None:
    """A request for keys asks for JSON, and for nothing compressed."""
    async with opened(server):
        assert server.asked is not None
        assert ("application/json", "identity") == (server.asked["accept"], server.asked["accept-encoding"])


@pytest.mark.parametrize(("size", "expected"), [(MAX_KEY_SET_BYTES, True), (MAX_KEY_SET_BYTES + 1, False)])
async def test_a_key_set_may_come_in_pieces_up_to_the_bound(server: KeyServer, size: int, *, expected: bool) -> None:
    """However an answer is cut up, it is read whole, and counts unless it is longer than the bound."""
    body = json.dumps({"keys": [published(EC_KEY)]}).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("transfer-encoding", "chunked")
        request.end_headers()
        for piece in (body, b" " * (size - len(body)), b""):
            request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    server.answer = answer
    async with opened(server) as key_set:
        assert expected is key_set.ready


async def test_a_published_key_never_serves_as_a_secret(server: KeyServer) -> None:
    """A token that uses a public key, in any spelling, as an HMAC secret is refused."""
    server.answer = server.publishes(
        published(EC_KEY), published(RSA_KEY, "2"), {"kty": "oct", "kid": "3", "k": _base64(b"x" * 32).decode()}
    )
    spellings = [
        key.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
        for key in (EC_KEY, RSA_KEY)
        for encoding in (Encoding.PEM, Encoding.DER)
    ]
    async with opened(server) as key_set:
        for checker in (verifier(key_set=key_set, secret=""), verifier(key_set=key_set)):
            for key in (*spellings, json.dumps(published(EC_KEY)).encode(), b"x" * 32):
                for kid in ("1", "2", "3"):
                    text = signed(claims(), header={"alg": "HS256", "kid": kid}, key=key)
                    assert refuses(text, by=checker)


async def test_the_algorithm_of_a_token_must_be_its_key_s(server: KeyServer) -> None:
    """A token that names another algorithm than its key is for is refused."""
    server.answer = server.publishes(published(EC_KEY, "ec"), published(RSA_KEY, "rsa"))
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        assert refuses(asymmetric(RSA_KEY, "ec"), by=checker)
        assert refuses(asymmetric(EC_KEY, "rsa"), by=checker)
        for algorithm in ("RS384", "PS256"):
            text = jwt.encode(claims(), RSA_KEY, algorithm, headers={"kid": "rsa"})
            assert refuses(text, by=checker)


@given(header=st.dictionaries(st.sampled_from(["typ", "kid", "crit", "b64", "jwk", "jku"]), _JSON))
def test_asymmetric_headers_of_any_type_never_break_the_verifier(header: dict[str, object]) -> None:
    """Whatever stands beside the algorithm, a token with a wrong signature is refused."""
    checker = verifier(key_set=_Loaded(published(EC_KEY), published(RSA_KEY, "2")))
    for algorithm in ("ES256", "RS256"):
        assert refuses(signed(claims(), header={**header, "alg": algorithm}), by=checker)


class _Loaded(KeySet):
    """A key set that holds keys without fetching any."""

    def __init__(self, *keys: object) -> None:
        super().__init__("http://127.0.0.1:9/", refresh_seconds=3600)
        self._keys = parse_keys(json.dumps({"keys": keys}).encode())


async def test_a_random_key_id_never_causes_a_fetch(server: KeyServer) -> None:
    """Keys are fetched on a timer only: no token makes the service ask for any."""
    server.answer = server.publishes(published(EC_KEY))
    async with opened(server, refresh_seconds=3600) as key_set:
        checker = verifier(key_set=key_set)
        for number in range(200):
            assert refuses(asymmetric(EC_KEY, f"random-{number}"), by=checker)
            await asyncio.sleep(0)
        assert SUBJECT == checker.verify(asymmetric(EC_KEY)).subject
    assert 1 == server.requests


async def test_a_rotated_key_is_taken_up_by_the_timer(server: KeyServer) -> None:
    """A key that is published later counts after the next refresh."""
    server.answer = server.publishes(published(EC_KEY))
    new = ec.generate_private_key(ec.SECP256R1())
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        assert refuses(asymmetric(new, "2"), by=checker)
        server.answer = server.publishes(published(EC_KEY), published(new, "2"))
        await until(lambda: len(key_set.keys or ()) == 2)
        assert SUBJECT == checker.verify(asymmetric(new, "2")).subject
        assert SUBJECT == checker.verify(asymmetric(EC_KEY)).subject


async def test_a_revoked_key_stops_working_after_the_refresh(server: KeyServer) -> None:
    """A token of a key that is no longer published is refused, although it was remembered and has not expired."""
    server.answer = server.publishes(published(EC_KEY))
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        text = asymmetric(EC_KEY)
        assert SUBJECT == checker.verify(text).subject
        server.answer = server.publishes()
        await until(lambda: not key_set.keys)
        assert refuses(text, by=checker)
        assert not key_set.degraded


async def test_a_caller_holds_as_long_as_his_key_is_published(server: KeyServer) -> None:
    """Others may come and go; with his own, or with another one under its name, his token would hold no longer."""
    other = ec.generate_private_key(ec.SECP256R1())
    server.answer = server.publishes(published(EC_KEY))
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        caller, unnamed = checker.verify(asymmetric(EC_KEY)), checker.verify(asymmetric(EC_KEY, None))
        by_secret = checker.verify(token())
        for keys, expected in (
            ([published(EC_KEY), published(RSA_KEY, "2")], (True, True)),
            ([published(EC_KEY), published(other, "2")], (True, False)),
            ([published(other)], (False, False)),
            ([published(EC_KEY)], (True, True)),
            ([], (False, False)),
        ):
            server.answer = server.publishes(*keys)
            await until(lambda: parse_keys(json.dumps({"keys": keys}).encode()) == key_set.keys)  # noqa: B023 - awaited here
            assert expected == (checker.holds(caller), checker.holds(unnamed))
            assert checker.holds(by_secret)
            assert checker.holds(NOBODY)
    assert verifier().holds(caller)


async def test_unchanged_keys_forget_nothing(server: KeyServer, decoded: list[str]) -> None:
    """A refresh that brings the same keys leaves the remembered tokens alone."""
    server.answer = server.publishes(published(EC_KEY), published(RSA_KEY, "2"))
    async with opened(server) as key_set:
        checker = verifier(key_set=key_set)
        text = asymmetric(EC_KEY)
        checker.verify(text)
        await more_fetches(server, 3)
        checker.verify(text)
    assert [text] == decoded


async def _fails(
    server: KeyServer, how: Callable[[BaseHTTPRequestHandler], None] | AbstractContextManager[None], **options: float
) -> None:
    server.answer = server.publishes(published(EC_KEY))
    async with opened(server, **options) as key_set:
        with how if isinstance(how, AbstractContextManager) else server.answering(how):
            await until(lambda: key_set.degraded)
            assert key_set.ready
            assert 0 == REGISTRY.get_sample_value("goodstanding_dependency_up", {"dependency": "jwks"})
            assert SUBJECT == verifier(key_set=key_set).verify(asymmetric(EC_KEY)).subject
        await until(lambda: not key_set.degraded)
        assert 1 == REGISTRY.get_sample_value("goodstanding_dependency_up", {"dependency": "jwks"})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": null}',
        b"[" * 60_000,
        b'{"keys": [' + b",".join([b"{}"] * 33) + b"]}",
        b'{"keys": []}' + b" " * 65_536,
    ],
    ids=range(11),
)
async def test_garbage_keeps_the_last_good_keys(server: KeyServer, body: bytes) -> None:
    """An answer that is no key set, or a too large one, changes no key."""
    await _fails(server, server.says(body))


@pytest.mark.parametrize("status", [204, 404, 500])
async def test_an_outage_keeps_the_last_good_keys(server: KeyServer, status: int) -> None:
    """A status other than 200 changes no key."""
    await _fails(server, server.says(b"" if status == 204 else b'{"keys": []}', status=status))


async def test_a_refused_connection_keeps_the_last_good_keys(server: KeyServer) -> None:
    """A server that is not there changes no key, and is asked again until it is."""
    await _fails(server, server.refusing())


async def test_a_redirect_is_not_followed(server: KeyServer) -> None:
    """The keys come from the address that is configured and from no other."""
    with KeyServer() as elsewhere:
        elsewhere.answer = elsewhere.publishes()
        await _fails(server, server.says(b"", status=302, headers=(("location", elsewhere.url),)))
        assert 0 == elsewhere.requests


async def test_a_hung_server_keeps_the_last_good_keys(server: KeyServer) -> None:
    """A server that accepts and says nothing costs one deadline."""
    await _fails(server, server.hangs, deadline_seconds=0.5)


async def test_a_dripping_server_meets_the_deadline(server: KeyServer) -> None:
    """A server that sends a byte now and then costs one deadline too."""
    await _fails(server, server.drips, deadline_seconds=0.5)


async def test_an_endless_answer_is_cut_off(server: KeyServer) -> None:
    """No more is read than a key set may measure."""
    await _fails(server, server.floods)


async def test_a_compressed_answer_is_not_unpacked(server: KeyServer) -> None:
    """A compressed answer, which was not asked for, is no key set."""
    await _fails(server, server.says(b"\x1f\x8b" + b"\x00" * 100, headers=(("content-encoding", "gzip"),)))


async def test_before_the_first_keys_a_token_that_needs_them_is_answered_with_try_again(server: KeyServer) -> None:
    """While no key set has ever been loaded, ES256 gets 503, HS256 works, and a quick retry ends that state."""
    server.answer = server.says(b"", status=503)
    async with opened(server, refresh_seconds=3600) as key_set:
        checker = verifier(key_set=key_set)
        assert not key_set.ready
        assert key_set.degraded
        for key in (EC_KEY, RSA_KEY):
            with pytest.raises(TemporarilyUnavailableError):
                checker.verify(asymmetric(key))
        assert SUBJECT == checker.verify(token()).subject
        await more_fetches(server)
        server.answer = server.publishes(published(EC_KEY))
        await until(lambda: key_set.ready)
        assert SUBJECT == checker.verify(asymmetric(EC_KEY)).subject


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """List for how long it is slept between two fetches, and let almost nothing of it pass."""
    seen: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        if seconds >= 0.1:
            seen.append(seconds)
        await sleep(min(seconds, 0.005))

    monkeypatch.setattr(asyncio, "sleep", noted)
    return seen


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 90.0), (0.5, 100.0), (0.75, 105.0)])
async def test_fetches_of_a_fleet_are_spread(
    server: KeyServer, pauses: list[float], chance: float, expected: float
) -> None:
    """Each fetch comes up to 10 % earlier or later than the interval."""
    server.answer = server.publishes(published(EC_KEY))
    async with KeySet(server.url, refresh_seconds=100, chance=lambda: chance):
        await until(lambda: len(pauses) >= 3)
    assert [expected] * 3 == pytest.approx(pauses[:3])


async def test_the_settings_say_how_often_keys_are_fetched(server: KeyServer, pauses: list[float]) -> None:
    """The interval comes from the settings, and no two processes keep the same pace."""
    server.answer = server.publishes(published(EC_KEY))
    key_set = KeySet.from_settings(load_settings(jwks_url=server.url, jwks_refresh_seconds=50))
    assert key_set is not None
    async with key_set:
        await until(lambda: len(pauses) >= 10)
    assert all(45 <= pause <= 55 for pause in pauses)
    assert 1 < len(set(pauses))


async def test_the_first_keys_are_tried_for_ever_less_often(server: KeyServer, pauses: list[float]) -> None:
    """Until there are keys, it asks after 1 s, 2 s, 4 s and so on, and at least as often as once there are."""
    server.answer = server.says(b"", status=503)
    async with KeySet(server.url, refresh_seconds=10, chance=lambda: 0.5) as key_set:
        await until(lambda: len(pauses) >= 6)
        server.answer = server.publishes(published(EC_KEY))
        await until(lambda: key_set.ready)
    assert [1, 2, 4, 8, 10, 10] == pytest.approx(pauses[:6])


async def test_entering_waits_for_the_first_keys_but_not_for_ever(server: KeyServer) -> None:
    """After entering, the keys are there, or the deadline has passed."""
    server.answer = server.hangs
    async with opened(server, deadline_seconds=0.05) as key_set:
        assert not key_set.ready
    server.answer = server.publishes(published(EC_KEY))
    async with opened(server) as key_set:
        assert key_set.ready


async def test_a_key_set_leaves_no_task_behind(server: KeyServer) -> None:
    """Leaving a key set, or being cancelled on the way in, ends everything it started."""
    server.answer = server.hangs
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), opened(server):
            pytest.fail("nobody answers")
    async with opened(server, deadline_seconds=0.02):
        assert 2 == len(asyncio.all_tasks())
    assert {asyncio.current_task()} == asyncio.all_tasks()


async def test_what_fails_inside_a_key_set_comes_out_as_it_is(server: KeyServer) -> None:
    """An error in the block is not wrapped into a group by the task that refreshes the keys."""
    with pytest.raises(ZeroDivisionError):
        async with opened(server):
            raise ZeroDivisionError


async def test_a_change_of_state_is_one_line(server: KeyServer) -> None:
    """The log has a line for each change of state, with its reason, none for each fetch, and never the address."""
    server.answer = server.publishes(published(EC_KEY))
    with capture_logs() as lines:
        async with opened(server) as key_set:
            await more_fetches(server, 3)
            server.answer = server.says(b"", status=500)
            await until(lambda: key_set.degraded)
            await more_fetches(server, 3)
            server.answer = server.publishes(published(EC_KEY))
            await until(lambda: not key_set.degraded)
            await more_fetches(server, 3)
    expected = [
        ("jwks_available", None, 1),
        ("jwks_keys_changed", None, 1),
        ("jwks_unavailable", "ValueError", None),
        ("jwks_available", None, 1),
    ]
    assert expected == [(line["event"], line.get("reason"), line.get("keys")) for line in lines]
    assert "127.0.0.1" not in str(lines)


@pytest.mark.parametrize(
    "jwk",
    [
        None,
        7,
        [],
        {},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
        {"kty": "EC", "crv": "P-256"},
        {"kty": "EC", "crv": "P-256", "x": 1, "y": 2},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": ["EC"], "crv": "P-256"},
        {"kty": "RSA", "n": "AA", "e": "AA"},
        {"kty": "RSA"},
        published(EC_KEY, use="enc"),
        published(EC_KEY, alg="ES384"),
        published(EC_KEY, alg="HS256"),
        published(EC_KEY, alg=None),
        published(EC_KEY, key_ops=["sign"]),
        published(EC_KEY, key_ops="verify"),
        {**published(EC_KEY), "kid": 7},
        {**published(EC_KEY), "kid": []},
        published(EC_KEY, d="AA"),
        published(EC_KEY, k="AA"),
        published(RSA_KEY, alg="RS512"),
        published(RSA_KEY, alg="ES256"),
        published(rsa.generate_private_key(public_exponent=65537, key_size=1024)),  # noqa: S505 - weak on purpose
        published(ec.generate_private_key(ec.SECP384R1())),
        json.loads(ECAlgorithm.to_jwk(EC_KEY)),
        json.loads(RSAAlgorithm.to_jwk(RSA_KEY)),
    ],
)
def test_a_key_that_does_not_fit_is_left_out(jwk: object) -> None:
    """Symmetric, private, weak, broken keys and those for other uses are ignored; the others count."""
    document = json.dumps({"keys": [jwk, published(EC_KEY, "good", use="sig", alg="ES256", key_ops=["verify"])]})
    assert {("ES256", "good")} == set(parse_keys(document.encode()))


def test_of_two_keys_with_one_name_the_first_counts() -> None:
    """A name that is published twice cannot push out the key that came first."""
    other = ec.generate_private_key(ec.SECP256R1())
    document = json.dumps({"keys": [published(EC_KEY), published(other)]}).encode()
    assert {("ES256", "1"): EC_KEY.public_key()} == parse_keys(document)


def test_a_key_set_may_hold_as_many_keys_as_the_bound() -> None:
    """The bound on keys is one that a key set may reach."""
    keys = [published(EC_KEY, str(number)) for number in range(MAX_KEYS)]
    assert MAX_KEYS == len(parse_keys(json.dumps({"keys": keys}).encode()))


@given(st.binary(max_size=100) | _JSON.map(lambda value: json.dumps({"keys": [value]}).encode()))
def test_no_document_breaks_the_reader(document: bytes) -> None:
    """Any bytes are either a key set or a ValueError."""
    try:
        parse_keys(document)
    except ValueError:
        return


# What a request says


def authenticator(*, dev_auth: bool = False, trusted_proxies: tuple[str, ...] = ()) -> Authenticator:
    """Build an authenticator that knows the shared secret."""
    return Authenticator(verifier(), dev_auth=dev_auth, trusted_proxies=trusted_proxies)


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_the_bearer_token_names_the_caller(scheme: bytes) -> None:
    """The scheme is read in either case."""
    headers = [(b"host", b"example"), (b"authorization", scheme + b" " + token().encode())]
    assert Caller(Role.AUTHENTICATED, SUBJECT) == authenticator().caller(headers)


def test_without_a_header_nobody_is_asking() -> None:
    """A request without credentials is anonymous."""
    assert Caller(Role.ANONYMOUS, None) == NOBODY == authenticator(dev_auth=True).caller([(b"host", b"example")])


def test_more_than_one_space_before_the_token_is_allowed() -> None:
    """The scheme and the token stand apart by one space or several (RFC 9110)."""
    headers = [(b"authorization", b"Bearer   " + token().encode() + b" ")]
    assert SUBJECT == authenticator().caller(headers).subject


def test_a_caller_who_proved_himself_is_known_by_his_header() -> None:
    """The same header, in any spelling that is allowed, is recognised until the token ends; no other one is."""
    time = Time()
    asking = Authenticator(verifier(time=time), dev_auth=False, trusted_proxies=())
    text = token().encode()
    assert asking.known(b"Bearer " + text) is None
    expected = asking.caller([(b"authorization", b"Bearer " + text)])
    for header in (b"Bearer " + text, b"bEARER   " + text + b" "):
        assert expected == asking.known(header)
    for header in (
        text,
        b"Basic " + text,
        b"Bearer",
        b"Bearer " + text + b"X",
        b"Bearer\t" + text,
        b"Bearer \t" + text,
    ):
        assert asking.known(header) is None
    time.now = NOW + timedelta(seconds=60)
    assert asking.known(b"Bearer " + text) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic dXNlcjpwYXNz",
        token().encode(),
        b"Bearer\t" + token().encode(),
        b"Bearer \t" + token().encode(),
        b"Bearer " + token().encode() + b", Bearer " + token().encode(),
        b"Bearer " + token().encode() + b"X",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
        "Bearer é".encode(),
    ],
)
def test_credentials_that_are_no_bearer_token_are_refused(value: bytes) -> None:
    """Anything but one bearer token is refused, the development bypass notwithstanding."""
    headers = [(b"authorization", value), (b"x-test-user-id", b"me")]
    with pytest.raises(UnauthorizedError):
        authenticator(dev_auth=True).caller(headers)


@given(st.binary(max_size=80))
def test_no_header_breaks_the_authenticator(value: bytes) -> None:
    """Whatever bytes a header holds, the answer is a caller or the one refusal."""
    for name in (b"authorization", b"x-test-user-id", b"x-forwarded-for"):
        asking = authenticator(dev_auth=True, trusted_proxies=("0.0.0.0/0",))
        headers = [(name, value)]
        try:
            caller = asking.caller(headers)
        except UnauthorizedError:
            continue
        assert asking.rate_key(caller, headers, "192.0.2.1")


@pytest.mark.parametrize("name", [b"authorization", b"x-test-user-id"])
def test_two_headers_that_name_a_caller_are_a_bad_request(name: bytes) -> None:
    """A doubled header is malformed, even when both say the same."""
    value = b"Bearer " + token().encode()
    with pytest.raises(BadRequestError):
        authenticator(dev_auth=True).caller([(name, value), (name, value)])


@pytest.mark.parametrize("subject", ["me", SUBJECT, "Zoë", "x" * 255])
def test_in_development_a_header_stands_for_a_user(subject: str) -> None:
    """With the bypass on, X-Test-User-ID is an authenticated user of that name."""
    headers = [(b"x-test-user-id", subject.encode())]
    assert Caller(Role.AUTHENTICATED, subject) == authenticator(dev_auth=True).caller(headers)


@pytest.mark.parametrize("value", [b"", b"x" * 256, b"a\x00b", b"\xff"])
def test_a_test_user_needs_a_proper_name(value: bytes) -> None:
    """A name that no token could carry is refused."""
    with pytest.raises(UnauthorizedError):
        authenticator(dev_auth=True).caller([(b"x-test-user-id", value)])


def test_a_token_wins_over_the_bypass() -> None:
    """A present Authorization header decides, good or bad."""
    headers = [(b"x-test-user-id", b"me"), (b"authorization", b"Bearer " + token().encode())]
    assert SUBJECT == authenticator(dev_auth=True).caller(headers).subject


def test_outside_development_the_bypass_is_a_header_like_any_other() -> None:
    """With the bypass off, X-Test-User-ID means nothing, not even doubled."""
    assert NOBODY == authenticator().caller([(b"x-test-user-id", b"me"), (b"x-test-user-id", b"you")])


async def test_settings_decide_what_counts(server: KeyServer) -> None:
    """Secret, audience, issuer, bypass, proxies and key set come from the settings."""
    settings = load_settings(
        jwt_secret=SECRET,
        jwt_audience="staff",
        jwt_issuer=ISSUER,
        environment="development",
        dev_auth=True,
        trusted_proxies="10.0.0.0/8",
        jwks_url=server.url,
    )
    server.answer = server.publishes(published(EC_KEY))
    key_set = KeySet.from_settings(settings)
    assert key_set is not None
    async with key_set:
        asking = Authenticator.from_settings(settings, clock=Time(), key_set=key_set)
        for text in (token(aud="staff", iss=ISSUER), asymmetric(EC_KEY, aud="staff", iss=ISSUER)):
            assert SUBJECT == asking.caller([(b"authorization", b"Bearer " + text.encode())]).subject
        for text in (token(), token(aud="staff"), token(iss=ISSUER)):
            with pytest.raises(UnauthorizedError):
                asking.caller([(b"authorization", b"Bearer " + text.encode())])
        forwarded = [(b"x-test-user-id", b"me"), (b"x-forwarded-for", b"192.0.2.7")]
        assert "me" == asking.caller(forwarded).subject
        assert "address:192.0.2.7" == asking.rate_key(NOBODY, forwarded, "10.1.2.3")


def test_development_alone_opens_no_bypass() -> None:
    """In development, too, X-Test-User-ID means nothing until it is asked for."""
    settings = load_settings(jwt_secret=SECRET, environment="development")
    asking = Authenticator.from_settings(settings, clock=Time(), key_set=None)
    assert NOBODY == asking.caller([(b"x-test-user-id", b"me")])


def test_without_an_address_no_keys_are_fetched() -> None:
    """No JWKS address, no key set; and an asymmetric token is refused."""
    assert KeySet.from_settings(load_settings(jwks_url="")) is None
    assert refuses(asymmetric(EC_KEY))


# From where


PROXIES: Final = (ip_network("10.0.0.0/8"), ip_network("2001:db8:1::/48"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.5, 198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7, 10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7", "10.0.0.2,10.0.0.3"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.5", "198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.7, nonsense, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["198.51.100.7, "], "10.0.0.1"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7:port"], "10.0.0.1"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7"], "10.0.0.1"),
        ("10.0.0.1", ["[2001:db8::7]x"], "10.0.0.1"),
        ("10.0.0.1", ["2001:DB8:0:0::7"], "2001:db8::7"),
        ("10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("::ffff:10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("2001:db8:1::1", ["198.51.100.7, ::ffff:10.0.0.2"], "198.51.100.7"),
        ("2001:db8:2::1", ["198.51.100.7"], "2001:db8:2::1"),
        ("fe80::1%eth0", ["198.51.100.7"], "fe80::1"),
        ("10.0.0.1", ["198.51.100.07"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7X"], "10.0.0.1"),
        ("10.0.0.1", ["\xff"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7\xa0"], "10.0.0.1"),
        (None, ["198.51.100.7"], "unknown"),
        ("testclient", ["198.51.100.7"], "testclient"),
    ],
)
def test_the_client_is_the_nearest_hop_nobody_vouches_further_for(
    peer: str | None, forwarded: list[str], expected: str
) -> None:
    """X-Forwarded-For counts from the right, only as far as trusted proxies report it."""
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    assert expected == client_address([(b"host", b"example"), *headers], peer, PROXIES)


@given(st.lists(st.binary(max_size=40), max_size=3))
def test_a_stranger_cannot_choose_his_address(values: list[bytes]) -> None:
    """Without a trusted proxy in between, no X-Forwarded-For changes the address."""
    headers = [(b"x-forwarded-for", value) for value in values]
    assert "192.0.2.1" == client_address(headers, "192.0.2.1", PROXIES)


@given(st.lists(st.sampled_from([b"203.0.113.5", b"10.0.0.9", b"x", b"::1", b""]), max_size=4))
def test_what_stands_left_of_the_nearest_stranger_changes_nothing(forged: list[bytes]) -> None:
    """Behind a trusted proxy, what a client itself sent is never believed."""
    headers = [(b"x-forwarded-for", b",".join([*forged, b"198.51.100.7"]))]
    assert "198.51.100.7" == client_address(headers, "10.0.0.1", PROXIES)


def test_a_proxy_may_be_named_by_any_address_of_its_network() -> None:
    """A network that is written with one of its hosts is that network."""
    asking = authenticator(trusted_proxies=("10.1.2.3/8",))
    assert "address:192.0.2.7" == asking.rate_key(NOBODY, [(b"x-forwarded-for", b"192.0.2.7")], "10.0.0.1")


def test_requests_are_counted_by_subject_else_by_address() -> None:
    """A subject and an address of the same text are two callers, and one client's IPv6 addresses are one."""
    asking = authenticator()
    by_subject = asking.rate_key(Caller(Role.AUTHENTICATED, "192.0.2.1"), [], "198.51.100.7")
    by_address = asking.rate_key(NOBODY, [], "192.0.2.1")
    assert ("subject:192.0.2.1", "address:192.0.2.1") == (by_subject, by_address)
    home = {asking.rate_key(NOBODY, [], peer) for peer in ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:0:9::")}
    assert 1 == len(home)
    assert asking.rate_key(NOBODY, [], "2001:db8:0:1::1") not in home
    assert "address:unknown" == asking.rate_key(NOBODY, [], None)


def test_the_digest_is_what_is_remembered() -> None:
    """No token stays in the verifier's memory, only its SHA-256."""
    checker = verifier()
    checker.verify(token())
    state = repr(vars(checker))
    assert token() not in state
    assert repr(hashlib.sha256(token().encode()).digest()) in state
