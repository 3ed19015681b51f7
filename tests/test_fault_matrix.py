"""The matrix of faults, as far as a minute goes, and the proof that its oracle sees what is wrong.

`make faults` runs all of it, `make cancellation` the requests that vanish, `make soak` the hour.
"""

import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import pytest_asyncio

from tests.faults import cancellation, soak
from tests.faults.load import Seen
from tests.faults.matrix import ORDINARY, Row, judge_answers, judge_logs, run
from tests.faults.oracle import Finding, Oracle, Person
from tests.faults.rows import FAULTS
from tests.faults.scene import STAGES, Scene, changed_program, scene
from tests.live import Served

_SEED = secrets.randbelow(2**31)
_RATE = 60.0
_RECOVERY = 10.0
"""Five times what is promised, in seconds: no busy machine excuses more."""
_SLICE = (
    "Redis: kill -9",
    "PostgreSQL: a backend killed",
    "PostgreSQL: disk full for the relay",
    "ours: SIGTERM",
)
_FOUND = ("the answer of ", "stale for ", "500 : not allowed", " after 1.", " dropped it: ", "no answer: hangs")
"""What must be said of the bugs that are planted."""
_BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """Give one scene to all faults here."""
    async with scene(tmp_path_factory.mktemp("scene"), seed=_SEED, rate=_RATE, people=400) as one:
        yield one


@asynccontextmanager
async def _changed(one: Served, monkeypatch: pytest.MonkeyPatch, program: Sequence[str]) -> AsyncIterator[None]:
    """Serve with another program inside the block, and as before after it."""
    with monkeypatch.context() as patch:
        patch.setattr(one, "program", program)
        await one.kill()
        await one.start()
    try:
        yield
    finally:
        await one.kill()
        await one.start()


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", _SLICE)
async def test_a_fault_is_survived(made: Scene, name: str) -> None:
    """Right answers, no older than promised, one log line, a metric; how fast they come, `make faults` judges."""
    row = await run(_BY_NAME[name], made, timed=False)
    found = [*row.wrong, *row.unexplained]
    assert not found, "\n".join([f"seed {_SEED}", *found[:10]])
    assert row.recovered < _RECOVERY


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_clients_that_vanish_leave_nothing_behind(made: Scene) -> None:
    """A third of some thousand requests vanish: nothing is left open or locked, nothing is crossed."""
    outcome = await cancellation.run(made, 3000)
    assert [] == outcome.wrong
    assert outcome.vanished > 500


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("bug", "found"),
    [
        ("lease kept", " leases were not given up"),
        ("connection kept", "process 0 did not run 10 loads"),
        ("stream kept", " open streams"),
    ],
)
async def test_what_is_left_behind_is_found(made: Scene, monkeypatch: pytest.MonkeyPatch, bug: str, found: str) -> None:
    """Every other lease stays, one connection to PostgreSQL, or every other stream: that is found, and nothing else."""
    async with _changed(made.served[0], monkeypatch, changed_program(bug)):
        outcome = await cancellation.run(made, 1500)
    assert outcome.wrong
    assert all(found in line for line in outcome.wrong)


@pytest.mark.slow
async def test_planted_bugs_are_found(tmp_path: Path) -> None:
    """Somebody else's answer, one that no change drops, an error, a delay, none at all, now and then: each is seen."""
    async with scene(tmp_path, seed=_SEED, rate=_RATE, people=400, changed="bugs") as one:
        row = await run(replace(ORDINARY, seconds=2.0), one)
    found = "\n".join((*row.wrong, *row.unexplained, *row.late))
    for words in _FOUND:
        assert words in found


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_a_process_that_drops_what_is_under_way_when_it_is_ended_is_found(
    made: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where SIGTERM ends a process at once, the requests that it had begun are missed, and nothing else is."""
    async with _changed(made.served[0], monkeypatch, changed_program("abrupt")):
        row = await run(_BY_NAME["ours: SIGTERM"], made, timed=False)
    assert any(" dropped it: " in line for line in row.wrong)
    assert all(" dropped it: " in line for line in row.wrong)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_a_wrong_answer_is_not_forgiven_because_the_harness_was_late(
    made: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another attempt would be without the bug, there is none: the row ends with the wrong answer."""
    one = made.served[1]
    programs = iter([changed_program("mixed")])

    @asynccontextmanager
    async def mixed_up_and_late(_scene: Scene) -> AsyncIterator[None]:
        async with _changed(one, monkeypatch, next(programs, one.program)):
            time.sleep(0.5)  # noqa: ASYNC251 - this loop is to be late
            yield

    row = await run(replace(ORDINARY, strike=mixed_up_and_late, seconds=2.0, alone=1, silent=True), made)
    assert row.lag > 0.1
    assert any("the answer of " in line for line in row.wrong)
    assert row.attempts == 1


_CALM_ANSWERS = [
    Seen(-1.0, 0.01, 0, "single", 200, source, retried=False, finding=Finding())
    for source in ("hit", "miss", "request")
    for _ in range(200)
]


def test_no_outage_is_excused_that_nothing_explains() -> None:
    """One 503 is wrong where none is allowed, unless the machine was busy, and then seven of six hundred are."""

    def found(seen: Seen, times: int = 1, **measured: float) -> Row:
        row = Row(ORDINARY)
        for name, value in measured.items():
            setattr(row, name, value)
        judge_answers(row, [*_CALM_ANSWERS, *[seen] * times], 0.0)
        assert row.late or row.wrong
        return row

    refused = replace(_CALM_ANSWERS[0], status=503, source="")
    stale = replace(_CALM_ANSWERS[0], source="stale")
    for outage in (refused, stale):
        assert found(outage).unexplained
        assert not found(outage, lag=0.2).unexplained
        assert not found(outage, pressed=0.9).unexplained
        assert found(outage, 7, lag=0.2).wrong
        assert not found(outage).certain
    assert not found(replace(_CALM_ANSWERS[0], source="bypass")).wrong
    crossed = Finding("the answer of somebody else")
    for source in ("hit", "stale", "bypass"):
        assert found(replace(_CALM_ANSWERS[0], source=source, finding=crossed), lag=0.2).certain
    assert found(replace(_CALM_ANSWERS[0], status=500, source=""), lag=0.2).certain
    assert not found(replace(_CALM_ANSWERS[0], status=0, source="", finding=Finding("hangs")), lag=0.2).certain


def test_a_warning_comes_once() -> None:
    """Whatever it is of, each cause by itself; an error is wrong at once."""

    def wrong(*lines: str) -> list[str]:
        row = Row(ORDINARY)
        judge_logs(row, [Counter(lines)])
        return [*row.wrong, *row.unexplained]

    once = ("warning relay_interrupted OSError", "warning relay_interrupted TimeoutError", "warning http_unbounded")
    assert [] == wrong(*once)
    for line in (*once, "warning jwks_unavailable", "info dependency_back redis"):
        assert [f"process 0 logged 2 times {line}"] == wrong(line, line)
    assert [] == wrong("info relay_leads", "info relay_leads")
    assert ["process 0 logged error relay_failed"] == wrong("error relay_failed")


def test_every_fault_has_a_stage_and_a_name_of_its_own() -> None:
    """A row of the matrix can be chosen by its name, and run."""
    assert len(_BY_NAME) == len(FAULTS)
    assert {fault.stage for fault in FAULTS} <= STAGES.keys()


def test_a_soak_sees_what_grows() -> None:
    """Memory and descriptors that grow a little each minute are found in an hour; what only goes up and down is not."""

    def found(leak_mb: float, leak: float) -> list[str]:
        minutes = range(60)
        samples: list[soak.Sample] = [
            [(80 + minute % 3 + minute * leak_mb, int(30 + minute % 4 + minute * leak))] for minute in minutes
        ]
        return soak.Outcome(samples=samples).findings()

    assert [] == found(0.0, 0.0)
    assert ["process 0 grew from 84.3 to 88.8 MB"] == found(0.15, 0.0)
    assert ["process 0 had 32 file descriptors, and has 42"] == found(0.0, 0.2)


def test_an_hour_of_soak_sees_every_fault() -> None:
    """Each comes once before any comes again: that can be borne without a restart, on the plain stage."""
    names = [fault.name for fault in soak.drawn(60, random.Random(_SEED))]  # noqa: S311 - repeatable
    borne = {fault.name for fault in FAULTS if fault.stage == "plain"} - {"ours: SIGTERM", "ours: kill -9"}
    assert borne == set(names[: len(borne)])
    assert len(names) == 60


def _told(completed: int, no_shows: int, **changed: object) -> dict[str, object]:
    score = max(-5, min(20, completed - no_shows))
    badge = "gold" if score >= 10 else "green" if score >= 0 else "red"
    told = {"score": score, "badge_color": badge, "completed_sessions": completed, "no_shows": no_shows}
    return {**told, "cache_timestamp": "2026-05-01T12:00:00Z", **changed}


def test_the_oracle_knows_what_must_be_told() -> None:
    """What was true within the bound is right; older, newer than ever, somebody else's or miscounted is wrong."""
    nobody = UUID(int=0)
    me = Person("me", nobody, begun=3, committed=[10.0, 20.0], completed=5, no_shows=2)
    other = Person("other", nobody, completed=6, no_shows=2)
    oracle = Oracle([me, other])

    def wrong(answer: dict[str, object] | None, *, bound: float | None = 2.0, asked: float = 21.0) -> str:
        return oracle.judge(me, answer, asked=asked, bound=bound).wrong

    assert not wrong(_told(5 + 16, 2)), "one second old"
    assert not wrong(_told(5 + 32, 2))
    assert not wrong(_told(5 + 48, 2)), "perhaps committed by now"
    assert not wrong(_told(5, 2), bound=None), "marked as stale"
    assert "stale for 11.000 s" in wrong(_told(5, 2))
    assert "stale for 2.500 s" in wrong(_told(5 + 16, 2), asked=22.5)
    assert "more than the 3" in wrong(_told(5 + 64, 2))
    assert "more than the 3" in wrong(_told(5 + 64, 2), bound=None)
    assert "the answer of other" in wrong(_told(6, 2))
    assert "nobody's counts" in wrong(_told(5, 3))
    assert "make" in wrong(_told(5 + 32, 2, badge_color="green"))
    assert "not the five members" in wrong(None)
