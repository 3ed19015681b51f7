"""SessionHistory on a real server: what it counts, and what it does when the server does not answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

import asyncpg
import pytest

from goodstanding.data import AtFault, SessionCounts, SessionId, UserId
from goodstanding.embedded import Postgres
from goodstanding.errors import InvalidInputError, SessionNotFoundError, TemporarilyUnavailableError
from goodstanding.history import QUERIES, SessionHistory, named_queries
from goodstanding.policy import LEGACY, STANDARD

from .conftest import Database, connect

DEADLINE = 1.0
PATIENCE = 10.0
SLACK = 1.0  # a busy machine is late; a wait that ignores the deadline is endless


@asynccontextmanager
async def opened(
    url: str, *, pool_size: int = 4, transaction_pooler: bool = False, deadline: float = PATIENCE
) -> AsyncIterator[SessionHistory]:
    """Open a history with a test's patience."""
    async with SessionHistory.open(
        url, pool_size=pool_size, transaction_pooler=transaction_pooler, deadline=deadline
    ) as history:
        yield history


@pytest.fixture
async def history(database: Database) -> AsyncIterator[SessionHistory]:
    """Give a history that logs in as the service does."""
    async with opened(database.service_url) as history:
        yield history


@asynccontextmanager
async def hanging(postgres: Postgres) -> AsyncIterator[None]:
    """Let the whole server hang inside the block."""
    postgres.pause()
    try:
        yield
    finally:
        postgres.resume()


async def test_counts_are_exact_for_both_sides_and_never_clamped(database: Database, history: SessionHistory) -> None:
    """Thirty completed sessions and one missed are 30 and 1, whichever side the user was on."""
    me, other = await database.add_user(), await database.add_user()
    mine, theirs = await database.add_match(me, other), await database.add_match(other, me)
    for _ in range(15):
        await database.add_session(mine, "completed", a=True)
        await database.add_session(theirs, "completed", b=True)
    await database.add_session(mine, "no_show", a=False, b=True)
    assert {
        me: SessionCounts(completed=30, no_shows=1),
        other: SessionCounts(completed=30, no_shows=0),
    } == await history.counts([me, other], STANDARD)


async def test_a_new_user_has_counts_and_an_unknown_one_has_none(database: Database, history: SessionHistory) -> None:
    """Zero sessions and no such user are two different answers, in one statement."""
    new, unknown = await database.add_user(), UserId(str(uuid4()))
    assert {new: SessionCounts(completed=0, no_shows=0)} == await history.counts([new, unknown, new], STANDARD)


async def test_no_new_connection_asks_what_a_type_is(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver knows every type of the counts by itself; it would ask in six round trips, while somebody waits."""
    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", None)
    user = await database.add_user()
    async with opened(database.service_url) as history:
        assert {user} == set(await history.counts([user], STANDARD))


async def test_a_hundred_users_are_one_call_and_more_are_refused(database: Database, history: SessionHistory) -> None:
    """The bounds of a call are 1 and 100 users."""
    users = [await database.add_user() for _ in range(100)]
    assert set(users) == set(await history.counts(users, STANDARD))
    for wrong in ([], [*users, users[0]]):
        with pytest.raises(ValueError, match="1 to 100"):
            await history.counts(wrong, STANDARD)


async def test_the_policy_decides(database: Database, history: SessionHistory) -> None:
    """The same cancelled session is nobody's fault under one policy and everybody's under the other."""
    me = await database.add_user()
    await database.add_session(await database.add_match(me, await database.add_user()), "cancelled")
    assert SessionCounts(completed=0, no_shows=0) == (await history.counts([me], STANDARD))[me]
    assert SessionCounts(completed=0, no_shows=1) == (await history.counts([me], LEGACY))[me]


async def test_the_newest_verdict_stands(database: Database, history: SessionHistory) -> None:
    """Each verdict replaces the one before, and every one is kept."""
    user1, user2 = await database.add_user(), await database.add_user()
    session = await database.add_session(await database.add_match(user1, user2), "cancelled")
    faults = {AtFault.USER1: (1, 0), AtFault.USER2: (0, 1), AtFault.BOTH: (1, 1), AtFault.NOBODY: (0, 0)}
    for at_fault, expected in faults.items():
        assert (user1, user2) == await history.attribute(session, at_fault, reason="seen", said_by="support")
        counts = await history.counts([user1, user2], STANDARD)
        assert expected == (counts[user1].no_shows, counts[user2].no_shows)
    async with database.owner() as owner:
        said = await owner.fetch("select * from reputation.attributions where session_id = $1 order by id", session)
    assert list(faults) == [AtFault(row["at_fault"]) for row in said]
    assert {("seen", "support")} == {(row["reason"], row["said_by"]) for row in said}
    assert all(row["said_at"].utcoffset() is not None for row in said)


async def test_a_verdict_waits_for_its_session(database: Database, history: SessionHistory) -> None:
    """A verdict on a session that is not over counts once it is cancelled, and not before."""
    me, other = await database.add_user(), await database.add_user()
    session = await database.add_session(await database.add_match(me, other))
    await history.attribute(session, AtFault.USER1, reason="told us so", said_by="support")
    assert (await history.counts([me], STANDARD))[me].no_shows == 0
    async with database.owner() as owner:
        await owner.execute("update public.wingman_sessions set status = 'cancelled'")
    assert (await history.counts([me], STANDARD))[me].no_shows == 1


async def test_a_verdict_needs_a_session(history: SessionHistory) -> None:
    """A session that does not exist gets no verdict."""
    with pytest.raises(SessionNotFoundError):
        await history.attribute(SessionId(str(uuid4())), AtFault.BOTH, reason="x", said_by="y")


@pytest.mark.parametrize("reason", ["", "x" * 1001, "nul \0", "\ud800"])
async def test_a_reason_that_postgres_does_not_take_is_the_callers_mistake(
    database: Database, history: SessionHistory, reason: str
) -> None:
    """Length and characters are checked by the database, and that is no outage."""
    match = await database.add_match(await database.add_user(), await database.add_user())
    with pytest.raises(InvalidInputError):
        await history.attribute(await database.add_session(match), AtFault.BOTH, reason=reason, said_by="y")


async def test_the_most_active_users_come_first(database: Database, history: SessionHistory) -> None:
    """Users are ordered by their sessions of the last month and after; older ones do not count."""
    busy, some, rare = [await database.add_user() for _ in range(3)]
    async with database.owner() as owner:
        for pair, sessions, age in (((busy, some), 3, 1), ((busy, rare), 1, 1), ((some, rare), 9, 60)):
            match = await database.add_match(*pair)
            await owner.execute(
                "insert into public.wingman_sessions (match_id, scheduled_time)"
                " select $1, now() - make_interval(days => $3) from generate_series(1, $2)",
                match,
                sessions,
                age,
            )
    assert [busy, some, rare] == await history.most_active(10)
    assert [busy] == await history.most_active(1)


async def test_a_call_is_one_statement_in_one_round_trip(database: Database) -> None:
    """Once the connection knows the statement, a call is one message out and one answer back, with no reset."""
    me = await database.add_user()
    async with _counting_proxy(database.service_url) as (url, requests), opened(url, pool_size=1) as history:
        await history.counts([me], STANDARD)
        before = len(requests)
        for _ in range(5):
            await history.counts([me], STANDARD)
        assert before + 5 == len(requests)


async def test_without_a_session_every_message_stands_alone(database: Database) -> None:
    """For a transaction pooler each request that executes also carries its own statement: no named ones, no reset."""
    me = await database.add_user()
    async with (
        _counting_proxy(database.service_url) as (url, requests),
        opened(url, pool_size=1, transaction_pooler=True) as history,
    ):
        await history.counts([me], STANDARD)
        before = len(requests)
        await history.counts([me], STANDARD)
        described, executed = requests[before:]
    assert b"reputation.read_counts" in described
    assert b"reputation.read_counts" in executed
    assert b"P" == executed[:1]
    assert b"__asyncpg" not in described + executed


async def test_the_login_shows_who_it_is(database: Database, history: SessionHistory) -> None:
    """An operator finds the service's connections by their name."""
    await history.ping()
    async with database.owner() as owner:
        assert "goodstanding" in {
            row[0]
            for row in await owner.fetch(
                "select application_name from pg_stat_activity where datname = current_database()"
            )
        }


async def test_a_database_that_is_down_is_no_reason_not_to_start(postgres: Postgres) -> None:
    """Opening needs no server; calls fail as unavailable, without the cause's words but with the cause."""
    assert postgres.running
    async with opened("postgresql://nobody@127.0.0.1:1/nowhere") as history:
        with pytest.raises(TemporarilyUnavailableError) as caught:
            await history.ping()
    assert isinstance(caught.value.__cause__, OSError)
    assert TemporarilyUnavailableError.default_detail == str(caught.value)


async def test_a_missing_schema_and_a_missing_right_are_outages(bare_database: Database, database: Database) -> None:
    """What only an operator can mend is unavailable to callers, and heals by itself once mended."""
    async with opened(bare_database.service_url) as history:
        with pytest.raises(TemporarilyUnavailableError):
            await history.ping()
    async with opened(database.service_url) as history, database.owner() as owner:
        await history.ping()
        await owner.execute("revoke usage on schema reputation from goodstanding_service")
        with pytest.raises(TemporarilyUnavailableError) as caught:
            await history.ping()
        assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)
        await owner.execute("grant usage on schema reputation to goodstanding_service")
        await history.ping()


async def test_rows_that_a_policy_would_hide_are_an_outage_and_never_a_zero(
    database: Database, history: SessionHistory
) -> None:
    """FORCE ROW LEVEL SECURITY binds even the owner: counting what is left would be a wrong answer."""
    me = await database.add_user()
    async with database.owner() as owner:
        await owner.execute("alter table public.wingman_sessions force row level security")
    for call in (history.counts([me], STANDARD), history.ping()):
        with pytest.raises(TemporarilyUnavailableError):
            await call


async def test_the_host_may_change_its_columns(database: Database, history: SessionHistory) -> None:
    """Our functions stand in the way of no ALTER TABLE, and count on afterwards."""
    me = await database.add_user()
    await database.add_session(await database.add_match(me, await database.add_user()), "completed", a=True)
    before = await history.counts([me], STANDARD)
    async with database.owner() as owner:
        await owner.execute("alter table public.wingman_sessions alter column status type text")
        await owner.execute("alter table public.wingman_sessions drop column notes")
    assert before == await history.counts([me], STANDARD)


async def test_a_killed_backend_costs_one_call_at_most(database: Database) -> None:
    """After the server ended the connection, the next call or the one after it answers."""
    me = await database.add_user()
    async with opened(database.service_url, pool_size=1) as history, connect(database.superuser_url) as admin:
        await history.ping()
        killed = await admin.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where datname = current_database() and application_name = 'goodstanding'"
        )
        assert killed == 1
        try:
            counts = await history.counts([me], STANDARD)
        except TemporarilyUnavailableError:
            counts = await history.counts([me], STANDARD)
    assert SessionCounts(completed=0, no_shows=0) == counts[me]


@pytest.mark.parametrize("connected", [True, False])
async def test_a_hung_server_costs_no_more_than_the_deadline(
    postgres: Postgres, database: Database, *, connected: bool
) -> None:
    """With the server stopped each call ends in time, on an open connection and on a new one; later calls answer."""
    loop = asyncio.get_running_loop()
    me = await database.add_user()
    async with opened(database.service_url, deadline=DEADLINE, pool_size=2) as history:
        if connected:
            await history.ping()
        async with hanging(postgres):
            for _ in range(2):
                started = loop.time()
                with pytest.raises(TemporarilyUnavailableError) as caught:
                    await history.counts([me], STANDARD)
                assert loop.time() - started < DEADLINE + SLACK
                assert isinstance(caught.value.__cause__, TimeoutError)
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    assert me in await history.counts([me], STANDARD)
                except TemporarilyUnavailableError:
                    continue
                break


async def test_a_cancelled_call_ends_at_once_even_when_the_server_hangs(postgres: Postgres, database: Database) -> None:
    """Cancelling does not wait for a server that answers nothing, and neither does closing beyond the deadline."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as hung:
        async with opened(database.service_url, deadline=DEADLINE) as history:
            await history.ping()
            await hung.enter_async_context(hanging(postgres))
            started = loop.time()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await history.ping()
            assert loop.time() - started < SLACK
            closing = loop.time()
        assert loop.time() - closing < DEADLINE + SLACK


async def test_a_query_that_is_given_up_stops_on_the_server(database: Database) -> None:
    """A call that ran out of time leaves no query running, and its connection is used again."""
    async with (
        opened(database.service_url, deadline=0.3, pool_size=1) as history,
        connect(database.superuser_url) as admin,
    ):
        await history.ping()
        async with admin.transaction():
            await admin.execute("lock table public.user_profiles in access exclusive mode")
            with pytest.raises(TemporarilyUnavailableError):
                await history.counts([UserId(str(uuid4()))], STANDARD)
            async with asyncio.timeout(PATIENCE):
                while await admin.fetchval(
                    "select count(*) from pg_stat_activity where datname = current_database()"
                    " and application_name = 'goodstanding' and state = 'active'"
                ):
                    await admin.execute("select pg_stat_clear_snapshot()")
        await history.ping()


async def test_an_exhausted_pool_is_an_outage_within_the_deadline(database: Database) -> None:
    """Waiting for a connection counts towards the deadline."""
    loop = asyncio.get_running_loop()
    async with (
        opened(database.service_url, deadline=DEADLINE, pool_size=1) as history,
        connect(database.superuser_url) as admin,
        admin.transaction(),
    ):
        await admin.execute("lock table public.user_profiles in access exclusive mode")
        started = loop.time()
        results = await asyncio.gather(
            *(history.counts([UserId(str(uuid4()))], STANDARD) for _ in range(5)), return_exceptions=True
        )
        assert loop.time() - started < DEADLINE + SLACK
    assert {TemporarilyUnavailableError} == {type(result) for result in results}


async def test_a_server_without_a_free_place_is_an_outage(database: Database) -> None:
    """A refused connection is unavailable, and the next call after one was freed answers."""
    async with connect(database.superuser_url) as admin:
        await admin.execute("alter role app_login connection limit 0")
        try:
            async with opened(database.service_url) as history:
                with pytest.raises(TemporarilyUnavailableError) as caught:
                    await history.ping()
                assert isinstance(caught.value.__cause__, asyncpg.TooManyConnectionsError)
                await admin.execute("alter role app_login connection limit -1")
                await history.ping()
        finally:
            await admin.execute("alter role app_login connection limit -1")


def test_every_query_has_a_name_and_a_comment() -> None:
    """The named queries are read whole, each with the comment that says what it gives."""
    assert {"counts", "attribute", "most_active", "ping", "status"} == set(QUERIES)
    assert all(query.startswith("-- ") for query in QUERIES.values())
    assert {"a": "select 1", "b_c": "-- why\nselect\n2"} == named_queries(
        "-- prologue\n\n-- name: a\nselect 1\n\n-- name: b_c\n-- why\nselect\n2\n"
    )


@asynccontextmanager
async def _counting_proxy(url: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Relay to the server of `url`, noting every piece that the client sends before the server answers."""
    host, _, rest = url.rpartition("@")
    address, _, name = rest.partition("/")
    server_host, _, server_port = address.partition(":")
    requests: list[bytes] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(server_host, int(server_port))
        answered = True

        async def outward() -> None:
            nonlocal answered
            while data := await reader.read(65536):
                if answered:
                    requests.append(data)
                else:
                    requests[-1] += data
                answered = False
                upstream_writer.write(data)
            upstream_writer.close()

        async def inward() -> None:
            nonlocal answered
            while data := await upstream_reader.read(65536):
                answered = True
                writer.write(data)
            writer.close()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(outward())
            tasks.create_task(inward())

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        yield f"{host}@127.0.0.1:{port}/{name}", requests
