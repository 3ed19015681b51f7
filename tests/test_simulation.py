"""The simulation of the fleet: the product keeps its promises on every seed, and without a safeguard it does not.

`make simulate` runs as many seeds as are asked for; here it is a slice.
"""

import random
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis as Client
from redis.exceptions import ResponseError

from goodstanding import cache
from goodstanding.cache import last_good_key, lease_key, value_key
from tests.parts import admin, user
from tests.serving import clean_environment
from tests.simulation.bugs import BUGS
from tests.simulation.redis import Redis
from tests.simulation.story import run, simulated
from tests.simulation.world import World

_SEEDS: Final = 20
_FOUND: Final = {
    "a fill asks for no token": 20,
    "an invalidation leaves the lease": 2,
    "published before it is dropped": 65,
    "committed before it is dropped": 124,
    "memory keeps what was evicted meanwhile": 777,
    "memory is not emptied when nothing is heard": 60,
    "a beat while changes wait": 13,
    "a late beat is believed for long": 30,
    "a rewound Redis is believed": 87,
    "a read joins any load": 117,
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
def test_what_is_found_is_told_with_what_repeats_it() -> None:
    """A safeguard that is left out shows, with the words that show it again."""
    (bug, seed), *_ = _FOUND.items()
    status, said = _simulate("--bug", bug, "--first", str(seed), "--seeds", "1", "--processes", "1")
    assert 1 == status, said
    assert f'replay: python -m tests.simulation {seed} --scenario "' in said
    with simulated(bug):
        again = run(seed, BUGS[bug].scenario)
    assert again.violations[0] in said


@pytest.mark.parametrize("bug", _FOUND)
def test_a_planted_bug_is_found(bug: str) -> None:
    """By a seed that keeps every promise as long as the safeguard is there."""
    with simulated(bug):
        assert run(_FOUND[bug], BUGS[bug].scenario).violations
    with simulated():
        assert not run(_FOUND[bug], BUGS[bug].scenario).violations


def test_a_seed_is_the_same_every_time() -> None:
    """Everything that happens follows from the seed: two runs leave the same trace."""
    with simulated(traced=True):
        for seed in range(3):
            first, second = run(seed, traced=True), run(seed, traced=True)
            assert first == second
            assert len(first.trace.splitlines()) > 50


async def test_the_model_of_redis_does_what_redis_does(redis_url: str) -> None:
    """Random commands of the product, to both: the same replies, and the same keys at the end."""
    rng = random.Random(20260501)  # noqa: S311 - reproducible, not secret
    async with admin(redis_url) as client:
        await client.flushdb()
        model = Redis(World(0), pause=0.0)
        model.run = (await client.info("server"))["run_id"]
        for _ in range(1000):
            command = _command(rng)
            expected = await _ask(client, *command)
            reply = model.execute(None, [str(word).encode() for word in command])
            assert expected == (reply.encode() if isinstance(reply, str) else reply), command
        assert sorted(await client.keys("*")) == sorted(key for key in list(model.keys) if model.get(key) is not None)
        for key in model.keys:
            life = await client.pttl(key)
            assert (life == -1) == (model.keys[key][1] == float("inf"))


def _command(rng: random.Random) -> tuple[str | int, ...]:
    who = user(rng.randint(1, 3))
    value, lease, good = value_key(who), lease_key(who), last_good_key(who)
    token, long = f"token{rng.randint(1, 3)}", 3_600_000
    fill, release, vouch = cache._FILL, cache._RELEASE, cache._VOUCH  # noqa: SLF001 - what the product sends
    commands: tuple[tuple[str | int, ...], ...] = (
        ("MGET", value, lease, good),
        ("SET", lease, token, "NX", "PX", long),
        ("SET", lease, token, "PX", long),
        ("EVAL", fill, 3, value, lease, good, token, f"text{rng.randint(1, 9)}", long, rng.choice((0, long))),
        ("EVAL", release, 1, lease, token),
        ("DEL", value, lease, good),
        ("UNLINK", good),
        ("EXISTS", value),
        ("PUBLISH", "goodstanding:0", "beat 1 2"),
        ("EVAL", vouch, 1, "{goodstanding:probe}:run", rng.choice(("", "other")), "goodstanding:0", "beat 1 2"),
    )
    return rng.choice(commands)


async def _ask(client: Client, *words: str | int) -> object:
    connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call] # redis-py leaves it untyped
    try:
        await connection.send_command(*words)
        return await connection.read_response()
    except ResponseError as error:
        return error
    finally:
        await client.connection_pool.release(connection)
