"""What the load generator draws and counts, where a mistake would not be seen in its figures."""

import random
from collections import Counter
from itertools import islice

import pytest
from benchmarks.load import Crowd, get, reads, zipf
from benchmarks.processor import shares_of
from benchmarks.spread import Spread


def test_zipf_draws_by_rank() -> None:
    """The one of rank r comes in proportion to 1 / r ** exponent, and everybody may come."""
    drawn = Counter(islice(zipf(range(1, 11), 1.0, random.Random(0)), 200_000))  # noqa: S311 - repeatable
    whole = sum(1 / rank for rank in range(1, 11))
    for rank in range(1, 11):
        assert 200_000 / rank / whole == pytest.approx(drawn[rank], rel=0.05)


def test_a_crowd_asks_the_same_each_time() -> None:
    """One seed is one sequence of reads; another seed another."""
    users, tokens = [f"user-{number}" for number in range(1000)], ["a", "b"]
    first = list(islice(reads(Crowd(users, tokens, seed=1)), 500))
    assert first == list(islice(reads(Crowd(users, tokens, seed=1)), 500))
    assert first != list(islice(reads(Crowd(users, tokens, seed=2)), 500))


def test_a_share_of_the_reads_is_for_fresh_users_each_once() -> None:
    """Fresh users come in their order and never twice; the crowd ends when there are none left."""
    fresh = [f"fresh-{number}" for number in range(300)]
    asked = list(reads(Crowd(["known"], ["token"], fresh=fresh, share=0.3)))
    assert 1000 == pytest.approx(len(asked), rel=0.15)
    assert [get(user, "token") for user in fresh] == [text for text in asked if "fresh-" in text]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.999, 1.0])
def test_a_quantile_is_the_sorted_list_s_within_a_hundredth(share: float) -> None:
    """A quantile of the counts is never below the list's own, and at most 1 % above it."""
    rng = random.Random(0)  # noqa: S311 - repeatable
    values = sorted(rng.lognormvariate(0, 2) for _ in range(10_000))
    spread = Spread()
    for value in values:
        spread.add(value)
    exact = values[max(0, round(share * len(values)) - 1)]
    assert exact <= spread.quantile(share) <= exact * 1.0101
    assert len(values) == spread.number
    assert values[-1] == spread.worst


def test_a_spread_takes_any_time() -> None:
    """Nothing at all, less than a microsecond and more than an hour are counted too."""
    spread = Spread()
    for value in (0.0, -0.1, 1e-9, 4e6):
        spread.add(value)
    assert (4, 4e6) == (spread.number, spread.worst)
    assert 4e6 > spread.quantile(0.75) > 0
    assert 0.0 == Spread().quantile(0.5)


def test_a_sample_belongs_to_the_innermost_package_or_to_the_system() -> None:
    """A system call counts for itself, what is no Python for the package that called it."""
    stacks = [
        "main (goodstanding/cli.py:1);run (uvloop/loop.so);data_received (goodstanding/http_protocol.py:60) 6",
        "run (uvloop/loop.so);data_received (goodstanding/http_protocol.py:60);blake2b (_blake2.so) 4",
        "_tell (goodstanding/fast_lane.py:280);observe (prometheus_client/metrics.py:667) 2",
        "run (uvloop/loop.so);uv__read (uvloop/loop.so);__libc_read (libc.so.6) 8",
    ]
    assert [("our Python", 50.0), ("system calls", 40.0), ("prometheus-client", 10.0)] == shares_of(stacks)
