"""The HTTP contract, over real sockets, against the real servers."""

import re
import secrets
import time
from collections.abc import Iterator
from typing import Final

import httpx2
import pytest
import redis
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from goodstanding import create_app
from goodstanding.embedded import Postgres, Valkey
from goodstanding.reputation_service import ReputationService
from tests.serving import (
    ATTRIBUTION,
    BATCH,
    GONE,
    INVALIDATE,
    INVALIDATE_ALL,
    NIL,
    NO_DATABASE,
    NO_REDIS,
    SINGLE,
    Backend,
    bearer,
    check_problem,
    client_of,
    open_backend,
    token,
    wait_until,
)

_MOMENT: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of the service as it runs in production."""
    with client_of(create_app(backend.settings(cors_origins="https://app.example"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def open_client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of a service that opens reads and metrics to everybody."""
    with client_of(create_app(backend.settings(public_reads=True, metrics_public=True))) as opened:
        yield opened


@pytest.fixture(scope="module")
def dev_client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of a service in development, where a header stands for a token."""
    settings = backend.settings(environment="development", dev_auth=True, cors_origins="http://localhost:3000")
    with client_of(create_app(settings)) as opened:
        yield opened


@pytest.fixture(scope="module")
def lonely_client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of a service whose Redis is not there."""
    away = backend.settings(redis_url=NO_REDIS)
    with client_of(create_app(away)) as opened:
        yield opened


def _read(client: httpx2.Client, user_id: str, query: str = "", **headers: str) -> httpx2.Response:
    return client.get(SINGLE.format(user_id) + query, headers=bearer() | headers)


def _status(answer: httpx2.Response) -> str:
    return answer.headers["cache-status"]


class TestSingleRead:
    """GET /api/user/reputation/{user_id}."""

    def test_the_body_is_exactly_the_five_members(self, backend: Backend, client: httpx2.Client) -> None:
        """The body is the five members in their order, without spaces, the timestamp in UTC with microseconds."""
        answer = _read(client, backend.user(completed=8, no_shows=1))
        assert 200 == answer.status_code
        assert "application/json" == answer.headers["content-type"]
        members = '"score":7,"badge_color":"green","completed_sessions":8,"no_shows":1,"cache_timestamp":'
        expected = r"\{" + members + '"' + _MOMENT + r'"\}'
        assert re.fullmatch(expected, answer.text)

    @pytest.mark.parametrize(
        ("completed", "no_shows", "score", "badge"),
        [(0, 0, 0, "green"), (10, 0, 10, "gold"), (30, 0, 20, "gold"), (0, 1, -1, "red"), (0, 9, -5, "red")],
    )
    def test_scores_and_badges(
        self, backend: Backend, client: httpx2.Client, completed: int, no_shows: int, score: int, badge: str
    ) -> None:
        """A score is clamped, a badge follows from it, and the counts stay exact."""
        told = _read(client, backend.user(completed=completed, no_shows=no_shows)).json()
        del told["cache_timestamp"]
        expected = {
            "score": score,
            "badge_color": badge,
            "completed_sessions": completed,
            "no_shows": no_shows,
        }
        assert expected == told

    def test_first_a_miss_then_a_hit(self, backend: Backend, client: httpx2.Client) -> None:
        """The first read is told as a miss, the next one as a hit with its remaining life and the same bytes."""
        user = backend.user(completed=1)
        first, second = _read(client, user), _read(client, user)
        assert "goodstanding; fwd=miss" == _status(first)
        assert re.fullmatch(r"goodstanding; hit; ttl=(300|29\d)", _status(second))
        assert first.content == second.content

    def test_use_cache_false_reads_past_the_cache_and_refreshes_it(
        self, backend: Backend, client: httpx2.Client
    ) -> None:
        """With use_cache=false a change that nobody told of shows at once, and the next cached read shows it too."""
        user, match_id = backend.match(completed=1)
        assert 1 == _read(client, user).json()["completed_sessions"]
        backend.complete(match_id, unseen=True)
        assert 1 == _read(client, user).json()["completed_sessions"]
        fresh = _read(client, user, "?use_cache=false")
        assert "goodstanding; fwd=request" == _status(fresh)
        assert 2 == fresh.json()["completed_sessions"]
        cached = _read(client, user, "?use_cache=true")
        assert _status(cached).startswith("goodstanding; hit")
        assert fresh.content == cached.content

    @pytest.mark.parametrize(
        "query", ["?use_cache=1", "?use_cache=", "?use_cache=True", "?use_cache=true&use_cache=true"]
    )
    def test_use_cache_is_true_or_false(self, client: httpx2.Client, query: str) -> None:
        """Any other value of use_cache, and a repeated one, is refused."""
        check_problem(_read(client, NIL, query), 422, "invalid_input")

    def test_either_case_is_the_same_user(self, backend: Backend, valkey: Valkey, client: httpx2.Client) -> None:
        """An id in capitals is the same user under the same cache key."""
        user = backend.user(completed=2)
        lower = _read(client, user)
        upper = _read(client, user.upper())
        assert _status(upper).startswith("goodstanding; hit")
        assert lower.content == upper.content
        with redis.Redis.from_url(valkey.url()) as store:
            assert 1 == store.exists(f"reputation:user:{user}")
            assert 0 == store.exists(f"reputation:user:{user.upper()}")

    @pytest.mark.parametrize("user_id", [NIL, GONE])
    def test_unknown_users_are_not_found(self, client: httpx2.Client, user_id: str) -> None:
        """A well-formed id of nobody is 404, from the database and from the cache."""
        for _ in range(2):
            check_problem(_read(client, user_id), 404, "user_not_found", never=user_id)

    def test_redis_away_is_a_bypass(self, backend: Backend, lonely_client: httpx2.Client) -> None:
        """Without Redis every read is answered from the database and told as a bypass."""
        user = backend.user(completed=3)
        for _ in range(2):
            answer = _read(lonely_client, user)
            assert "goodstanding; fwd=bypass" == _status(answer)
            assert 3 == answer.json()["score"]

    def test_without_a_redis_url_memory_is_the_cache(self, backend: Backend) -> None:
        """Without a Redis URL the process's memory answers, invalidations included."""
        user = backend.user(completed=3)
        with client_of(create_app(backend.settings(redis_url=""))) as client:
            assert "goodstanding; fwd=miss" == _status(_read(client, user))
            # Whatever was loaded before the process began to hear of changes is forgotten when it does.
            wait_until(lambda: _status(_read(client, user)).startswith("goodstanding; hit"))
            client.post(INVALIDATE.format(user), headers=bearer("service_role")).raise_for_status()
            assert "goodstanding; fwd=miss" == _status(_read(client, user))

    def test_stale_is_told_as_stale(self, postgres: Postgres, valkey: Valkey, backend: Backend) -> None:
        """While PostgreSQL hangs the last known good copy is served with a negative ttl, and no browser keeps it."""
        known, unseen = backend.user(completed=4), backend.user()
        with (
            client_of(create_app(backend.settings(load_deadline_ms=200, memory_seconds=0))) as client,
            redis.Redis.from_url(valkey.url()) as store,
        ):
            fresh = _read(client, known)
            wait_until(lambda: _status(_read(client, known)).startswith("goodstanding; hit"))
            store.delete(f"reputation:user:{known}")
            postgres.pause()
            try:
                stale = _read(client, known)
                batch = client.post(BATCH, json={"user_ids": [known]}, headers=bearer())
                check_problem(_read(client, unseen), 503, "temporarily_unavailable")
            finally:
                postgres.resume()
            assert re.fullmatch(r"goodstanding; hit; ttl=-\d+", _status(stale))
            assert "private, max-age=0" == stale.headers["cache-control"]
            assert fresh.content == stale.content
            assert fresh.json() == batch.json()["reputations"][known]
            wait_until(lambda: "ready" == client.get("/health/ready").json()["status"])
            assert "goodstanding; fwd=miss" == _status(_read(client, known))
        served = REGISTRY.get_sample_value(
            "goodstanding_http_request_seconds_count",
            {"route": SINGLE.format("{user_id}"), "method": "GET", "status": "200", "source": "stale"},
        )
        assert served is not None


class TestBrowserCaching:
    """ETag, If-None-Match and Cache-Control."""

    def test_the_etag_is_weak_and_follows_what_a_person_sees(self, backend: Backend, client: httpx2.Client) -> None:
        """The ETag survives a recomputation and changes with the counts."""
        user, match = backend.match(completed=1)
        first, again = _read(client, user), _read(client, user, "?use_cache=false")
        assert first.json()["cache_timestamp"] != again.json()["cache_timestamp"]
        assert first.headers["etag"].startswith('W/"')
        assert first.headers["etag"] == again.headers["etag"]
        backend.session(match, "no_show")
        assert again.headers["etag"] != _read(client, user, "?use_cache=false").headers["etag"]

    def test_the_etag_tells_counts_apart_that_score_the_same(self, backend: Backend, client: httpx2.Client) -> None:
        """Beyond the bounds, and where both counts rise, the ETag still changes."""
        counts = [(25, 0), (26, 0), (0, 6), (0, 7), (4, 1), (5, 2)]
        users = [backend.user(completed=completed, no_shows=no_shows) for completed, no_shows in counts]
        assert len(counts) == len({_read(client, user).headers["etag"] for user in users})

    @pytest.mark.parametrize(
        "form", ["{}", "*", '"other", {}', '{} , "other"', "{strong}", '"a,b", {}', 'W/"x",{strong},W/"y"']
    )
    def test_a_matching_condition_is_not_modified(self, backend: Backend, client: httpx2.Client, form: str) -> None:
        """If-None-Match matches weakly, alone or in a list, and the 304 has the headers of the 200 but no body."""
        user = backend.user(completed=1)
        etag = _read(client, user).headers["etag"]
        answer = _read(client, user, **{"If-None-Match": form.format(etag, strong=etag.removeprefix("W/"))})
        assert 304 == answer.status_code
        assert b"" == answer.content
        assert etag == answer.headers["etag"]
        assert _status(answer).startswith("goodstanding; hit")
        assert answer.headers["cache-control"].startswith("private, max-age=")

    @pytest.mark.parametrize("form", ['"other"', "", "W/", "{bare}", '"*"', "w/{strong}"])
    def test_another_condition_is_answered_in_full(self, backend: Backend, client: httpx2.Client, form: str) -> None:
        """A condition that names another state, or nothing well formed, gets the whole answer."""
        user = backend.user(completed=1)
        etag = _read(client, user).headers["etag"]
        strong = etag.removeprefix("W/")
        answer = _read(client, user, **{"If-None-Match": form.format(strong=strong, bare=strong.strip('"'))})
        assert 200 == answer.status_code

    def test_several_condition_headers_are_one_list(self, backend: Backend, client: httpx2.Client) -> None:
        """Two If-None-Match lines count as one list."""
        user = backend.user(completed=1)
        etag = _read(client, user).headers["etag"]
        headers = [*bearer().items(), ("If-None-Match", '"other"'), ("If-None-Match", etag)]
        assert 304 == client.get(SINGLE.format(user), headers=headers).status_code

    def test_an_unknown_user_matches_no_condition(self, client: httpx2.Client) -> None:
        """A condition `*` about nobody is 404."""
        check_problem(_read(client, NIL, **{"If-None-Match": "*"}), 404)

    @pytest.mark.parametrize(("life", "most"), [(300, 5), (3, 3)])
    def test_a_browser_keeps_it_five_seconds_at_most(self, backend: Backend, life: int, most: int) -> None:
        """max-age is at most 5 and never beyond the entry's own remaining life."""
        user = backend.user()
        with client_of(create_app(backend.settings(redis_url="", cache_ttl_seconds=life))) as client:
            for answer in (_read(client, user), _read(client, user)):
                age = int(answer.headers["cache-control"].removeprefix("private, max-age="))
                assert most - 1 <= age <= most

    @pytest.mark.parametrize("path", [SINGLE, "/health/live", "/health/ready", "/metrics"])
    def test_head_is_get_without_a_body(self, backend: Backend, client: httpx2.Client, path: str) -> None:
        """HEAD answers with the status and the headers of GET, and no body."""
        path = path.format(backend.user(completed=1))
        client.get(path, headers=bearer("service_role"))
        get = client.get(path, headers=bearer("service_role"))
        head = client.head(path, headers=bearer("service_role"))
        assert b"" == head.content
        assert get.status_code == head.status_code
        own = {"date", "x-request-id", "cache-status"} | ({"content-length"} if path == "/metrics" else set())
        assert {key: value for key, value in get.headers.items() if key not in own} == {
            key: value for key, value in head.headers.items() if key not in own
        }

    def test_head_of_nobody_is_404(self, client: httpx2.Client) -> None:
        """HEAD tells errors by their status."""
        answer = client.head(SINGLE.format(NIL), headers=bearer())
        assert 404 == answer.status_code
        assert b"" == answer.content


class TestBatch:
    """POST /api/user/reputation/batch."""

    def test_ids_come_back_as_they_were_sent(self, backend: Backend, client: httpx2.Client) -> None:
        """Each id is answered as sent, in that order; an unknown one is null; two spellings are two members."""
        one, two = backend.user(completed=1), backend.user(no_shows=1)
        ids = [two.upper(), NIL, one, two, one]
        answer = client.post(BATCH, json={"user_ids": ids}, headers=bearer())
        told = answer.json()["reputations"]
        assert "application/json" == answer.headers["content-type"]
        assert [two.upper(), NIL, one, two] == list(told)
        assert told[NIL] is None
        assert told[two] == told[two.upper()]
        assert -1 == told[two]["score"]
        assert ["score", "badge_color", "completed_sessions", "no_shows", "cache_timestamp"] == list(told[one])

    def test_the_body_is_the_single_reads_bodies(self, backend: Backend, client: httpx2.Client) -> None:
        """A member of a batch is byte for byte what the single read says."""
        user = backend.user(completed=5)
        batch = client.post(BATCH, json={"user_ids": [user]}, headers=bearer())
        assert f'{{"reputations":{{"{user}":{_read(client, user).text}}}}}' == batch.text

    def test_a_hundred_users(self, backend: Backend, client: httpx2.Client) -> None:
        """A hundred ids, and a hundred times the same one, are served; one more is refused."""
        users = [backend.user() for _ in range(100)]
        assert 100 == len(client.post(BATCH, json={"user_ids": users}, headers=bearer()).json()["reputations"])
        same = client.post(BATCH, json={"user_ids": users[:1] * 100}, headers=bearer())
        assert users[:1] == list(same.json()["reputations"])
        check_problem(client.post(BATCH, json={"user_ids": users[:1] * 101}, headers=bearer()), 422, "invalid_input")
        check_problem(client.post(BATCH, json={"user_ids": []}, headers=bearer()), 422, "invalid_input")

    def test_one_bad_id_refuses_the_batch(self, backend: Backend, client: httpx2.Client) -> None:
        """An id that is not canonical refuses the whole batch, unechoed."""
        answer = client.post(BATCH, json={"user_ids": [backend.user(), "evil-id"]}, headers=bearer())
        check_problem(answer, 422, "invalid_user_id", never="evil")

    def test_one_round_trip_and_at_most_one_query(
        self, backend: Backend, valkey: Valkey, client: httpx2.Client
    ) -> None:
        """A cold batch of any size is one query, a cached one none, and no trip to Redis where memory has it."""
        users = [backend.user() for _ in range(50)]
        before = _queries()
        client.post(BATCH, json={"user_ids": users}, headers=bearer()).raise_for_status()
        assert 1 == _queries() - before

        def reads_of_a_batch() -> int:
            with redis.Redis.from_url(valkey.url()) as store:
                start = store.info("stats")["total_reads_processed"]
                client.post(BATCH, json={"user_ids": users}, headers=bearer()).raise_for_status()
                return int(store.info("stats")["total_reads_processed"] - start)

        # Redis counts the second look at its own figures too; probes and beats may add to some of the attempts.
        assert 1 == min(reads_of_a_batch() for _ in range(8))
        assert 1 == _queries() - before


def _queries() -> float:
    return REGISTRY.get_sample_value("goodstanding_query_seconds_count", {"query": "counts"}) or 0.0


class TestInvalidation:
    """POST /api/user/reputation/cache/invalidate..."""

    def test_one_user(self, backend: Backend, client: httpx2.Client) -> None:
        """An invalidation, in either case, makes the next read of that user a miss, and of no other."""
        user, other = backend.user(), backend.user()
        _read(client, user)
        _read(client, other)
        answer = client.post(INVALIDATE.format(user.upper()), headers=bearer("service_role"))
        assert 200 == answer.status_code
        assert {"success": True, "message": "The cached reputation is gone."} == answer.json()
        assert "goodstanding; fwd=miss" == _status(_read(client, user))
        assert _status(_read(client, other)).startswith("goodstanding; hit")

    def test_nobody_can_be_invalidated_too(self, client: httpx2.Client) -> None:
        """An id of nobody is no error: there is nothing cached about it afterwards."""
        assert client.post(INVALIDATE.format(GONE), headers=bearer("service_role")).json()["success"] is True

    def test_everybody(self, backend: Backend, valkey: Valkey, client: httpx2.Client) -> None:
        """Invalidating all drops every reputation, leaves other keys alone and never asks for KEYS."""
        user, other = backend.user(), backend.user()
        _read(client, user)
        _read(client, other)
        with redis.Redis.from_url(valkey.url()) as store:
            store.set("the-host-apps-own", "key")
            answer = client.post(INVALIDATE_ALL, headers=bearer("service_role"))
            assert 200 == answer.status_code
            assert ["success", "message"] == list(answer.json())
            assert re.fullmatch(r"\d+ cached reputations are gone\.", answer.json()["message"])
            assert b"key" == store.get("the-host-apps-own")
            assert not {"cmdstat_keys", "cmdstat_flushdb"} & store.info("commandstats").keys()
        assert "goodstanding; fwd=miss" == _status(_read(client, user))
        assert "goodstanding; fwd=miss" == _status(_read(client, other))

    @pytest.mark.parametrize("path", [INVALIDATE.format(NIL), INVALIDATE_ALL])
    def test_redis_away(self, lonely_client: httpx2.Client, path: str) -> None:
        """What cannot be invalidated now is 503 with the time to come back, never a success."""
        check_problem(lonely_client.post(path, headers=bearer("service_role")), 503, "temporarily_unavailable")


class TestAttribution:
    """POST /api/admin/sessions/{session_id}/attribution."""

    def _attribute(
        self, client: httpx2.Client, session: str, at_fault: str, *, reason: str = "seen", **claims: object
    ) -> httpx2.Response:
        body = {"at_fault": at_fault, "reason": reason}
        return client.post(ATTRIBUTION.format(session), json=body, headers=bearer("service_role", **claims))

    def test_a_verdict_changes_the_score_at_once_and_the_newest_stands(
        self, backend: Backend, client: httpx2.Client
    ) -> None:
        """Each verdict shows in the very next cached read, and the newest one decides."""
        user, match = backend.match()
        session = backend.session(match, "cancelled")
        assert 0 == _read(client, user).json()["score"]
        for at_fault, score in (("user1", -1), ("user2", 0), ("both", -1), ("nobody", 0)):
            answer = self._attribute(client, session.upper(), at_fault)
            assert {"success": True, "message": "The verdict is recorded."} == answer.json()
            assert score == _read(client, user).json()["score"]

    def test_a_verdict_waits_for_its_session(self, backend: Backend, client: httpx2.Client) -> None:
        """A verdict on a scheduled session counts once that session is a no-show."""
        user, match = backend.match()
        session = backend.session(match, "scheduled")
        assert 200 == self._attribute(client, session, "user2").status_code
        assert 0 == _read(client, user).json()["no_shows"]
        backend.execute("update public.wingman_sessions set status = 'no_show' where id = $1", session)
        assert 0 == _read(client, user, "?use_cache=false").json()["no_shows"]
        assert 200 == self._attribute(client, session, "user1").status_code
        assert 1 == _read(client, user).json()["no_shows"]

    def test_who_said_it_and_why_is_kept(self, backend: Backend, client: httpx2.Client) -> None:
        """The token's subject, or its role where it has none, and the trimmed reason are kept with the verdict."""
        _, match = backend.match()
        session = backend.session(match, "no_show")
        self._attribute(
            client, session, "user1", reason="  waited until 19:40 😀 ", sub="moderator-7"
        ).raise_for_status()
        self._attribute(client, session, "user2", sub=None).raise_for_status()

        async def verdicts() -> list[tuple[str, str, str]]:
            async with backend.database.owner() as connection:
                rows = await connection.fetch(
                    "select at_fault, reason, said_by from reputation.attributions where session_id = $1 order by id",
                    session,
                )
            return [tuple(row) for row in rows]

        expected = [("user1", "waited until 19:40 😀", "moderator-7"), ("user2", "seen", "service_role")]
        assert expected == backend.call(verdicts)

    @pytest.mark.parametrize("session_id", [NIL, GONE])
    def test_an_unknown_session_is_not_found(self, client: httpx2.Client, session_id: str) -> None:
        """A well-formed id of no session is 404."""
        check_problem(self._attribute(client, session_id, "user1"), 404, "session_not_found", never=session_id)

    def test_redis_away_records_and_says_so(self, backend: Backend, lonely_client: httpx2.Client) -> None:
        """A verdict is recorded without Redis too, and the answer says that badges may follow later."""
        user, match = backend.match()
        answer = self._attribute(lonely_client, backend.session(match, "cancelled"), "user1")
        assert 200 == answer.status_code
        assert "badges may follow later" in answer.json()["message"]
        assert -1 == _read(lonely_client, user).json()["score"]


class TestHealth:
    """GET /health/live and /health/ready."""

    def test_live(self, client: httpx2.Client) -> None:
        """Liveness needs no token and says nothing but that the process runs."""
        answer = client.get("/health/live")
        assert (200, {"status": "alive"}) == (answer.status_code, answer.json())

    def test_ready(self, client: httpx2.Client) -> None:
        """With both dependencies there the service is ready, as soon as a relay leads."""
        wait_until(lambda: client.get("/health/ready").json()["status"] == "ready")
        answer = client.get("/health/ready")
        assert (200, {"status": "ready", "degraded": []}) == (answer.status_code, answer.json())

    def test_without_redis_it_is_degraded(self, lonely_client: httpx2.Client) -> None:
        """Without Redis reads are still answered: degraded, and its name is all that is told."""
        answer = lonely_client.get("/health/ready")
        assert (200, {"status": "degraded", "degraded": ["cache"]}) == (answer.status_code, answer.json())

    def test_without_a_database_it_is_degraded_and_without_both_unavailable(self, backend: Backend) -> None:
        """Without PostgreSQL the cache still answers; without both nobody does, which is 503."""
        nowhere = NO_DATABASE
        with client_of(create_app(backend.settings(database_url=nowhere))) as client:
            answer = client.get("/health/ready")
            assert (200, {"status": "degraded", "degraded": ["database"]}) == (answer.status_code, answer.json())
        away = NO_REDIS
        with client_of(create_app(backend.settings(database_url=nowhere, redis_url=away))) as client:
            answer = client.get("/health/ready")
            expected = {"status": "unavailable", "degraded": ["database", "cache"]}
            assert (503, expected) == (answer.status_code, answer.json())
            assert 200 == client.get("/health/live").status_code

    def test_keys_that_never_came_make_it_unavailable(self, backend: Backend) -> None:
        """A service that could not load one published key can recognise nobody, and says so."""
        settings = backend.settings(jwks_url="http://127.0.0.1:1/jwks.json")
        with client_of(create_app(settings)) as client:
            wait_until(lambda: "relay" not in client.get("/health/ready").json()["degraded"])
            answer = client.get("/health/ready")
            assert (503, {"status": "unavailable", "degraded": ["jwks"]}) == (answer.status_code, answer.json())

    def test_without_a_relay_it_is_degraded(self, backend: Backend) -> None:
        """While nobody tells of changes reads are still answered, and it says so until somebody does."""
        unheard = backend.redis_url.rpartition("/")[0] + "/1"
        user = backend.user(completed=1)
        with client_of(create_app(backend.settings(redis_url=unheard, relay=False))) as client:
            answer = client.get("/health/ready")
            assert (200, {"status": "degraded", "degraded": ["relay"]}) == (answer.status_code, answer.json())
            assert 1 == _read(client, user).json()["score"]


_CALLS: Final = {
    "read": ("GET", SINGLE, None, "authenticated"),
    "head": ("HEAD", SINGLE, None, "authenticated"),
    "batch": ("POST", BATCH, {"user_ids": [NIL]}, "authenticated"),
    "invalidate": ("POST", INVALIDATE, None, "service_role"),
    "invalidate-all": ("POST", INVALIDATE_ALL, None, "service_role"),
    "attribution": ("POST", ATTRIBUTION, {"at_fault": "user1", "reason": "seen"}, "service_role"),
    "metrics": ("GET", "/metrics", None, "service_role"),
}
_NOBODYS: Final = {
    "no token": {},
    "dev header in production": {"X-Test-User-ID": "alice"},
    "garbage": {"Authorization": "Bearer garbage"},
    "no scheme": {"Authorization": token()},
    "basic": {"Authorization": "Basic YWxpY2U6c2VjcmV0"},
    "empty": {"Authorization": ""},
    "expired": bearer(exp=1),
    "another secret": bearer(secret="x" * 40),
    "another audience": bearer(aud="other"),
    "no subject": bearer(sub=None),
    "service_role of another audience": bearer("service_role", aud="other"),
    "expired with dev header": bearer(exp=1) | {"X-Test-User-ID": "alice"},
}
_FOUND: Final = {"read": 404, "head": 404, "attribution": 404}
"""The calls are about nobody, so where one gets through, some answer 404."""


class TestAuthorisation:
    """Who may call what."""

    def _call(self, client: httpx2.Client, name: str, headers: dict[str, str]) -> httpx2.Response:
        method, path, body, _ = _CALLS[name]
        return client.request(method, path.format(NIL), json=body, headers=headers)

    @staticmethod
    def _check(answer: httpx2.Response, status: int, code: str) -> None:
        assert status == answer.status_code
        if answer.request.method == "HEAD":
            assert b"" == answer.content
        else:
            check_problem(answer, status, code)

    @pytest.mark.parametrize("name", _CALLS)
    @pytest.mark.parametrize("credentials", _NOBODYS)
    def test_nobody(self, client: httpx2.Client, name: str, credentials: str) -> None:
        """Without a token that holds every guarded call is 401 and says which scheme is asked for."""
        answer = self._call(client, name, _NOBODYS[credentials])
        self._check(answer, 401, "unauthorized")
        assert "Bearer" == answer.headers["www-authenticate"]

    @pytest.mark.parametrize("name", _CALLS)
    @pytest.mark.parametrize("role", ["anon", "authenticated", "service_role", "SERVICE_ROLE", "admin"])
    def test_roles(self, client: httpx2.Client, name: str, role: str) -> None:
        """A known role gets what is meant for it, and service_role everything; anything else is 403."""
        allowed = role == "service_role" or role == _CALLS[name][3]
        answer = self._call(client, name, bearer(role))
        if allowed:
            assert _FOUND.get(name, 200) == answer.status_code
        else:
            self._check(answer, 403, "forbidden")

    def test_supabases_own_service_key(self, client: httpx2.Client) -> None:
        """A service_role key without subject and audience is accepted."""
        headers = bearer("service_role", sub=None, aud=None)
        assert 200 == client.post(INVALIDATE_ALL, headers=headers).status_code

    @pytest.mark.parametrize("name", _CALLS)
    def test_the_development_header(self, dev_client: httpx2.Client, name: str) -> None:
        """In development any text in X-Test-User-ID is an authenticated user, and nothing more."""
        answer = self._call(dev_client, name, {"X-Test-User-ID": "alice from the tests"})
        if _CALLS[name][3] == "authenticated":
            assert _FOUND.get(name, 200) == answer.status_code
        else:
            self._check(answer, 403, "forbidden")

    def test_a_token_goes_before_the_development_header(self, dev_client: httpx2.Client) -> None:
        """A token that does not hold is not saved by the development header."""
        answer = self._call(dev_client, "read", {"Authorization": "Bearer garbage", "X-Test-User-ID": "alice"})
        self._check(answer, 401, "unauthorized")

    @pytest.mark.parametrize("name", _CALLS)
    def test_public_reads_open_the_single_read_alone(self, open_client: httpx2.Client, name: str) -> None:
        """PUBLIC_READS opens the single read to callers without a token, METRICS_PUBLIC the metrics, and no more."""
        answer = self._call(open_client, name, {})
        if name in {"read", "head", "metrics"}:
            assert _FOUND.get(name, 200) == answer.status_code
        else:
            self._check(answer, 401, "unauthorized")

    def test_public_reads_do_not_accept_a_bad_token(self, open_client: httpx2.Client) -> None:
        """Where no token is needed, one that does not hold is still refused, and an anon key is served."""
        self._check(self._call(open_client, "read", {"Authorization": "Bearer x"}), 401, "unauthorized")
        self._check(self._call(open_client, "read", bearer("anon")), 404, "user_not_found")

    def test_authorisation_comes_before_the_input(self, client: httpx2.Client) -> None:
        """A caller who may not call learns nothing about the input."""
        check_problem(client.get(SINGLE.format("evil")), 401)
        check_problem(client.post(INVALIDATE.format("evil"), headers=bearer()), 403)
        check_problem(client.post(BATCH, content=b"{"), 401)


class TestErrors:
    """Every error has the same form and tells nothing of the inside."""

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/nope",
            "/api/user/reputation",
            "/api/user/reputation/",
            f"/api/user/reputation/{NIL}/",
            "/health/live/",
        ],
    )
    def test_unknown_paths(self, client: httpx2.Client, path: str) -> None:
        """An unknown path, one with a trailing slash too, is 404 in the same form, and never a redirect."""
        check_problem(client.get(path, headers=bearer(), follow_redirects=False), 404, "not_found")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("POST", SINGLE.format(NIL), "GET, HEAD"),
            ("DELETE", SINGLE.format(NIL), "GET, HEAD"),
            ("PUT", BATCH, "POST"),
            ("GET", BATCH, "POST"),
            ("POST", f"{BATCH[:-5]}stream", "GET, HEAD"),
            ("GET", INVALIDATE_ALL, "POST"),
            ("PATCH", ATTRIBUTION.format(NIL), "POST"),
            ("OPTIONS", "/metrics", "GET, HEAD"),
        ],
    )
    def test_wrong_methods(self, client: httpx2.Client, method: str, path: str, allowed: str) -> None:
        """A wrong method is 405 in the same form and names the right ones."""
        answer = client.request(method, path, headers=bearer("service_role"))
        check_problem(answer, 405, "method_not_allowed")
        assert allowed == answer.headers["allow"]

    def test_a_bug_of_ours_is_a_500_without_text(self, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unexpected exception is 500 in the same form; its text goes to the log with the request's id alone."""

        async def broken(*_: object, **__: object) -> None:
            message = "select secret from notes"
            raise RuntimeError(message)

        monkeypatch.setattr(ReputationService, "read", broken)
        with capture_logs() as lines:
            answer = _read(client, NIL, **{"X-Request-ID": "abc-1"})
        check_problem(answer, 500, "internal_error", never="secret")
        assert "abc-1" == answer.headers["x-request-id"]
        assert ["request_failed"] == [line["event"] for line in lines]

    @pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "päh", "a\tb", "{}"])
    def test_a_request_id_of_another_form_is_replaced(self, client: httpx2.Client, sent: str) -> None:
        """A well-formed request id is kept; anything else is replaced and never echoed."""
        kept = client.get("/health/live", headers={"X-Request-ID": "Aa0._-"})
        assert "Aa0._-" == kept.headers["x-request-id"]
        replaced = client.get("/health/live", headers={b"X-Request-ID": sent.encode("latin-1")})
        assert re.fullmatch(r"[0-9a-f]{32}", replaced.headers["x-request-id"])

    def test_cors(self, client: httpx2.Client, dev_client: httpx2.Client) -> None:
        """The configured origin may call with its token and read our headers, also of an error; no other may."""
        preflight = {
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "authorization,if-none-match",
        }
        allowed = client.options(SINGLE.format(NIL), headers=preflight)
        assert 200 == allowed.status_code
        assert "https://app.example" == allowed.headers["access-control-allow-origin"]
        error = client.get(SINGLE.format(NIL), headers={"Origin": "https://app.example"})
        assert "https://app.example" == error.headers["access-control-allow-origin"]
        assert "ETag" in error.headers["access-control-expose-headers"]
        other = client.get(SINGLE.format(NIL), headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        evil = client.options(SINGLE.format(NIL), headers=preflight | {"Origin": "https://evil.example"})
        assert 400 == evil.status_code
        assert "access-control-allow-origin" not in evil.headers
        for answer in (allowed, error, other, evil):
            # Callers are known by a token alone: a browser need not send cookies, nor show what they would bring.
            assert "access-control-allow-credentials" not in answer.headers
        dev_header = {"Access-Control-Request-Headers": "x-test-user-id"}
        assert 400 == client.options(SINGLE.format(NIL), headers=preflight | dev_header).status_code
        local = preflight | dev_header | {"Origin": "http://localhost:3000"}
        assert 200 == dev_client.options(SINGLE.format(NIL), headers=local).status_code


class TestRateLimits:
    """How often one may ask."""

    def _statuses(
        self, client: httpx2.Client, count: int, *, path: str = SINGLE.format(NIL), **headers: str
    ) -> list[int]:
        return [client.get(path, headers=headers).status_code for _ in range(count)]

    def test_per_subject(self, backend: Backend) -> None:
        """Beyond its limit a subject gets 429 and when to come back; another subject, and another kind, is served."""
        settings = backend.settings(redis_url="", read_limit_per_minute=3, admin_limit_per_minute=2)
        with client_of(create_app(settings)) as client:
            alice, bob, root = bearer(), bearer(), bearer("service_role")
            assert [404, 404, 404, 429] == self._statuses(client, 4, **alice)
            check_problem(client.get(SINGLE.format(NIL), headers=alice), 429, "rate_limited")
            check_problem(client.post(BATCH, json={"user_ids": [NIL]}, headers=alice), 429, "rate_limited")
            assert [404] == self._statuses(client, 1, **bob)
            assert [404, 404, 404] == self._statuses(client, 3, **root)
            statuses = [client.post(INVALIDATE.format(NIL), headers=root).status_code for _ in range(3)]
            assert [200, 200, 429] == statuses
            assert [200] * 5 == self._statuses(client, 5, path="/health/live")

    def test_two_tokens_of_one_subject_are_one_caller(self, backend: Backend) -> None:
        """A new token does not give its subject a new allowance."""
        with client_of(create_app(backend.settings(redis_url="", read_limit_per_minute=2))) as client:
            name = secrets.token_hex(8)
            made = [bearer(sub=name, jti=str(number)) for number in range(3)]
            assert [404, 404, 429] == [self._statuses(client, 1, **headers)[0] for headers in made]

    def test_by_address_without_a_token(self, backend: Backend) -> None:
        """Without a token the address counts, and a forged X-Forwarded-For changes nothing."""
        settings = backend.settings(redis_url="", public_reads=True, read_limit_per_minute=3)
        with client_of(create_app(settings)) as client:
            forged = [
                {"X-Forwarded-For": f"203.0.113.{number}", "Forwarded": "for=198.51.100.9"} for number in range(4)
            ]
            assert [404, 404, 404, 429] == [self._statuses(client, 1, **headers)[0] for headers in forged]
            assert [404] == self._statuses(client, 1, **bearer())

    def test_bad_tokens_count_where_they_come_from(self, backend: Backend) -> None:
        """Guessing tokens is limited by address."""
        with client_of(create_app(backend.settings(redis_url="", read_limit_per_minute=3))) as client:
            guesses = [{"Authorization": f"Bearer guess-{number}"} for number in range(4)]
            assert [401, 401, 401, 429] == [self._statuses(client, 1, **headers)[0] for headers in guesses]

    def test_a_trusted_proxy_is_believed(self, backend: Backend) -> None:
        """Behind a trusted proxy the address that it reports counts, not what the client claims before it."""
        settings = backend.settings(
            redis_url="", public_reads=True, read_limit_per_minute=1, trusted_proxies="127.0.0.0/8"
        )
        with client_of(create_app(settings)) as client:
            hops = ["203.0.113.1", "203.0.113.2", "198.51.100.7, 203.0.113.1", "::ffff:203.0.113.2"]
            expected = [404, 404, 429, 429]
            assert expected == [self._statuses(client, 1, **{"X-Forwarded-For": hop})[0] for hop in hops]

    @pytest.mark.parametrize("memory_seconds", [0, 10])
    def test_a_cached_read_costs_one_command_or_none(
        self, backend: Backend, valkey: Valkey, memory_seconds: int
    ) -> None:
        """40 cached reads are 40 looks, or none where they are in memory too; counting requests adds nothing."""
        with client_of(create_app(backend.settings(memory_seconds=memory_seconds))) as client:
            wait_until(lambda: "ready" == client.get("/health/ready").json()["status"])
            self._check_commands(backend, valkey, client, reads=0 if memory_seconds else 40)

    def _check_commands(self, backend: Backend, valkey: Valkey, client: httpx2.Client, *, reads: int) -> None:
        user, caller = backend.user(), bearer()
        _read(client, user)
        with redis.Redis.from_url(valkey.url()) as store:
            before, began = _commands(store), time.monotonic()
            for _ in range(40):
                assert _status(client.get(SINGLE.format(user), headers=caller)).startswith("goodstanding; hit")
            after, ticks = _commands(store), (time.monotonic() - began) / 0.5 + 2
        spent = {name: calls - before.get(name, 0) for name, calls in after.items() if calls != before.get(name, 0)}
        assert reads == spent.pop("cmdstat_mget", 0)
        clocks = {f"cmdstat_{name}" for name in ("set", "incrby", "expire", "info", "ping")}
        beats = {f"cmdstat_{name}" for name in ("eval", "get", "publish")}
        assert clocks | beats >= spent.keys()
        # A few servers of this module run at once; each probes and syncs twice a second, whatever is asked of them.
        servers = 5
        assert spent.get("cmdstat_set", 0) <= ticks * servers
        assert reads <= spent.get("cmdstat_eval", 0) <= reads + 2 * ticks
        assert spent.get("cmdstat_incrby", 0) <= 2 * ticks

    def test_limits_hold_while_redis_is_away(self, backend: Backend) -> None:
        """Without Redis each process limits alone: still 429, never 500."""
        away = NO_REDIS
        with client_of(create_app(backend.settings(redis_url=away, read_limit_per_minute=2))) as client:
            assert [404, 404, 429] == self._statuses(client, 3, **bearer(sub="alone"))


def _commands(store: "redis.Redis") -> dict[str, int]:
    stats: dict[str, dict[str, int]] = store.info("commandstats")
    return {name: figures["calls"] for name, figures in stats.items()}


def test_a_read_only_redis_is_away(backend: Backend, valkey: Valkey) -> None:
    """A Redis that takes no writes is not read, because an invalidation could not reach it."""
    user = backend.user(completed=1)
    with client_of(create_app(backend.settings())) as client, redis.Redis.from_url(valkey.url()) as store:
        _read(client, user)
        store.replicaof("127.0.0.1", "1")
        try:
            wait_until(lambda: "goodstanding; fwd=bypass" == _status(_read(client, user)), seconds=5)
            answer = client.post(INVALIDATE.format(user), headers=bearer("service_role"))
            check_problem(answer, 503, "temporarily_unavailable")
        finally:
            store.replicaof("NO", "ONE")
        wait_until(lambda: _status(_read(client, user)).startswith("goodstanding; hit"), seconds=5)
