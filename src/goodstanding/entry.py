"""What the cache holds about one user, and its one text form: JSON that begins with the contract's five members."""

import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

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

_NEWEST: Final = timedelta(seconds=2)
"""So much younger than the oldest that is believed an entry may be: of now, by a clock that is half a second ahead. One
that seems younger is of before a clock was set back, and of any age."""
_MOMENT: Final = slice(-len('2026-11-22T16:39:00.123456Z"}'), -len('"}'))
"""Where a body tells when it was computed."""
_SEEN: Final = re.compile(rb'":"?(-?[0-9]+|gold|green|red)\b(?=[,"])')


class Rejection(StrEnum):
    """Why a cached text is not served."""

    CORRUPT = "corrupt"
    OTHER_POLICY = "other_policy"
    OTHER_USER = "other_user"


class Entry:
    """A user's reputation as computed at `computed_at`, as it is sent: `body` is None where no such user existed then.

    A process keeps very many of them, packed, and a hit never needs more than the body: whatever else it tells is read
    from it for whoever asks.
    """

    __slots__ = ("_computed_at", "body")

    def __init__(self, body: bytes | None, computed_at: datetime | None = None) -> None:
        self.body = body
        self._computed_at = computed_at

    @classmethod
    def of(cls, data: ReputationData) -> "Entry":
        """Write a reputation that was just computed."""
        return cls(body(data), data.cache_timestamp)

    @classmethod
    def unpack(cls, packed: bytes) -> "Entry":
        """Read what `pack` wrote."""
        return cls(packed) if packed.startswith(b"{") else cls(None, datetime.fromisoformat(packed.decode()))

    def pack(self) -> bytes:
        """Write it as one value: the body, which tells when it was computed, or that moment alone."""
        return timestamp(self.computed_at).encode() if self.body is None else self.body

    @property
    def computed_at(self) -> datetime:
        """When it was computed: an aware UTC moment."""
        if self._computed_at is None:
            self._computed_at = datetime.fromisoformat((self.body or b"")[_MOMENT].decode())
        return self._computed_at

    @property
    def seen(self) -> bytes:
        """What a person sees of it, in one word."""
        return b"unknown" if self.body is None else b"-".join(_SEEN.findall(self.body))

    @property
    def data(self) -> ReputationData | None:
        """The reputation as data."""
        if self.body is None:
            return None
        members = json.loads(self.body)
        members |= {"badge_color": BadgeColor(members["badge_color"]), "cache_timestamp": self.computed_at}
        return ReputationData(**members)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and (self.body, self.computed_at) == (other.body, other.computed_at)

    def __hash__(self) -> int:
        return hash((self.body, self.computed_at))

    def __repr__(self) -> str:
        return f"Entry({self.data!r}, {self.computed_at!r})"


def peeked(packed: bytes, refreshed: bytes) -> bytes | None:
    """Read of what `pack` wrote how it is sent; None where it is due: of a known user, and no younger than `refreshed`.

    Moments are compared as they are written, by `timestamp`.
    """
    if not packed.startswith(b"{"):
        return b"null"
    return packed if packed[_MOMENT] > refreshed else None


class Fetched(NamedTuple):
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


def is_recent(entry: Entry, oldest: datetime | None) -> bool:
    """Tell whether an entry was computed since then; one that seems to come from the future was not."""
    return oldest is None or oldest <= entry.computed_at <= oldest + _NEWEST


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
    if entry.body is not None:
        head = entry.body[:-1]
    else:
        nulls = "".join(f'"{name}":null,' for name in _MEMBERS)
        head = f'{{{nulls}"cache_timestamp":"{timestamp(entry.computed_at)}"'.encode()
    return b'%s,"user_id":"%s","policy":"%s"}' % (head, user_id.encode(), policy.encode())


def decode(text: bytes, *, user_id: UserId, policy: str) -> Entry | Rejection:
    """Read an entry, strictly: anything that `encode` would not have written for this user and policy is rejected."""
    written = _WRITTEN.fullmatch(text)
    if written is None:
        return Rejection.CORRUPT
    score, *_, moment, whose, under = written.groups()
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
    return Entry(text[: written.end(5) + 1] + b"}", computed_at)
