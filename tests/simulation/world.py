"""Virtual time, processes and connections. One seeded generator decides what happens when, and nothing else does.

A process is asyncio's own event loop without a clock and without sockets: the world gives it both. What happens between
two events of the world takes no time, so a run costs what its callbacks cost, and every run of a seed is the same.
"""

import asyncio
import contextlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, Final, Protocol

_BIRTH: Final = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
_MOST_EVENTS: Final = 1_000_000
_RESOLUTION: Final = 1e-9


class World:
    """The queue of everything that will happen; times are in virtual seconds since the beginning."""

    def __init__(self, seed: int, *, traced: bool = False) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.now = 0.0
        self.violations: list[str] = []
        self.events = 0
        self.happened: Callable[[str], None] = _nothing
        """Called by the servers with what they do, before they have done it."""
        self._lines: list[str] | None = [] if traced else None
        self._queue: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = count()
        self._closed = False

    @property
    def traced(self) -> bool:
        """Whether anybody will read what is noted."""
        return self._lines is not None

    @property
    def trace(self) -> str:
        """What happened, a line each."""
        return "\n".join(self._lines or ())

    def note(self, who: str, what: str) -> None:
        """Write a line of the trace, if there is one."""
        if self._lines is not None and not self._closed:
            self._lines.append(f"{self.now:10.6f}  {who:<9} {what}")

    def violated(self, who: str, what: str) -> None:
        """Note that a promise was broken."""
        if not self._closed:
            self.note(who, f"VIOLATION: {what}")
            self.violations.append(f"{self.now:.6f} {who}: {what}")

    def close(self) -> None:
        """Note nothing from now on: what still runs is only to come to its end."""
        self._closed = True
        self.violations = []

    def at(self, when: float, call: Callable[..., object], *args: object) -> None:
        """Let something happen at a moment, or now if that has passed; what was said first happens first."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._numbers), call, args))

    def after(self, delay: float, call: Callable[..., object], *args: object) -> None:
        """Let something happen so many seconds later."""
        heapq.heappush(self._queue, (self.now + delay, next(self._numbers), call, args))

    def run(self, until: float) -> None:
        """Let everything happen up to a moment, or up to the first broken promise."""
        queue = self._queue
        while queue and queue[0][0] <= until and not self.violations:
            self.now, _, call, args = heapq.heappop(queue)
            self.events += 1
            call(*args)
            if self.events > _MOST_EVENTS:
                self.violated("world", "it never comes to rest")
        self.now = max(self.now, until)


@dataclass(slots=True)
class Route:
    """The way from a process to a server; `delays` are the seconds that a message may take, each as likely.

    What is under way during a cut arrives when it ends.
    """

    world: World
    delays: tuple[float, ...]
    cut_until: float = 0.0
    slow_until: float = 0.0
    slow: float = 0.0
    links: "set[Link]" = field(default_factory=set)

    def delay(self) -> float:
        """Draw how long a message takes."""
        rng = self.world.rng
        if self.world.now < self.slow_until:
            return rng.random() * self.slow
        return self.delays[int(rng.random() * len(self.delays))]

    def reset(self) -> None:
        """Break every connection that goes this way; both ends are told."""
        for link in sorted(self.links, key=lambda link: link.number):
            link.reset()


class _Way:
    """One direction of a connection: what is sent first arrives first."""

    __slots__ = ("_arrivals", "_last", "_route", "_world")

    def __init__(self, route: Route) -> None:
        self._route = route
        self._world = route.world
        self._arrivals: deque[tuple[float, Callable[..., object], tuple[Any, ...]]] = deque()
        self._last = 0.0

    def send(self, call: Callable[..., object], *args: object) -> None:
        """Let something happen at the other end."""
        self._last = max(self._last, self._world.now + self._route.delay())
        self._arrivals.append((self._last, call, args))
        if len(self._arrivals) == 1:
            self._world.at(self._last, self._arrive)

    def lose(self) -> None:
        """Lose what has not arrived, if a generator says so."""
        if self._arrivals and self._world.rng.random() < 0.5:
            # The first is in the world's queue already: it arrives and does nothing.
            self._arrivals = deque((when, _nothing, ()) for when, _, _ in list(self._arrivals)[:1])

    def _arrive(self) -> None:
        if self._world.now < self._route.cut_until:
            self._world.at(self._route.cut_until, self._arrive)
            return
        _, call, args = self._arrivals.popleft()
        if self._arrivals:
            self._world.at(self._arrivals[0][0], self._arrive)
        call(*args)


class Peer(Protocol):
    """The server's end of a connection."""

    def gone(self) -> None:
        """Note that the connection has ended."""
        ...


class Server(Protocol):
    """Whatever processes connect to."""

    def accept(self, link: "Link", answer: "Callable[[Peer | OSError], None]") -> None:
        """Take a connection, or refuse it, and say so when that is done."""
        ...


class Link:
    """One connection of a process to a server: `up` leads to the server, `down` to the process."""

    _numbers = count()

    def __init__(self, process: "Process", route: Route) -> None:
        self.number = next(self._numbers)
        self.process = process
        self.up = _Way(route)
        self._down = _Way(route)
        self._route = route
        self.peer: Peer | None = None
        self.on_lost: Callable[[], None] = _nothing
        self._open = True
        self._told = False
        route.links.add(self)

    @property
    def is_open(self) -> bool:
        """Whether the process still has it."""
        return self._open

    def down(self, call: Callable[..., object], *args: object) -> None:
        """Let something happen in the process, unless it has closed the connection by then."""
        self._down.send(self.process.deliver, self, call, args)

    def close(self) -> None:
        """End the connection from the process' side; the server hears of it after what was sent before."""
        if self._open:
            self._open = False
            self._route.links.discard(self)
            self.up.send(self._end_peer)

    def lose(self) -> None:
        """End the connection from the server's side; the process hears of it."""
        if not self._told:
            self._told = True
            self.peer = None
            self._down.lose()
            self.down(self._lost)

    def reset(self) -> None:
        """Break the connection; both ends are told, each at once or later."""
        self.up.lose()
        self.up.send(self._end_peer)
        self._down.lose()
        self.down(self._lost)

    def _end_peer(self) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.gone()

    def _lost(self) -> None:
        if self._open:
            self._open = False
            self._route.links.discard(self)
            self.on_lost()


async def connect(process: "Process", route: Route, server: Server) -> Link:
    """Open a connection; raises OSError."""
    if process.cut_off:
        raise ConnectionRefusedError
    link = Link(process, route)
    answered: asyncio.Future[Peer | OSError] = process.create_future()

    def answer(outcome: Peer | OSError) -> None:
        if not isinstance(outcome, OSError):
            link.peer = outcome
        link.down(_resolve, answered, outcome)

    link.on_lost = lambda: _resolve(answered, ConnectionResetError())
    link.up.send(server.accept, link, answer)
    try:
        outcome = await answered
        if isinstance(outcome, OSError):
            raise outcome
    except BaseException:
        link.close()
        raise
    link.on_lost = _nothing
    return link


class Process(asyncio.BaseEventLoop):
    """A process that can be frozen and killed; `skew` seconds is how much its wall clock is wrong."""

    # asyncio's own, of which nothing is public: what is to be called now, and what later.
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, world: World, name: str, *, uptime: float, skew: float, hesitation: float) -> None:
        super().__init__()
        self.world = world
        self.name = name
        self.alive = True
        self.cut_off = False
        self.frozen_until = 0.0
        self._uptime = uptime
        self._skew = timedelta(seconds=skew)
        self._hesitation = hesitation
        self._arrived: list[tuple[Link, Callable[..., object], tuple[Any, ...]]] = []
        self._wakes: set[float] = set()
        """When it will be looked for something to do."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        """Give the seconds since this machine was started."""
        return self.world.now + self._uptime

    def clock(self) -> datetime:
        """Give the moment, as far as this machine knows."""
        return _BIRTH + timedelta(seconds=self.world.now) + self._skew

    def start(self, work: Coroutine[Any, Any, Any], *, name: str | None = None) -> "asyncio.Task[Any]":
        """Begin something in this process, from outside."""
        task: asyncio.Task[Any] = asyncio.Task(work, loop=self, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._wake(self.world.now)
        return task

    @property
    def unfinished(self) -> "set[asyncio.Task[Any]]":
        """What was begun from outside and has not ended."""
        return set(self._tasks)

    def deliver(self, link: Link, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Let something arrive over a connection."""
        if self.alive and link.is_open:
            self._arrived.append((link, call, args))
            self._wake(self.world.now)

    def freeze(self, seconds: float) -> None:
        """Let it do nothing for a while."""
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)

    def _wake(self, when: float) -> None:
        if when not in self._wakes:
            self._wakes.add(when)
            self.world.at(when, self._turn, when)

    def _turn(self, when: float) -> None:
        self._wakes.discard(when)
        if not self.alive:
            return
        if self.world.now < self.frozen_until:
            self._wake(self.frozen_until)
            return
        asyncio._set_running_loop(self)
        try:
            self._run_ready()
        finally:
            asyncio._set_running_loop(None)

    def _run_ready(self) -> None:
        """Do what asyncio's loop does: call what is ready, then what has arrived, then what is due, until nothing is.

        Nothing of what a call makes ready is called in the same round.
        """
        world, ready, scheduled = self.world, self._ready, self._scheduled
        while True:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._run()
            if self._arrived:
                for link, call, args in self._take_arrived():
                    if link.is_open:
                        call(*args)
            now = self.time() + _RESOLUTION
            while scheduled and (scheduled[0]._cancelled or scheduled[0]._when < now):  # type: ignore[attr-defined]
                handle = heapq.heappop(scheduled)
                handle._scheduled = False  # type: ignore[attr-defined]
                if not handle._cancelled:
                    ready.append(handle)
            if not ready:
                break
            if self._hesitation and world.rng.random() < self._hesitation:
                # The machine is busy elsewhere between two callbacks.
                self._wake(world.now + world.rng.random() * 0.005)
                return
        if scheduled:
            self._wake(max(world.now, scheduled[0].when() - self._uptime))

    def _take_arrived(self) -> list[tuple[Link, Callable[..., object], tuple[Any, ...]]]:
        """Give what has arrived: in order within a connection, in any order between connections."""
        arrived, self._arrived = self._arrived, []
        if len(arrived) > 1:
            turns: dict[Link, float] = {}
            for link, _, _ in arrived:
                if link not in turns:
                    turns[link] = self.world.rng.random()
            arrived.sort(key=lambda item: turns[item[0]])
        return arrived

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: a cancelled timer is passed over when it is due."""

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.world.violated(self.name, f"unhandled: {context.get('message')}: {context.get('exception')!r}")

    def bury(self) -> None:
        """Forget the process; nothing of it may run any more."""
        self.alive = False
        with contextlib.suppress(RuntimeError):
            self.close()


def _resolve(future: "asyncio.Future[Any]", outcome: object) -> None:
    if not future.done():
        future.set_result(outcome)


def _nothing(*_: object) -> None:
    """Do nothing."""
