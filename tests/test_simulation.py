"""The simulation of the fleet: the product keeps its promises on every seed, and without a safeguard it does not.

`make simulate` runs as many seeds as are asked for; here it is a slice.
"""

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.serving import clean_environment

_SEEDS: Final = 40
_FOUND: Final = {
    "a fill asks for no token": 2,
    "committed before it is dropped": 430,
    "a rewound Redis is believed": 87,
    "a beat while changes wait": 21,
}
"""Planted bugs, and a seed that finds each; `--bug` with `--seeds` looks for others."""


def _simulate(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *words],
        cwd=Path(__file__).parent.parent,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_promise_is_kept() -> None:
    """Whatever breaks, in whatever order: no answer is older than promised, and nothing is left behind."""
    status, said = _simulate("--first", str(secrets.randbelow(10**9)), "--seeds", str(_SEEDS), "--processes", "1")
    assert 0 == status, said
    assert "every promise was kept" in said


@pytest.mark.slow
@pytest.mark.parametrize("bug", _FOUND)
def test_a_planted_bug_is_found_and_its_seed_finds_it_again(bug: str) -> None:
    """A safeguard that is left out shows, with the seed that repeats it."""
    status, said = _simulate("--bug", bug, "--first", str(_FOUND[bug]), "--seeds", "1", "--processes", "1")
    assert 1 == status, said
    replay = f'replay: python -m tests.simulation {_FOUND[bug]} --scenario "'
    assert replay in said
    again, repeated = _simulate("--bug", bug, str(_FOUND[bug]))
    assert 1 == again, repeated
    violations = [line for line in said.splitlines() if line.startswith("seed ")]
    assert violations[-1] in repeated.splitlines()
