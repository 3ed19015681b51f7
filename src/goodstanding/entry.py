"""What the cache holds about one user, and its one text form: JSON that begins with the contract's five members."""

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from goodstanding.data import BadgeColor, ReputationData, SessionCounts, UserId

_MEMBERS: Final = ("score", "badge_color", "completed_sessions", "no_shows")


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
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if moment.year >= 1000 else moment.isoformat()  # noqa: PLR2004 - %Y pads from there


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
    try:
        value = json.loads(text)
        if value["policy"] != policy:
            return Rejection.OTHER_POLICY
        if value["user_id"] != user_id:
            return Rejection.OTHER_USER
        computed_at = datetime.fromisoformat(value["cache_timestamp"])
        if computed_at.utcoffset() is None:
            return Rejection.CORRUPT
        if value["score"] is None:
            entry = Entry(None, computed_at)
        else:
            counts = SessionCounts(_whole(value["completed_sessions"]), _whole(value["no_shows"]))
            entry = Entry(
                ReputationData(
                    score=_whole(value["score"]),
                    badge_color=BadgeColor(value["badge_color"]),
                    completed_sessions=counts.completed,
                    no_shows=counts.no_shows,
                    cache_timestamp=computed_at,
                ),
                computed_at,
            )
        # Comparing with what would have been written leaves no more to check by hand: order, spelling, extra members.
        if encode(entry, user_id=user_id, policy=policy) != text:
            return Rejection.CORRUPT
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return Rejection.CORRUPT
    return entry


def _whole(number: object) -> int:
    """Give a whole number back; raises TypeError for anything else, such as 7.0, [] or true."""
    if type(number) is not int:
        raise TypeError
    return number
