"""SessionHistory: what PostgreSQL knows about a user's sessions."""

import re
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def named_queries(text: str) -> dict[str, str]:
    """Read queries that each follow a line `-- name: ...`; what stands before the first name is a comment."""
    _, *parts = _NAME.split(text)
    return {name: query.strip() for name, query in zip(parts[::2], parts[1::2], strict=True)}
