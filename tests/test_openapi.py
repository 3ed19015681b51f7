"""schemathesis over the whole OpenAPI document, with all of its checks, against `goodstanding serve`."""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from goodstanding.embedded import Postgres, Valkey
from tests.serving import (
    Backend,
    client_of_command,
    command,
    environment_of,
    free_port,
    open_backend,
    root,
)

_OPERATIONS: Final = 9
_EXAMPLES: Final = os.environ.get("GOODSTANDING_EXAMPLES", "")
_EFFORT: Final = (
    ("--max-examples", _EXAMPLES, "--seed", str(secrets.randbelow(2**31)))
    if _EXAMPLES
    else ("--max-examples", "5", "--seed", "1")
)
_MOST_SECONDS: Final = 3600 if _EXAMPLES else 250
_PLENTY: Final = {
    "GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000000",
    "GOODSTANDING_ADMIN_LIMIT_PER_MINUTE": "1000000",
    "GOODSTANDING_STREAMS_PER_CALLER": "10000",
}


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.timeout(_MOST_SECONDS + 60)
@pytest.mark.parametrize("role", ["service_role", "authenticated"] if _EXAMPLES else ["service_role"])
def test_schemathesis_finds_nothing(backend: Backend, tmp_path: Path, role: str) -> None:
    """Whatever it makes of the document, valid or not, in any order: statuses, bodies, headers, rights are as told."""
    user, match = backend.match(completed=3)
    port = free_port()
    environment = environment_of(backend.settings()) | _PLENTY
    known = {"KNOWN_USER_ID": user, "KNOWN_SESSION_ID": backend.session(match, "no_show"), "ROLE": role}
    hooks = {"SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(root()), "TMPDIR": str(tmp_path)}
    run = ["schemathesis", "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", "all"]
    with (
        client_of_command("goodstanding", "serve", "--port", str(port), port=port, environment=environment),
        command(*run, *_EFFORT, environment=environment | known | hooks, folder=tmp_path) as process,
    ):
        told, _ = process.communicate(timeout=_MOST_SECONDS)
    assert 0 == process.returncode, told
    assert f"{_OPERATIONS} selected / {_OPERATIONS} total" in told
    if role == "service_role":
        # Whoever may not do everything is warned of that.
        assert re.search(r"No issues found in", told), told
        assert "WARNINGS" not in told
