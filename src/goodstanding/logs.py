"""Structured log lines: JSON for machines, readable on a terminal.

The rule for every line of this service: the event is a constant, the fields are named where the line is written, and
none holds a user's data - no token, no note, no address, no text of another exception. So nothing needs redacting.
"""

import logging
import sys
import traceback
from typing import TextIO

import structlog
from structlog.typing import ExcInfo, Processor

from goodstanding.settings import Settings

_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")
_CHATTY = ("httpx2", "httpcore2", "asyncio")


def configure(settings: Settings, *, stream: TextIO | None = None) -> None:
    """Send this process's log lines, the standard library's too, to `stream`; by default to standard error.

    Call it once, where a process begins, and start uvicorn with `log_config=None`.
    """
    stream = stream if stream is not None else sys.stderr
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    readable = settings.log_format == "console" or (settings.log_format == "auto" and stream.isatty())
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(readable=readable, colors=stream.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _UVICORN:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # Access lines name users and addresses; the metrics count requests without naming anybody.
    logging.getLogger("uvicorn.access").disabled = True
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _renderers(*, readable: bool, colors: bool) -> list[Processor]:
    exceptions = structlog.processors.ExceptionRenderer(_where)
    if readable:
        # The default formatter would print local variables, and those hold tokens.
        plain = structlog.dev.plain_traceback
        return [exceptions, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return [exceptions, structlog.processors.JSONRenderer()]


def _where(exc_info: ExcInfo) -> str:
    """Render where an exception came from and of which types it is; its message may quote a user's data."""
    lines: list[str] = []
    pending: list[BaseException | None] = [exc_info[1]]
    while pending:
        error = pending.pop()
        if error is None:
            continue
        lines += traceback.format_tb(error.__traceback__)
        lines.append(f"{type(error).__module__}.{type(error).__qualname__}\n")
        pending.append(error.__cause__ if error.__suppress_context__ else error.__context__)
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
    return "".join(lines).rstrip()
