"""A model of PostgreSQL as the product meets it: sessions, snapshots, commits, one advisory lock and NOTIFY.

What a user's counts are is a list of versions, each with the moment of its commit: so what a read may answer is known.
"""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final

import asyncpg

from goodstanding import broadcast, changes, history, tallies
from goodstanding.data import UserId
from goodstanding.history import TallyStatus
from tests.simulation.world import Link, Peer, Process, Route, World, connect

_IDLE_SECONDS: Final = 1.0
_EPOCH: Final = 1_700_000_000_000_000


@dataclass(frozen=True, slots=True)
class Version:
    """What a user's completed sessions are since a moment; None: there is no such user."""

    since: float
    completed: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A row that a trigger appended; `user` is None for everybody."""

    user: UserId | None
    at: float


@dataclass(slots=True)
class _Transaction:
    """What is to happen at the commit."""

    taken: list[Change] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    folds: bool = False


class Session:
    """The server's end of a connection. Statements are carried out one after another."""

    def __init__(self, server: "Postgres", link: Link) -> None:
        self.link = link
        self.transaction: _Transaction | None = None
        self.idle_timeout = False
        self.ended = False
        self.listener: Callable[..., None] | None = None
        self._server = server
        self._statements: deque[tuple[int, str, tuple[Any, ...], Callable[[int, Any], None]]] = deque()
        self._running = 0
        self._idle = 0

    def ask(self, number: int, sql: str, args: tuple[Any, ...], answer: Callable[[int, Any], None]) -> None:
        """Take a statement."""
        self._idle += 1
        self._statements.append((number, sql, args, answer))
        self.work()

    def cancel(self, number: int) -> None:
        """Stop a statement, if it is still running."""
        if self._running == number:
            self._server.stop_waiting(self)
            self.reply(asyncpg.QueryCanceledError())

    def work(self) -> None:
        """Begin the next statement, if there is one."""
        if self._running or not self._statements or self.ended:
            return
        if self._server.hung:
            self._server.stalled.append(self.work)
            return
        number, sql, args, _ = self._statements[0]
        self._running = number
        self._server.execute(self, number, sql, args)

    def still(self, number: int) -> bool:
        """Tell whether this statement is still to be answered."""
        return self._running == number and not self.ended

    def reply(self, outcome: object) -> None:
        """Answer the statement that runs, and begin the next."""
        number, _, _, answer = self._statements.popleft()
        self._running = 0
        self.link.down(answer, number, outcome)
        self._idle += 1
        timed = self.idle_timeout if self.transaction is None else self.transaction.folds
        if timed:
            self._server.world.after(_IDLE_SECONDS, self._end_if_idle, self._idle)
        self.work()

    def gone(self) -> None:
        """Note that the process closed the connection."""
        self.end()

    def end(self) -> None:
        """End the session: what it had open is rolled back, what it had locked is free."""
        if not self.ended:
            self.ended = True
            self.transaction = None
            self.link.lose()
            self._server.forget(self)

    def _end_if_idle(self, idle: int) -> None:
        if idle == self._idle and not self.ended:
            self._server.world.note("postgres", f"ends the idle session of {self.link.process.name}")
            self.end()


class Postgres:
    """The server, and the host's app, which writes to it. A fold that begins before `slow_until` ends then."""

    def __init__(self, world: World, users: Sequence[UserId], *, query_delay: Callable[[], float]) -> None:
        self.world = world
        self.versions: dict[UserId, list[Version]] = {user: [Version(-100.0, 0)] for user in users}
        self.changes: list[Change] = []
        self.appended = 0
        self.folded = 0
        self.hung = False
        self.down = False
        self.slow_until = 0.0
        self.stalled: list[Callable[[], None]] = []
        self.leader: Session | None = None
        self._query_delay = query_delay
        self._sessions: dict[Session, None] = {}
        self._upkeep: Session | None = None
        self._waiting: list[tuple[Session, Callable[[], None]]] = []
        self._folded_to = ""
        self._term = 0
        self._statements: dict[str, Callable[..., None]] = {
            history.QUERIES["counts"]: self._counts,
            history.QUERIES["ping"]: self._nothing,
            history.QUERIES["status"]: self._status,
            tallies.QUERIES["pending"]: self._pending,
            tallies.QUERIES["fold"]: self._fold,
            tallies.QUERIES["recount"]: self._recount,
            changes._LEAD: self._lead,
            changes._IDLE: self._set_idle_timeout,
            broadcast._NOTIFY: self._notify,
            "listen": self._listen,
            "select": self._nothing,
            "begin": self._begin,
            "commit": self._commit,
            "rollback": self._rollback,
        }

    # What the host does.

    def complete(self, user: UserId) -> None:
        """Commit one more completed session of a user, who is created if need be."""
        last = self.versions[user][-1].completed
        known = [version.completed for version in self.versions[user] if version.completed is not None]
        self._write(user, max(known, default=-1) + 1 if last is not None or known else 0)

    def delete(self, user: UserId) -> None:
        """Commit that there is no such user."""
        self._write(user, None)

    def complete_everybody(self) -> None:
        """Commit another session of everybody, of which one mark for everybody is all that tells."""
        for user, versions in self.versions.items():
            if versions[-1].completed is not None:
                self.world.note("host", f"commits {user[-2:]} = {versions[-1].completed + 1}, marked as everybody")
                versions.append(Version(self.world.now, versions[-1].completed + 1))
        self._append(None)

    def _write(self, user: UserId, completed: int | None) -> None:
        self.world.note("host", f"commits {user[-2:]} = {completed}")
        self.versions[user].append(Version(self.world.now, completed))
        self._append(user)

    def _append(self, user: UserId | None) -> None:
        self.changes.append(Change(user, self.world.now))
        self.appended += 1

    def may_answer(self, user: UserId, completed: int | None, *, since: float) -> bool:
        """Tell whether these counts were the truth at any moment since then."""
        versions = self.versions[user]
        first = max(0, bisect_right(versions, since, key=attrgetter("since")) - 1)
        return any(version.completed == completed for version in versions[first:])

    # Its faults.

    def hang(self, seconds: float) -> None:
        """Begin no statement for a while."""
        self.hung = True
        self.world.after(seconds, self._go_on)

    def stop(self, seconds: float) -> None:
        """End, and with it every session; begin again after a while."""
        self.down = True
        self.end_sessions()
        self.world.after(seconds, self._start)

    def end_sessions(self) -> None:
        """End every session."""
        for session in list(self._sessions):
            session.end()

    # Its connections.

    def accept(self, link: Link, answer: Callable[[Peer | OSError], None]) -> None:
        """Take a connection."""
        if self.down:
            answer(ConnectionRefusedError())
        elif self.hung:
            self.stalled.append(lambda: self.accept(link, answer))
        else:
            session = Session(self, link)
            self._sessions[session] = None
            answer(session)

    def forget(self, session: Session) -> None:
        """Free what an ended session held."""
        self._sessions.pop(session, None)
        if self.leader is session:
            self.leader = None
        self.stop_waiting(session)
        self._unlock(session)

    def stop_waiting(self, session: Session) -> None:
        """Let a session wait for the lock no longer."""
        self._waiting = [waiting for waiting in self._waiting if waiting[0] is not session]

    def execute(self, session: Session, number: int, sql: str, args: tuple[Any, ...]) -> None:
        """Carry out a statement; it answers now or later."""
        statement = self._statements[sql]
        self.world.happened(statement.__name__)
        statement(session, number, *args)

    # Its statements.

    def _nothing(self, session: Session, _number: int) -> None:
        session.reply([])

    def _counts(self, session: Session, number: int, users: Sequence[UserId], *_policy: str) -> None:
        def look() -> None:
            if session.still(number):
                latest = [(user, self.versions[user][-1].completed) for user in users if user in self.versions]
                rows = [
                    {"user_id": user, "completed": completed, "no_shows": 0}
                    for user, completed in latest
                    if completed is not None
                ]
                if self.world.traced:
                    seen = ", ".join(f"{user[-2:]} = {completed}" for user, completed in latest)
                    self.world.note("postgres", f"counts for {session.link.process.name}: {seen}")
                self.world.after(self._query_delay(), end, rows)

        def end(rows: list[dict[str, Any]]) -> None:
            if session.still(number):
                session.reply(rows)

        self.world.after(self._query_delay(), look)

    def _status(self, session: Session, _number: int, *_policy: str) -> None:
        status = TallyStatus(tracked=True, same_policy=True, counting=False, waiting=False, pending=False)
        session.reply([tuple(getattr(status, name) for name in TallyStatus.__slots__)])

    def _pending(self, session: Session, _number: int) -> None:
        session.reply([(bool(self.changes),)])

    def _lead(self, session: Session, _number: int, _lock: int) -> None:
        if self.leader is not None and self.leader is not session:
            session.reply([])
            return
        self.leader = session
        self._term = max(self._term + 1, _EPOCH + int(self.world.now * 1e6))
        self.world.note("postgres", f"lets {session.link.process.name} lead, term {self._term}")
        session.reply([(self._term,)])

    def _set_idle_timeout(self, session: Session, _number: int) -> None:
        session.idle_timeout = True
        session.reply([])

    def _begin(self, session: Session, _number: int) -> None:
        session.transaction = _Transaction()
        session.reply([])

    def _fold(self, session: Session, number: int, batch: int) -> None:
        if not self.changes or session.transaction is None:
            session.reply([(0, False, [], None)])
        elif self._upkeep is not None and self._upkeep is not session:
            self._waiting.append((session, lambda: self._fold(session, number, batch)))
        else:
            self._upkeep = session
            session.transaction.folds = True
            taken = self._take(batch)
            session.transaction.taken = taken
            users = sorted({change.user for change in taken if change.user is not None})
            everybody = any(change.user is None for change in taken)
            self.world.note(
                "postgres",
                f"folds for {session.link.process.name}: {[user[-2:] for user in users]}{' everybody' * everybody}",
            )
            row = (len(taken), everybody, users, None)

            def end() -> None:
                if session.still(number):
                    session.reply([row])

            if self.world.now < self.slow_until:
                self.world.at(self.slow_until, end)
            else:
                end()

    def _take(self, batch: int) -> list[Change]:
        """Take what a fold takes: in the order of the users, going on where the last one ended, and every mark."""
        named = sorted((change for change in self.changes if change.user is not None), key=lambda one: str(one.user))
        ahead = [change for change in named if change.user is not None and change.user >= self._folded_to]
        behind = [change for change in named if change.user is not None and change.user < self._folded_to]
        taken = [*ahead, *behind][:batch]
        self._folded_to = str(ahead[batch - 1].user) if len(ahead) >= batch else ""
        return taken + [change for change in self.changes if change.user is None][:batch]

    def _recount(self, session: Session, _number: int, _batch: int) -> None:
        session.reply([(0, False)])

    def _notify(self, session: Session, _number: int, _channel: str, said: Sequence[str]) -> None:
        if session.transaction is not None:
            session.transaction.notices += said
        else:
            self._tell(said)
        session.reply([])

    def _listen(self, session: Session, _number: int, callback: Callable[..., None]) -> None:
        session.listener = callback
        session.reply([])

    def _commit(self, session: Session, _number: int) -> None:
        transaction, session.transaction = session.transaction, None
        if transaction is not None:
            gone = set(transaction.taken)
            self.changes = [change for change in self.changes if change not in gone]
            self.folded += len(gone)
            self.world.note("postgres", f"commits for {session.link.process.name}: {len(gone)} changes folded")
            self._tell(transaction.notices)
        self._unlock(session)
        session.reply([])

    def _rollback(self, session: Session, _number: int) -> None:
        session.transaction = None
        self._unlock(session)
        session.reply([])

    def _tell(self, notices: Sequence[str]) -> None:
        for said in notices:
            self.world.note("postgres", f"notifies: {said}")
            for session in self._sessions:
                if session.listener is not None:
                    session.link.down(session.listener, None, 0, "goodstanding", said)

    def _unlock(self, session: Session) -> None:
        if self._upkeep is session:
            self._upkeep = None
            if self._waiting:
                _, go_on = self._waiting.pop(0)
                go_on()

    def _go_on(self) -> None:
        self.hung = False
        stalled, self.stalled = self.stalled, []
        for go_on in stalled:
            go_on()

    def _start(self) -> None:
        self.down = False


class Connection:
    """What the product uses of an asyncpg connection."""

    def __init__(self, process: Process, link: Link, session: Session, *, command_timeout: float | None) -> None:
        self._process = process
        self._link = link
        self._session = session
        self._command_timeout = command_timeout
        self._number = 0
        self._waiting: asyncio.Future[Any] | None = None
        link.on_lost = self._lost

    def is_closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return not self._link.is_open

    async def fetch(self, sql: str, *args: object, timeout: float | None = None) -> Any:  # noqa: ANN401, ASYNC109 - as asyncpg's
        """Ask, and give the rows."""
        return await self._ask(sql, args, timeout)

    async def fetchval(self, sql: str, *args: object) -> Any:  # noqa: ANN401 - as asyncpg's
        """Ask, and give the first value of the first row."""
        rows = await self._ask(sql, args, None)
        return rows[0][0] if rows else None

    async def execute(self, sql: str, *args: object) -> None:
        """Ask, and give nothing."""
        await self._ask(sql, args, None)

    @asynccontextmanager
    async def transaction(self, *, isolation: str) -> AsyncIterator[None]:
        """Begin, and commit or roll back at the end."""
        assert isolation == "read_committed"
        await self._ask("begin", (), None)
        try:
            yield
        except BaseException:
            await self._ask("rollback", (), None)
            raise
        await self._ask("commit", (), None)

    async def add_listener(self, _channel: str, callback: Callable[..., None]) -> None:
        """Have what others say told to `callback`."""
        await self._ask("listen", (callback,), None)

    def terminate(self) -> None:
        """Close the connection without a word."""
        self._link.close()
        self._lost()

    def _lost(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(asyncpg.ConnectionDoesNotExistError("connection was closed"))

    def _answered(self, number: int, outcome: object) -> None:
        if number != self._number or self._waiting is None or self._waiting.done():
            return
        if isinstance(outcome, Exception):
            self._waiting.set_exception(outcome)
        else:
            self._waiting.set_result(outcome)

    async def _ask(self, sql: str, args: tuple[Any, ...], timeout: float | None) -> Any:  # noqa: ANN401, ASYNC109 - as asyncpg's
        if not self._link.is_open:
            message = "connection is closed"
            raise asyncpg.InterfaceError(message)
        if self._waiting is not None:
            message = "another operation is in progress"
            raise asyncpg.InterfaceError(message)
        self._number += 1
        self._waiting = self._process.create_future()
        self._link.up.send(self._session.ask, self._number, sql, args, self._answered)
        try:
            async with asyncio.timeout(timeout or self._command_timeout):
                return await self._waiting
        except (TimeoutError, asyncio.CancelledError):
            self._link.up.send(self._session.cancel, self._number)
            raise
        finally:
            self._waiting = None


class Pool:
    """What the product uses of an asyncpg pool."""

    def __init__(self, process: Process, route: Route, server: Postgres) -> None:
        self._process = process
        self._route = route
        self._server = server
        self._idle: list[Connection] = []

    async def acquire(self) -> Connection:
        """Lend a connection, a new one if need be."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await open_connection(self._process, self._route, self._server)

    async def release(self, connection: Connection, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as asyncpg's
        """Take a connection back."""
        if timeout is None:
            self._idle.append(connection)
        else:
            connection.terminate()

    async def close(self) -> None:
        """Close what is idle."""
        self.terminate()

    def terminate(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()


async def open_connection(
    process: Process, route: Route, server: Postgres, *, command_timeout: float | None = None
) -> Connection:
    """Connect; raises OSError."""
    link = await connect(process, route, server)
    if not isinstance(link.peer, Session):
        link.close()
        raise ConnectionResetError
    return Connection(process, link, link.peer, command_timeout=command_timeout)
