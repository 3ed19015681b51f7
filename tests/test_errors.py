"""The errors that a caller may see: one status, one stable code and one harmless text each."""

from typing import Final

import pytest

from goodstanding import errors
from goodstanding.errors import GoodstandingError, RateLimitedError, TemporarilyUnavailableError

# What front ends switch on: a change here breaks them.
CONTRACT: Final = {
    "GoodstandingError": (500, "internal_error"),
    "BadRequestError": (400, "bad_request"),
    "UnauthorizedError": (401, "unauthorized"),
    "ForbiddenError": (403, "forbidden"),
    "UserNotFoundError": (404, "user_not_found"),
    "SessionNotFoundError": (404, "session_not_found"),
    "RequestTimeoutError": (408, "request_timeout"),
    "PayloadTooLargeError": (413, "payload_too_large"),
    "UnsupportedMediaTypeError": (415, "unsupported_media_type"),
    "InvalidInputError": (422, "invalid_input"),
    "InvalidUserIdError": (422, "invalid_user_id"),
    "InvalidSessionIdError": (422, "invalid_session_id"),
    "RateLimitedError": (429, "rate_limited"),
    "HeadersTooLargeError": (431, "headers_too_large"),
    "TemporarilyUnavailableError": (503, "temporarily_unavailable"),
    "CacheAwayError": (503, "temporarily_unavailable"),
    "ConfigurationError": (500, "configuration"),
}
ERRORS: Final = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, GoodstandingError)
]


def test_statuses_and_codes_never_change() -> None:
    """Every error has the status and the code that the contract fixes."""
    assert CONTRACT == {error.__name__: (error.status, error.code) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_explains_itself(error: type[GoodstandingError]) -> None:
    """Raised bare, an error has a title and a detail in one plain line; its text is the detail."""
    raised = error()
    assert error.default_detail == raised.detail == str(raised)
    for text in (raised.detail, raised.title):
        assert text.strip() == text
        assert "\n" not in text
        assert text


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_takes_a_detail_of_its_own(error: type[GoodstandingError]) -> None:
    """A detail and a time to come back may be given where the error is raised."""
    raised = error("One line.", retry_after=7)
    assert ("One line.", 7, "One line.") == (raised.detail, raised.retry_after, str(raised))


def test_only_what_passes_by_itself_says_when_to_come_back() -> None:
    """A dependency's absence suggests a second; other errors suggest nothing unless told."""
    assert 1 == TemporarilyUnavailableError().retry_after
    assert RateLimitedError().retry_after is None
