"""Who is watching whom: one read for everybody, only the newest, in order, and bounded."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from goodstanding.data import BadgeColor, ReputationData, UserId
from goodstanding.errors import RateLimitedError, TemporarilyUnavailableError
from goodstanding.main import utc_now
from goodstanding.subscribers import Ending, Subscribers, Subscription, Timing
from goodstanding.tasks import background
from tests.conftest import Database
from tests.parts import NOON, eventually, metric, open_redis, open_service, user

_SOON: Final = Timing(
    heartbeat=60, send=60, stop=0.05, first=10, look=0.01, mistrust=60, renewal=60, retry=0.02, doubt=60, doubt_pause=0
)
_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Answer:
    data: ReputationData | None
    ttl: int = 300


def _data(completed: int, *, at: float = 0.0) -> ReputationData:
    return ReputationData(completed, BadgeColor.GREEN, completed, 0, NOON + timedelta(seconds=at))


@dataclass(slots=True)
class _Reader:
    """Reads from a table, as it is when a read ends; a read can be held up and can fail."""

    values: dict[UserId, ReputationData | None] = field(default_factory=dict)
    past: dict[UserId, ReputationData | None] = field(default_factory=dict)
    """What a read past the cache gives, where it is something else."""
    stale: set[UserId] = field(default_factory=set)
    failing: set[UserId] = field(default_factory=set)
    reads: list[tuple[tuple[UserId, ...], bool]] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False
    busy: int = 0

    def __post_init__(self) -> None:
        self.open.set()

    async def __call__(self, user_ids: Sequence[UserId], *, use_cache: bool = True) -> Mapping[UserId, _Answer]:
        assert 1 <= len(user_ids) <= 100
        assert not self.busy, "one read at a time"
        self.busy += 1
        try:
            self.reads.append((tuple(user_ids), use_cache))
            await asyncio.sleep(0)
            await self.open.wait()
            if self.broken:
                raise ZeroDivisionError
            if not self.failing.isdisjoint(user_ids):
                raise TemporarilyUnavailableError
            table = self.values if use_cache else self.values | self.past
            return {one: _Answer(table.get(one), -1 if one in self.stale else 300) for one in user_ids}
        finally:
            self.busy -= 1


@asynccontextmanager
async def _running(reader: Any, *, timing: Timing = _SOON, **options: Any) -> AsyncIterator[Subscribers]:  # noqa: ANN401 - whatever the constructor takes
    subscribers = Subscribers(reader, timing=timing, **{"clock": utc_now, **options})
    async with background() as spawn:
        spawn(subscribers.run())
        yield subscribers


async def _text(subscription: Subscription) -> str:
    """Take what is sent next, as whoever writes the stream does."""
    async with asyncio.timeout(_SECONDS):
        text = await subscription.written()
    assert text is not None
    subscription.sent()
    return text.decode()


def _events(text: str) -> list[tuple[str, dict[str, Any], str]]:
    """Read kind, data and id of each event."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in lines:
            events.append((lines["event"], json.loads(lines["data"]), lines["id"]))
    return events


async def _scores(subscription: Subscription) -> list[int]:
    return [data["score"] for _, data, _ in _events(await _text(subscription))]


async def _quiet(subscribers: Subscribers) -> None:
    """Wait until nothing is left to read."""
    await eventually(lambda: subscribers._due() == float("inf"))  # noqa: SLF001 - nothing else tells
    await asyncio.sleep(0)


async def test_the_present_values_come_first_in_the_order_asked() -> None:
    """A stream begins with when to come back, and then every user's value, each once, under an id of its own."""
    reader = _Reader({user(1): _data(1), user(2): None, user(3): _data(3)})
    async with _running(reader) as subscribers:
        stream = await subscribers.open([user(3), user(2), user(1), user(3)], caller="a")
        text = await _text(stream)
    assert text.startswith("retry: 2000\n\nevent: reputation\ndata: {")
    events = _events(text)
    assert ["reputation", "user_not_found", "reputation"] == [kind for kind, _, _ in events]
    expected = {
        "user_id": user(3),
        "score": 3,
        "badge_color": "green",
        "completed_sessions": 3,
        "no_shows": 0,
        "cache_timestamp": "2026-05-01T12:00:00.000000Z",
    }
    assert list(expected.items()) == list(events[0][1].items())
    assert {"user_id": user(2)} == events[1][1]
    assert 3 == len({place for _, _, place in events})
    assert [((user(3), user(2), user(1)), True)] == reader.reads


async def test_a_change_reaches_every_stream_of_the_user_and_nobody_else() -> None:
    """Whoever watches the user gets the same event after one read; whoever does not gets nothing."""
    reader = _Reader({user(1): _data(1), user(2): _data(2)})
    async with _running(reader) as subscribers:
        watching = [await subscribers.open([user(1)], caller=str(n)) for n in range(200)]
        other = await subscribers.open([user(2)], caller="other")
        for stream in (*watching, other):
            await _text(stream)
        before = len(reader.reads)
        reader.values[user(1)] = _data(5, at=1)
        subscribers.changed([user(1), user(9)])
        texts = {await _text(stream) for stream in watching}
        assert 1 == len(texts)
        assert [5] == [data["score"] for _, data, _ in _events(texts.pop())]
        assert [((user(1),), True)] == reader.reads[before:]
        await _quiet(subscribers)
        assert not other._pending  # noqa: SLF001 - nothing to send


async def test_changes_during_a_read_are_one_more_read() -> None:
    """However often a user changes while he is read, he is read once more, and the value after the last is sent."""
    reader = _Reader({user(1): _data(1)})
    async with _running(reader) as subscribers:
        stream = await subscribers.open([user(1)], caller="a")
        await _text(stream)
        reader.open.clear()
        subscribers.changed([user(1)])
        await eventually(lambda: reader.busy == 1)
        for number in range(5):
            reader.values[user(1)] = _data(10 + number, at=number)
            subscribers.changed([user(1)])
        reader.open.set()
        await _quiet(subscribers)
        assert 3 == len(reader.reads)
        assert [14] == await _scores(stream)


async def test_whoever_joins_during_a_read_is_read_for_again() -> None:
    """A stream that opens while its user is being read gets a value whose read began afterwards."""
    reader = _Reader({user(1): _data(1)})
    async with _running(reader) as subscribers, background() as spawn:
        await subscribers.open([user(1)], caller="a")
        reader.open.clear()
        subscribers.changed([user(1)])
        await eventually(lambda: reader.busy == 1)
        opened: list[Subscription] = []

        async def join() -> None:
            opened.append(await subscribers.open([user(1)], caller="b"))

        spawn(join())
        await asyncio.sleep(0)
        reader.open.set()
        await eventually(lambda: bool(opened))
        assert 3 == len(reader.reads)


async def test_what_looks_the_same_is_not_sent_again() -> None:
    """A value that was computed later but that nobody could tell from the one before is no event."""
    reader = _Reader({user(1): _data(1)})
    async with _running(reader) as subscribers:
        stream = await subscribers.open([user(1)], caller="a")
        await _text(stream)
        reader.values[user(1)] = _data(1, at=5)
        subscribers.changed([user(1)])
        await eventually(lambda: len(reader.reads) == 2)
        await _quiet(subscribers)
        assert not stream._pending  # noqa: SLF001 - nothing to send
        late = await subscribers.open([user(1)], caller="b")
        assert "2026-05-01T12:00:05.000000Z" in await _text(late)


async def test_a_slow_stream_gets_the_newest_value_alone() -> None:
    """What changed three times before the client read is sent once, as it is now; what changed back is not sent."""
    reader = _Reader({user(1): _data(1), user(2): _data(2)})
    async with _running(reader) as subscribers:
        stream = await subscribers.open([user(1), user(2)], caller="a")
        await _text(stream)
        for number, score in enumerate((3, 4, 5), 1):
            reader.values |= {user(1): _data(score, at=number), user(2): _data(2 + number % 3, at=number)}
            subscribers.changed([user(1), user(2)])
            await _quiet(subscribers)
        assert [5] == await _scores(stream)


async def test_a_user_may_come_and_go() -> None:
    """A user who is made or deleted while he is watched is told of at once, after a read past the cache."""
    reader = _Reader()
    async with _running(reader) as subscribers:
        stream = await subscribers.open([user(1)], caller="a")
        assert ["user_not_found"] == [kind for kind, _, _ in _events(await _text(stream))]
        reader.values[user(1)] = _data(0)
        subscribers.changed([user(1)])
        assert [0] == await _scores(stream)
        reader.values[user(1)] = None
        subscribers.changed([user(1)])
        assert ["user_not_found"] == [kind for kind, _, _ in _events(await _text(stream))]
        assert [True, True, False, True, False] == [cached for _, cached in reader.reads]


class TestOrder:
    """Never an older value after a newer one."""

    async def test_an_older_value_is_read_again_past_the_cache(self) -> None:
        """A cached value that is older than the one shown is not sent; what the database says is."""
        reader = _Reader({user(1): _data(3, at=10)})
        async with _running(reader) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            reader.values[user(1)] = _data(2, at=5)
            reader.past[user(1)] = _data(4, at=11)
            subscribers.changed([user(1)])
            assert [4] == await _scores(stream)
            assert [True, True, False] == [cached for _, cached in reader.reads]

    async def test_an_older_value_of_the_same_look_is_left_alone(self) -> None:
        """An older copy of what is shown is neither sent nor read again."""
        reader = _Reader({user(1): _data(3, at=10)})
        async with _running(reader) as subscribers:
            await subscribers.open([user(1)], caller="a")
            reader.values[user(1)] = _data(3, at=5)
            subscribers.changed([user(1)])
            await eventually(lambda: len(reader.reads) == 2)
            await _quiet(subscribers)
            late = await subscribers.open([user(1)], caller="b")
            assert "12:00:10.000000Z" in await _text(late)
            assert [True, True, True] == [cached for _, cached in reader.reads]

    async def test_a_slow_clock_is_waited_for(self) -> None:
        """A value of the database whose moment is older is read again until its clock has caught up."""
        reader = _Reader({user(1): _data(3, at=10)})
        async with _running(reader) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            reader.values[user(1)] = reader.past[user(1)] = _data(4, at=9)
            subscribers.changed([user(1)])
            await eventually(lambda: len(reader.reads) > 10)
            assert not stream._pending  # noqa: SLF001 - nothing to send
            reader.past[user(1)] = _data(4, at=10)
            assert [4] == await _scores(stream)

    async def test_a_clock_that_is_far_behind_loses_nothing(self) -> None:
        """After a while a value of the database is believed whatever its moment: it was read after the other."""
        reader = _Reader({user(1): _data(3, at=10)})
        timing = Timing(doubt=0.05, doubt_pause=0.005, look=0.01)
        async with _running(reader, timing=timing) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            reader.values[user(1)] = reader.past[user(1)] = _data(4, at=-3600)
            subscribers.changed([user(1)])
            assert [4] == await _scores(stream)

    @pytest.mark.parametrize("seed", range(40))
    async def test_no_stream_ever_goes_back(self, seed: int) -> None:
        """Through a cache that is behind, with failures and changes at any time, nobody sees an older value."""
        storm = _Storm(seed)
        timing = Timing(look=0.01, retry=0.001, doubt_pause=0.0005, doubt=60)
        async with _running(storm.read, timing=timing) as subscribers, background() as spawn:
            for log, watched in storm.watchers:
                spawn(storm.watch(subscribers, watched, log))
            await storm.write(subscribers)
            await eventually(storm.everybody_is_up_to_date)
        for log, watched in storm.watchers:
            for one in watched:
                versions = [score for who, score in log if who == one]
                assert sorted(set(versions)) == versions


class _Storm:
    """Users whose score is their version, and reads that are slow, that fail, and that may find an older version.

    A value's moment is its version: the clocks agree.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a reproducible storm
        self.present = {user(number): 0 for number in range(4)}
        self.cached = dict(self.present)
        self.watchers: list[tuple[list[tuple[str, int]], list[UserId]]] = [
            ([], self.chance.sample([*self.present], self.chance.randint(1, 4))) for _ in range(5)
        ]

    async def pause(self, most: int) -> None:
        """Let the others have some turns."""
        for _ in range(self.chance.randrange(most)):
            await asyncio.sleep(0)

    async def read(self, user_ids: Sequence[UserId], *, use_cache: bool = True) -> Mapping[UserId, _Answer]:
        """Read from the cache or, perhaps, past it."""
        await self.pause(4)
        if self.chance.random() < 0.2:
            raise TemporarilyUnavailableError
        table = self.cached if use_cache and self.chance.random() < 0.7 else self.present
        answers = {one: _Answer(_data(table[one], at=table[one])) for one in user_ids}
        await self.pause(4)
        return answers

    async def watch(self, subscribers: Subscribers, watched: Sequence[UserId], log: list[tuple[str, int]]) -> None:
        """Write down what a stream shows, reading it now and then."""
        stream = None
        while stream is None:
            with suppress(TemporarilyUnavailableError):
                stream = await subscribers.open(watched, caller="x")
        with stream:
            while (text := await stream.written()) is not None:
                stream.sent()
                log += [(data["user_id"], data["score"]) for _, data, _ in _events(text.decode())]
                await self.pause(6)

    async def write(self, subscribers: Subscribers) -> None:
        """Change users, and tell of each change sooner than the cache is up to date, or later."""
        for _ in range(300):
            one = self.chance.choice([*self.present])
            self.present[one] += 1
            await self.pause(2)
            subscribers.changed([one])
            if self.chance.random() < 0.5:
                self.cached[one] = self.present[one]
        self.cached.update(self.present)
        subscribers.changed(None)

    def everybody_is_up_to_date(self) -> bool:
        """Tell whether each stream has shown the last version of each of its users."""
        return all((one, self.present[one]) in log for log, watched in self.watchers for one in watched)


class TestOutages:
    """Nothing is lost while values cannot be had."""

    async def test_what_could_not_be_read_is_read_later(self) -> None:
        """A change during an outage is told when the outage is over, whatever else happens meanwhile."""
        reader = _Reader({user(1): _data(1), user(2): _data(2)})
        async with _running(reader) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            reader.failing.add(user(1))
            reader.values[user(1)] = _data(7, at=1)
            subscribers.changed([user(1)])
            await eventually(lambda: len(reader.reads) > 3)
            reader.failing.clear()
            assert [7] == await _scores(stream)

    async def test_a_failure_is_only_of_those_whom_it_concerns(self) -> None:
        """Of streams that open together only those fail whose own users cannot be had."""
        reader = _Reader({user(1): _data(1), user(2): _data(2)}, failing={user(2)})
        async with _running(reader) as subscribers:
            reader.open.clear()
            watched = ([user(1)], [user(2)], [user(1), user(2)], [user(1)])
            opening = asyncio.gather(
                *(subscribers.open(users, caller=str(place)) for place, users in enumerate(watched)),
                return_exceptions=True,
            )
            await eventually(lambda: reader.busy == 1)
            reader.open.set()
            first, second, third, fourth = await opening
        assert isinstance(first, Subscription)
        assert isinstance(second, TemporarilyUnavailableError)
        assert isinstance(third, TemporarilyUnavailableError)
        assert isinstance(fourth, Subscription)

    async def test_a_copy_of_last_resort_serves_until_there_is_better(self) -> None:
        """A stale value is shown to a new stream, never sent to one that has a value, and asked about again."""
        reader = _Reader({user(1): _data(1)}, stale={user(1)})
        async with _running(reader) as subscribers:
            first = await subscribers.open([user(1)], caller="a")
            assert [1] == await _scores(first)
            await eventually(lambda: len(reader.reads) > 3)
            reader.values[user(1)] = _data(6, at=1)
            asked = len(reader.reads)
            await eventually(lambda: len(reader.reads) > asked + 1)
            assert not first._pending  # noqa: SLF001 - nothing to send
            reader.stale.clear()
            assert [6] == await _scores(first)

    async def test_a_bug_in_a_read_ends_nothing(self) -> None:
        """An error that nobody expected is logged, and the user is read again."""
        reader = _Reader({user(1): _data(1)})
        with capture_logs() as logs:
            async with _running(reader) as subscribers:
                stream = await subscribers.open([user(1)], caller="a")
                await _text(stream)
                reader.broken = True
                reader.values[user(1)] = _data(2, at=1)
                subscribers.changed([user(1)])
                await eventually(lambda: len(reader.reads) > 2)
                reader.broken = False
                assert [2] == await _scores(stream)
        assert {"stream_read_failed"} == {line["event"] for line in logs}

    async def test_first_values_that_do_not_come_are_given_up(self) -> None:
        """A stream whose values are not had in time is refused, and leaves nothing behind."""
        reader = _Reader({user(1): _data(1)})
        reader.open.clear()
        async with _running(reader, timing=Timing(first=0.02)) as subscribers:
            with pytest.raises(TemporarilyUnavailableError):
                await subscribers.open([user(1)], caller="a")
            assert not subscribers._open  # noqa: SLF001 - nothing is left
            assert not subscribers._watched  # noqa: SLF001 - nothing is left
            assert not subscribers._callers  # noqa: SLF001 - nothing is left

    async def test_while_the_broadcast_is_away_everybody_is_read_again(self) -> None:
        """While changes may go unheard, every watched user is read again and again, and once more when it is back."""
        reader = _Reader({user(1): _data(1)})
        fresh = False
        timing = Timing(look=0.005, mistrust=0.01)
        async with _running(reader, timing=timing, fresh=lambda: fresh) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            reader.values[user(1)] = _data(2, at=1)
            assert [2] == await _scores(stream)
            reader.open.clear()
            await eventually(lambda: reader.busy == 1)
            fresh = True
            reads = len(reader.reads)
            reader.open.set()
            await eventually(lambda: len(reader.reads) == reads + 1)
            await _quiet(subscribers)
            assert reads + 1 == len(reader.reads)

    async def test_everybody_is_read_again_now_and_then(self) -> None:
        """Without any news a value that has changed is found after a while."""
        reader = _Reader({user(1): _data(1)})
        async with _running(reader, timing=Timing(look=0.005, renewal=0.02)) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            reader.values[user(1)] = _data(2, at=1)
            assert [2] == await _scores(stream)


class TestResumption:
    """`Last-Event-ID`: the same state has the same id, in any process."""

    async def test_a_client_that_has_everything_gets_nothing(self) -> None:
        """Opened again with the last id, in whatever order of users, another process sends a comment alone."""
        reader = _Reader({user(1): _data(1), user(2): _data(2), user(3): None})
        async with _running(reader) as here, _running(_Reader(dict(reader.values))) as there:
            stream = await here.open([user(1), user(2), user(3)], caller="a")
            last = _events(await _text(stream))[-1][2]
            again = await there.open([user(3), user(1), user(2)], caller="a", last_event_id=last)
            assert "retry: 2000\n\n: nothing has changed\n\n" == await _text(again)

    async def test_ids_go_on_after_a_resumption(self) -> None:
        """What changes after a resumption is sent under the id that any other stream of these users has then."""
        reader = _Reader({user(1): _data(1), user(2): _data(2)})
        async with _running(reader) as subscribers:
            first = await subscribers.open([user(1), user(2)], caller="a")
            last = _events(await _text(first))[-1][2]
            again = await subscribers.open([user(1), user(2)], caller="a", last_event_id=last)
            await _text(again)
            reader.values[user(2)] = _data(9, at=1)
            subscribers.changed([user(2)])
            texts = [await _text(first), await _text(again)]
            assert texts[0] == texts[1]
            third = await subscribers.open([user(1), user(2)], caller="a", last_event_id=_events(texts[0])[-1][2])
            assert ": nothing has changed" in await _text(third)

    @pytest.mark.parametrize("last_event_id", ["", "0", "0000000000000000", "x" * 5000, "the first"])
    async def test_any_other_id_gets_everything(self, last_event_id: str) -> None:
        """An id of another state, of half of this one, or of nothing gets all values."""
        reader = _Reader({user(1): _data(1), user(2): _data(2)})
        async with _running(reader) as subscribers:
            stream = await subscribers.open([user(1), user(2)], caller="a")
            half = _events(await _text(stream))[0][2]
            tried = half if last_event_id == "the first" else last_event_id
            again = await subscribers.open([user(1), user(2)], caller="a", last_event_id=tried)
            assert [1, 2] == await _scores(again)


class TestBounds:
    """How many, how long, how slow."""

    async def test_one_caller_has_only_so_many(self) -> None:
        """A caller's third stream is refused, another caller's is not, and a closed one makes room at once."""
        reader = _Reader()
        before = metric("goodstanding_rate_limited_total", kind="stream")
        async with _running(reader, per_caller=2) as subscribers:
            streams = [await subscribers.open([user(1)], caller="a") for _ in range(2)]
            with pytest.raises(RateLimitedError) as refused:
                await subscribers.open([user(1)], caller="a")
            assert (refused.value.retry_after or 0) >= 1
            await subscribers.open([user(1)], caller="b")
            with streams[0]:
                pass
            await subscribers.open([user(1)], caller="a")
        assert before + 1 == metric("goodstanding_rate_limited_total", kind="stream")

    async def test_one_process_has_only_so_many(self) -> None:
        """A process that is full says when to come back."""
        async with _running(_Reader(), per_process=2) as subscribers:
            streams = [await subscribers.open([user(1)], caller=str(n)) for n in range(2)]
            with pytest.raises(TemporarilyUnavailableError) as refused:
                await subscribers.open([user(1)], caller="c")
            assert (refused.value.retry_after or 0) >= 1
            subscribers.close(streams[0], Ending.GONE)
            subscribers.close(streams[0], Ending.GONE)
            await subscribers.open([user(1)], caller="c")

    async def test_thousands_of_users_are_read_in_batches(self) -> None:
        """Streams that open together are read for together, at most 100 users a read."""
        reader = _Reader({user(n): _data(1) for n in range(500)})
        async with _running(reader) as subscribers:
            reader.open.clear()
            opening = asyncio.gather(
                *(
                    subscribers.open([user(n) for n in range(start, start + 40)], caller=str(start))
                    for start in range(0, 500, 20)
                )
            )
            await eventually(lambda: reader.busy == 1)
            reader.open.set()
            await opening
            assert len(reader.reads) < 15
            reads = len(reader.reads)
            subscribers.changed(None)
            await eventually(lambda: len(reader.reads) >= reads + 6)
            await _quiet(subscribers)

    async def test_a_quiet_stream_beats(self) -> None:
        """After a silence a comment shows that the connection lives."""
        async with _running(_Reader(), timing=Timing(look=0.005, heartbeat=0.02)) as subscribers:
            stream = await subscribers.open([user(1)], caller="a")
            await _text(stream)
            assert ":\n\n" == await _text(stream)
            assert ":\n\n" == await _text(stream)

    @pytest.mark.parametrize(
        ("expires", "timing", "ending"),
        [
            (datetime(1970, 1, 1, tzinfo=UTC), _SOON, Ending.EXPIRED),
            (None, Timing(look=0.005, life=0.01), Ending.AGED),
            (datetime(2970, 1, 1, tzinfo=UTC), Timing(look=0.005, life=0.01), Ending.AGED),
            (None, _SOON, Ending.STOPPED),
            (None, Timing(look=0.005, send=0.01), Ending.SLOW),
        ],
    )
    async def test_streams_end(self, expires: datetime | None, timing: Timing, ending: Ending) -> None:
        """A stream ends with its token, of age, with the server, or for a client that does not read: counted so."""
        before = metric("goodstanding_streams_ended_total", reason=ending.value)
        opened = metric("goodstanding_streams")
        async with _running(_Reader(), timing=timing) as subscribers:
            stream = await subscribers.open([user(1)], caller="a", expires=expires)
            assert opened + 1 == metric("goodstanding_streams")
            with stream:
                await _text(stream)
                if ending is Ending.SLOW:
                    dropped: list[bool] = []
                    stream.drop = lambda: dropped.append(True)
                    stream.sending()
                    await eventually(lambda: bool(dropped))
                if ending is Ending.STOPPED:
                    subscribers.stop()
                async with asyncio.timeout(_SECONDS):
                    assert await stream.written() is None
                milliseconds = int(stream.farewell().split()[1])
                assert 500 <= milliseconds <= 3000
        assert before + 1 == metric("goodstanding_streams_ended_total", reason=ending.value)
        assert opened == metric("goodstanding_streams")

    async def test_streams_of_one_moment_end_at_many(self) -> None:
        """A stream lives for an hour at most, and up to a tenth less."""
        loop = asyncio.get_running_loop()
        async with _running(_Reader(), timing=Timing(), per_caller=50) as subscribers:
            began = loop.time()
            ends = [(await subscribers.open([user(1)], caller="a")).ends[0] for _ in range(50)]
        assert 3240 <= min(ends) - began
        assert max(ends) - loop.time() <= 3600
        assert max(ends) - min(ends) > 100

    async def test_a_stream_ends_when_its_callers_key_does(self) -> None:
        """When the keys are others, whoever they no longer prove is sent away; while they are the same nobody asks."""
        keys: list[object] = [object()]
        asked = 0
        holding = True

        def holds() -> bool:
            nonlocal asked
            asked += 1
            return holding

        revoked = metric("goodstanding_streams_ended_total", reason="revoked")
        async with _running(_Reader(), timing=Timing(look=0.001), keys=lambda: keys[-1]) as subscribers:
            with (
                await subscribers.open([user(1)], caller="a", holds=holds) as one,
                await subscribers.open([user(1)], caller="b") as other,
            ):
                for stream in (one, other):
                    await _text(stream)
                looked = subscribers.now
                await eventually(lambda: subscribers.now > looked)
                assert 0 == asked
                keys.append(object())
                await eventually(lambda: asked == 1)
                holding = False
                keys.append(object())
                async with asyncio.timeout(_SECONDS):
                    assert await one.written() is None
                subscribers.changed([user(1)])
                await _quiet(subscribers)
                other.beat()
                assert ":\n\n" == await _text(other)
        assert revoked + 1 == metric("goodstanding_streams_ended_total", reason="revoked")

    async def test_a_stream_that_nobody_writes_is_forgotten(self) -> None:
        """A place that was taken for a response that never began is free again soon."""
        async with _running(_Reader(), timing=Timing(look=0.005, send=0.02), per_caller=1) as subscribers:
            await subscribers.open([user(1)], caller="a")
            await eventually(lambda: not subscribers._open)  # noqa: SLF001 - nothing else tells
            await subscribers.open([user(1)], caller="a")

    async def test_a_stopping_process_takes_no_more(self) -> None:
        """Once the server stops, new streams are refused, those that wait for their first values too."""
        reader = _Reader()
        reader.open.clear()
        async with _running(reader) as subscribers:
            opening = asyncio.gather(subscribers.open([user(1)], caller="a"), return_exceptions=True)
            await eventually(lambda: reader.busy == 1)
            subscribers.stop()
            assert isinstance((await opening)[0], TemporarilyUnavailableError)
            with pytest.raises(TemporarilyUnavailableError):
                await subscribers.open([user(1)], caller="a")

    async def test_whoever_gives_up_leaves_nothing(self) -> None:
        """A request that is cancelled while it waits for its first values gives its place back."""
        reader = _Reader()
        reader.open.clear()
        async with _running(reader) as subscribers:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await subscribers.open([user(1)], caller="a")
            assert not subscribers._open  # noqa: SLF001 - nothing is left
            reader.open.set()
            await _quiet(subscribers)
            assert not subscribers._watched  # noqa: SLF001 - nothing is left


async def test_a_write_in_the_database_becomes_an_event(database: Database, redis_url: str) -> None:
    """Through the real service: a session is written and invalidated, and the stream shows it; a deletion too."""
    async with (
        open_redis(redis_url) as cache,
        open_service(cache, database.service_url) as service,
        _running(service.read_many) as subscribers,
    ):
        one, other = await database.add_user(), await database.add_user()
        match = await database.add_match(one, other)
        stream = await subscribers.open([one, other], caller="a")
        assert [0, 0] == await _scores(stream)
        before = metric("goodstanding_stream_events_total")
        await database.add_session(match, "completed", a=True, b=True)
        await service.invalidate([one, other])
        subscribers.changed([one, other])
        told: dict[str, int] = {}
        while len(told) < 2:
            told |= {data["user_id"]: data["score"] for _, data, _ in _events(await _text(stream))}
        assert {one: 1, other: 1} == told
        await eventually(lambda: before + 2 == metric("goodstanding_stream_events_total"))
        async with database.owner() as connection:
            await connection.execute("delete from public.user_profiles where id = $1", one)
        await service.invalidate([one, other])
        subscribers.changed([one])
        assert [("user_not_found", {"user_id": one})] == [event[:2] for event in _events(await _text(stream))]
