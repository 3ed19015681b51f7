"""The nouns: what is an id, what is a count, what is a moment."""

from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goodstanding.data import (
    AtFault,
    BadgeColor,
    ReputationData,
    SessionCounts,
    parse_session_id,
    parse_user_id,
)
from goodstanding.errors import InvalidSessionIdError, InvalidUserIdError

CANONICAL = "0f8fad5b-d9cb-469f-a165-70867728950e"
NOW = datetime(2026, 11, 22, tzinfo=UTC)


@given(st.uuids())
def test_a_canonical_uuid_is_one_user_in_either_case(uuid: UUID) -> None:
    """Upper, lower and mixed case are one id, in lower case; also the nil and the all-ones UUID."""
    text = str(uuid)
    assert text == parse_user_id(text)
    assert text == parse_user_id(text.upper())
    assert text == parse_user_id(text[:18] + text[18:].upper())
    assert text == parse_session_id(text.upper())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        CANONICAL[:-1],
        CANONICAL + "0",
        CANONICAL.replace("-", ""),
        f"{{{CANONICAL}}}",
        f"urn:uuid:{CANONICAL}",
        f" {CANONICAL}",
        f"{CANONICAL}\n",
        f"{CANONICAL}\0",
        CANONICAL.replace("0f", "0g", 1),
        CANONICAL.replace("-", "_"),
        CANONICAL.replace("0", "\uff10"),  # full-width digits, which int() and UUID() take
        CANONICAL.replace("0", "\u0660"),
        CANONICAL.replace("f", "\u017f", 1),
        "0f8fad5bd-9cb-469f-a165-70867728950e",
        "' or 1=1 --",
        "../../etc/passwd",
    ],
)
def test_what_is_no_canonical_uuid_is_refused(text: str) -> None:
    """Only hyphenated hexadecimal digits of ASCII are an id, and the refusal does not repeat the text."""
    for parse, error in ((parse_user_id, InvalidUserIdError), (parse_session_id, InvalidSessionIdError)):
        with pytest.raises(error) as caught:
            parse(text)
        assert error.default_detail == str(caught.value)


@given(st.text())
def test_arbitrary_text_is_an_id_or_an_error_and_nothing_else(text: str) -> None:
    """No text makes the parser fail in another way, and what it accepts is its own canonical form."""
    try:
        accepted = parse_user_id(text)
    except InvalidUserIdError:
        return
    assert str(UUID(text)) == accepted


@pytest.mark.parametrize(("completed", "no_shows"), [(-1, 0), (0, -1), (-1, -1)])
def test_negative_counts_do_not_exist(completed: int, no_shows: int) -> None:
    """No history holds fewer than no sessions."""
    with pytest.raises(ValueError, match="negative"):
        SessionCounts(completed=completed, no_shows=no_shows)


def test_a_moment_without_a_zone_is_refused() -> None:
    """A naive timestamp would mean another moment on another machine; any aware one will do."""
    for zone in (UTC, timezone(timedelta(hours=5, minutes=45))):
        assert ReputationData(0, BadgeColor.GREEN, 0, 0, NOW.astimezone(zone)).cache_timestamp == NOW
    with pytest.raises(ValueError, match="aware"):
        ReputationData(0, BadgeColor.GREEN, 0, 0, NOW.replace(tzinfo=None))


def test_the_nouns_do_not_change() -> None:
    """A count or a reputation that somebody holds is never altered under them, nor given attributes by mistake."""
    counts = SessionCounts(completed=1, no_shows=2)
    with pytest.raises(FrozenInstanceError):
        counts.completed = 5  # type: ignore[misc]  # what is tested
    assert not hasattr(counts, "__dict__")
    assert hash(counts) == hash(SessionCounts(completed=1, no_shows=2))


def test_the_words_of_the_contract() -> None:
    """Badges and verdicts are spelled as clients and the database spell them."""
    assert ["gold", "green", "red"] == [str(badge) for badge in BadgeColor]
    assert ["user1", "user2", "both", "nobody"] == [str(verdict) for verdict in AtFault]
