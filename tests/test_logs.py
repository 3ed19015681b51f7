"""Log lines: one renderer for everything, and nothing in them that is a user's."""

import ast
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import structlog

import goodstanding
from goodstanding import logs
from goodstanding.settings import load_settings

SOURCES: Final = sorted(Path(goodstanding.__file__).parent.glob("*.py"))
LEVELS: Final = frozenset({"debug", "info", "warning", "error", "exception", "critical"})
PERSONAL: Final = frozenset(
    {"token", "authorization", "secret", "password", "sub", "subject", "address", "notes", "venue_name"}
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@contextmanager
def logging_as_before() -> Iterator[None]:
    """Leave the process's logging as it was."""
    root, config = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx2", "httpcore2", "asyncio")
    loggers = [(logger, logger.level, logger.disabled) for logger in map(logging.getLogger, names)]
    try:
        yield
    finally:
        structlog.configure(**config)
        root.handlers[:] = handlers
        root.setLevel(level)
        for logger, its_level, disabled in loggers:
            logger.setLevel(its_level)
            logger.disabled = disabled


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with logging_as_before():
        yield


def configured(stream: io.StringIO | None = None, **settings: object) -> io.StringIO:
    """Configure logging to a stream and give it."""
    stream = stream if stream is not None else io.StringIO()
    logs.configure(load_settings(**settings), stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Read the JSON lines of a stream."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_time_level_event_and_fields() -> None:
    """A line holds the event, its fields, the level and an ISO 8601 time in UTC."""
    stream = configured()
    structlog.get_logger("goodstanding").warning("dependency_away", dependency="redis")
    (line,) = lines(stream)
    assert timedelta(0) == datetime.fromisoformat(line.pop("timestamp")).utcoffset()
    assert {"event": "dependency_away", "dependency": "redis", "level": "warning"} == line


def test_what_is_bound_to_the_request_stands_in_its_lines() -> None:
    """Context variables, such as the request id, are merged into every line."""
    stream = configured()
    with structlog.contextvars.bound_contextvars(request_id="abc"):
        structlog.get_logger("goodstanding").info("one")
        logging.getLogger("uvicorn.error").info("two")
    structlog.get_logger("goodstanding").info("three")
    assert ["abc", "abc", None] == [line.get("request_id") for line in lines(stream)]


def test_the_standard_library_s_lines_look_the_same() -> None:
    """Lines of uvicorn and other libraries come out of the same renderer."""
    stream = configured()
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    (line,) = lines(stream)
    assert {"event", "level", "timestamp"} == line.keys()
    assert ("Started server process [7]", "info") == (line["event"], line["level"])


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_a_setting(level: str, expected: int) -> None:
    """Lines below GOODSTANDING_LOG_LEVEL are not written, whoever writes them."""
    stream = configured(log_level=level)
    ours, theirs = structlog.get_logger("goodstanding"), logging.getLogger("some.library")
    for log in (ours, theirs):
        log.debug("one")
        log.info("two")
        log.warning("three")
        log.error("four")
    assert 2 * expected == len(lines(stream))


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_a_terminal_gets_readable_lines(log_format: str, stream: io.StringIO, *, is_json: bool) -> None:
    """`auto` is readable on a terminal and JSON everywhere else; the setting may insist on either."""
    configured(stream, log_format=log_format)
    structlog.get_logger("goodstanding").info("something_happened", count=3)
    assert is_json == stream.getvalue().startswith("{")
    assert "something_happened" in stream.getvalue()


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output stays free for what a command prints."""
    logs.configure(load_settings(log_format="json"))
    structlog.get_logger("goodstanding").info("started")
    captured = capsys.readouterr()
    assert ("", "started") == (captured.out, json.loads(captured.err)["event"])


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_exception_tells_where_and_what_but_not_its_message(log_format: str) -> None:
    """A traceback shows files, lines and types; no message and no local variable, for they may be a user's."""
    stream = configured(log_format=log_format)
    token = "local-variable-with-a-token"
    try:
        try:
            int(token)
        except ValueError as error:
            group = ExceptionGroup("message-with-a-note", [LookupError("message-with-a-venue")])
            raise group from error
    except ExceptionGroup:
        structlog.get_logger("goodstanding").exception("request_failed", route="/")
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    text = stream.getvalue()
    for expected in ("request_failed", "Exception in ASGI application", "test_logs.py"):
        assert expected in text
    for kind in ("builtins.ExceptionGroup", "builtins.ValueError", "builtins.LookupError"):
        assert 2 == text.count(kind)
    for personal in (token, "message-with-a-note", "message-with-a-venue"):
        assert personal not in text


def test_libraries_that_name_addresses_are_quiet() -> None:
    """Neither uvicorn's access lines nor the HTTP client's request lines are written."""
    stream = configured(log_level="debug")
    logging.getLogger("uvicorn.access").info('192.0.2.1 - "GET /api/user/reputation/someone"')
    logging.getLogger("httpx2").info("HTTP Request: GET https://project.example/jwks.json")
    assert [] == lines(stream)


def test_configuring_again_replaces_what_was() -> None:
    """Each line is written once, however often logging was configured."""
    first = configured()
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(first))
    second = configured()
    logging.getLogger("uvicorn.error").warning("once")
    assert ("", 1) == (first.getvalue(), len(lines(second)))


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="_log" | "log" | "logger"), attr=level)):
                    if level in LEVELS:
                        yield f"{source.name}:{node.lineno}", node


def test_every_event_is_a_constant_and_no_field_is_personal() -> None:
    """In the source, each log call has a literal event, named fields, and none named like a user's data."""
    seen = 0
    for place, call in _calls():
        seen += 1
        (event,) = call.args
        assert isinstance(event, ast.Constant), place
        assert str(event.value).isidentifier(), place
        assert PERSONAL.isdisjoint({keyword.arg for keyword in call.keywords}), place
    assert 5 < seen
