"""The fast lane: the same answers as the ordinary route, byte for byte, and every guard of it."""

import http.client
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goodstanding.data import UserId
from goodstanding.embedded import Postgres, Valkey
from goodstanding.reputation_service import ReputationService
from tests.parts import metric
from tests.serving import GONE, INVALIDATE, SINGLE, Backend, bearer, open_backend, token, wait_until
from tests.ways import WAYS, Three, comparable, people_of, three_ways


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module", params=["memory", "redis"])
def three(backend: Backend, request: pytest.FixtureRequest) -> Iterator[Three]:
    """Give the service as it is, and without its memory tier."""
    with three_ways(backend, **({} if request.param == "memory" else {"memory_seconds": 0})) as opened:
        yield opened


@pytest.fixture(scope="module")
def people(backend: Backend) -> dict[str, UserId]:
    """Give users whose badges differ."""
    return people_of(backend)


_ID: Final = st.sampled_from(["gold", "green", "red", "gone", "nil", "short", "braces", "wide"])
_SPELL: Final = st.sampled_from([str, str.upper, lambda text: text.replace("-", "%2D"), lambda text: "%33" + text[1:]])
_AUTHORIZATION: Final = st.sampled_from(
    [
        ("known",),
        ("known",),
        ("known",),
        ("service",),
        ("anonymous",),
        ("forged",),
        ("lowercase",),
        ("spaces",),
        ("basic",),
        (),
        ("known", "known"),
        ("known", "service"),
    ]
)
_REQUEST_ID: Final = st.lists(st.sampled_from(["a-1", "x" * 64, "x" * 65, "", "caf\xe9", "a b", "0" * 32]), max_size=2)
_CONDITION: Final = st.lists(
    st.sampled_from(["*", 'W/"12-gold-12-0"', '"12-gold-12-0"', 'W/"1-green-2-1"', '"x", W/"-3-red-0-3"', "", "W/"]),
    max_size=2,
)
_OTHER: Final = st.lists(
    st.sampled_from(
        [
            "Origin: https://app.example",
            "Accept: */*",
            "Cookie: a=b",
            "X-Test-User-ID: someone",
            "X-Forwarded-For: 192.0.2.1",
            "Content-Length: 0",
            "Connection: keep-alive",
            "Connection: close",
            "Expect: 100-continue",
            "Accept-Encoding: gzip",
        ]
    ),
    max_size=3,
    unique=True,
)


class TestSameAnswers:
    """What the three ways answer."""

    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "OPTIONS"]),
        who=_ID,
        spell=_SPELL,
        query=st.sampled_from(["", "", "", "?", "?use_cache=true", "?use_cache=maybe", "?x=1"]),
        authorization=_AUTHORIZATION,
        request_id=_REQUEST_ID,
        condition=_CONDITION,
        other=_OTHER,
        version=st.sampled_from(["1.1", "1.1", "1.1", "1.0"]),
    )
    def test_any_request_is_answered_the_same_whatever_way_it_takes(  # noqa: PLR0913, PLR0917 - the parts of a request
        self,
        three: Three,
        people: dict[str, UserId],
        method: str,
        who: str,
        spell: Callable[[str], str],
        query: str,
        authorization: tuple[str, ...],
        request_id: list[str],
        condition: list[str],
        other: list[str],
        version: str,
    ) -> None:
        """Status, headers and body do not depend on the way, whatever is sent."""
        others = {
            "gone": GONE,
            "nil": "0" * 8,
            "short": "x" * 36,
            "braces": "{" + "a" * 34 + "}",
            "wide": "\uff11" * 12,
        }
        user = spell(people[who] if who in people else others[who])
        values = {
            "known": f"Bearer {_KNOWN}",
            "service": f"Bearer {_SERVICE}",
            "anonymous": f"Bearer {_ANONYMOUS}",
            "forged": f"Bearer {_KNOWN[:-2]}",
            "lowercase": f"bearer {_KNOWN}",
            "spaces": f"Bearer   {_KNOWN} ",
            "basic": "Basic dXNlcjpwYXNz",
        }
        lines = [f"Authorization: {values[name]}" for name in authorization]
        lines += [f"X-Request-ID: {value}" for value in request_id]
        lines += [f"If-None-Match: {value}" for value in condition] + other
        head = f"{method} {SINGLE.format(user)}{query} HTTP/{version}\r\nHost: a\r\n"
        request = (head + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode("utf-8")
        three.ask("route", request)  # whatever it fills is filled, whoever it makes known is known
        answers = {way: comparable(three.ask(way, request)) for way in WAYS}
        if any(answers[way] != answers["route"] for way in WAYS):
            # A machine that stood still may have cost one of them its round trip to Redis; a difference stays.
            answers = {way: comparable(three.ask(way, request)) for way in WAYS}
        assert answers["route"] == answers["lane"]
        assert answers["route"] == answers["protocol"]
        assert answers["route"] == answers["repeated"]

    def test_hits_of_known_callers_never_reach_the_application(self, three: Three, people: dict[str, UserId]) -> None:
        """Both fast ways answer by themselves, GET by both and HEAD by the lane."""
        headers = bearer()
        three.warm(people["gold"], headers)
        three.passed.clear()
        three.hits.clear()
        for way in ("lane", "protocol"):
            for method in ("GET", "HEAD"):
                answer = three.get(way, people["gold"], headers, method)
                assert 200 == answer.status
                assert answer.headers["cache-status"].startswith("goodstanding; hit; ttl=")
        assert [] == three.passed
        three.hits.clear()
        body = three.get("repeated", people["gold"], headers).body
        assert [body] * 3 == three.hits, "the protocol did not know the bytes again"
        assert [] == three.passed

    def test_every_way_is_counted_alike(self, three: Three, people: dict[str, UserId]) -> None:
        """A hit is one request in the metrics, whichever way it took."""
        headers = bearer()
        three.warm(people["red"], headers)

        def requests() -> float:
            return metric(
                "goodstanding_http_request_seconds_count",
                route="/api/user/reputation/{user_id}",
                method="GET",
                status="200",
                source="cache",
            )

        for way in WAYS:
            requested, hits = requests(), metric("goodstanding_cache_reads_total", result="hit")
            three.get(way, people["red"], headers)
            count = 3 if way == "repeated" else 1
            wait_until(lambda expected=requested + count: expected == requests())  # type: ignore[misc] # a default is no surprise
            assert hits + count == metric("goodstanding_cache_reads_total", result="hit")

    def test_a_refusal_is_the_same_whatever_way_it_takes(
        self, three: Three, people: dict[str, UserId], backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a read would wait in vain, also the protocol says 503, and when to come back; hits are answered."""
        headers = bearer()
        three.warm(people["gold"], headers)
        three.get("repeated", people["gold"], headers)
        cold = backend.user(completed=1)
        monkeypatch.setattr(ReputationService, "_has_room", lambda _self, _loads: False)
        answers = {way: comparable(three.get(way, cold, headers)) for way in WAYS}
        assert [answers["route"]] * len(WAYS) == [*answers.values()]
        assert 503 == answers["route"][0]
        assert ("retry-after", "1") in answers["route"][1]
        assert 200 == three.get("protocol", people["gold"], headers).status


class TestGuards:
    """What holds on the ordinary route holds on the fast ways."""

    @pytest.mark.parametrize("way", ["lane", "protocol"])
    def test_a_token_that_expires_is_refused_on_the_same_connection(self, backend: Backend, way: str) -> None:
        """Nobody is known for longer than the token holds."""
        user = backend.user(completed=1)
        with three_ways(backend) as three, _connection(three.urls[way]) as ask:
            headers = bearer(exp=int(three.clock.now.timestamp()) + 60)
            three.warm(user, headers)
            assert [200] * 3 == [ask(user, headers) for _ in range(3)]
            three.clock.now += timedelta(seconds=61)
            assert 401 == ask(user, headers)

    @pytest.mark.parametrize("way", ["lane", "protocol", "repeated"])
    def test_the_limit_holds(self, backend: Backend, way: str) -> None:
        """The first request above the limit is refused, with the time to wait."""
        user = backend.user(completed=1)
        with three_ways(backend, read_limit_per_minute=50) as three:
            headers = bearer()
            three.warm(user, headers)
            answers = [three.get(way, user, headers) for _ in range(60)]
        statuses = [answer.status for answer in answers]
        assert {200, 429} == set(statuses)
        assert sorted(statuses) == statuses
        assert 50 > statuses.count(200)
        assert int(answers[-1].headers["retry-after"]) >= 1

    @pytest.mark.parametrize("way", ["lane", "protocol", "repeated"])
    def test_a_change_shows_at_once(self, backend: Backend, three: Three, way: str) -> None:
        """What was invalidated is not answered from memory."""
        user, match = backend.match(completed=1)
        headers = bearer()
        three.warm(user, headers)
        backend.session(match, "no_show")
        service = "".join(f"{name}: {value}\r\n" for name, value in bearer("service_role").items())
        path = INVALIDATE.format(user)
        assert 200 == three.ask("route", f"POST {path} HTTP/1.1\r\nHost: a\r\n{service}\r\n".encode()).status
        assert b'"no_shows":0' not in three.get(way, user, headers).body

    @pytest.mark.parametrize("way", ["lane", "protocol", "repeated"])
    def test_without_redis_this_process_answers_from_its_own_cache(
        self, postgres: Postgres, valkey: Valkey, template: str, way: str
    ) -> None:
        """And the first change that it hears of shows."""
        with open_backend(postgres, valkey, template) as alone, three_ways(alone, redis_url="") as three:
            user, match = alone.match(completed=1)
            headers = bearer()
            three.warm(user, headers)
            three.passed.clear()
            assert three.get(way, user, headers).headers["cache-status"].startswith("goodstanding; hit")
            assert [] == three.passed
            alone.session(match, "no_show")
            wait_until(lambda: b'"no_shows":1' in three.get(way, user, headers).body)

    @pytest.mark.parametrize("memory_seconds", [5, 0])
    def test_another_origin_is_told_on_every_way_what_it_may_see(self, backend: Backend, memory_seconds: int) -> None:
        """A hit says whose page may read it, and no other origin's may; nobody's cookies are asked for."""
        user = backend.user(completed=1)
        with three_ways(backend, cors_origins="https://app.example", memory_seconds=memory_seconds) as three:
            headers = bearer()
            three.warm(user, headers)
            # Without an origin the fast ways answer, and may not lend that answer to one.
            assert "access-control-allow-origin" not in three.get("repeated", user, headers).headers
            for way in WAYS:
                answer = three.get(way, user, headers | {"Origin": "https://app.example"})
                assert 200 == answer.status
                assert answer.headers["cache-status"].startswith("goodstanding; hit; ttl=")
                assert "https://app.example" == answer.headers["access-control-allow-origin"]
                assert "Origin" == answer.headers["vary"]
                other = three.get(way, user, headers | {"Origin": "https://evil.example"})
                assert 200 == other.status
                assert "access-control-allow-origin" not in other.headers
                assert {"access-control-allow-credentials"}.isdisjoint([*answer.headers, *other.headers])

    @pytest.mark.parametrize("moved", [245, -3600])
    def test_what_is_due_or_of_another_time_is_left_to_the_service(self, backend: Backend, moved: int) -> None:
        """From 80 % of an entry's life on, or when the clock is set back, the fast ways look away."""
        user = backend.user(completed=1)
        with three_ways(backend, cache_ttl_seconds=300, memory_seconds=300) as three:
            headers = bearer(exp=int(three.clock.now.timestamp()) + 3600)
            three.warm(user, headers)
            three.passed.clear()
            three.hits.clear()
            three.clock.now += timedelta(seconds=moved)
            answer = three.get("protocol", user, headers)
            assert 200 == answer.status
            if answer.headers["cache-status"].startswith("goodstanding; hit; ttl="):
                assert 0 <= int(answer.headers["cache-status"].rpartition("=")[2]) <= 300
            assert [] == three.hits


@contextmanager
def _connection(url: str) -> Iterator[Callable[[str, Mapping[str, str]], int]]:
    """Give what asks on one connection that stays open."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)

    def ask(user: str, headers: Mapping[str, str]) -> int:
        connection.request("GET", SINGLE.format(user), headers=dict(headers))
        answer = connection.getresponse()
        answer.read()
        return answer.status

    try:
        yield ask
    finally:
        connection.close()


_KNOWN: Final = token()
_SERVICE: Final = token("service_role")
_ANONYMOUS: Final = token("anon")
