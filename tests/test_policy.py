"""The policy: its presets, its options, and what it refuses."""

from dataclasses import asdict, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goodstanding.errors import ConfigurationError
from goodstanding.policy import LEGACY, PRESETS, STANDARD, Blame, CompletedRule, ReputationPolicy

BOUNDS = st.integers(-1_000, 1_000)


@st.composite
def policies(draw: st.DrawFn) -> ReputationPolicy:
    """Draw any valid policy."""
    lowest, highest = sorted((draw(BOUNDS), draw(BOUNDS)))
    green, gold = sorted((draw(BOUNDS), draw(BOUNDS)))
    return ReputationPolicy(
        completed_rule=draw(st.sampled_from(CompletedRule)),
        unattributed_no_show=draw(st.sampled_from(Blame)),
        unattributed_cancelled=draw(st.sampled_from(Blame)),
        min_score=lowest,
        max_score=highest,
        green_at=green,
        gold_at=gold,
    )


def test_the_presets_are_the_two_of_the_design() -> None:
    """Standard and legacy differ in the meaning of sessions only, and standard is what one gets."""
    scale = {"min_score": -5, "max_score": 20, "gold_at": 10, "green_at": 0}
    assert {
        "completed_rule": "any",
        "unattributed_no_show": "unconfirmed",
        "unattributed_cancelled": "nobody",
        **scale,
    } == asdict(STANDARD)
    assert {
        "completed_rule": "own",
        "unattributed_no_show": "both",
        "unattributed_cancelled": "both",
        **scale,
    } == asdict(LEGACY)
    assert ReputationPolicy() == STANDARD
    assert {"standard": STANDARD, "legacy": LEGACY} == PRESETS


def test_the_meaning_is_the_three_options_in_order() -> None:
    """What the database is asked with, in the order of reputation.outcome's arguments, as plain text."""
    assert ("any", "unconfirmed", "nobody") == STANDARD.meaning
    assert ("own", "both", "both") == LEGACY.meaning
    assert {str} == {type(option) for option in LEGACY.meaning}


@given(policies(), policies())
def test_policies_share_a_version_exactly_when_they_are_equal(one: ReputationPolicy, other: ReputationPolicy) -> None:
    """The version tells policies apart, and is the same for the same policy in every process."""
    assert (one == other) == (one.version == other.version)
    assert one.version == replace(one).version
    assert len(one.version) == 12


def test_every_option_changes_the_version() -> None:
    """No option is forgotten in the digest."""
    changed = [
        replace(STANDARD, **change)
        for change in (
            {"completed_rule": CompletedRule.BOTH},
            {"unattributed_no_show": Blame.NOBODY},
            {"unattributed_cancelled": Blame.BOTH},
            {"min_score": -6},
            {"max_score": 21},
            {"gold_at": 11},
            {"green_at": 1},
        )
    ]
    assert len(asdict(STANDARD)) == len(changed)
    assert len({STANDARD.version, *(policy.version for policy in changed)}) == len(changed) + 1


def test_a_version_never_drifts() -> None:
    """Entries cached before an upgrade stay valid after it: the digest is part of the cache's format."""
    assert [STANDARD.version, LEGACY.version] == ["d87a947b007e", "218287560f0f"]


@given(policies())
def test_a_preset_takes_options_as_text_or_value(policy: ReputationPolicy) -> None:
    """Every policy can be reached from every preset, also with the text that a setting holds."""
    for name in PRESETS:
        assert policy == ReputationPolicy.preset(name, **asdict(policy))
        assert policy == ReputationPolicy.preset(
            name, **{key: str(value) if isinstance(value, str) else value for key, value in asdict(policy).items()}
        )


def test_an_option_left_out_stays_as_the_preset_has_it() -> None:
    """None is no choice."""
    nothing = dict.fromkeys(asdict(LEGACY))
    assert ReputationPolicy.preset("legacy", **nothing) == LEGACY
    assert replace(LEGACY, gold_at=15) == ReputationPolicy.preset("legacy", **(nothing | {"gold_at": 15}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completed_rule": "most"}, "completed_rule must be one of: any, own, both"),
        ({"unattributed_no_show": "any"}, "unattributed_no_show must be one of: unconfirmed, both, nobody"),
        ({"unattributed_cancelled": ""}, "unattributed_cancelled must be one of: unconfirmed, both, nobody"),
        ({"min_score": 21}, "min_score (21) must not be above max_score (20)"),
        ({"max_score": -6}, "min_score (-5) must not be above max_score (-6)"),
        ({"green_at": 11}, "green_at (11) must not be above gold_at (10)"),
        ({"gold_at": -1}, "green_at (0) must not be above gold_at (-1)"),
        *(
            ({name: value}, f"{name} must be a whole number")
            for name, value in product(("min_score", "max_score", "gold_at", "green_at"), (True, 1.5, "3"))
        ),
        ({"colour": "blue"}, "no such policy option: colour"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    """One line says which option is wrong and what it may be."""
    with pytest.raises(ConfigurationError) as caught:
        ReputationPolicy.preset("standard", **options)
    assert message == str(caught.value)


def test_an_unknown_preset_is_refused() -> None:
    """The choice is named."""
    with pytest.raises(ConfigurationError, match="policy must be one of: standard, legacy"):
        ReputationPolicy.preset("strict")
