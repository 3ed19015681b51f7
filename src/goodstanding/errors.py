"""Everything that can go wrong, once: one base class that carries its HTTP status and its stable code.

`detail` is for people and may be reworded; `code` is for programs and never changes.
Neither ever holds input, SQL or the text of another exception.
"""

from typing import ClassVar


class GoodstandingError(Exception):
    """Base of every error that a caller may see; `retry_after` is in whole seconds."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    default_detail: ClassVar[str] = "The request could not be handled."

    def __init__(self, detail: str | None = None, *, retry_after: int | None = None) -> None:
        self.detail = detail if detail is not None else self.default_detail
        self.retry_after = retry_after
        super().__init__(self.detail)


class BadRequestError(GoodstandingError):
    """The request is not well formed HTTP or JSON."""

    status = 400
    code = "bad_request"
    title = "Bad request"
    default_detail = "The request is malformed."


class UnauthorizedError(GoodstandingError):
    """Nobody is known to be asking: no token, or one that does not hold."""

    status = 401
    code = "unauthorized"
    title = "Unauthorized"
    default_detail = "A valid bearer token is required."


class ForbiddenError(GoodstandingError):
    """The caller is known and may not do this."""

    status = 403
    code = "forbidden"
    title = "Forbidden"
    default_detail = "This call needs another role."


class UserNotFoundError(GoodstandingError):
    """No user has this id."""

    status = 404
    code = "user_not_found"
    title = "User not found"
    default_detail = "No user has this id."


class SessionNotFoundError(GoodstandingError):
    """No session has this id."""

    status = 404
    code = "session_not_found"
    title = "Session not found"
    default_detail = "No session has this id."


class RequestTimeoutError(GoodstandingError):
    """The request did not arrive whole in time."""

    status = 408
    code = "request_timeout"
    title = "Request timeout"
    default_detail = "The request did not arrive in time."


class PayloadTooLargeError(GoodstandingError):
    """The body is longer than this call takes."""

    status = 413
    code = "payload_too_large"
    title = "Payload too large"
    default_detail = "The request body is too large."


class UnsupportedMediaTypeError(GoodstandingError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"
    title = "Unsupported media type"
    default_detail = "The request body must be application/json."


class InvalidInputError(GoodstandingError):
    """A value is well formed and not one this call takes."""

    status = 422
    code = "invalid_input"
    title = "Invalid input"
    default_detail = "The request holds a value that is not accepted."


class InvalidUserIdError(InvalidInputError):
    """The text is not a canonical UUID: 8-4-4-4-12 hexadecimal digits with hyphens, either case."""

    code = "invalid_user_id"
    default_detail = "The user id must be a UUID in its canonical text form."


class InvalidSessionIdError(InvalidInputError):
    """The text is not a canonical UUID."""

    code = "invalid_session_id"
    default_detail = "The session id must be a UUID in its canonical text form."


class RateLimitedError(GoodstandingError):
    """The caller asked too often; `retry_after` says when to come back."""

    status = 429
    code = "rate_limited"
    title = "Too many requests"
    default_detail = "Too many requests. Try again later."


class HeadersTooLargeError(GoodstandingError):
    """The request's head (its target and its headers) is longer than is taken."""

    status = 431
    code = "headers_too_large"
    title = "Request header fields too large"
    default_detail = "The request's headers are too large."


class TemporarilyUnavailableError(GoodstandingError):
    """A dependency cannot answer now; nothing is wrong with the request."""

    status = 503
    code = "temporarily_unavailable"
    title = "Temporarily unavailable"
    default_detail = "The service cannot answer right now. Try again shortly."

    def __init__(self, detail: str | None = None, *, retry_after: int | None = 1) -> None:
        super().__init__(detail, retry_after=retry_after)


class CacheAwayError(TemporarilyUnavailableError):
    """The cache cannot be asked now; the answer must come from elsewhere."""


class ConfigurationError(GoodstandingError):
    """A setting, an option or an installation is wrong; the detail names it in one line."""

    code = "configuration"
    title = "Configuration error"
