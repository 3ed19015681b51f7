"""What is broken and what must hold then, one row each; how a row is run, and what it says."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.faults.load import Seen
from tests.faults.scene import Scene

ANSWERABLE: Final = 0.3
"""Seconds within which anything is answered that can be."""
RECOVERY: Final = 2.0
_CALM: Final = 1.0
"""After the recovery, in seconds: everything is as on any ordinary day."""
_READY: Final = 15.0
HANGS: Final = 5.0
"""A request without an answer so many seconds after the row's end will not get one."""
_STEADY: Final = 0.9
"""Of the requests that were due, so many at least must have been sent, or nothing was under load."""
_EXCUSED: Final = 0.01
"""Of all answers so many at most may be refused or stale for no reason but a busy machine that missed a deadline."""
_LAG: Final = 0.1
"""A measurement by a loop that was so late, in seconds, is repeated."""
_PRESSED: Final = 0.8
"""Where somebody waited for a processor for more of the time, or this loop was late, the machine was busy."""
_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """One row. `strike` breaks something on entering and mends it on leaving; the rest is what must hold.

    `away`: dependencies that every process must say are away, once, in log and metric, and back, once. `flaps`: so
    often, where it strikes again and again. `heals`: it is mended, as far as a client can tell, once it has struck.
    `statuses`: besides 200 and 404. `sources`: besides hit, miss and request.
    `shows`: what must have been seen, or nothing was broken: sources, or statuses.
    `waits`: within so many seconds comes an answer that is not from a cache; hits within ANSWERABLE.
    `meters`: metrics that must have risen. `slows`: so many seconds every answer past the cache takes at least, or
    nothing was broken. `alone`: the process that is itself broken. It alone is excused by all of
    this, hits as well; `silent`: by giving no answer, too. For the other one it is an ordinary day.
    `refuses`: the share of the answers that may be 503.
    `once`: what is broken stays so, and no attempt follows the first.
    """

    name: str
    strike: Callable[[Scene], AbstractAsyncContextManager[None]]
    seconds: float = 4.0
    away: Sequence[str] = ()
    statuses: frozenset[int] = frozenset()
    sources: frozenset[str] = frozenset()
    shows: frozenset[str] = frozenset()
    waits: float = ANSWERABLE
    meters: Sequence[str] = ()
    slows: float = 0.0
    recovery: float = RECOVERY
    alone: int | None = None
    silent: bool = False
    heals: bool = False
    flaps: int = 1
    stage: str = "plain"
    once: bool = False
    refuses: float = 0.0

    def allows(self, process: int) -> "Fault":
        """Give what holds for a process while this lasts."""
        return self if self.alone in {None, process} else ORDINARY


@asynccontextmanager
async def nothing(_scene: Scene) -> AsyncIterator[None]:
    """Break nothing: an ordinary day."""
    yield


ORDINARY: Final = Fault("nothing", nothing)


@dataclass(slots=True)
class Row:
    """What came of a fault."""

    fault: Fault
    answers: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    hit: float = 0.0
    other: float = 0.0
    stalest: float = 0.0
    recovered: float = 0.0
    retried: int = 0
    logged: str = ""
    lag: float = 0.0
    pressed: float = 0.0
    """The share of the time in which somebody on this machine waited for a processor."""
    wrong: list[str] = field(default_factory=list)
    certain: bool = False
    """Whether some of what is wrong is a wrong answer, or an error in a log: nobody's lateness makes or excuses one."""
    unexplained: list[str] = field(default_factory=list)
    """What only a busy machine would explain, and this one was not seen to be busy: run again where times matter."""
    late: list[str] = field(default_factory=list)
    """What a busy machine may be to blame for."""
    attempts: int = 1
    before: Sequence[str] = ()
    """Why it was repeated."""
    broken: bool = False
    """Whether it could not be run to its end, so that nothing can be run after it on the same scene."""

    @property
    def busy(self) -> bool:
        """Whether the machine may have made others miss a deadline."""
        return self.lag > _LAG or self.pressed > _PRESSED

    @property
    def kept(self) -> bool:
        """Whether everything held."""
        return not (self.wrong or self.unexplained or self.late)


async def run(fault: Fault, scene: Scene, *, timed: bool = True) -> Row:
    """Run a fault; again where only times were missed, if they matter, or this process itself did not get to run.

    What came in spite of that, a wrong answer above all, is the row's end: no later attempt takes it back.
    """
    try:
        return await _attempts(fault, scene, timed=timed)
    except Exception as error:  # noqa: BLE001 - told in the row
        return Row(fault, wrong=[f"it could not be run: {error!r}"], broken=True)


async def _attempts(fault: Fault, scene: Scene, *, timed: bool) -> Row:
    row = await _run(fault, scene)
    # Times are missed on a busy machine, and whoever stops this process too leaves nothing to be judged.
    most = 1 if fault.once else _ATTEMPTS
    while not row.kept and not row.certain and row.attempts < most and (row.lag > _LAG if row.wrong else timed):
        before, row = row, await _run(fault, scene)
        row.attempts = before.attempts + 1
        missed = [*before.wrong, *before.unexplained, *before.late]
        row.before = (
            *before.before,
            f"attempt {before.attempts} missed {len(missed)}: {_pressed(before)}: {missed[0]}",
        )
    return row


async def _run(fault: Fault, scene: Scene) -> Row:
    load, row = scene.load, Row(fault)
    await scene.calm()
    load.lag = 0.0
    load.stale_allowed = frozenset(
        process for process in range(len(scene.served)) if "stale" in fault.allows(process).sources
    )
    logged, before, began = scene.logged(), await scene.metrics(), load.now
    load.seen = [one for one in load.seen if one.asked >= began]
    mended = ready = began
    held, pressure = before, _pressure()
    async with fault.strike(scene):
        struck = mended = load.now
        if fault.heals:
            ready = await _ready(row, scene)
        await asyncio.sleep(max(0.0, mended + fault.seconds - load.now))
        if fault.away:
            held = await scene.metrics()
    if not fault.heals:
        mended = load.now
        if fault.alone is not None:
            # PostgreSQL was never away: whoever was itself broken finds it at once.
            load.stale_allowed = frozenset()
        ready = await _ready(row, scene)
    await asyncio.sleep(max(0.0, mended + fault.recovery - load.now))
    load.stale_allowed = frozenset()
    await asyncio.sleep(_CALM)
    ended = load.now
    seen = await load.account(began, ended, within=HANGS)
    row.lag = load.lag
    row.pressed = (_pressure() - pressure) / (load.now - began)
    if len(seen) < _STEADY * load.rate * (ended - began):
        row.late.append(f"{len(seen)} requests in {ended - began:.1f} s are no steady load")
    judge_answers(row, seen, mended)
    _judge_slowness(row, [one for one in seen if struck <= one.asked and one.asked + one.seconds < mended])
    degraded = max((one.asked - mended for one in seen if not one.whole), default=0.0)
    row.recovered = max(ready - mended, degraded)
    if row.recovered > fault.recovery:
        row.late.append(f"recovered after {row.recovered:.2f} s")
    judge_logs(row, scene.said(logged))
    _judge_metrics(row, before, held, await scene.metrics())
    return row


async def _ready(row: Row, scene: Scene) -> float:
    """Give the moment at which every process was ready."""
    try:
        await scene.ready(within=_READY)
    except AssertionError:
        row.wrong.append(f"not every process was ready again {_READY:.0f} s later")
    return scene.load.now


def judge_answers(row: Row, seen: Sequence[Seen], mended: float) -> None:
    """Note in a row what became of each request; it was mended at a moment of the load's clock."""
    row.answers = len(seen)
    row.retried = sum(one.retried for one in seen)
    excused: list[str] = []
    outages = unexplained = 0

    def alone(one: Seen) -> bool:
        return one.process == row.fault.alone

    for one in seen:
        row.outcomes[_outcome(one)] += 1
        what = f"{one.asked - mended:+.3f} s: process {one.process}: {one.kind}: {one.status} {one.source}"
        # Whoever asks later than a recovery may take asks on an ordinary day.
        allowed = row.fault.allows(one.process) if one.asked < mended + row.fault.recovery else ORDINARY
        wrong = _wrong(allowed, one)
        if wrong and not one.finding.wrong and (one.status == 503 or one.source in {"stale", "bypass"}):
            excused.append(f"{what}: {wrong}")
            outages += one.source != "bypass"
            unexplained += one.source != "bypass" and 503 not in row.fault.allows(one.process).statuses
        elif wrong:
            row.wrong.append(f"{what}: {wrong}")
            # One that did not come may be the fault of whoever waited for it too late.
            row.certain |= one.status != 0
        if one.status and one.seconds > (allowed.waits if one.source != "hit" or alone(one) else ANSWERABLE):
            row.late.append(f"{what} after {one.seconds:.3f} s")
    row.stalest = max((one.finding.behind for one in seen if not one.old), default=0.0)
    times = [(one.source == "hit", one.seconds) for one in seen if one.status and not alone(one)]
    row.hit, row.other = (max((seconds for hit, seconds in times if hit is of), default=0.0) for of in (True, False))
    row.late += excused
    # Only a machine that is seen to be busy explains that a second was not enough for PostgreSQL, and not often; where
    # the fault itself refuses, that it goes on to for a moment longer. Of a bypass, 50 ms of any machine are enough.
    many = outages > _EXCUSED * row.answers
    if many or (unexplained and not row.busy):
        told = row.wrong if many else row.unexplained
        told.append(f"{outages} of {row.answers} answers are outages that are not allowed")
    _judge_outcomes(row)


def _judge_slowness(row: Row, seen: Sequence[Seen]) -> None:
    # A miss may share a load that began before it.
    quickest = min((one.seconds for one in seen if one.source == "request"), default=0.0)
    if quickest < row.fault.slows:
        row.wrong.append(f"nothing was broken: an answer past the cache came after {quickest:.3f} s")


def _judge_outcomes(row: Row) -> None:
    if row.outcomes["503"] > max(row.fault.refuses, _EXCUSED) * row.answers:
        row.wrong.append(f"{row.outcomes['503']} of {row.answers} were refused")
    row.wrong += [f"nothing was broken: no {wanted} was seen" for wanted in row.fault.shows - row.outcomes.keys()]
    if not {"hit", "miss", "request"} <= row.outcomes.keys():
        row.wrong.append(f"a load of every kind was wanted: {dict(row.outcomes)}")


def _outcome(one: Seen) -> str:
    if one.status == 200:
        return one.source.removeprefix("old ") or one.kind
    return str(one.status or "no answer")


def _wrong(allowed: Fault, one: Seen) -> str:
    """Tell what is wrong with an answer, if anything is."""
    if one.status == 0:
        return "" if allowed.silent else f"no answer: {one.finding.wrong}"
    if one.finding.wrong:
        return one.finding.wrong
    if one.status not in {200, 404} | allowed.statuses:
        return "not allowed"
    if one.status == 200 and one.source not in {"", "old batch", "hit", "miss", "request"} | allowed.sources:
        return "not allowed"
    return ""


def _pressure() -> float:
    """Give for how many seconds anybody has waited for a processor since the machine began; Linux alone knows."""
    try:
        return int(Path("/proc/pressure/cpu").read_text("ascii").partition("total=")[2].split()[0]) / 1e6
    except OSError:
        return 0.0


def judge_logs(row: Row, said: Sequence[Counter[str]]) -> None:
    """Note in a row what the processes have said that they should not have, and the other way round."""
    told: Counter[str] = Counter()
    for process, lines in enumerate(said):
        for line, times in lines.items():
            level, _, event = line.partition(" ")
            if level in {"error", "critical", "unstructured"}:
                row.wrong.append(f"process {process} logged {line}")
                row.certain = True
            if level == "warning":
                told[event] = max(told[event], times)
            state = level == "warning" or event.startswith(("dependency_back", "rate_limits"))
            if state and times > row.fault.flaps:
                # A deadline that a busy machine misses looks like another outage.
                (row.late if row.busy else row.unexplained).append(f"process {process} logged {times} times {line}")
        for dependency in row.fault.away:
            for line in (f"warning dependency_away {dependency}", f"info dependency_back {dependency}"):
                if not lines[line]:
                    row.wrong.append(f"process {process} did not log {line}")
    row.logged = ", ".join(sorted(event.removeprefix("dependency_") for event in told))


def _judge_metrics(
    row: Row,
    before: Sequence[dict[str, float]],
    held: Sequence[dict[str, float]],
    after: Sequence[dict[str, float]],
) -> None:
    for process, (during, later) in enumerate(zip(held, after, strict=True)):
        for dependency in ("redis", "database", "relay"):
            gauge = f'goodstanding_dependency_up{{dependency="{dependency}"}}'
            if dependency in row.fault.away and not row.fault.heals and during.get(gauge) != 0.0:
                row.wrong.append(f"process {process} did not meter that {dependency} was away")
            if later.get(gauge) != 1.0:
                row.wrong.append(f"process {process} does not meter that {dependency} is back")
    for name in row.fault.meters:
        if sum(one.get(name, 0.0) for one in after) <= sum(one.get(name, 0.0) for one in before):
            row.wrong.append(f"{name} did not rise")


HEAD: Final = (
    "| fault | answers | what they were | hit | other | stalest | back | said | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def _pressed(row: Row) -> str:
    return f"somebody waited for a processor {row.pressed:.0%} of the time, this loop {row.lag * 1000:.0f} ms"


def cells(row: Row) -> str:
    """Write a row of the table; times in milliseconds, `back` in seconds."""
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(row.outcomes.items()))
    again = f", attempt {row.attempts}" if row.attempts > 1 else ""
    if not row.kept:
        again += (
            f", somebody waited for a processor {row.pressed:.0%} of the time, this process {row.lag * 1000:.0f} ms"
        )
    verdict = ("kept" if row.kept else "MISSED") + again
    figures = f"{row.hit * 1000:.0f} | {row.other * 1000:.0f} | {row.stalest * 1000:.0f} | {row.recovered:.2f}"
    return f"| {row.fault.name} | {row.answers} | {outcomes} | {figures} | {row.logged} | {verdict} |"
