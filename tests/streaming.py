"""Clients of the stream: they read one block of server-sent events at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from tests.serving import bearer

STREAM: Final = "/api/user/reputation/stream"
SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Event:
    """One event, or what stands between them: then `kind` is empty."""

    kind: str
    data: dict[str, Any]
    place: str
    lines: tuple[str, ...]


class Reader:
    """A client of a stream, which reads one block at a time."""

    def __init__(self, answer: httpx2.Response) -> None:
        self.answer = answer
        self._lines = answer.iter_lines()

    def block(self) -> Event:
        """Wait for the next block."""
        lines = []
        for line in self._lines:
            if not line:
                break
            lines.append(line)
        else:
            raise EOFError
        fields = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith(":"))
        return Event(fields.get("event", ""), json.loads(fields.get("data", "{}")), fields.get("id", ""), tuple(lines))

    def event(self) -> Event:
        """Wait for the next event."""
        while not (block := self.block()).kind:
            pass
        return block

    def rest(self) -> list[str]:
        """Read until the stream ends."""
        return [*self._lines]


@contextmanager
def streaming(client: httpx2.Client, *users: str, **headers: str) -> Iterator[Reader]:
    """Open a stream."""
    given = headers if "Authorization" in headers or "Authorization" in client.headers else bearer() | headers
    with client.stream("GET", STREAM, params={"user_id": users}, headers=given, timeout=SECONDS) as answer:
        if answer.status_code != httpx2.codes.OK:
            answer.read()
        yield Reader(answer)
