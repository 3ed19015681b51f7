"""The command line: thin commands over the same parts that serve requests."""

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from uvicorn.config import STARTUP_FAILURE

from goodstanding import doctor as doctor_checks
from goodstanding import logs, server, tallies
from goodstanding import migrate as migrations
from goodstanding.data import BadgeColor, parse_user_id
from goodstanding.entry import body
from goodstanding.errors import ConfigurationError, GoodstandingError, TemporarilyUnavailableError
from goodstanding.main import create_served_app, open_relay, open_service
from goodstanding.reputation_service import MOST_USERS, Answer, Source
from goodstanding.settings import Settings, load_settings

app = typer.Typer(
    name="goodstanding",
    help="Tells people who are about to meet whether the other one turns up.\n\n"
    "Settings come from the environment (GOODSTANDING_DATABASE_URL, GOODSTANDING_REDIS_URL, ...). "
    "To see it work without any: goodstanding demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)
_BADGES: Final = {BadgeColor.GOLD: "bold yellow", BadgeColor.GREEN: "bold green", BadgeColor.RED: "bold red"}
_STATUS_STYLES: Final = {"ok": "green", "warning": "yellow", "failure": "red"}

DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="PostgreSQL as the owner of the host app's tables. Default: GOODSTANDING_DATABASE_URL."),
]


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn an error into one line and an exit code: 2 for a wrong setting, 1 for anything else."""
    try:
        yield
    except ConfigurationError as error:
        _err.print(f"goodstanding: {error.detail}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except GoodstandingError as error:
        _err.print(f"goodstanding: {error.detail}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _settings(**overrides: object) -> Settings:
    settings = load_settings(**{name: value for name, value in overrides.items() if value is not None})
    logs.configure(settings)
    return settings


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"goodstanding {version('goodstanding')}\n")
        raise typer.Exit


@app.callback()
def every_command(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that go before any command."""


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", envvar="PORT", min=0, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1, max=64)] = 1,
) -> None:
    """Serve the HTTP API.

    Ctrl-C or SIGTERM ends it after the requests under way are answered.
    """
    with _readable_errors():
        settings = _settings()
        # Whatever is wrong is told here in one line, not by a worker in a traceback.
        served = create_served_app(settings)
        if workers > 1 and not settings.redis_url.get_secret_value() and settings.session_database() is None:
            message = (
                "GOODSTANDING_RELAY_DATABASE_URL: without Redis, workers hear of changes from PostgreSQL, "
                "over connections that keep their session"
            )
            raise ConfigurationError(message)
    if not server.serve(served, factory="goodstanding.main:create_served_app", host=host, port=port, workers=workers):
        raise typer.Exit(STARTUP_FAILURE)


@app.command()
def relay() -> None:
    """Carry changes to the caches and serve nothing, for a fleet that serves with GOODSTANDING_RELAY=false.

    One relay of the fleet works and the others wait: start two, and one may die. Ctrl-C or SIGTERM ends it.
    """

    async def work() -> None:
        settings = _settings()
        settings.require_database()
        task = asyncio.current_task()
        if task is not None:
            for ending in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(ending, task.cancel)
        with suppress(asyncio.CancelledError):
            async with open_relay(settings) as carrier:
                await carrier.run()

    with _readable_errors():
        _run(work())


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="Port to listen on.", envvar="PORT", min=0, max=65535)] = 8000,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the data lives. Default: the user's cache directory.")
    ] = None,
) -> None:
    """Try everything: starts PostgreSQL and Valkey of its own, with sample users, the API and a page."""
    with _readable_errors():
        from goodstanding import demo as demonstration  # noqa: PLC0415 - needs the extra `demo`, and says so

        demonstration.run(port=port, data_dir=data_dir)


@app.command()
def show(
    user_id: Annotated[str, typer.Argument(help="The user's UUID.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the five members of the contract.")] = False,
    use_cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Whether the cache may answer.")] = True,
) -> None:
    """Show one user's reputation."""

    async def work() -> None:
        user = parse_user_id(user_id)
        async with open_service(_settings()) as opened:
            answer = await opened.service.read(user, use_cache=use_cache)
        _print_answer(answer, as_json=as_json)

    with _readable_errors():
        _run(work())


def _print_answer(answer: Answer, *, as_json: bool) -> None:
    data = answer.data
    if data is None:  # pragma: no cover - the service raises for an unknown user
        return
    if as_json:
        sys.stdout.write(json.dumps(json.loads(body(data)), indent=2) + "\n")
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("badge", f"[{_BADGES[data.badge_color]}]● {data.badge_color}[/]")
    table.add_row("score", str(data.score))
    table.add_row("completed sessions", str(data.completed_sessions))
    table.add_row("no-shows", str(data.no_shows))
    table.add_row("computed", data.cache_timestamp.isoformat(timespec="seconds"))
    table.add_row("source", answer.source.value)
    _out.print(table)


@app.command()
def migrate(
    database_url: DatabaseUrl = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL and change nothing.")] = False,
    down: Annotated[
        bool, typer.Option("--down", help="Remove every trace: the schema, the indexes, the role.")
    ] = False,
    covering_indexes: Annotated[
        bool,
        typer.Option(
            "--covering-indexes",
            help="Also index the host's tables so that a recount reads indexes only. It halves a recount and ends the "
            "tables' HOT updates (measured: writes at 0.80 of their rate).",
        ),
    ] = False,
    without_triggers: Annotated[
        bool,
        typer.Option(
            "--without-triggers",
            help="Leave no trigger on the host's tables. Counts are then recounted on every load, and badges change "
            "when the cache expires or is invalidated.",
        ),
    ] = False,
) -> None:
    """Create or upgrade the schema `reputation` and the role goodstanding_service.

    Runs as the owner of the host app's tables, who need not be a superuser; running it again changes nothing.
    Afterwards grant the role to the login that serves: GRANT goodstanding_service TO app_login.
    """

    async def work() -> None:
        settings = _settings(database_url=database_url)
        policy = settings.reputation_policy()
        triggers = not without_triggers
        if dry_run:
            sys.stdout.write(
                migrations.plan(down=down, covering_indexes=covering_indexes, triggers=triggers, policy=policy)
            )
        elif down:
            await migrations.downgrade(settings.require_database(), report=_report)
        else:
            await migrations.upgrade(
                settings.require_database(),
                covering_indexes=covering_indexes,
                triggers=triggers,
                policy=policy,
                report=_report,
            )

    with _readable_errors():
        _run(work())


def _report(line: str) -> None:
    _out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def rebuild(
    user_id: Annotated[str | None, typer.Argument(help="Count only this user again, by UUID.")] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Count everybody again, under the policy of the settings; or one user, under the policy that the tallies have.

    Blocks nobody: meanwhile every read is exact, and a relay continues what was interrupted.
    """

    async def work() -> None:
        settings = _settings(database_url=database_url)
        url, policy = settings.require_database(), settings.reputation_policy()
        if user_id is None:
            await tallies.rebuild(url, policy, report=_report)
            _report("The tallies are rebuilt.")
        else:
            await tallies.rebuild_user(url, parse_user_id(user_id), policy)
            _report("Every read counts this user again from now on, until the relay has renewed the tally.")

    with _readable_errors():
        _run(work())


@app.command()
def verify(database_url: DatabaseUrl = None) -> None:
    """Compare everybody's counts with a recount, in one snapshot; exits with 1 when somebody's differ."""

    async def work() -> None:
        found = await tallies.verify(_settings(database_url=database_url).require_database(), report=_report)
        _report(f"{found.users} users compared, {found.differing} differ.")
        for user in found.first:
            _report(user)
        if found.differing:
            _report("Repair one with: goodstanding rebuild USER_ID; all with: goodstanding rebuild")
            raise typer.Exit(1)

    with _readable_errors():
        _run(work())


@app.command()
def invalidate(
    user_id: Annotated[str | None, typer.Argument(help="The user's UUID.")] = None,
    everybody: Annotated[bool, typer.Option("--all", help="Drop every cached reputation.")] = False,
) -> None:
    """Drop what is cached about one user, or about all."""
    if (user_id is None) is not everybody:
        message = "give either a user's id or --all"
        raise typer.BadParameter(message)

    async def work() -> None:
        users = [parse_user_id(user_id)] if user_id is not None else []
        settings = _settings()
        if not settings.redis_url.get_secret_value():
            message = "GOODSTANDING_REDIS_URL: without Redis each process has a cache of its own; use the HTTP call"
            raise ConfigurationError(message)
        async with open_service(settings) as opened:
            if users:
                await opened.service.invalidate(users)
                _report("The cached reputation is gone.")
            else:
                with _out.status("Dropping every cached reputation"):
                    dropped = await opened.service.invalidate_all()
                _report(f"{dropped} cached reputations are gone.")

    with _readable_errors():
        _run(work())


@app.command()
def warm(
    users: Annotated[int, typer.Option(help="How many of the most active users.", min=1, max=1_000_000)] = 10_000,
    rate: Annotated[int, typer.Option(help="Most users per second.", min=1, max=100_000)] = 1000,
) -> None:
    """Fill the cache for the users with the most sessions in the last 30 days, at a bounded rate."""

    async def work() -> None:
        settings = _settings()
        if not settings.redis_url.get_secret_value():
            message = "GOODSTANDING_REDIS_URL: there is no shared cache to fill"
            raise ConfigurationError(message)
        async with open_service(settings) as opened:
            with _out.status("Looking for the most active users"):
                active = await opened.history.most_active(users)
            loop = asyncio.get_running_loop()
            step = min(MOST_USERS, rate)
            columns = (TextColumn("warming"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=_out) as progress:
                task = progress.add_task("", total=len(active))
                for start in range(0, len(active), step):
                    due = loop.time() + step / rate
                    batch = active[start : start + step]
                    answers = await opened.service.read_many(batch)
                    if any(answer.source is Source.BYPASS for answer in answers.values()):
                        message = "Redis is away: there is nothing to fill."
                        raise TemporarilyUnavailableError(message)
                    progress.advance(task, len(batch))
                    await asyncio.sleep(max(0.0, due - loop.time()))
        _report(f"{len(active)} users are in the cache.")

    with _readable_errors():
        _run(work())


@app.command()
def doctor(database_url: DatabaseUrl = None) -> None:
    """Check database, rights, indexes, Redis and token settings; exits with 1 when something does not work."""

    async def work() -> None:
        findings = await doctor_checks.examine(_settings(database_url=database_url))
        for finding in findings:
            status = finding.status.value
            _out.print(f"[{_STATUS_STYLES[status]}]{status:8}[/]", end="")
            _out.print(f"{finding.name}: {finding.message}", markup=False, highlight=False, soft_wrap=True)
        if any(finding.status.value == "failure" for finding in findings):
            raise typer.Exit(1)

    with _readable_errors():
        _run(work())
