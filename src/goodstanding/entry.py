"""What the cache holds about one user, and its one text form: JSON that begins with the contract's five members."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from goodstanding.data import BadgeColor, ReputationData, UserId

_MEMBERS: Final = ("score", "badge_color", "completed_sessions", "no_shows")
_COUNT: Final = rb"(0|[1-9][0-9]{0,17})"
_WRITTEN: Final = re.compile(
    rb'\{(?:"score":(0|-?[1-9][0-9]{0,17}),"badge_color":"(gold|green|red)",'
    rb'"completed_sessions":' + _COUNT + rb',"no_shows":' + _COUNT + rb","
    rb'|"score":null,"badge_color":null,"completed_sessions":null,"no_shows":null,)'
    rb'"cache_timestamp":"([0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}\.[0-9]{6}Z)",'
    rb'"user_id":"([0-9a-f-]{36})","policy":"([0-9a-f]{12})"\}'
)
"""What `encode` writes, and nothing else: no other order, spelling, type or member. Much faster than reading JSON."""


class Rejection(StrEnum):
    """Why a cached text is not served."""

    CORRUPT = "corrupt"
    OTHER_POLICY = "other_policy"
    OTHER_USER = "other_user"


@dataclass(frozen=True, slots=True)
class Entry:
    """A user's reputation as computed at `computed_at`; `data` is None where no such user existed then."""

    data: ReputationData | None
    computed_at: datetime


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one look into the cache showed: an entry that may be served, and whose lease is out, if any."""

    entry: Entry | None
    lease: str | None


@dataclass(frozen=True, slots=True)
class Lives:
    """How long things are kept, in milliseconds."""

    value: int
    unknown: int
    last_good: int
    lease: int


def timestamp(moment: datetime) -> str:
    """Write an aware UTC moment as the contract does: ISO 8601 with six decimals and a Z."""
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def body(data: ReputationData) -> bytes:
    """Write the five members of the contract, in their order."""
    return (
        f'{{"score":{data.score},"badge_color":"{data.badge_color.value}",'
        f'"completed_sessions":{data.completed_sessions},"no_shows":{data.no_shows},'
        f'"cache_timestamp":"{timestamp(data.cache_timestamp)}"}}'
    ).encode()


def encode(entry: Entry, *, user_id: UserId, policy: str) -> bytes:
    """Write an entry: the five members (null where the user is unknown), then whose it is and under which policy."""
    if entry.data is not None:
        head = body(entry.data)[:-1].decode()
    else:
        nulls = "".join(f'"{name}":null,' for name in _MEMBERS)
        head = f'{{{nulls}"cache_timestamp":"{timestamp(entry.computed_at)}"'
    return f'{head},"user_id":"{user_id}","policy":"{policy}"}}'.encode()


def decode(text: bytes, *, user_id: UserId, policy: str) -> Entry | Rejection:
    """Read an entry, strictly: anything that `encode` would not have written for this user and policy is rejected."""
    written = _WRITTEN.fullmatch(text)
    if written is None:
        return Rejection.CORRUPT
    score, badge, completed, no_shows, moment, whose, under = written.groups()
    if under.decode() != policy:
        return Rejection.OTHER_POLICY
    if whose.decode() != user_id:
        return Rejection.OTHER_USER
    try:
        computed_at = datetime.fromisoformat(moment.decode())
    except ValueError:
        return Rejection.CORRUPT
    if score is None:
        return Entry(None, computed_at)
    data = ReputationData(
        score=int(score),
        badge_color=BadgeColor(badge.decode()),
        completed_sessions=int(completed),
        no_shows=int(no_shows),
        cache_timestamp=computed_at,
    )
    return Entry(data, computed_at)
