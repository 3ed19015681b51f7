"""The cache's text form: what is written is read back, and nothing else is ever served."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goodstanding.data import BadgeColor, ReputationData
from goodstanding.entry import Entry, Rejection, body, decode, encode, timestamp
from tests.parts import NOON, entry, user

_ME = user(1)
_POLICY = "0123456789ab"
_GOOD = encode(entry(), user_id=_ME, policy=_POLICY)

_moments = st.datetimes(timezones=st.just(UTC))
_numbers = st.integers(-(10**12), 10**12)
_counts = st.integers(0, 10**12)
_known = st.builds(ReputationData, _numbers, st.sampled_from(BadgeColor), _counts, _counts, _moments).map(Entry.of)
_entries = _known | st.builds(Entry, st.none(), _moments)


@given(_entries)
def test_what_is_written_is_read_back(written: Entry) -> None:
    """Every entry survives the round trip, to the microsecond."""
    assert written == decode(encode(written, user_id=_ME, policy=_POLICY), user_id=_ME, policy=_POLICY)


@given(_entries)
def test_the_text_is_json_that_begins_with_the_contracts_five_members(written: Entry) -> None:
    """Somebody with redis-cli reads the same as somebody with a browser."""
    members = json.loads(encode(written, user_id=_ME, policy=_POLICY))
    assert [
        *("score", "badge_color", "completed_sessions", "no_shows", "cache_timestamp"),
        *("user_id", "policy"),
    ] == list(members)
    if written.data is not None:
        assert json.loads(body(written.data)) == dict(list(members.items())[:5])


def test_the_body_is_the_contracts() -> None:
    """Five members, this order, a timestamp in UTC with six decimals."""
    data = ReputationData(7, BadgeColor.GREEN, 8, 1, datetime(2026, 11, 22, 16, 39, 0, 123456, tzinfo=UTC))
    expected = (
        b'{"score":7,"badge_color":"green","completed_sessions":8,"no_shows":1,'
        b'"cache_timestamp":"2026-11-22T16:39:00.123456Z"}'
    )
    assert expected == body(data)
    assert "2026-11-22T16:39:00.000000Z" == timestamp(data.cache_timestamp.replace(microsecond=0))


@given(_entries, st.text(max_size=12))
def test_another_policys_entry_is_never_served(written: Entry, other: str) -> None:
    """A policy reads only what was computed under itself."""
    text = encode(written, user_id=_ME, policy=_POLICY)
    expected = Rejection.OTHER_POLICY if other != _POLICY else written
    assert expected == decode(text, user_id=_ME, policy=other)


@given(_entries, st.integers(2, 1000))
def test_another_users_entry_is_never_served(written: Entry, other: int) -> None:
    """An entry under the wrong key is not its owner's."""
    text = encode(written, user_id=_ME, policy=_POLICY)
    assert Rejection.OTHER_USER == decode(text, user_id=user(other), policy=_POLICY)


@given(st.binary(max_size=300))
def test_random_bytes_are_never_served(text: bytes) -> None:
    """Whatever stands under the key, reading it ends with a rejection."""
    assert isinstance(decode(text, user_id=_ME, policy=_POLICY), Rejection)


@given(st.integers(0, len(_GOOD) - 1), st.integers(0, 255))
def test_one_changed_byte_is_another_entry_or_none(place: int, byte: int) -> None:
    """What is served is always exactly what would have been written."""
    text = _GOOD[:place] + bytes([byte]) + _GOOD[place + 1 :]
    read = decode(text, user_id=_ME, policy=_POLICY)
    assert isinstance(read, Rejection) or text == encode(read, user_id=_ME, policy=_POLICY)


@given(st.integers(0, len(_GOOD) - 1))
def test_a_truncated_entry_is_never_served(length: int) -> None:
    """Half an entry is none."""
    assert Rejection.CORRUPT == decode(_GOOD[:length], user_id=_ME, policy=_POLICY)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["score", "completed_sessions", "no_shows", "badge_color", "cache_timestamp"]), _json)
def test_a_member_of_another_type_is_never_served(name: str, value: object) -> None:
    """Numbers are whole, badges are badges, moments are moments; whatever JSON allows beside that."""
    members = json.loads(_GOOD) | {name: value}
    for text in (json.dumps(members, separators=(",", ":")), json.dumps(members)):
        read = decode(text.encode(errors="surrogatepass"), user_id=_ME, policy=_POLICY)
        if isinstance(read, Entry):
            assert read.data is not None
            assert type(value) is int
            assert name == "score" or value >= 0


@pytest.mark.parametrize(
    "text",
    [
        _GOOD.replace(b'"score":7', b'"score":7.0'),
        _GOOD.replace(b'"score":7', b'"score":1e+16'),
        _GOOD.replace(b'"score":7', b'"score":NaN'),
        _GOOD.replace(b'"score":7', b'"score":Infinity'),
        _GOOD.replace(b'"score":7', b'"score":[]'),
        _GOOD.replace(b'"score":7', b'"score":[7]'),
        _GOOD.replace(b'"score":7', b'"score":true'),
        _GOOD.replace(b'"score":7', b'"score":"7"'),
        _GOOD.replace(b'"score":7', b'"score":07'),
        _GOOD.replace(b'"score":7', b'"score":' + b"9" * 5000),
        _GOOD.replace(b'"no_shows":0', b'"no_shows":-1'),
        _GOOD.replace(b'"no_shows":0', b'"no_shows":{}'),
        _GOOD.replace(b'"no_shows":0', b'"no_shows":null'),
        _GOOD.replace(b'"score":7', b'"score":null'),
        _GOOD.replace(b'"score":7', b'"score":7,"score":7'),
        _GOOD.replace(b'"score":7,', b""),
        _GOOD.replace(b"green", b"purple"),
        _GOOD.replace(b'"green"', b"[]"),
        _GOOD.replace(b'"policy"', b'"admin":true,"policy"'),
        _GOOD.replace(b":7", b": 7"),
        _GOOD.replace(b"000Z", b"000+02:00"),
        _GOOD.replace(b"000Z", b"000"),
        _GOOD.replace(b"Z", b"z"),
        _GOOD.replace(b"2026-05-01", b"2026-13-01"),
        _GOOD.replace(b"2026-05-01", b"2026-02-30"),
        _GOOD.replace(b"2026-05-01", b"0000-05-01"),
        _GOOD + b" ",
        _GOOD + _GOOD,
        b"\xef\xbb\xbf" + _GOOD,
        _GOOD.decode().encode("utf-16"),
        b"",
        b"null",
        b"7",
        b"[]",
        b'"text"',
        b"{}",
        b"[" * 100_000,
        b'{"policy":' * 100_000,
        b'{"policy":"0123456789ab","user_id":' + b"[" * 100_000,
    ],
)
def test_an_entry_that_nobody_wrote_is_never_served(text: bytes) -> None:
    """Corrupt, doubled, extended, respelled or deeply nested: a rejection, and no error."""
    assert _GOOD != text
    assert isinstance(decode(text, user_id=_ME, policy=_POLICY), Rejection)


def test_the_moments_own_zone_does_not_matter() -> None:
    """An entry is written in UTC, so one with another offset was not written by us."""
    elsewhere = NOON.astimezone(timezone(timedelta(hours=2)))
    text = _GOOD.replace(b"2026-05-01T12:00:00.000000Z", elsewhere.isoformat().encode())
    assert Rejection.CORRUPT == decode(text, user_id=_ME, policy=_POLICY)
