"""The nouns of the domain: who, how often, and how that looks. No I/O, no framework."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, NewType

from goodstanding.errors import InvalidSessionIdError, InvalidUserIdError

UserId = NewType("UserId", str)
"""A user's UUID in canonical lower-case text: one user, one spelling, one cache key."""

SessionId = NewType("SessionId", str)
"""A session's UUID in canonical lower-case text."""

Clock = Callable[[], datetime]
"""Gives the present moment: aware, UTC. Handed in, so that a test can own the time."""

# Written out: half the time of one that repeats a group and ignores the case.
_is_uuid: Final = re.compile("-".join(f"[0-9a-fA-F]{{{length}}}" for length in (8, 4, 4, 4, 12)), re.ASCII).fullmatch


def parse_user_id(text: str) -> UserId:
    """Read a user id; raises InvalidUserIdError unless it is a hyphenated UUID of ASCII digits, either case.

    Stricter than uuid.UUID, which also takes braces, `urn:uuid:`, missing hyphens and full-width digits.
    """
    if not _is_uuid(text):
        raise InvalidUserIdError
    return UserId(text.lower())


def parse_session_id(text: str) -> SessionId:
    """Read a session id under the same rule as a user id; raises InvalidSessionIdError."""
    if not _is_uuid(text):
        raise InvalidSessionIdError
    return SessionId(text.lower())


class BadgeColor(StrEnum):
    """What a person sees at a glance."""

    GOLD = "gold"
    GREEN = "green"
    RED = "red"


class AtFault(StrEnum):
    """Whom a recorded verdict names as the cause of a no-show or a cancellation."""

    USER1 = "user1"
    USER2 = "user2"
    BOTH = "both"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """How many sessions a user completed and missed; exact, never clamped, never negative."""

    completed: int
    no_shows: int

    def __post_init__(self) -> None:
        """Refuse what no history can hold."""
        if self.completed < 0 or self.no_shows < 0:
            message = "session counts cannot be negative"
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class ReputationData:
    """A user's reputation at one moment: the five members of the HTTP contract.

    `cache_timestamp` is when the value was computed: aware, UTC, microseconds.
    """

    score: int
    badge_color: BadgeColor
    completed_sessions: int
    no_shows: int
    cache_timestamp: datetime

    def __post_init__(self) -> None:
        """Refuse a naive timestamp: it would mean another moment on another machine."""
        if self.cache_timestamp.utcoffset() is None:
            message = "cache_timestamp must be an aware datetime"
            raise ValueError(message)
