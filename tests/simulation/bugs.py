"""Planted bugs: the product without one of its safeguards. A simulation that does not find them proves nothing."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final
from unittest.mock import patch

from goodstanding import changes
from goodstanding.broadcast import BELIEF_SECONDS, Broadcast, Freshness, beat
from goodstanding.cache import RedisCache, last_good_key, lease_key, value_key
from goodstanding.changes import BEAT_SECONDS, Ledger, RedisPublisher, Relay
from goodstanding.data import UserId
from goodstanding.entry import Entry
from goodstanding.errors import CacheAwayError
from goodstanding.memory import MemoryTier
from goodstanding.reputation_service import _Flight
from goodstanding.tasks import background
from tests.simulation.redis import Redis, Reply


@dataclass(frozen=True, slots=True)
class Bug:
    """What is left out, and the scenario in which that shows soonest."""

    plant: Callable[[], AbstractContextManager[object]]
    scenario: str


def _fill(self: Redis, value: bytes, lease: bytes, good: bytes, _token: bytes, text: bytes, *lives: bytes) -> Reply:
    return self.store(value, lease, good, text, *lives)


async def _invalidate_without_lease(self: RedisCache, user_ids: Sequence[UserId]) -> None:
    await self._in_order(
        [("DEL", value_key(user), last_good_key(user)) for user in user_ids],
        [("PUBLISH", self._channel, " ".join(("changed", *user_ids)))],
    )


async def _publish_first(self: RedisCache, user_ids: Sequence[UserId]) -> None:
    await self.say(" ".join(("changed", *user_ids)))
    await self._send([("DEL", value_key(user), lease_key(user), last_good_key(user)) for user in user_ids])


async def _commit_first(self: Relay, ledger: Ledger) -> bool:
    async with ledger.folding(2000) as folded:
        pass
    if folded.everybody:
        await self._publisher.changed(ledger, None)
    elif folded.users:
        await self._publisher.changed(ledger, folded.users)
    return True


_keep = MemoryTier._keep


def _keep_always(self: MemoryTier, user_id: UserId, entry: Entry, _asked: int) -> None:
    _keep(self, user_id, entry, self._events)


def _lose_and_keep(self: Broadcast) -> None:
    self.freshness.lose()


_lead = Relay._lead


async def _beat_regardless(self: Relay, ledger: Ledger, term: int) -> None:
    async def say() -> None:
        while isinstance(self._publisher, RedisPublisher):
            with suppress(CacheAwayError):
                await self._publisher._cache.say_vouched(beat(term, self._monotonic()))
            await asyncio.sleep(BEAT_SECONDS)

    async with background() as spawn:
        spawn(say())
        await _lead(self, ledger, term)


def _believe_any_term(self: Freshness, _term: int, looked: float) -> None:
    now = self.monotonic()
    measured = self._ahead < float("inf")
    self._ahead = min(self._ahead, now - looked)
    if measured:
        self._until = looked + self._ahead + BELIEF_SECONDS


def _believe_late(self: Freshness, term: int, _looked: float) -> None:
    self.lead(term)
    if term == self._term:
        self._until = self.monotonic() + BELIEF_SECONDS


_beat = Freshness.beat


def _believe_first(self: Freshness, term: int, looked: float) -> None:
    self.lead(term)
    if term == self._term and self._ahead == float("inf"):
        _beat(self, term, looked)
    _beat(self, term, looked)


def _answer_for_ever(self: Freshness, _asked: float) -> None:
    self._answered = float("inf")


@contextmanager
def _and_without_answers(plant: AbstractContextManager[object]) -> Iterator[None]:
    """Leave out two safeguards, either of which covers nearly all that the other one does."""
    with plant, patch.object(Freshness, "answer", _answer_for_ever):
        yield


async def _say_unvouched(self: RedisCache, message: str) -> None:
    await self.say(message)


def _join_any(_self: _Flight, _user_id: UserId, *, begin: int, lease: str | None) -> bool:  # noqa: ARG001 - as the product's
    return True


BUGS: Final[dict[str, Bug]] = {
    "a fill asks for no token": Bug(lambda: patch.object(Redis, "fill", _fill), "calm"),
    "an invalidation leaves the lease": Bug(
        lambda: patch.object(RedisCache, "invalidate", _invalidate_without_lease), "calm"
    ),
    "published before it is dropped": Bug(lambda: patch.object(RedisCache, "invalidate", _publish_first), "calm"),
    "committed before it is dropped": Bug(lambda: patch.object(Relay, "_fold", _commit_first), "kills"),
    "memory keeps what was evicted meanwhile": Bug(lambda: patch.object(MemoryTier, "_keep", _keep_always), "calm"),
    "memory is not emptied when nothing is heard": Bug(
        lambda: patch.object(Broadcast, "lose", _lose_and_keep), "network"
    ),
    "a beat while changes wait": Bug(lambda: patch.object(Relay, "_lead", _beat_regardless), "postgres"),
    "a replaced relay is believed": Bug(lambda: patch.object(Freshness, "beat", _believe_any_term), "freezes"),
    "a late beat is believed for long": Bug(lambda: patch.object(Freshness, "beat", _believe_late), "a lone relay"),
    "a first beat is believed": Bug(
        lambda: _and_without_answers(patch.object(Freshness, "beat", _believe_first)), "a lone relay"
    ),
    "a look that is long past is spoken of": Bug(
        lambda: _and_without_answers(patch.object(changes, "_LATE_SECONDS", 1e9)), "postgres"
    ),
    "a rewound Redis is believed": Bug(lambda: patch.object(RedisCache, "say_vouched", _say_unvouched), "redis"),
    "a read joins any load": Bug(lambda: patch.object(_Flight, "serves", _join_any), "calm"),
}
"""By name; each is planted by a context manager, inside `simulated`."""
