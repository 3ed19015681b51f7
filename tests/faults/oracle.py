"""What each answer must tell, and whose it is: no two people's counts are ever alike.

A person's no-shows never change, and completed sessions come sixteen at a time. So an answer's no-shows and the
remainder of its completed sessions tell whose it is, and the rest how many changes it knows of.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from tests.conftest import Database
from tests.live import Ledger

STEP: Final = 16
_NO_SHOWS: Final = 64
MOST: Final = STEP * _NO_SHOWS
_MEMBERS: Final = ["score", "badge_color", "completed_sessions", "no_shows", "cache_timestamp"]
_INSERT: Final = """
with person as (
    select * from unnest($1::uuid[], $2::uuid[], $3::uuid[]) as person (id, other, match)
),
known as (
    insert into public.user_profiles (id) select id from person union all select other from person
)
insert into public.wingman_matches (id, user1_id, user2_id) select match, id, other from person
"""
_SESSIONS: Final = """
insert into public.wingman_sessions
    (match_id, status, user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1)
select person.match, $3::text, $3::text = 'completed', true
from unnest($1::uuid[], $2::integer[]) as person (match, sessions)
cross join lateral generate_series(1, person.sessions)
"""
CHANGE: Final = (
    "insert into public.wingman_sessions (match_id, status, user1_completed_confirmed_by_user2)"
    " select $1, 'completed', true from generate_series(1, $2)"
)
COUNT: Final = "select count(*) from public.wingman_sessions where match_id = $1 and status = 'completed'"


@dataclass(slots=True)
class Person(Ledger):
    """Whose completed sessions are `completed` plus STEP for each change."""

    completed: int = 0
    no_shows: int = 0

    def changes(self, completed: int) -> int:
        """Tell how many changes make so many completed sessions."""
        return (completed - self.completed) // STEP


@dataclass(frozen=True, slots=True)
class Finding:
    """What an answer turned out to be: `wrong` says why it is, `behind` by how much it is stale, in seconds."""

    wrong: str = ""
    behind: float = 0.0


@dataclass(slots=True)
class Oracle:
    """Everybody, and what is known of them."""

    people: Sequence[Person]
    _whose: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._whose.update({(person.no_shows, person.completed): person.user for person in self.people})

    def judge(self, person: Person, answer: Mapping[str, Any] | None, *, asked: float, bound: float | None) -> Finding:
        """Judge the five members of an answer.

        `asked` is when it was asked for, on the clock of whoever writes; `bound` is how stale it may be, in seconds,
        None: whatever was true once may be told.
        """
        if answer is None or list(answer) != _MEMBERS:
            return Finding(f"not the five members: {answer!r}")
        completed, no_shows = int(answer["completed_sessions"]), int(answer["no_shows"])
        if (no_shows, completed % STEP) != (person.no_shows, person.completed):
            whose = self._whose.get((no_shows, completed % STEP))
            return Finding(f"the answer of {whose}" if whose else f"nobody's counts: {completed}, {no_shows}")
        score = max(-5, min(20, completed - no_shows))
        badge = "gold" if score >= 10 else "green" if score >= 0 else "red"
        if (answer["score"], answer["badge_color"]) != (score, badge):
            return Finding(f"{completed} and {no_shows} make {score} and {badge}, not {answer!r}")
        return _compare(person, person.changes(completed), asked, bound)


def _compare(person: Person, changes: int, asked: float, bound: float | None) -> Finding:
    if changes > person.begun:
        return Finding(f"has {changes} changes, more than the {person.begun} that were ever begun")
    known = person.at_least(asked)
    if changes >= known:
        return Finding()
    # The first change that it does not tell of is as old as the answer is stale.
    behind = asked - person.committed[changes]
    late = bound is not None and behind > bound
    return Finding(f"stale for {behind:.3f} s: {changes} of {known} changes" if late else "", behind)


async def populate(database: Database, people: int, rng: random.Random) -> Oracle:
    """Insert so many people (at most MOST), each with counts of their own, and a match with somebody else each."""
    assert people <= MOST
    ids = [[UUID(int=rng.getrandbits(128), version=4) for _ in range(people)] for _ in range(3)]
    users, others, matches = ids
    lot = [
        Person(str(user), match, completed=number % STEP, no_shows=number // STEP)
        for number, (user, match) in enumerate(zip(users, matches, strict=True))
    ]
    async with database.owner() as owner, owner.transaction():
        await owner.execute(_INSERT, users, others, matches)
        await owner.execute(_SESSIONS, matches, [person.completed for person in lot], "completed")
        await owner.execute(_SESSIONS, matches, [person.no_shows for person in lot], "no_show")
    async with database.owner() as owner:
        await owner.execute("select reputation.fold(1000000)")
    return Oracle(lot)
