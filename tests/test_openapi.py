"""schemathesis over the whole OpenAPI document, with all of its checks, against `goodstanding serve`."""

import re
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
@pytest.mark.timeout(300)
def test_schemathesis_finds_nothing(backend: Backend, tmp_path: Path) -> None:
    """Whatever it makes of the document, valid or not, in any order: statuses, bodies, headers, rights are as told."""
    user, match = backend.match(completed=3)
    port = free_port()
    environment = environment_of(backend.settings()) | _PLENTY
    known = {"KNOWN_USER_ID": user, "KNOWN_SESSION_ID": backend.session(match, "no_show")}
    hooks = {"SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(root()), "TMPDIR": str(tmp_path)}
    run = ["schemathesis", "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", "all", "--max-examples", "5"]
    with (
        client_of_command("goodstanding", "serve", "--port", str(port), port=port, environment=environment),
        command(*run, "--seed", "1", environment=environment | known | hooks, folder=tmp_path) as process,
    ):
        told, _ = process.communicate(timeout=250)
    assert 0 == process.returncode, told
    assert f"{_OPERATIONS} selected / {_OPERATIONS} total" in told
    assert re.search(r"No issues found in", told), told
    assert "WARNINGS" not in told
