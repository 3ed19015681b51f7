"""What schemathesis needs to know of the service: a token for each call, and ids of which half are known."""

import os
import time
import uuid
from typing import Any

import jwt
import schemathesis

_STREAM = "/stream"


@schemathesis.auth(refresh_interval=None)
class Token:
    """Who calls: whoever is named. A stream ends when its token does, so that one ends at once."""

    def get(self, case: schemathesis.Case[Any], _context: schemathesis.AuthContext) -> str:
        """Sign a token."""
        seconds = 0.2 if case.operation.path.endswith(_STREAM) else 3600
        claims = {"sub": "somebody", "aud": "authenticated", "role": os.environ["ROLE"], "exp": time.time() + seconds}  # noqa: TID251 - an edge
        return jwt.encode(claims, os.environ["GOODSTANDING_JWT_SECRET"], algorithm="HS256")

    def set(self, case: schemathesis.Case[Any], data: str, _context: schemathesis.AuthContext) -> None:
        """Put it into the request."""
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def map_path_parameters(
    _context: schemathesis.HookContext, path_parameters: dict[str, object] | None
) -> dict[str, object] | None:
    """Let every other id be one that is known."""
    for name, value in (path_parameters or {}).items():
        if isinstance(value, str) and _is_odd(value):
            path_parameters[name] = os.environ[f"KNOWN_{name.upper()}"]  # type: ignore[index] # it is not None here
    return path_parameters


def _is_odd(text: str) -> bool:
    try:
        return uuid.UUID(text).int % 2 == 1
    except ValueError:
        return False
