"""The calculator: counts and a policy in, score and badge out; nothing else."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goodstanding.calculator import ReputationCalculator
from goodstanding.data import BadgeColor, ReputationData, SessionCounts
from goodstanding.policy import LEGACY, STANDARD, ReputationPolicy

from .test_policy import policies

NOW = datetime(2026, 11, 22, 16, 39, 0, 123456, tzinfo=UTC)
COUNT = st.integers(0, 10**9)
COUNTS = st.builds(SessionCounts, completed=COUNT, no_shows=COUNT)


@pytest.mark.parametrize(
    ("completed", "no_shows", "score", "badge"),
    [
        (0, 0, 0, "green"),
        (8, 1, 7, "green"),
        (9, 0, 9, "green"),
        (10, 0, 10, "gold"),
        (20, 0, 20, "gold"),
        (21, 0, 20, "gold"),
        (1_000_000, 0, 20, "gold"),
        (5, 5, 0, "green"),
        (0, 1, -1, "red"),
        (0, 5, -5, "red"),
        (0, 6, -5, "red"),
        (7, 1_000_000, -5, "red"),
    ],
)
@pytest.mark.parametrize("policy", [STANDARD, LEGACY])
def test_the_scale_of_both_presets(
    policy: ReputationPolicy, completed: int, no_shows: int, score: int, badge: str
) -> None:
    """From -5 to 20, gold from 10, green from 0, and the counts as they are."""
    assert ReputationData(
        score=score,
        badge_color=BadgeColor(badge),
        completed_sessions=completed,
        no_shows=no_shows,
        cache_timestamp=NOW,
    ) == ReputationCalculator(policy).calculate(SessionCounts(completed=completed, no_shows=no_shows), now=NOW)


@given(policies(), COUNTS)
def test_a_score_is_the_difference_within_the_bounds(policy: ReputationPolicy, counts: SessionCounts) -> None:
    """Inside the bounds the score is the difference; outside it is the nearer bound. The counts are never clamped."""
    data = ReputationCalculator(policy).calculate(counts, now=NOW)
    assert sorted((policy.min_score, counts.completed - counts.no_shows, policy.max_score))[1] == data.score
    assert (counts.completed, counts.no_shows) == (data.completed_sessions, data.no_shows)
    assert data.cache_timestamp == NOW


@given(policies(), COUNTS, COUNTS)
def test_more_is_never_worse(policy: ReputationPolicy, one: SessionCounts, other: SessionCounts) -> None:
    """Whoever completed as much and missed no more has no lower score and no worse badge."""
    calculator = ReputationCalculator(policy)
    better = SessionCounts(completed=max(one.completed, other.completed), no_shows=min(one.no_shows, other.no_shows))
    ranks = [BadgeColor.RED, BadgeColor.GREEN, BadgeColor.GOLD]
    for counts in (one, other):
        assert calculator.score(counts) <= calculator.score(better)
        worse_badge, better_badge = (calculator.badge(calculator.score(each)) for each in (counts, better))
        assert ranks.index(worse_badge) <= ranks.index(better_badge)


@given(policies(), st.integers(-2_000, 2_000))
def test_both_thresholds_are_inclusive(policy: ReputationPolicy, score: int) -> None:
    """Gold from gold_at, green from green_at, else red."""
    badge = ReputationCalculator(policy).badge(score)
    assert (score >= policy.gold_at) == (badge is BadgeColor.GOLD)
    assert (score < policy.green_at) == (badge is BadgeColor.RED)


@given(COUNTS)
def test_the_meaning_of_sessions_is_not_the_calculators_business(counts: SessionCounts) -> None:
    """Policies that differ only in what a session means give the same score for the same counts."""
    options = replace(STANDARD, completed_rule=LEGACY.completed_rule)
    assert ReputationCalculator(STANDARD).score(counts) == ReputationCalculator(options).score(counts)
