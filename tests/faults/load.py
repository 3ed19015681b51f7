"""A steady load: requests that are due at a fixed rate, answered or not, and a writer who changes what they ask for."""

import asyncio
import json
import random
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import asyncpg

from goodstanding.tasks import Spawn, background
from tests.conftest import connect
from tests.faults.oracle import CHANGE, COUNT, STEP, Finding, Oracle, Person
from tests.live import OUTAGES, PROMISED, Line, Served
from tests.parts import eventually
from tests.serving import BATCH, INVALIDATE, SINGLE, token
from tests.streaming import STREAM

_CALLERS: Final = 20
_HOT: Final = 20
_WARM: Final = 200
_A_BATCH: Final = 10
_A_STREAM: Final = 3
_NEVER: Final = 4_000_000_000
_UNKNOWN: Final = 50
_MOST_LINES: Final = 100
"""Connections to one process; who cannot be served by it asks another one."""
_GIVE_UP_SECONDS: Final = 20.0
_MOST_ATTEMPTS: Final = 4
_RESET_SECONDS: Final = 0.05
_CLOSED: Final = 7
"""TCP_CLOSE of Linux: what a connection is that was reset."""
_KINDS: Final = {"single": 84, "past the cache": 4, "batch": 8, "unknown": 4}
_OF_ANY_KIND: Final = {"read": 88, "stream": 8, "invalidation": 4}
_TIERS: Final = (50, 30, 20)
"""How often the hot, the warm and the cold are asked for."""
_SOURCES: Final = {
    "hit": "hit",
    "fwd=miss": "miss",
    "fwd=request": "request",
    "fwd=bypass": "bypass",
}


class NotReadError(ConnectionError):
    """The server has not read the request, and will not: it can be sent again, whatever it was."""


@dataclass(slots=True, eq=False)
class Asked:
    """A request under way, since a moment of the event loop's clock."""

    moment: float
    kind: str
    process: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of one request. Times in seconds of the event loop's clock; status 0: no answer at all."""

    asked: float
    seconds: float
    process: int
    kind: str
    status: int
    source: str
    retried: bool
    finding: Finding

    @property
    def old(self) -> bool:
        """Whether it may be from before an outage, and says so: a batch by its timestamps."""
        return self.source in {"stale", "old batch"}

    @property
    def whole(self) -> bool:
        """Whether it was answered as it is on any ordinary day."""
        return self.status in {200, 404} and self.source not in {"bypass", "stale"}


@dataclass(slots=True)
class Load:
    """Asks every process that is served, in turn, and judges what they say."""

    oracle: Oracle
    served: Sequence[Served]
    rng: random.Random
    rate: float = 250.0
    """Requests a second; 0: only what others ask by `one`."""
    bound: float = PROMISED
    """How stale an answer may be that is not marked so, in seconds."""
    stale_allowed: frozenset[int] = frozenset()
    """Processes that may answer as before an outage; single answers are marked, in a batch they have an old timestamp.
    """
    writing: bool = True
    seen: list[Seen] = field(default_factory=list)
    under_way: set[Asked] = field(default_factory=set)
    lag: float = 0.0
    """How late this process's own loop was at most, in seconds: its measurements are no better."""
    _spawn: Spawn | None = None
    _idle: list[deque[tuple[AsyncExitStack, Line]]] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)
    _heads: list[str] = field(default_factory=list)
    _unknown: list[str] = field(default_factory=list)
    _turn: int = 0

    def __post_init__(self) -> None:
        self._idle = [deque() for _ in self.served]
        self._open = [0 for _ in self.served]
        self._heads = [_head(token(exp=_NEVER)) for _ in range(_CALLERS)]
        self._unknown = [str(UUID(int=self.rng.getrandbits(128), version=4)) for _ in range(_UNKNOWN)]

    @property
    def now(self) -> float:
        """The one clock."""
        return asyncio.get_running_loop().time()

    @asynccontextmanager
    async def running(self, database_url: Callable[[], str]) -> AsyncIterator[None]:
        """Ask and write until the block ends."""
        async with background() as spawn:
            self._spawn = spawn
            writing = spawn(self._write(database_url))
            spawn(self._ask())
            spawn(self._measure_lag())
            yield
            # Not cancelled: what becomes of a commit that nobody waits for is not known.
            self.writing = False
            await asyncio.wait([writing], timeout=_GIVE_UP_SECONDS)
        await self.close_idle()

    async def account(self, began: float, ended: float, *, within: float) -> Sequence[Seen]:
        """Tell of every request of this time what became of it; one without an answer so many seconds later hangs."""

        def left() -> Sequence[Asked]:
            return [one for one in self.under_way if began <= one.moment < ended]

        with suppress(AssertionError):
            await eventually(lambda: not left(), within=within)
        hangs = Finding("hangs")
        hanging = [
            Seen(one.moment, self.now - one.moment, one.process, one.kind, 0, "", retried=False, finding=hangs)
            for one in left()
        ]
        return [*(one for one in self.seen if began <= one.asked < ended), *hanging]

    def connections(self, process: int) -> int:
        """Tell how many connections to a process are kept."""
        return self._open[process]

    async def close_idle(self) -> None:
        """Close the connections over which nothing is asked now."""
        for process, idle in enumerate(self._idle):
            while idle:
                await self._close(process, idle.pop()[0])

    async def _measure_lag(self) -> None:
        while True:
            due = self.now + 0.01
            await asyncio.sleep(0.01)
            self.lag = max(self.lag, self.now - due)

    # Who writes.

    def some(self) -> Person:
        """Choose somebody, hot ones more often."""
        people = self.oracle.people
        tier = self.rng.choices(range(3), _TIERS)[0]
        first, last = ((0, _HOT), (_HOT, _HOT + _WARM), (_HOT + _WARM, len(people)))[tier]
        return people[self.rng.randrange(first, last)]

    async def _write(self, database_url: Callable[[], str]) -> None:
        """Change one person after another, until told to stop; after an outage find out what became of the last."""
        doubtful: tuple[Person, int] | None = None
        while self.writing or doubtful:
            with suppress(*OUTAGES):
                async with connect(database_url()) as connection:
                    if doubtful is not None:
                        await self._find_out(connection, *doubtful)
                        doubtful = None
                    while self.writing:
                        person = self.some()
                        person.begun += 1
                        doubtful = (person, connection.get_server_pid())
                        await connection.execute(CHANGE, person.match, STEP)
                        person.committed.append(self.now)
                        doubtful = None
                        await asyncio.sleep(0.1)
            await asyncio.sleep(0.05)

    async def _find_out(self, connection: "asyncpg.Connection[asyncpg.Record]", person: Person, pid: int) -> None:
        if await connection.fetchval("select exists (select from pg_stat_activity where pid = $1)", pid):
            raise ConnectionError
        count: int = await connection.fetchval(COUNT, person.match)
        person.begun = (count - person.completed) // STEP
        person.committed += [self.now] * (person.begun - len(person.committed))

    # Who asks.

    async def _ask(self) -> None:
        assert self._spawn is not None
        due = self.now
        while True:
            if not self.rate:
                await asyncio.sleep(0.05)
                due = self.now
                continue
            due = max(due + 1 / self.rate, self.now - 0.1)
            await asyncio.sleep(due - self.now)
            self._spawn(self.one())

    def request(self) -> tuple[str, Sequence[Person], bytes]:
        """Make up a request: its kind, whom it is for, its bytes."""
        kind = self.rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        people = self._people(kind)
        return kind, people, self._bytes(kind, people)

    def past_the_cache(self, person: Person) -> bytes:
        """Give the bytes of a request that PostgreSQL must answer."""
        return self._bytes("past the cache", [person])

    def request_of_any_kind(self) -> bytes:
        """Make up the bytes of a request whose answer nobody judges: a read, a stream of some, an invalidation."""
        kind = self.rng.choices(list(_OF_ANY_KIND), list(_OF_ANY_KIND.values()))[0]
        if kind == "read":
            return self.request()[2]
        if kind == "invalidation":
            head = _head(token("service_role", exp=_NEVER))
            return f"POST {INVALIDATE.format(self.some().user)}{head}Content-Length: 0\r\n\r\n".encode()
        users = "&".join(f"user_id={self.some().user}" for _ in range(_A_STREAM))
        return f"GET {STREAM}?{users}{self.rng.choice(self._heads)}\r\n".encode()

    async def one(self) -> None:
        """Ask once, and judge the answer."""
        kind, people, request = self.request()
        asked = Asked(self.now, kind)
        self.under_way.add(asked)
        try:
            await self._one(asked, people, request)
        finally:
            self.under_way.discard(asked)

    async def _one(self, asked: Asked, people: Sequence[Person], request: bytes) -> None:
        kind, stale_allowed = asked.kind, self.stale_allowed
        self._turn += 1
        first = self._turn
        retried = False
        status, head, body = 0, b"", b""
        failures: list[str] = []
        for attempt in range(_MOST_ATTEMPTS):
            asked.process = self._place(first + attempt)
            retried = attempt > 0
            try:
                async with asyncio.timeout(_GIVE_UP_SECONDS):
                    status, head, body = await self._exchange(asked.process, request)
                break
            except NotReadError as error:
                # As any client does, and a balancer with another process.
                failures.append(f"process {asked.process} did not read it: {error.__cause__!r}")
            except TimeoutError:
                failures.append(f"process {asked.process} said nothing")
                break
            except OSError as error:
                failures.append(f"process {asked.process} dropped it: {error!r} {error.__cause__!r}")
                break
        seconds = self.now - asked.moment
        source = _source(head) if status == 200 and kind in {"single", "past the cache"} else ""
        if kind == "batch" and status == 200 and asked.process in stale_allowed:
            source = "old batch"
        finding = (
            self._judge(kind, people, status, source, body, asked.moment) if status else Finding("; ".join(failures))
        )
        self.seen.append(Seen(asked.moment, seconds, asked.process, kind, status, source, retried, finding))

    def _people(self, kind: str) -> Sequence[Person]:
        if kind == "unknown":
            return []
        if kind == "batch":
            return list({person.user: person for person in (self.some() for _ in range(_A_BATCH))}.values())
        return [self.some()]

    def _bytes(self, kind: str, people: Sequence[Person]) -> bytes:
        head = self.rng.choice(self._heads)
        if kind == "batch":
            body = json.dumps({"user_ids": [person.user for person in people]})
            return (
                f"POST {BATCH}{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            ).encode()
        who = people[0].user if people else self.rng.choice(self._unknown)
        query = "?use_cache=false" if kind == "past the cache" else ""
        return f"GET {SINGLE.format(who)}{query}{head}\r\n".encode()

    def _place(self, wanted: int) -> int:
        """Choose a process, another one where all connections to it are in use."""
        wanted %= len(self.served)
        if not self._idle[wanted] and self._open[wanted] >= _MOST_LINES:
            return min(range(len(self.served)), key=lambda process: self._open[process] - len(self._idle[process]))
        return wanted

    async def _exchange(self, process: int, request: bytes) -> tuple[int, bytes, bytes]:
        idle = self._idle[process]
        stack, line = idle.pop() if idle else (None, None)
        while line is not None and stack is not None and line.reader.at_eof():
            # The server has closed it: it was idle for long.
            await self._close(process, stack)
            stack, line = idle.pop() if idle else (None, None)
        kept = line is not None
        if line is None or stack is None:
            self._open[process] += 1
            stack = AsyncExitStack()
            try:
                line = await stack.enter_async_context(Line.to(self.served[process].port))
            except BaseException as error:
                self._open[process] -= 1
                if isinstance(error, ConnectionError):
                    raise NotReadError from error
                raise
        whole = False
        try:
            answer = await line.ask(request)
            whole = b"\r\nconnection: close" not in answer[1].lower()
        except ConnectionError as error:
            # Of a new connection no client could tell whether it had been idle.
            if kept and await _is_reset(line, error):
                raise NotReadError from error
            raise
        finally:
            if whole:
                idle.append((stack, line))
            else:
                await self._close(process, stack)
        return answer

    async def _close(self, process: int, stack: AsyncExitStack) -> None:
        self._open[process] -= 1
        await stack.aclose()

    def _judge(
        self, kind: str, people: Sequence[Person], status: int, source: str, body: bytes, asked: float
    ) -> Finding:
        if status not in {200, 404}:
            if status == 503 and json.loads(body).get("code") != "temporarily_unavailable":
                return Finding(f"503 {body!r}")
            return Finding()
        if status == 404 or kind == "unknown":
            return Finding("" if status == 404 and kind == "unknown" else f"{status} {body!r}")
        bound = None if source in {"stale", "old batch"} else self.bound
        told = json.loads(body)
        if kind == "batch" and list(told["reputations"]) != [person.user for person in people]:
            return Finding(f"a batch of others: {body!r}")
        answers = told["reputations"].values() if kind == "batch" else [told]
        findings = [
            self.oracle.judge(person, answer, asked=asked, bound=bound)
            for person, answer in zip(people, answers, strict=True)
        ]
        return max(findings, key=lambda finding: (finding.wrong, finding.behind))


def _head(bearer: str) -> str:
    return f" HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {bearer}\r\n"


def _source(head: bytes) -> str:
    status = head.partition(b"cache-status: goodstanding; ")[2].partition(b"\r\n")[0].decode()
    word, _, life = status.partition("; ttl=")
    return "stale" if life.startswith("-") else _SOURCES.get(word, status)


async def _is_reset(line: Line, error: ConnectionError) -> bool:
    """Tell whether the server closed a connection before it had read what was sent: then its kernel resets it.

    Of a request that was read and dropped nothing but the end of the connection is seen. Elsewhere than on Linux the
    two are not told apart.
    """
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return True
    if sys.platform != "linux":
        return not getattr(error.__cause__, "partial", b"")
    one: socket.socket = line.writer.get_extra_info("socket")
    with suppress(AssertionError):
        await eventually(
            lambda: one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED, within=_RESET_SECONDS
        )
        return True
    return False
