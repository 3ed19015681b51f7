"""What a program that imports the package may rely on."""

import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files

import pytest

import goodstanding
from goodstanding import (
    BadgeColor,
    GoodstandingError,
    ReputationCalculator,
    ReputationData,
    ReputationPolicy,
    SessionCounts,
    Settings,
)
from tests.serving import clean_environment


def test_the_public_names() -> None:
    """The package offers exactly these names, and every one of them exists."""
    expected = [
        "BadgeColor",
        "GoodstandingError",
        "ReputationCalculator",
        "ReputationData",
        "ReputationPolicy",
        "ReputationService",
        "SessionCounts",
        "Settings",
        "create_app",
        "load_settings",
        "open_service",
        "parse_user_id",
        "router",
    ]
    assert expected == goodstanding.__all__
    for name in expected:
        assert getattr(goodstanding, name).__doc__


def test_the_version_is_the_distributions() -> None:
    """The version is told in one place."""
    assert version("goodstanding") == goodstanding.__version__


def test_the_core_alone() -> None:
    """A score can be computed with nothing but the public names."""
    counts = SessionCounts(completed=9, no_shows=1)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    expected = ReputationData(
        score=8, badge_color=BadgeColor.GREEN, completed_sessions=9, no_shows=1, cache_timestamp=now
    )
    assert expected == ReputationCalculator(ReputationPolicy()).calculate(counts, now=now)


def test_settings_are_read_when_asked_for() -> None:
    """Settings are built with arguments or from the environment, and a wrong policy is the package's own error."""
    settings: Settings = goodstanding.load_settings(policy="legacy")
    assert ReputationPolicy.preset("legacy") == settings.reputation_policy()
    with pytest.raises(GoodstandingError, match="min_score"):
        ReputationPolicy(min_score=5, max_score=1)


def test_importing_it_reads_no_setting_and_opens_nothing() -> None:
    """Importing the package works without any setting, with wrong ones too, and prints nothing."""
    environment = clean_environment({"GOODSTANDING_POLICY": "nonsense", "DATABASE_URL": "nonsense"})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import goodstanding, goodstanding.main, goodstanding.cli"],
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
        text=True,
    )
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


def test_it_is_typed() -> None:
    """The package tells type checkers that it has types."""
    assert files("goodstanding").joinpath("py.typed").is_file()
