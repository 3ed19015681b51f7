"""The command line: what each command prints, and with which status it ends."""

import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any, Final

import asyncpg
import httpx2
import pytest
import redis
import structlog
import typer
import uvicorn
from typer.testing import CliRunner, Result
from uvicorn.supervisors import Multiprocess

import goodstanding
from goodstanding import cli, demo
from goodstanding.cli import app
from goodstanding.embedded import Postgres, Valkey
from goodstanding.tallies import LEAD
from tests.conftest import connect
from tests.serving import (
    GONE,
    INVALIDATE,
    NO_DATABASE,
    NO_REDIS,
    SECRET,
    SINGLE,
    Backend,
    bearer,
    clean_environment,
    client_of_command,
    command,
    environment_of,
    free_port,
    open_backend,
    wait_until,
)

_COMMANDS: Final = {name.name or name.callback.__name__: name for name in app.registered_commands if name.callback}


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture
def bare(postgres: Postgres, valkey: Valkey, bare_template: str) -> Iterator[Backend]:
    """Give a database with the host's tables alone."""
    with open_backend(postgres, valkey, bare_template) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """Commands set up their process: its log and its signals; here that is the test run's."""
    log = logging.getLogger()
    handlers, level = log.handlers[:], log.level
    on_sigterm = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    log.handlers[:] = handlers
    log.setLevel(level)
    structlog.reset_defaults()


def _run(*words: str, environment: dict[str, str] | None = None) -> Result:
    variables: dict[str, str | None] = {**clean_environment(environment or {})}
    return CliRunner().invoke(app, words, env=variables)


def _on(backend: Backend, *words: str, **variables: str) -> Result:
    return _run(*words, environment=environment_of(backend.settings()) | variables)


def _one_line(result: Result, status: int) -> str:
    assert status == result.exit_code, result.output
    assert 1 == result.stderr.count("\n")
    assert result.stderr.startswith("goodstanding: ")
    return result.stderr.strip()


class TestHelp:
    """--help teaches."""

    def test_nothing_given_shows_the_commands(self) -> None:
        """Without a command the help is shown; every command is in it, and where settings come from."""
        result = _run()
        for name in _COMMANDS:
            assert name in result.output
        assert "GOODSTANDING_DATABASE_URL" in result.output

    @pytest.mark.parametrize("name", _COMMANDS)
    def test_every_command_explains_its_options(self, name: str) -> None:
        """The help of a command says what it does and explains every option and argument."""
        result = _run(name, "--help")
        assert 0 == result.exit_code
        described: Any = typer.main.get_command(app)
        for parameter in described.commands[name].params:
            assert parameter.help, parameter.name
            assert any(word in result.output for word in (*parameter.opts, str(parameter.name).upper()))
        assert described.commands[name].help

    def test_version(self) -> None:
        """--version prints the version alone."""
        result = _run("--version")
        assert (0, f"goodstanding {goodstanding.__version__}\n") == (result.exit_code, result.stdout)

    def test_an_unknown_command_is_a_usage_error(self) -> None:
        """A command that does not exist ends with 2."""
        assert 2 == _run("shw").exit_code


class TestShow:
    """goodstanding show."""

    def test_a_table(self, backend: Backend) -> None:
        """A table shows badge, score, counts, when it was computed and where it came from."""
        user = backend.user(completed=12, no_shows=1)
        result = _on(backend, "show", user)
        assert 0 == result.exit_code
        rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
        assert "● gold" == rows["badge"]
        assert ("11", "12", "1") == (rows["score"], rows["completed sessions"], rows["no-shows"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", rows["computed"])
        assert "miss" == rows["source"]
        assert "hit" in _on(backend, "show", user.upper()).stdout
        assert "request" in _on(backend, "show", user, "--no-cache").stdout

    def test_json(self, backend: Backend) -> None:
        """--json prints exactly the five members, and nothing else, also when every log line is written."""
        result = _on(backend, "show", backend.user(no_shows=1), "--json", GOODSTANDING_LOG_LEVEL="debug")
        told = json.loads(result.stdout)
        assert ["score", "badge_color", "completed_sessions", "no_shows", "cache_timestamp"] == list(told)
        assert (-1, "red") == (told["score"], told["badge_color"])

    def test_unknown_and_malformed_ids(self, backend: Backend) -> None:
        """An unknown user and a malformed id are one line and status 1."""
        assert "goodstanding: No user has this id." == _one_line(_on(backend, "show", GONE), 1)
        told = _one_line(_on(backend, "show", "[bold]evil"), 1)
        assert "UUID" in told
        assert "evil" not in told

    def test_without_servers(self) -> None:
        """Without its servers it is one line and status 1."""
        environment = {"GOODSTANDING_DATABASE_URL": NO_DATABASE, "GOODSTANDING_LOG_LEVEL": "error"}
        assert "cannot answer" in _one_line(_run("show", GONE, environment=environment), 1)

    def test_ctrl_c(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C ends a command with 130, without a traceback."""

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "open_service", interrupted)
        result = _on(backend, "show", GONE)
        assert (130, "") == (result.exit_code, result.output)


class TestMigrate:
    """goodstanding migrate."""

    def test_dry_run_needs_no_database(self) -> None:
        """--dry-run prints SQL without a database, for both directions and with the optional indexes."""
        up, down, more = (
            _run("migrate", "--dry-run", *options) for options in ((), ("--down",), ("--covering-indexes",))
        )
        assert (0, 0, 0) == (up.exit_code, down.exit_code, more.exit_code)
        assert "create schema reputation" in up.stdout
        assert "drop schema" in down.stdout
        assert "concurrently" in more.stdout
        assert "concurrently" not in up.stdout

    def test_dry_run_changes_nothing_up_twice_and_down(self, bare: Backend) -> None:
        """A dry run leaves no trace, migrating twice is migrating once, and --down leaves no trace either."""
        owner = {"GOODSTANDING_DATABASE_URL": bare.database.owner_url}
        assert 0 == _run("migrate", "--dry-run", environment=owner).exit_code
        assert [] == _schemas(bare)
        for _ in range(2):
            result = _run("migrate", environment=owner)
            assert 0 == result.exit_code, result.output
            assert result.stdout
            assert ["reputation"] == _schemas(bare)
        assert 0 == _run("migrate", "--down", environment=owner).exit_code
        assert [] == _schemas(bare)

    def test_the_url_can_be_given(self, bare: Backend) -> None:
        """--database-url wins over the environment, since migrating takes another login than serving."""
        environment = {"GOODSTANDING_DATABASE_URL": NO_DATABASE}
        words = ("migrate", "--database-url", bare.database.owner_url)
        assert 0 == _run(*words, environment=environment).exit_code
        assert ["reputation"] == _schemas(bare)

    def test_what_goes_wrong_is_one_line(self, bare: Backend) -> None:
        """Without a URL, without a server and without rights it is one line."""
        assert "GOODSTANDING_DATABASE_URL" in _one_line(_run("migrate"), 2)
        for url in (NO_DATABASE, bare.database.service_url):
            result = _run("migrate", "--database-url", url)
            assert 0 != result.exit_code
            _one_line(result, result.exit_code)

    def test_without_triggers(self, bare: Backend) -> None:
        """--without-triggers leaves the host's tables alone, takes off what is there, and the counts stay right."""
        owner = {"GOODSTANDING_DATABASE_URL": bare.database.owner_url}
        assert "goodstanding_session_updated" not in _run("migrate", "--dry-run", "--without-triggers").stdout
        for words, triggers in ((("--without-triggers",), 0), ((), 12), (("--without-triggers",), 0)):
            assert 0 == _run("migrate", *words, environment=owner).exit_code
            assert triggers == _value(bare, "select count(*) from pg_trigger where tgname like 'goodstanding%'")
        told = _one_line(_run("rebuild", environment=owner), 2)
        assert "run goodstanding migrate" in told


class TestRebuild:
    """goodstanding rebuild, goodstanding verify."""

    def test_what_verify_finds_rebuild_repairs(self, backend: Backend) -> None:
        """Those whose counts differ are named, with status 1; a rebuild of one mends one, a rebuild mends all."""
        users = sorted(backend.user(completed=2) for _ in range(2))
        assert 0 == _on_owner(backend, "rebuild").exit_code
        result = _on_owner(backend, "verify")
        assert 0 == result.exit_code, result.output
        assert re.search(r"^\d+ users compared, 0 differ\.$", result.stdout, re.MULTILINE)
        for user in users:
            backend.execute("update reputation.tallies set completed = 7 where user_id = $1", user)
        result = _on_owner(backend, "verify")
        assert 1 == result.exit_code
        assert "users compared, 2 differ." in result.stdout
        assert users == [line for line in result.stdout.splitlines() if line in users]
        assert "goodstanding rebuild USER_ID" in result.stdout

        result = _on_owner(backend, "rebuild", users[0].upper())
        assert (0, 1) == (result.exit_code, result.stdout.count("\n"))
        assert "this user" in result.stdout
        result = _on_owner(backend, "verify")
        assert (1, [users[1]]) == (result.exit_code, [line for line in result.stdout.splitlines() if line in users])

        result = _on_owner(backend, "rebuild")
        assert 0 == result.exit_code
        assert "The tallies are rebuilt." in result.stdout
        assert re.search(r"^counted \d+ users$", result.stdout, re.MULTILINE)
        assert 0 == _on_owner(backend, "verify").exit_code

    def test_a_rebuild_brings_in_the_policy_of_the_settings(self, backend: Backend) -> None:
        """The tallies mean what the settings say, and then again what they said before."""
        for name in ("legacy", "standard"):
            assert 0 == _on_owner(backend, "rebuild", GOODSTANDING_POLICY=name).exit_code
            assert {"legacy": "own", "standard": "any"}[name] == _value(
                backend, "select completed_rule from reputation.policy"
            )

    def test_one_that_was_killed_is_continued_from_where_it_was(self, backend: Backend) -> None:
        """After a SIGKILL between two batches everybody before is tallied, and whoever recounts next does the rest.

        There are batches while a relay leads, which here is nobody but a lock.
        """
        backend.execute("insert into public.user_profiles (id) select gen_random_uuid() from generate_series(1, 1100)")
        assert 0 == _on_owner(backend, "rebuild").exit_code
        version = "select version from reputation.policy"
        counted = (
            "select count(*) from reputation.tallies where policy_version = (select version from reputation.policy)"
        )
        everybody, before = _value(backend, counted), _value(backend, version)
        with (
            _held(backend, f"select pg_advisory_xact_lock({LEAD})"),
            _held(backend, "select from reputation.tallies order by user_id desc limit 1 for update"),
        ):
            owner = {"GOODSTANDING_DATABASE_URL": backend.database.owner_url}
            with command("goodstanding", "rebuild", environment=owner) as process:
                wait_until(lambda: _value(backend, version) == before + 1 and _value(backend, _WHO_WAITS) == 1)
                process.kill()
                # A server that waits for a lock does not notice that its client is gone.
                assert 1 == _value(backend, _END_WHO_WAITS)
        done = _value(backend, counted)
        assert 500 <= done < everybody
        assert 0 == _on_owner(backend, "verify").exit_code
        recounted = _value(backend, "select sum(recounted)::bigint from reputation.recount(1000000)")
        assert everybody - done == recounted
        assert everybody == _value(backend, counted)

    def test_what_goes_wrong_is_one_line(self, backend: Backend, bare: Backend) -> None:
        """An unknown user, a malformed id, no schema, no URL, no server, and a login without the right."""
        assert "goodstanding: No user has this id." == _one_line(_on_owner(backend, "rebuild", GONE), 1)
        assert "UUID" in _one_line(_on_owner(backend, "rebuild", "x"), 1)
        for name in ("rebuild", "verify"):
            assert "run goodstanding migrate" in _one_line(_on_owner(bare, name), 2)
            assert "GOODSTANDING_DATABASE_URL" in _one_line(_run(name), 2)
            assert "lacks a right" in _one_line(_on(backend, name), 2)
            _one_line(_run(name, "--database-url", NO_DATABASE), 1)


_WHO_WAITS: Final = """
select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
"""
_END_WHO_WAITS: Final = """
select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock'
"""


def _on_owner(backend: Backend, *words: str, **variables: str) -> Result:
    return _on(backend, *words, **{"GOODSTANDING_DATABASE_URL": backend.database.owner_url, **variables})


def _value(backend: Backend, query: str) -> Any:  # noqa: ANN401 - whatever the query gives
    async def ask() -> Any:  # noqa: ANN401 - the same
        async with connect(backend.database.superuser_url) as connection:
            return await connection.fetchval(query)

    return backend.call(ask)


@contextmanager
def _held(backend: Backend, query: str) -> Iterator[None]:
    """Hold the locks that a query takes."""

    async def take() -> "asyncpg.Connection[asyncpg.Record]":
        connection = await asyncpg.connect(backend.database.superuser_url)
        await connection.execute("begin")
        await connection.execute(query)
        return connection

    connection = backend.call(take)
    try:
        yield
    finally:
        backend.call(connection.close)


def _schemas(backend: Backend) -> list[str]:
    async def ask() -> list[str]:
        async with connect(backend.database.superuser_url) as connection:
            rows = await connection.fetch("select nspname from pg_namespace where nspname = 'reputation'")
        return [row["nspname"] for row in rows]

    return backend.call(ask)


class TestInvalidate:
    """goodstanding invalidate."""

    def test_one_user(self, backend: Backend, valkey: Valkey) -> None:
        """One user's cached reputation goes, in either case, and no other."""
        user, other = backend.user(), backend.user()
        for one in (user, other):
            assert 0 == _on(backend, "show", one).exit_code
        result = _on(backend, "invalidate", user.upper())
        assert (0, "The cached reputation is gone.\n") == (result.exit_code, result.stdout)
        with redis.Redis.from_url(valkey.url()) as store:
            assert (0, 1) == (store.exists(f"reputation:user:{user}"), store.exists(f"reputation:user:{other}"))

    def test_everybody(self, backend: Backend, valkey: Valkey) -> None:
        """--all drops every cached reputation and says how many."""
        for _ in range(2):
            assert 0 == _on(backend, "show", backend.user()).exit_code
        result = _on(backend, "invalidate", "--all")
        assert 0 == result.exit_code
        assert re.fullmatch(r"\d+ cached reputations are gone\.\n", result.stdout)
        assert int(result.stdout.split()[0]) >= 2
        with redis.Redis.from_url(valkey.url()) as store:
            assert [] == list(store.scan_iter("*reputation:user:*"))

    def test_either_a_user_or_all(self, backend: Backend) -> None:
        """Neither and both are usage errors, a malformed id is refused before anything is opened."""
        assert 2 == _on(backend, "invalidate").exit_code
        assert 2 == _on(backend, "invalidate", GONE, "--all").exit_code
        assert "UUID" in _one_line(_run("invalidate", "x"), 1)

    def test_without_redis(self, backend: Backend) -> None:
        """Without a Redis URL there is nothing that this process could drop; with Redis away it fails."""
        told = _one_line(_on(backend, "invalidate", GONE, GOODSTANDING_REDIS_URL=""), 2)
        assert "GOODSTANDING_REDIS_URL" in told
        away = {"GOODSTANDING_REDIS_URL": NO_REDIS, "GOODSTANDING_LOG_LEVEL": "error"}
        assert "cannot answer" in _one_line(_on(backend, "invalidate", GONE, **away), 1)
        assert "cannot answer" in _one_line(_on(backend, "invalidate", "--all", **away), 1)


class TestWarm:
    """goodstanding warm."""

    def test_it_fills_the_cache(self, backend: Backend, valkey: Valkey) -> None:
        """The most active users are in the cache afterwards, at no more than the given rate."""
        users = [backend.user(completed=number + 1) for number in range(3)]
        _on(backend, "invalidate", "--all")
        result = _on(backend, "warm", "--users", "1000", "--rate", "100000")
        assert 0 == result.exit_code, result.output
        assert re.search(r"^\d+ users are in the cache\.$", result.stdout, re.MULTILINE)
        with redis.Redis.from_url(valkey.url()) as store:
            assert 3 == store.exists(*(f"reputation:user:{user}" for user in users))

    def test_the_rate_is_kept(self, backend: Backend) -> None:
        """Two users at two a second take a second."""
        backend.user(completed=1)
        began = time.monotonic()
        assert 0 == _on(backend, "warm", "--users", "2", "--rate", "2").exit_code
        assert time.monotonic() - began >= 1.0

    def test_without_redis(self, backend: Backend) -> None:
        """Without a shared cache there is nothing to warm: a wrong setting, or a failure while Redis is away."""
        assert "GOODSTANDING_REDIS_URL" in _one_line(_on(backend, "warm", GOODSTANDING_REDIS_URL=""), 2)
        backend.user(completed=1)
        away = {"GOODSTANDING_REDIS_URL": NO_REDIS, "GOODSTANDING_LOG_LEVEL": "error"}
        assert "Redis is away" in _one_line(_on(backend, "warm", **away), 1)


class TestDoctor:
    """goodstanding doctor."""

    def test_all_is_well(self, backend: Backend) -> None:
        """With everything in place it ends with 0; each finding is one line."""
        result = _on(backend, "doctor")
        assert 0 == result.exit_code, result.output
        lines = result.stdout.splitlines()
        assert len(lines) >= 8
        for line in lines:
            assert re.match(r"(ok|warning) +\w[\w ]*: ", line)
        assert SECRET not in result.output

    def test_something_does_not_work(self, bare: Backend) -> None:
        """With the schema missing, or no server at all, it ends with 1 and says so, without a traceback."""
        result = _on(bare, "doctor")
        assert 1 == result.exit_code
        assert re.search(r"^failure +schema: not installed", result.stdout, re.MULTILINE)
        nothing = _run("doctor", "--database-url", NO_DATABASE)
        assert 1 == nothing.exit_code
        assert "Traceback" not in nothing.output


_FINE: Final = {"GOODSTANDING_DATABASE_URL": NO_DATABASE, "GOODSTANDING_JWT_SECRET": SECRET}
_WRONG: Final = [
    ("GOODSTANDING_DATABASE_URL", ""),
    ("GOODSTANDING_DATABASE_URL", "mysql://localhost/app"),
    ("GOODSTANDING_DATABASE_URL", "localhost/app"),
    ("GOODSTANDING_DATABASE_URL", "postgresql://localhost:port/app"),
    ("DATABASE_URL", "mysql://localhost/app"),
    ("GOODSTANDING_REDIS_URL", "http://localhost"),
    ("GOODSTANDING_REDIS_URL", "localhost:6379"),
    ("GOODSTANDING_REDIS_URL", "redis://localhost:port/0"),
    ("GOODSTANDING_REDIS_URL", "redis://localhost/first"),
    ("GOODSTANDING_REDIS_URL", "redis+sentinel://one:26379,two:26379"),
    ("GOODSTANDING_REDIS_URL", "redis+cluster://"),
    ("GOODSTANDING_REDIS_DEADLINE_MS", "0"),
    ("GOODSTANDING_CACHE_TTL_SECONDS", "301"),
    ("GOODSTANDING_UNKNOWN_TTL_SECONDS", "31"),
    ("GOODSTANDING_STALE_TTL_SECONDS", "3601"),
    ("GOODSTANDING_LOAD_DEADLINE_MS", "1s"),
    ("GOODSTANDING_MEMORY_SECONDS", "301"),
    ("GOODSTANDING_RELAY", "perhaps"),
    ("GOODSTANDING_RELAY_DATABASE_URL", "redis://localhost"),
    ("GOODSTANDING_RELAY_POLL_MS", "0"),
    ("GOODSTANDING_DATABASE_POOL_SIZE", "-1"),
    ("GOODSTANDING_JWT_SECRET", ""),
    ("GOODSTANDING_JWT_SECRET", "short"),
    ("GOODSTANDING_JWT_SECRET", "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQ\n-----END PUBLIC KEY-----"),
    ("GOODSTANDING_JWKS_URL", "ftp://keys.example"),
    ("GOODSTANDING_JWKS_URL", "keys"),
    ("GOODSTANDING_ENVIRONMENT", "staging"),
    ("GOODSTANDING_DEV_AUTH", "true"),
    ("GOODSTANDING_PUBLIC_READS", "perhaps"),
    ("GOODSTANDING_POLICY", "strict"),
    ("GOODSTANDING_COMPLETED_RULE", "none"),
    ("GOODSTANDING_MIN_SCORE", "low"),
    ("GOODSTANDING_MIN_SCORE", "21"),
    ("GOODSTANDING_GREEN_AT", "11"),
    ("GOODSTANDING_READ_LIMIT_PER_MINUTE", "0"),
    ("GOODSTANDING_ADMIN_LIMIT_PER_MINUTE", "1e9"),
    ("GOODSTANDING_TRUSTED_PROXIES", "proxy"),
    ("GOODSTANDING_CORS_ORIGINS", "app.example"),
    ("GOODSTANDING_LOG_LEVEL", "loud"),
    ("GOODSTANDING_LOG_FORMAT", "xml"),
]


class TestServe:
    """goodstanding serve."""

    @pytest.mark.parametrize(("name", "value"), _WRONG)
    def test_a_wrong_setting_is_one_line_that_names_it(self, name: str, value: str) -> None:
        """A wrong setting stops the start with status 2 and one line with the variable's name, never a secret value."""
        environment = {**_FINE, name: value}
        if name == "DATABASE_URL":
            del environment["GOODSTANDING_DATABASE_URL"]
        told = _one_line(_run("serve", environment=environment), 2)
        assert name.removeprefix("GOODSTANDING_") in told
        assert "GOODSTANDING_" in told
        if name in {"GOODSTANDING_JWT_SECRET", "GOODSTANDING_DATABASE_URL"} and value:
            assert value not in told

    def test_several_workers_need_a_way_to_hear_of_changes(self) -> None:
        """Without Redis they hear from PostgreSQL, and a pooler in transaction mode passes nothing on."""
        pooled = {**_FINE, "GOODSTANDING_DATABASE_TRANSACTION_POOLER": "true"}
        told = _one_line(_run("serve", "--workers", "2", environment=pooled), 2)
        assert "GOODSTANDING_RELAY_DATABASE_URL" in told

    @pytest.mark.parametrize("options", [("--port", "70000"), ("--workers", "0"), ("--port", "x")])
    def test_wrong_options_are_usage_errors(self, options: tuple[str, str]) -> None:
        """A wrong option ends with 2."""
        assert 2 == _run("serve", *options, environment=_FINE).exit_code

    @pytest.mark.parametrize("workers", [1, 2])
    def test_how_uvicorn_is_run(self, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """It listens on loopback, believes no forwarded header, shares metrics and may open all the files it can."""
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "unset below")
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
        seen: dict[str, Any] = {}
        port = free_port()

        def run(server: uvicorn.Server | Multiprocess, sockets: Sequence[socket.socket] = ()) -> None:
            sockets = getattr(server, "sockets", sockets)
            seen.update(vars(server.config), sockets=sockets, metrics=os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
            server.started = True  # type: ignore[union-attr] # whoever runs several does not ask
            for one in sockets:
                one.close()

        monkeypatch.setattr(uvicorn.Server, "run", run)
        monkeypatch.setattr(Multiprocess, "run", run)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most - 1, most))
        environment = {**_FINE, "GOODSTANDING_REDIS_URL": "redis://127.0.0.1:1", "PORT": str(port)}
        assert 0 == _run("serve", "--workers", str(workers), environment=environment).exit_code
        assert (most, most) == resource.getrlimit(resource.RLIMIT_NOFILE)
        if workers > 1:
            assert ("goodstanding.main:create_served_app", True) == (seen["app"], seen["factory"])
        else:
            assert ("Goodstanding", False) == (seen["app"].title, seen["factory"])
        assert 16 == len(seen["sockets"])
        assert ("127.0.0.1", port, workers) == (seen["host"], seen["port"], seen["workers"])
        assert seen["proxy_headers"] is False
        assert (workers > 1) is (seen["metrics"] is not None)


class TestRelay:
    """goodstanding relay."""

    def test_it_needs_a_database_that_keeps_sessions(self) -> None:
        """Without a database, or behind a pooler in transaction mode, it is one line that names the setting."""
        nothing = {"GOODSTANDING_JWT_SECRET": SECRET}
        assert "GOODSTANDING_DATABASE_URL" in _one_line(_run("relay", environment=nothing), 2)
        pooled = {**_FINE, "GOODSTANDING_DATABASE_TRANSACTION_POOLER": "true"}
        assert "GOODSTANDING_RELAY_DATABASE_URL" in _one_line(_run("relay", environment=pooled), 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("store", ["redis", "none"])
    @pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
    def test_it_carries_changes_until_it_is_ended(self, backend: Backend, store: str, ending: signal.Signals) -> None:
        """It needs no way to recognise callers, carries what waits, and ends with a signal, without a traceback."""
        variables = environment_of(backend.settings())
        del variables["GOODSTANDING_JWT_SECRET"]
        if store == "none":
            del variables["GOODSTANDING_REDIS_URL"]
        _, match_id = backend.match(completed=1)
        backend.complete(match_id)
        with command("goodstanding", "relay", environment=variables) as process:
            wait_until(lambda: process.poll() is not None or not backend.call(_is_pending, backend))
            backend.complete(match_id)
            wait_until(lambda: process.poll() is not None or not backend.call(_is_pending, backend))
            process.send_signal(ending)
            told, _ = process.communicate(timeout=30)
        assert 0 == process.returncode, told
        assert "relay_leads" in told
        assert "Traceback" not in told


def _status(connection: socket.socket) -> int:
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


async def _is_pending(backend: Backend) -> bool:
    async with backend.database.owner() as owner:
        waits: bool = await owner.fetchval("select reputation.pending()")
        return waits


class TestDemo:
    """goodstanding demo."""

    def test_it_runs_with_its_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Port and folder reach the demo."""
        seen: dict[str, object] = {}
        monkeypatch.setattr(demo, "run", lambda **options: seen.update(options))
        assert 0 == _run("demo", "--port", "8001", "--data-dir", "there").exit_code
        assert (8001, "there") == (seen["port"], str(seen["data_dir"]))

    def test_without_its_extra_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the extra `demo` it is one line that says how to get it."""
        for name in ("demo", "embedded"):
            monkeypatch.delitem(sys.modules, f"goodstanding.{name}", raising=False)
            monkeypatch.delattr(goodstanding, name, raising=False)
        monkeypatch.setitem(sys.modules, "platformdirs", None)
        assert "goodstanding[demo]" in _one_line(_run("demo"), 2)


@pytest.mark.slow
class TestProcess:
    """The commands as processes."""

    def test_a_wrong_setting(self) -> None:
        """The process ends with 2 and one line on standard error, nothing else."""
        with command("goodstanding", "serve", environment={**_FINE, "GOODSTANDING_DEV_AUTH": "true"}) as process:
            told, _ = process.communicate(timeout=30)
        assert (2, 1) == (process.returncode, told.count("\n"))
        assert told.startswith("goodstanding: GOODSTANDING_DEV_AUTH: ")

    @pytest.mark.slow
    def test_a_process_that_was_stopped_answers_what_came_meanwhile(self, backend: Backend) -> None:
        """Time that it did not have ends no connection, be it idle or in the middle of a request."""
        port = free_port()
        request = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
        variables = environment_of(backend.settings())
        with command("goodstanding", "serve", "--port", str(port), environment=variables) as process:
            wait_until(lambda: _listens(port))
            with (
                socket.create_connection(("127.0.0.1", port), timeout=30) as idle,
                socket.create_connection(("127.0.0.1", port), timeout=30) as amid,
            ):
                for connection, cut in ((idle, 0), (amid, 20)):
                    connection.sendall(request)
                    assert 200 == _status(connection)
                    connection.sendall(request[:cut])
                time.sleep(0.5)
                process.send_signal(signal.SIGSTOP)
                # Longer than an idle connection lives, or a request may take to arrive.
                time.sleep(9.0)
                idle.sendall(request)
                amid.sendall(request[20:])
                process.send_signal(signal.SIGCONT)
                assert 200 == _status(idle)
                assert 200 == _status(amid)

    def test_the_port_is_taken(self, backend: Backend) -> None:
        """A port that somebody else has ends `serve` with a status that is not 0, without a traceback."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            words = ("goodstanding", "serve", "--port", str(taken.getsockname()[1]))
            with command(*words, environment=environment_of(backend.settings())) as process:
                told, _ = process.communicate(timeout=30)
        assert 0 != process.returncode
        assert "address already in use" in told.lower()
        assert "Traceback" not in told

    def test_two_workers_without_redis_agree(self, backend: Backend) -> None:
        """Each has a cache of its own, and both follow every change and every invalidation."""
        port, (user, match_id) = free_port(), backend.match(completed=1)
        variables = environment_of(backend.settings(redis_url="")) | {"GOODSTANDING_PUBLIC_READS": "true"}
        words = ("goodstanding", "serve", "--workers", "2", "--port", str(port))
        with client_of_command(*words, port=port, environment=variables):
            url = f"http://127.0.0.1:{port}"

            def answers() -> set[int]:
                # A connection each, so that both workers get some.
                return {httpx2.get(url + SINGLE.format(user)).json()["completed_sessions"] for _ in range(16)}

            for completed in (1, 2, 3):
                wait_until(lambda expected=completed: {expected} == answers(), seconds=5)  # type: ignore[misc] # mypy cannot tell its type
                assert {completed} == answers()
                backend.complete(match_id)
            backend.complete(match_id, unseen=True)
            httpx2.post(url + INVALIDATE.format(user), headers=bearer("service_role")).raise_for_status()
            wait_until(lambda: {5} == answers(), seconds=5)

    def test_show(self, backend: Backend) -> None:
        """The process prints JSON on standard output and ends with 0."""
        user = backend.user(completed=1)
        with command("goodstanding", "show", user, "--json", environment=environment_of(backend.settings())) as process:
            told, _ = process.communicate(timeout=30)
        assert (0, 1) == (process.returncode, json.loads(told)["score"])
