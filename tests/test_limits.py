"""How often one may ask: what the sliding window admits, what it promises, and what the fleet shares."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Final, cast

import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from goodstanding.errors import RateLimitedError, TemporarilyUnavailableError
from goodstanding.limits import COUNTER_TTL_SECONDS, WINDOW_SECONDS, LimitKind, RateLimiter, SharedCounters
from goodstanding.settings import load_settings

MINUTE: Final = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NUMBER: Final = int(MINUTE.timestamp()) // WINDOW_SECONDS
_SECONDS: Final = 10.0


class Time:
    """A clock that stands still until it is told to move."""

    def __init__(self, now: datetime = MINUTE) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """Give the moment at which the clock stands."""
        return self.now

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


class ValkeyCounters:
    """The fleet's counters in a real server; `away` stands for a connection that is refused."""

    def __init__(self, client: "redis.asyncio.Redis") -> None:
        self.client = client
        self.away = False
        self.calls: list[dict[str, int]] = []

    async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
        """Add in one round trip."""
        if self.away:
            raise TemporarilyUnavailableError
        async with asyncio.timeout(_SECONDS), self.client.pipeline(transaction=False) as pipe:
            for key, count in increments.items():
                pipe.incrby(key, count)
                pipe.pexpire(key, ttl_seconds * 1000)
            answers = await pipe.execute()
        self.calls.append(dict(increments))
        return dict(zip(increments, answers[::2], strict=True))


@pytest.fixture
async def counters(redis_url: str) -> AsyncIterator[ValkeyCounters]:
    """Count in an empty Valkey."""
    client = redis.asyncio.Redis.from_url(redis_url, decode_responses=True)
    async with client:
        yield ValkeyCounters(client)


def limiter(
    limit: int = 10, *, time: Time | None = None, counters: SharedCounters | None = None, max_callers: int = 1000
) -> RateLimiter:
    """Build a limiter for reads."""
    return RateLimiter({LimitKind.READ: limit}, clock=time or Time(), counters=counters, max_callers=max_callers)


def admits(one: RateLimiter, caller: str = "me") -> bool:
    """Ask once."""
    try:
        one.take(caller, LimitKind.READ)
    except RateLimitedError:
        return False
    return True


def admitted(one: RateLimiter, times: int, caller: str = "me") -> int:
    """Ask several times and count the successes."""
    return sum(admits(one, caller) for _ in range(times))


def retry_after(one: RateLimiter, caller: str = "me") -> int:
    """Ask once, in vain, and give the time to come back."""
    with pytest.raises(RateLimitedError) as caught:
        one.take(caller, LimitKind.READ)
    assert caught.value.retry_after is not None
    return caught.value.retry_after


# One process


def test_the_limit_is_admitted_and_not_one_more() -> None:
    """Of many requests in one minute exactly the limit is admitted."""
    assert 10 == admitted(limiter(10), 100)


def test_callers_and_kinds_count_for_themselves() -> None:
    """One caller's requests, or requests of one kind, use up nobody else's."""
    both = RateLimiter({LimitKind.READ: 2, LimitKind.ADMIN: 1}, clock=Time())
    assert 2 == admitted(both, 5, "me")
    assert 2 == admitted(both, 5, "you")
    both.take("me", LimitKind.ADMIN)
    with pytest.raises(RateLimitedError):
        both.take("me", LimitKind.ADMIN)


def test_settings_decide_the_limits() -> None:
    """Both limits come from the settings."""
    settings = load_settings(read_limit_per_minute=3, admin_limit_per_minute=2)
    both = RateLimiter.from_settings(settings, clock=Time(), counters=None)
    assert 3 == admitted(both, 5)
    for _ in range(2):
        both.take("me", LimitKind.ADMIN)
    with pytest.raises(RateLimitedError):
        both.take("me", LimitKind.ADMIN)


def test_the_previous_minute_fades_out() -> None:
    """After a full minute, the next one admits as the old one fades: half of it after half a minute."""
    time = Time()
    one = limiter(10, time=time)
    assert 10 == admitted(one, 20)
    time.move(WINDOW_SECONDS)
    assert 0 == admitted(one, 20)
    time.move(30)
    assert 5 == admitted(one, 20)
    time.move(30)
    assert 5 == admitted(one, 20)
    time.move(2 * WINDOW_SECONDS)
    assert 10 == admitted(one, 20)


def test_a_refused_request_does_not_count() -> None:
    """Asking again and again while refused prolongs nothing."""
    patient, eager = Time(), Time()
    one, other = limiter(5, time=patient), limiter(5, time=eager)
    admitted(one, 5)
    admitted(other, 5)
    wait = retry_after(one)
    patient.move(wait)
    for _ in range(wait):
        admitted(other, 50)
        eager.move(1)
    assert (1, 1) == (admitted(one, 50), admitted(other, 50))


def test_a_refusal_is_counted_by_kind() -> None:
    """The metric tells how many requests were refused."""
    name, labels = "goodstanding_rate_limited_total", {"kind": "read"}
    before = REGISTRY.get_sample_value(name, labels) or 0
    admitted(limiter(1), 4)
    assert before + 3 == REGISTRY.get_sample_value(name, labels)


def test_a_clock_that_is_set_back_harms_nobody() -> None:
    """When the clock goes back, the counts stay and nothing fails."""
    time = Time()
    one = limiter(4, time=time)
    assert 2 == admitted(one, 2)
    time.move(-600)
    assert 2 == admitted(one, 5)
    assert 1 <= retry_after(one) <= 2 * WINDOW_SECONDS


_STEPS: Final = st.lists(
    st.tuples(st.floats(min_value=0, max_value=40, allow_nan=False), st.integers(min_value=1, max_value=12)),
    min_size=1,
    max_size=30,
)


@given(limit=st.integers(min_value=1, max_value=12), offset=st.floats(min_value=0, max_value=59), steps=_STEPS)
def test_what_a_sliding_window_counter_guarantees(limit: int, offset: float, steps: list[tuple[float, int]]) -> None:
    """At most L in a clock minute, less than 2 L in any 60 seconds, and p * (1 - f) + c <= L at every admission."""
    time = Time(MINUTE + timedelta(seconds=offset))
    one = limiter(limit, time=time)
    moments: list[datetime] = []
    for pause, burst in steps:
        time.move(pause)
        moments += [time.now] * admitted(one, burst)
    for moment in moments:
        number, elapsed = divmod((moment - MINUTE) / timedelta(seconds=1), WINDOW_SECONDS)
        minutes = [(other - MINUTE) // timedelta(minutes=1) for other in moments if other <= moment]
        current, previous = minutes.count(int(number)), minutes.count(int(number) - 1)
        assert limit >= current
        assert limit + 1e-6 >= previous * (1 - elapsed / WINDOW_SECONDS) + current
        assert 2 * limit > sum(moment - timedelta(minutes=1) < other <= moment for other in moments)


@given(limit=st.integers(min_value=1, max_value=12), offset=st.floats(min_value=0, max_value=59), steps=_STEPS)
def test_a_refused_caller_who_waits_as_told_is_admitted(
    limit: int, offset: float, steps: list[tuple[float, int]]
) -> None:
    """Retry-After is at least a second, at most two minutes, and true; the second before it is too early."""
    time = Time(MINUTE + timedelta(seconds=offset))
    one = limiter(limit, time=time)
    for pause, burst in steps:
        time.move(pause)
        admitted(one, burst)
    admitted(one, limit)
    wait = retry_after(one)
    assert 1 <= wait <= 2 * WINDOW_SECONDS
    if wait > 1:
        time.move(wait - 1.001)
        assert not admits(one)
        time.move(1.001)
    else:
        time.move(1)
    assert admits(one)


@given(
    limit=st.integers(min_value=1, max_value=8),
    requests=st.lists(st.floats(min_value=0, max_value=20, allow_nan=False), max_size=60),
)
def test_who_stays_below_the_limit_is_never_refused(limit: int, requests: list[float]) -> None:
    """Requests that are spaced so that no two minutes hold more than the limit are all admitted."""
    time = Time()
    one = limiter(limit, time=time)
    for pause in requests:
        time.move(2 * WINDOW_SECONDS / limit + pause)
        assert admits(one)


def test_memory_is_bounded_and_a_flood_pushes_out_itself() -> None:
    """Many new callers cost a fixed number of entries, and a busy caller's count survives them."""
    one = limiter(10, max_callers=100)
    assert 10 == admitted(one, 10, "busy")
    for number in range(5000):
        assert admits(one, f"flood-{number}")
    assert not admits(one, "busy")
    assert 1 == sum(len(callers) <= 100 for callers in one._callers.values())  # noqa: SLF001 - the bound is inside


def test_callers_of_minutes_ago_are_forgotten_first() -> None:
    """A caller whose counts have faded makes room before any whose counts matter."""
    time = Time()
    one = limiter(10, time=time, max_callers=8)
    for number in range(4):
        admitted(one, 9, f"past-{number}")
    time.move(WINDOW_SECONDS)
    admitted(one, 1, "recent")
    time.move(WINDOW_SECONDS)
    for number in range(3):
        admitted(one, 1, f"present-{number}")
    for number in range(4):
        admitted(one, 2, f"new-{number}")
    remembered = set(one._callers[LimitKind.READ])  # noqa: SLF001 - what is forgotten shows in no answer
    expected = {"recent", *(f"present-{number}" for number in range(3)), *(f"new-{number}" for number in range(4))}
    assert expected == remembered


# The fleet


def fleet(size: int, limit: int, time: Time, counters: ValkeyCounters) -> list[RateLimiter]:
    """Build the limiters of several processes that share one clock."""
    return [limiter(limit, time=time, counters=counters) for _ in range(size)]


async def test_the_fleet_agrees_after_a_sync(counters: ValkeyCounters) -> None:
    """Each process admits the limit at most, and none any more once its news came back with the fleet's total."""
    processes = fleet(4, 20, Time(), counters)
    expected = [[15, 15, 15, 15], [5, 0, 0, 0], [0, 0, 0, 0]]
    for counts in expected:
        assert counts == [admitted(one, 15) for one in processes]
        for one in processes:
            await one.sync()


async def test_overshoot_is_what_the_others_admit_between_two_syncs(counters: ValkeyCounters) -> None:
    """A caller spread over the fleet gets the limit and at most what arrives within one interval."""
    time = Time()
    processes = fleet(4, 100, time, counters)
    total, per_interval = 0, 12
    spread = cycle(processes)
    for _ in range(40):
        total += sum(admits(next(spread)) for _ in range(per_interval))
        time.move(0.5)
        for one in processes:
            await one.sync()
    assert 100 <= total <= 100 + per_interval


async def test_a_process_that_meets_a_caller_for_the_first_time_learns_his_past(counters: ValkeyCounters) -> None:
    """A caller who moves on to another process at the turn of the minute takes his counts along."""
    time = Time()
    first, second = fleet(2, 10, time, counters)
    assert 10 == admitted(first, 10)
    await first.sync()
    time.move(WINDOW_SECONDS)
    assert 1 == admitted(second, 1)
    await second.sync()
    assert 0 == admitted(second, 10)
    time.move(30)
    assert 4 == admitted(second, 10)


async def test_what_was_admitted_at_the_end_of_a_minute_is_told_in_the_next(counters: ValkeyCounters) -> None:
    """The last requests of a minute reach the fleet with the first exchange of the next one."""
    time = Time()
    first, second = fleet(2, 10, time, counters)
    assert 1 == admitted(second, 1)
    time.move(WINDOW_SECONDS - 0.1)
    assert 9 == admitted(first, 9)
    time.move(0.2)
    await first.sync()
    time.move(30)
    assert 1 == admitted(second, 1)
    await second.sync()
    assert 5 - 1 >= admitted(second, 10)


async def test_redis_holds_counts_under_a_digest_and_for_a_while(counters: ValkeyCounters) -> None:
    """Keys name the kind, a digest and the minute, never the caller, and expire."""
    one = limiter(10, counters=counters)
    admitted(one, 3, "subject:someone@example.org")
    await one.sync()
    keys = [key async for key in counters.client.scan_iter()]
    assert {"3", "0"} == {await counters.client.get(key) for key in keys}
    for key in keys:
        assert key.startswith("goodstanding:limit:read:")
        assert int(key.rpartition(":")[2]) in {NUMBER, NUMBER - 1}
        assert "someone" not in key
        assert 0 < await counters.client.ttl(key) <= COUNTER_TTL_SECONDS


async def test_only_news_is_told(counters: ValkeyCounters) -> None:
    """An exchange holds what was admitted since the last one; without any there is none."""
    one = limiter(10, counters=counters)
    await one.sync()
    admitted(one, 3)
    await one.sync()
    await one.sync()
    admitted(one, 2)
    await one.sync()
    assert [[3, 0], [2]] == [list(call.values()) for call in counters.calls]


async def test_a_large_exchange_goes_in_pieces(counters: ValkeyCounters) -> None:
    """Hundreds of callers are told in calls of bounded size."""
    one = limiter(10, counters=counters, max_callers=5000)
    for number in range(320):
        admits(one, f"caller-{number}")
    await one.sync()
    assert 640 == sum(len(call) for call in counters.calls)
    assert 100 >= max(len(call) for call in counters.calls)


async def test_while_the_counters_are_away_limits_are_local(counters: ValkeyCounters) -> None:
    """An outage raises nothing, keeps what is known, and ends without anyone being counted twice."""
    time = Time()
    first, second = fleet(2, 20, time, counters)
    with capture_logs() as lines:
        admitted(first, 5)
        await first.sync()
        counters.away = True
        for _ in range(3):
            assert 4 == admitted(first, 4)
            await first.sync()
        assert 3 == admitted(first, 10)
        counters.away = False
        assert 6 == admitted(second, 6)
        await second.sync()
        time.move(WINDOW_SECONDS)
        admitted(first, 1)
        await first.sync()
    events = [line["event"] for line in lines]
    assert ["rate_limits_shared", "rate_limits_local", "rate_limits_shared", "rate_limits_shared"] == events
    totals = [int(await counters.client.get(key) or 0) async for key in counters.client.scan_iter()]
    assert 5 + 6 + 3 == max(totals)


async def test_what_may_have_arrived_is_not_told_again(counters: ValkeyCounters) -> None:
    """An exchange whose answer was lost is not repeated: nobody is refused for requests he did not make."""

    class LosesAnswers(ValkeyCounters):
        async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
            await super().add(increments, ttl_seconds)
            raise TemporarilyUnavailableError

    lossy = LosesAnswers(counters.client)
    one = limiter(10, counters=lossy)
    for _ in range(3):
        admitted(one, 1)
        await one.sync()
    assert [[1, 0], [1], [1]] == [list(call.values()) for call in lossy.calls]
    assert 7 == admitted(one, 20)


async def test_lost_counters_give_no_second_helping(counters: ValkeyCounters) -> None:
    """When the server is flushed, what this process knows still counts."""
    one = limiter(10, counters=counters)
    admitted(one, 6)
    await one.sync()
    await counters.client.flushall()
    admitted(one, 1)
    await one.sync()
    assert 3 == admitted(one, 20)


class _Raises:
    async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
        raise ZeroDivisionError(increments, ttl_seconds)


class _AnswersNonsense:
    async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
        return cast("Mapping[str, int]", {key: ResponseError(str(ttl_seconds)) for key in increments})


@pytest.mark.parametrize("broken", [_Raises(), _AnswersNonsense()])
async def test_a_broken_counter_ends_nothing(broken: SharedCounters) -> None:
    """Whatever the counters raise or answer, limiting goes on."""
    one = limiter(3, counters=broken)
    admitted(one, 1)
    await one.sync()
    assert 2 == admitted(one, 5)


async def test_requests_during_an_exchange_count_once(counters: ValkeyCounters) -> None:
    """What is admitted while an exchange is under way is told with the next one."""

    class Slow(ValkeyCounters):
        async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
            assert 2 == admitted(one, 2)
            return await super().add(increments, ttl_seconds)

    slow = Slow(counters.client)
    one = limiter(10, counters=slow)
    admitted(one, 3)
    await one.sync()
    assert 5 == admitted(one, 20)
    assert [[3, 0]] == [list(call.values()) for call in slow.calls]


@asynccontextmanager
async def running(one: RateLimiter) -> AsyncIterator[None]:
    """Let a limiter compare notes in the background."""
    async with asyncio.timeout(_SECONDS), asyncio.TaskGroup() as group:
        task = group.create_task(one.run(sync_seconds=0.01))
        yield
        task.cancel()


async def until_told(counters: ValkeyCounters, times: int) -> None:
    """Wait until the fleet was told something so many times."""
    async with asyncio.timeout(_SECONDS):
        while len(counters.calls) < times:  # noqa: ASYNC110 - the limiter announces its exchanges to nobody
            await asyncio.sleep(0.005)


async def test_run_compares_notes_until_it_is_cancelled(counters: ValkeyCounters) -> None:
    """Two processes that run learn of each other without being asked."""
    first, second = fleet(2, 10, Time(), counters)
    admitted(first, 6)
    async with running(first):
        await until_told(counters, 1)
        async with running(second):
            assert 1 == admitted(second, 1)
            await until_told(counters, 2)
    await second.sync()
    assert 3 == admitted(second, 20)


async def test_run_ends_also_when_a_library_swallows_its_cancellation() -> None:
    """A cancellation that arrives while the counters are asked ends the background work, whatever they make of it."""
    asked = asyncio.Event()

    class Deaf:
        async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
            asked.set()
            try:
                await asyncio.sleep(ttl_seconds)
            except asyncio.CancelledError:
                return increments
            return {}

    one = limiter(10, counters=Deaf())
    admitted(one, 1)
    async with running(one):
        await asked.wait()


async def test_without_counters_there_is_nothing_to_run() -> None:
    """A limiter that shares nothing ends its background work at once."""
    one = limiter(2)
    async with asyncio.timeout(_SECONDS):
        await one.run()
        await one.sync()
    assert 2 == admitted(one, 5)
