"""A fleet of real processes under writes and faults, and readers who know what they must be told.

Every user's completed sessions only ever grow, one writer writes each user, and everything happens in one process with
one clock. So of each answer it is known what it must tell at least (what had been committed 2 s before the read began)
and at most (what was being committed when the answer came).
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

import asyncpg

from goodstanding.embedded import Valkey
from goodstanding.tallies import LEAD
from goodstanding.tasks import background

from .cable import Cable
from .conftest import Database, connect
from .parts import SECONDS, eventually
from .serving import SINGLE, clean_environment, free_port

PROMISED: Final = 2.0
"""Nothing is stale for longer, in seconds."""

_INSERT: Final = (
    "insert into public.wingman_sessions (match_id, status, user1_completed_confirmed_by_user2)"
    " select one.match_id, 'completed', true from unnest($1::uuid[]) as one (match_id)"
)
_USERS: Final = """
with pair as (
    select gen_random_uuid() as one, gen_random_uuid() as other from generate_series(1, $1)
),
known as (
    insert into public.user_profiles (id) select one from pair union all select other from pair
)
insert into public.wingman_matches (user1_id, user2_id) select one, other from pair returning id, user1_id
"""
_COUNT: Final = "select match_id, count(*) from public.wingman_sessions where match_id = any ($1::uuid[]) group by 1"
END_THE_LEAD: Final = (
    "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and granted and objsubid = 1"
    " and database = (select oid from pg_database where datname = current_database())"
    " and (classid::bigint << 32) + objid::bigint = $1::bigint"
)
OUTAGES: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


@dataclass(slots=True)
class Served:
    """One `goodstanding serve`, as a process that can be killed, frozen and started again."""

    environment: dict[str, str]
    program: Sequence[str] = (str(Path(sys.executable).with_name("goodstanding")),)
    log: Path = Path(os.devnull)
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None
    up: bool = False
    """Whether it must answer."""

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220 - the same
                [*self.program, "serve", "--port", str(self.port)],
                env=clean_environment(self.environment),
                stdout=log,
                stderr=log,
            )
        await eventually(self._is_alive)
        self.up = True

    def signal(self, how: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(how)

    async def kill(self) -> None:
        """Kill it."""
        self.up = False
        self.signal(signal.SIGKILL)
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(SECONDS)
            self.process = None

    async def leads(self) -> bool:
        """Tell whether its relay leads."""
        async with Line.to(self.port) as line:
            _, _, text = await line.get("/metrics")
        return b"\ngoodstanding_relay_leading 1.0" in text

    async def hears(self) -> bool:
        """Tell whether it is ready, with nothing away."""
        async with Line.to(self.port) as line:
            _, _, text = await line.get("/health/ready")
        return b'"ready"' in text

    async def _is_alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None
        try:
            async with Line.to(self.port) as line:
                return (await line.get("/health/live"))[0] == 200
        except OSError:
            return False


@dataclass(slots=True)
class Line:
    """A kept connection to a server; as little as a reader needs, since there are many."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator["Line"]:
        """Connect."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def get(self, path: str) -> tuple[int, bytes, bytes]:
        """Ask; gives status, head and body."""
        return await self.ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Send a request's bytes; gives status, head and body. Raises OSError."""
        self.writer.write(request)
        try:
            async with asyncio.timeout(SECONDS):
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                return int(head[9:12]), head, await self.reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError from error


@dataclass(slots=True)
class Ledger:
    """What was committed about one user, and when it was known to be."""

    user: str
    match: UUID
    begun: int = 0
    committed: list[float] = field(default_factory=list)

    def at_least(self, moment: float) -> int:
        """Tell how many sessions had been committed by then."""
        return bisect_right(self.committed, moment)


@dataclass(slots=True)
class Fleet:
    """Served processes, those who write and those who read; what they found is in `wrong`."""

    database: Database
    valkey: Valkey | None
    served: list[Served]
    cables: list[Cable]
    ledgers: list[Ledger]
    watched: list[Ledger]
    rng: random.Random
    changes: int = 0
    reads: int = 0
    pause: float = 0.04
    a_commit: int = 10
    stopping: bool = False
    unavailable: bool = False
    """Whether a database is away, so that 503 and answers marked stale may come."""
    stalest: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    delays: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def now(self) -> float:
        """The one clock."""
        return asyncio.get_running_loop().time()

    # Writers.

    async def write(self, ledgers: Sequence[Ledger]) -> None:
        """Complete sessions of these users' matches, some at a time, until told to stop."""
        while not self.stopping:
            with suppress(*OUTAGES):
                async with connect(self.database.owner_url) as connection:
                    while not self.stopping:
                        some = self.rng.sample(ledgers, min(self.a_commit, len(ledgers)))
                        await self._complete(connection, some)
                        await asyncio.sleep(self.pause)
            await asyncio.sleep(0.1)

    async def watch(self, ledgers: Sequence[Ledger]) -> None:
        """Complete one session after another, and time how long each process takes to tell it, until told to stop."""
        while not self.stopping:
            with suppress(*OUTAGES):
                async with connect(self.database.owner_url) as connection:
                    while not self.stopping:
                        one = self.rng.choice(ledgers)
                        await self._complete(connection, [one])
                        committed = one.committed[-1]
                        await asyncio.gather(*(self._time(served, one, committed) for served in self.served))
                        await asyncio.sleep(self.rng.random() * 0.02)
            await asyncio.sleep(0.1)

    async def _time(self, served: Served, ledger: Ledger, committed: float) -> None:
        with suppress(OSError):
            async with Line.to(served.port) as line:
                while served.up:
                    count = await self._read(served, line, ledger)
                    if count is not None and count >= len(ledger.committed):
                        self.delays.append(self.now - committed)
                        return
                    await asyncio.sleep(0.001)

    async def _complete(self, connection: "asyncpg.Connection[asyncpg.Record]", ledgers: Sequence[Ledger]) -> None:
        for ledger in ledgers:
            ledger.begun += 1
        try:
            await connection.execute(_INSERT, [ledger.match for ledger in ledgers])
        except OUTAGES:
            await self._find_out(ledgers, connection.get_server_pid())
            raise
        now = self.now
        for ledger in ledgers:
            ledger.committed.append(now)
        self.changes += 2 * len(ledgers)

    async def _find_out(self, ledgers: Sequence[Ledger], pid: int) -> None:
        """Ask what became of a commit whose connection ended under it."""

        async def known() -> bool:
            with suppress(*OUTAGES):
                async with connect(self.database.superuser_url) as connection:
                    if await connection.fetchval("select exists (select from pg_stat_activity where pid = $1)", pid):
                        return False
                    rows = await connection.fetch(_COUNT, [ledger.match for ledger in ledgers])
                    counted: dict[UUID, int] = {row["match_id"]: row["count"] for row in rows}
                    for ledger in ledgers:
                        ledger.begun = counted.get(ledger.match, 0)
                        ledger.committed += [self.now] * (ledger.begun - len(ledger.committed))
                    return True
            return False

        await eventually(known)

    async def flood(self, *, a_second: int, seconds: float) -> float:
        """Let changes rain on a thousand users of their own; gives how many a second it were."""
        ledgers = await _ledgers(self.database, 1000)
        self.ledgers += ledgers
        commits, each = 10 * int(seconds), a_second // 20
        async with connect(self.database.owner_url) as connection:
            began = self.now
            for number in range(commits):
                await asyncio.sleep(max(0.0, began + number / 10 - self.now))
                await self._complete(connection, self.rng.sample(ledgers, each))
            return commits * each * 2 / (self.now - began)

    # Readers.

    async def read(self, served: Served) -> None:
        """Read one user after another from a process, until cancelled."""
        while True:
            try:
                async with Line.to(served.port) as line:
                    while True:
                        await self._read(served, line, self.rng.choice(self.ledgers))
                        await asyncio.sleep(0.003)
            except OSError:
                if served.up:
                    self.outcomes["no answer"] += 1
            await asyncio.sleep(0.05)

    async def _read(self, served: Served, line: Line, ledger: Ledger) -> int | None:
        began = self.now
        # Who asked in the last moments of an outage may be answered after it.
        unavailable = self.unavailable
        who = f"{began:.3f}: process {self.served.index(served)}: {ledger.user}"
        status, head, text = await line.get(SINGLE.format(ledger.user))
        self.reads += 1
        stale = b"ttl=-" in head
        if status == 503 or stale:
            self.outcomes["503" if status == 503 else "marked stale"] += 1
            if not (unavailable or self.unavailable):
                self.wrong.append(f"{who}: {status}, {self.now - began:.3f} s later, while everything was there")
            return None
        if status != 200:
            self.wrong.append(f"{who}: {status} {text!r}")
            return None
        self.outcomes["cached" if b"goodstanding; hit" in head else "counted"] += 1
        count = int(json.loads(text)["completed_sessions"])
        if count < ledger.at_least(began):
            # The first commit that it does not tell of is as old as the answer is stale.
            behind = began - ledger.committed[count]
            self.stalest = max(self.stalest, behind)
            if behind > PROMISED:
                self.wrong.append(f"{who}: stale for {behind:.3f} s: {count} of {ledger.at_least(began)}")
        if count > ledger.begun:
            self.wrong.append(f"{who}: has {count}, more than the {ledger.begun} that were ever begun")
        return count

    # Faults.

    async def leader(self) -> Served:
        """Give the process that leads now."""
        found: list[Served] = []

        async def leads() -> bool:
            found[:] = [one for one in self.served if one.up and await one.leads()]
            return len(found) == 1

        await eventually(leads)
        return found[0]

    async def make_lead(self, wanted: Served) -> None:
        """End the session in which somebody else leads until the wanted one does."""

        async def leads() -> bool:
            if await self.leader() is wanted:
                return True
            async with connect(self.database.superuser_url) as killer:
                await killer.execute(END_THE_LEAD, LEAD)
            return False

        await eventually(leads)

    async def end_sessions(self) -> int:
        """End every session in the database but one's own."""
        async with connect(self.database.superuser_url) as killer:
            ended: int = await killer.fetchval(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
            return ended

    async def crash_a_backend(self) -> None:
        """Kill one backend of the service; PostgreSQL then ends all the others, and recovers."""
        async with connect(self.database.superuser_url) as killer:
            pid = await killer.fetchval(
                "select pid from pg_stat_activity where datname = current_database() and usename = 'app_login' limit 1"
            )
        os.kill(pid, signal.SIGKILL)

    async def calm(self, seconds: float) -> None:
        """Let them write and read for a while, and check what was found until then."""
        await asyncio.sleep(seconds)
        self.check()

    def check(self) -> None:
        """Fail when anything wrong was found."""
        assert not self.wrong, "\n".join([f"{self.now:.3f}: {len(self.wrong)} wrong answers", *self.wrong[:20]])

    async def agree(self, *, within: float = SECONDS) -> None:
        """Wait until every process is ready and tells exactly what was committed; nobody writes any more."""

        async def exact() -> bool:
            for served in self.served:
                if not await served.hears():
                    return False
                async with Line.to(served.port) as line:
                    for ledger in (*self.ledgers, *self.watched):
                        if await self._read(served, line, ledger) != len(ledger.committed):
                            return False
            return True

        await eventually(exact, within=within)
        self.check()


@asynccontextmanager
async def fleet(
    database: Database, valkey: Valkey | None, *, processes: int, users: int, seed: int
) -> AsyncIterator[Fleet]:
    """Start served processes; the first is connected to PostgreSQL, and to Redis, by cables that can be cut."""
    async with AsyncExitStack() as stack:
        urls = [database.service_url, *([valkey.url()] if valkey is not None else [])]
        cables = [await Cable.to(url) for url in urls]
        for cable in cables:
            stack.callback(cable.end)
        served = []
        for number in range(processes):
            ours = [cable.url for cable in cables] if number == 0 else urls
            one = Served(
                {
                    "GOODSTANDING_DATABASE_URL": ours[0],
                    "GOODSTANDING_REDIS_URL": ours[1] if valkey is not None else "",
                    "GOODSTANDING_PUBLIC_READS": "true",
                    "GOODSTANDING_METRICS_PUBLIC": "true",
                    "GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000000",
                    "GOODSTANDING_LOG_LEVEL": "error",
                }
            )
            served.append(one)
            stack.callback(one.end)
        ledgers, watched = await _ledgers(database, users), await _ledgers(database, 20)
        await asyncio.gather(*(one.start() for one in served))
        lot = Fleet(database, valkey, served, cables, ledgers, watched, random.Random(seed))  # noqa: S311 - repeatable
        await lot.agree()
        yield lot


@asynccontextmanager
async def under_load(lot: Fleet, *, writers: int = 2, readers: int = 2) -> AsyncIterator[None]:
    """Let the fleet be written and read until the block ends."""
    async with background() as spawn:
        writing = [spawn(lot.write(lot.ledgers[number::writers])) for number in range(writers)]
        writing.append(spawn(lot.watch(lot.watched)))
        for served in lot.served:
            for _ in range(readers):
                spawn(lot.read(served))
        yield
        # Not cancelled: what becomes of a commit that nobody waits for is not known.
        lot.stopping = True
        await asyncio.wait(writing, timeout=SECONDS)


async def _ledgers(database: Database, users: int) -> list[Ledger]:
    async with database.owner() as connection:
        rows = await connection.fetch(_USERS, users)
    return [Ledger(str(row["user1_id"]), row["id"]) for row in rows]


Fault = Callable[[Fleet], Awaitable[None]]
