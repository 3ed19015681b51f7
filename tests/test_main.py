"""The wiring: the application alone, inside a host's application, as a process, and without its servers."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from structlog.testing import capture_logs

import goodstanding
from goodstanding import logs, main
from goodstanding.embedded import Postgres, Valkey
from goodstanding.errors import ConfigurationError, GoodstandingError
from goodstanding.migrate import upgrade
from goodstanding.settings import load_settings
from tests.conftest import SERVICE, Database, connect, emptied
from tests.conftest import command as run_statement
from tests.serving import (
    BATCH,
    INVALIDATE,
    NIL,
    SINGLE,
    Backend,
    bearer,
    check_problem,
    client_of,
    client_of_command,
    command,
    environment_of,
    free_port,
    open_backend,
    wait_until,
)


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


class TestInAHostsApp:
    """`app.include_router(goodstanding.router())`."""

    def test_two_lines(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        """The router alone, with settings from the environment, brings its own lifespan into a host's app."""
        for name, value in environment_of(backend.settings()).items():
            monkeypatch.setenv(name, value)
        app = FastAPI()
        app.include_router(goodstanding.router())
        user = backend.user(completed=2)
        with client_of(app) as client:
            assert 2 == client.get(SINGLE.format(user), headers=bearer()).json()["score"]
            check_problem(client.get(SINGLE.format(user)), 401, "unauthorized")

    def test_a_hosts_own_lifespan_handlers_and_routes_stay_as_they_are(self, backend: Backend) -> None:
        """The host's lifespan surrounds ours, its handlers never see our errors, and its routes are untouched."""
        events: list[str] = []

        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, str]]:
            events.append("started")
            yield {"name": "wingman"}
            events.append("ended")

        app = FastAPI(lifespan=lifespan)

        @app.exception_handler(Exception)
        @app.exception_handler(HTTPException)
        @app.exception_handler(RequestValidationError)
        @app.exception_handler(GoodstandingError)
        async def on_error(_request: Request, error: Exception) -> JSONResponse:
            events.append(type(error).__name__)
            return JSONResponse({"host": "error"}, 418)

        @app.get("/sessions")
        async def sessions(request: Request, limit: int = 1) -> dict[str, object]:
            return {"host": request.state.name, "limit": limit}

        app.include_router(goodstanding.router(backend.settings()))
        with client_of(app) as client:
            assert {"host": "wingman", "limit": 1} == client.get("/sessions").json()
            assert 418 == client.get("/sessions?limit=x").status_code
            assert {"host": "error"} == client.get("/sessions?limit=x").json()
            del events[1:]
            user = backend.user(completed=1)
            assert 1 == client.get(SINGLE.format(user), headers=bearer()).json()["score"]
            check_problem(client.get(SINGLE.format(NIL), headers=bearer()), 404, "user_not_found")
            check_problem(client.get(SINGLE.format("x"), headers=bearer()), 422, "invalid_user_id")
            check_problem(client.post(BATCH, content=b"{", headers=bearer()), 400, "bad_request")
            check_problem(client.post(INVALIDATE.format(NIL), headers=bearer()), 403, "forbidden")
            assert ["started"] == events
        assert ["started", "ended"] == events

    def test_under_a_prefix(self, backend: Backend) -> None:
        """A host may put the routes under a prefix."""
        app = FastAPI()
        app.include_router(goodstanding.router(backend.settings(metrics_public=True)), prefix="/v2")
        user = backend.user()
        with client_of(app) as client:
            assert 200 == client.get("/v2" + SINGLE.format(user), headers=bearer()).status_code
            assert 404 == client.get(SINGLE.format(user), headers=bearer()).status_code
            assert SINGLE.format("{user_id}") in client.get("/v2/metrics").text

    def test_a_hosts_dependency_answers_in_the_hosts_form(self, backend: Backend) -> None:
        """What a dependency of the host refuses is the host's to answer; what it cannot read is told as ours."""

        async def gate(request: Request) -> None:
            if request.headers.get("x-tenant") is None:
                raise HTTPException(402, {"host": "no tenant"})
            if request.headers["x-tenant"] == "broken":
                raise RequestValidationError([])

        app = FastAPI()
        app.include_router(goodstanding.router(backend.settings()), dependencies=[Depends(gate)])
        with client_of(app) as client:
            refused = client.get("/health/live")
            assert (402, {"detail": {"host": "no tenant"}}) == (refused.status_code, refused.json())
            check_problem(client.get("/health/live", headers={"X-Tenant": "broken"}), 422, "invalid_input")
            assert 200 == client.get("/health/live", headers={"X-Tenant": "a"}).status_code

    def test_without_its_lifespan_it_says_so_in_the_log_alone(self, backend: Backend) -> None:
        """Under an app whose lifespan nobody runs the routes answer 500 in our form."""
        inner = FastAPI()
        inner.include_router(goodstanding.router(backend.settings()))
        outer = FastAPI()
        outer.mount("/inner", inner)
        with client_of(outer) as client:
            check_problem(client.get("/inner" + SINGLE.format(NIL)), 500, "internal_error", never="lifespan")

    def test_an_app_can_be_started_again(self, backend: Backend) -> None:
        """The same application runs, ends and runs again."""
        app = goodstanding.create_app(backend.settings())
        for _ in range(2):
            with client_of(app) as client:
                assert 404 == client.get(SINGLE.format(NIL), headers=bearer()).status_code


class TestSettings:
    """What is wrong with the settings is told before anything starts."""

    def test_a_database_is_required(self) -> None:
        """Without a database URL there is nothing to serve."""
        settings = load_settings(database_url="", jwt_secret="x" * 40)
        with pytest.raises(ConfigurationError, match="GOODSTANDING_DATABASE_URL"):
            goodstanding.create_app(settings)

    def test_somebody_must_be_able_to_call(self) -> None:
        """Without secret and keys nobody could ever call."""
        settings = load_settings(database_url="postgresql://x/y", jwt_secret="")
        with pytest.raises(ConfigurationError, match="GOODSTANDING_JWT_SECRET"):
            goodstanding.router(settings)

    def test_a_public_key_is_no_secret(self) -> None:
        """A public key as shared secret is refused when the routes are built, not when the app starts."""
        pem = "-----BEGIN PUBLIC KEY-----\n" + "x" * 40 + "\n-----END PUBLIC KEY-----"
        settings = load_settings(database_url="postgresql://x/y", jwt_secret=pem)
        with pytest.raises(ConfigurationError, match="GOODSTANDING_JWT_SECRET"):
            goodstanding.router(settings)

    def test_the_served_app_sets_up_its_log(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker process of `serve` builds the same application, with its log lines set up from the environment."""
        for name, value in environment_of(backend.settings()).items():
            monkeypatch.setenv(name, value)
        seen: list[str] = []
        monkeypatch.setattr(logs, "configure", lambda settings: seen.append(settings.log_level))
        assert "Goodstanding" == main.create_served_app().title
        assert ["info"] == seen


def test_a_route_that_somebody_adds_keeps_the_form(backend: Backend) -> None:
    """What somebody adds to the application answers errors in the same form, without an echo."""
    app = goodstanding.create_app(backend.settings())

    @app.get("/more")
    async def more(number: int) -> int:
        if not number:
            raise HTTPException(status_code=409, detail="evil")
        return number

    with client_of(app) as client:
        assert 5 == client.get("/more?number=5").json()
        check_problem(client.get("/more?number=evil"), 422, "invalid_input", never="evil")
        check_problem(client.get("/more?number=0"), 409, "bad_request", never="evil")


def test_the_openapi_document_is_written_once(backend: Backend) -> None:
    """It is the framework's, byte for byte, and whoever asks for it again gets what was written then."""
    app = goodstanding.create_app(backend.settings())
    with client_of(app) as client:
        assert JSONResponse(app.openapi()).body == client.get("/openapi.json").content
        expected = client.get("/openapi.json")
        app.openapi_schema = {"openapi": "another"}
        again = client.get("/openapi.json")
    assert expected.content == again.content
    assert "application/json" == again.headers["content-type"]
    app.root_path = "/below"
    with client_of(app) as client:
        assert {"openapi": "another", "servers": [{"url": "/below"}]} == client.get("/openapi.json").json()


class TestModuleAttribute:
    """`goodstanding.main:app`, for any ASGI server."""

    def test_it_is_built_when_asked_for(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        """The attribute is an application made from the environment."""
        for name, value in environment_of(backend.settings()).items():
            monkeypatch.setenv(name, value)
        assert isinstance(main.app, FastAPI)

    def test_a_wrong_setting_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A server that asks for the application with a wrong setting ends with status 2 and one line."""
        monkeypatch.setenv("GOODSTANDING_POLICY", "strict")
        with pytest.raises(SystemExit) as ended:
            main.app  # noqa: B018 - reading it builds the application
        assert 2 == ended.value.code
        told = capsys.readouterr().err
        assert told.startswith("goodstanding: GOODSTANDING_POLICY: ")
        assert 1 == told.count("\n")

    def test_there_is_no_other(self) -> None:
        """Any other name is an ordinary AttributeError."""
        with pytest.raises(AttributeError, match="application"):
            main.application  # noqa: B018 - it does not exist


class TestDependenciesAway:
    """The service starts without its servers and finds them when they come."""

    def test_redis_down_at_the_start(self, backend: Backend, valkey: Valkey) -> None:
        """Started while Redis is down, it answers from the database, and caches soon after Redis is up."""
        user = backend.user(completed=1)
        valkey.kill()
        try:
            with client_of(goodstanding.create_app(backend.settings())) as client:
                answer = client.get(SINGLE.format(user), headers=bearer())
                assert (200, "goodstanding; fwd=bypass") == (answer.status_code, answer.headers["cache-status"])
                emptied(valkey)
                wait_until(lambda: _ready(client), seconds=5)
                first, second = (client.get(SINGLE.format(user), headers=bearer()) for _ in range(2))
                assert "goodstanding; fwd=miss" == first.headers["cache-status"]
                assert second.headers["cache-status"].startswith("goodstanding; hit")
        finally:
            emptied(valkey)

    def test_postgresql_down_at_the_start(self, backend: Backend, postgres: Postgres) -> None:
        """Started while PostgreSQL is down, it answers 503 with Retry-After, and serves soon after PostgreSQL is up."""
        user = backend.user(completed=1)
        postgres.stop()
        try:
            with client_of(goodstanding.create_app(backend.settings())) as client:
                for _ in range(4):
                    answer = client.get(SINGLE.format(user), headers=bearer())
                    check_problem(answer, 503, "temporarily_unavailable")
                assert ["database"] == client.get("/health/ready").json()["degraded"]
                postgres.start()
                wait_until(lambda: _ready(client), seconds=10)
                assert 1 == client.get(SINGLE.format(user), headers=bearer()).json()["score"]
        finally:
            postgres.start()


def _level(level: str, lines: Sequence[Mapping[str, object]]) -> list[object]:
    return [line["event"] for line in lines if line["log_level"] == level]


class TestChanges:
    """Relay, broadcast and memory, as the settings ask for them."""

    @pytest.mark.parametrize(
        "options",
        [{}, {"memory_seconds": 0}, {"redis_url": ""}],
        ids=["redis and memory", "redis alone", "memory alone"],
    )
    def test_a_change_is_seen_by_every_process(self, backend: Backend, options: dict[str, object]) -> None:
        """What is cached stays cached, in one process as in the other, until it changes."""
        user, match_id = backend.match(completed=1)
        settings = backend.settings(**options)
        with client_of(goodstanding.create_app(settings)) as one, client_of(goodstanding.create_app(settings)) as two:
            wait_until(lambda: _ready(one) and _ready(two))
            for client in (one, two):
                _read(client, user)
            for completed in (2, 3, 4):
                wait_until(lambda: all(_read(each, user)[1].startswith("goodstanding; hit") for each in (one, two)))
                backend.complete(match_id)
                expected = [completed, completed]
                wait_until(partial(_agree, (one, two), user, expected), seconds=3)

    @pytest.mark.parametrize("redis", [True, False])
    def test_an_invalidation_reaches_every_process(self, backend: Backend, *, redis: bool) -> None:
        """Without triggers nobody tells of a change but whoever invalidates: every process then counts anew."""
        user, match_id = backend.match(completed=1)
        settings = backend.settings(**({} if redis else {"redis_url": ""}))
        with client_of(goodstanding.create_app(settings)) as one, client_of(goodstanding.create_app(settings)) as two:
            wait_until(lambda: _ready(one) and _ready(two))
            for client in (one, two):
                _read(client, user)
            backend.complete(match_id, unseen=True)
            assert [1, 1] == [_read(client, user)[0] for client in (one, two)]
            one.post(INVALIDATE.format(user), headers=bearer("service_role")).raise_for_status()
            assert 2 == _read(one, user)[0]
            wait_until(lambda: 2 == _read(two, user)[0], seconds=3)

    def test_without_a_relay_nothing_old_is_served(self, backend: Backend) -> None:
        """While nobody tells of changes, what was computed longer ago than 1.5 s is counted anew."""
        user, match_id = backend.match(completed=1)
        unheard = backend.redis_url.rpartition("/")[0] + "/1"
        with client_of(goodstanding.create_app(backend.settings(redis_url=unheard, relay=False))) as client:
            assert 1 == _read(client, user)[0]
            assert _read(client, user)[1].startswith("goodstanding; hit")
            backend.complete(match_id, unseen=True)
            wait_until(lambda: 2 == _read(client, user)[0], seconds=2.5)

    def test_behind_a_pooler_it_says_what_is_missing(self, backend: Backend) -> None:
        """No session can be kept there, so no relay runs and nothing is heard; reads and invalidations work."""
        user = backend.user(completed=1)
        settings = backend.settings(redis_url="", database_transaction_pooler=True)
        with capture_logs() as lines, client_of(goodstanding.create_app(settings)) as client:
            assert ["relay"] == client.get("/health/ready").json()["degraded"]
            assert 1 == _read(client, user)[0]
            answer = client.post(INVALIDATE.format(user), headers=bearer("service_role"))
            assert 200 == answer.status_code
            assert _read(client, user)[1] == "goodstanding; fwd=miss"
        [line] = [line for line in lines if line["event"] == "relay_needs_sessions"]
        assert ("warning", "GOODSTANDING_RELAY_DATABASE_URL") == (line["log_level"], line["setting"])

    @pytest.mark.parametrize(("policy", "mend"), [("legacy", "goodstanding rebuild"), ("standard", None)])
    def test_another_policy_is_told_at_the_start(self, backend: Backend, policy: str, mend: str | None) -> None:
        """Tallies that mean another policy are of no use here, and it says how to mend that; bounds do not matter."""
        with capture_logs() as lines:
            settings = backend.settings(policy=policy, max_score=9, gold_at=9)
            with client_of(goodstanding.create_app(settings)) as client:
                wait_until(lambda: _ready(client))
                wait_until(lambda: mend is None or "tallies_unused" in _level("warning", lines))
        assert [mend] * (mend is not None) == [line["mend"] for line in lines if line["event"] == "tallies_unused"]

    def test_missing_triggers_are_told_at_the_start(
        self, postgres: Postgres, valkey: Valkey, bare_template: str
    ) -> None:
        """Without triggers every load recounts and nothing is carried, which somebody may have forgotten."""
        with open_backend(postgres, valkey, bare_template) as bare:
            bare.call(partial(upgrade, bare.database.owner_url, triggers=False))
            bare.call(partial(_grant, bare.database))
            with (
                capture_logs() as lines,
                client_of(goodstanding.create_app(bare.settings())) as client,
            ):
                wait_until(lambda: _ready(client))
                wait_until(lambda: "tallies_unused" in _level("warning", lines))
        assert ["goodstanding migrate"] == [line["mend"] for line in lines if line["event"] == "tallies_unused"]


async def _grant(database: Database) -> None:
    async with connect(database.owner_url) as owner:
        await run_statement(owner, "grant goodstanding_service to %I", SERVICE)


def _agree(clients: Sequence[httpx2.Client], user: str, expected: Sequence[int]) -> bool:
    return expected == [_read(client, user)[0] for client in clients]


def _read(client: httpx2.Client, user: str) -> tuple[int, str]:
    """Give a user's completed sessions, and where the answer came from."""
    answer = client.get(SINGLE.format(user), headers=bearer())
    assert 200 == answer.status_code, answer.text
    return answer.json()["completed_sessions"], answer.headers["cache-status"]


def _ready(client: httpx2.Client) -> bool:
    return {"status": "ready", "degraded": []} == dict(client.get("/health/ready").json())


@pytest.mark.slow
class TestProcesses:
    """The service as processes of their own."""

    def test_any_asgi_server_can_run_it(self, backend: Backend) -> None:
        """`uvicorn goodstanding.main:app` is all that another server needs."""
        port = free_port()
        words = ("uvicorn", "goodstanding.main:app", "--port", str(port))
        with client_of_command(*words, port=port, environment=environment_of(backend.settings())) as client:
            assert 404 == client.get(SINGLE.format(NIL), headers=bearer()).status_code

    def test_uvicorn_with_a_wrong_setting_ends_in_one_line(self) -> None:
        """A wrong setting ends another server too, in one line and with status 2."""
        with command("uvicorn", "goodstanding.main:app", environment={"GOODSTANDING_POLICY": "strict"}) as process:
            told, _ = process.communicate(timeout=30)
        assert (2, 1) == (process.returncode, told.count("\n"))
        assert told.startswith("goodstanding: GOODSTANDING_POLICY: ")
