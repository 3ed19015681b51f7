"""What counts, and how much: the rules of a reputation as one validated value. No I/O, no framework."""

import hashlib
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Final, Self

from goodstanding.errors import ConfigurationError


class CompletedRule(StrEnum):
    """Whose confirmation makes a session of status `completed` count as completed."""

    ANY = "any"
    OWN = "own"
    BOTH = "both"


class Blame(StrEnum):
    """Who is held at fault for a session when nobody recorded whose fault it was."""

    UNCONFIRMED = "unconfirmed"
    BOTH = "both"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReputationPolicy:
    """How sessions become counts, and counts a score and a badge.

    Invariants: `min_score <= max_score` and `green_at <= gold_at`. A gold or green threshold outside the
    score's bounds is allowed: that badge is then out of reach, or everyone's.
    Raises ConfigurationError, in one line that names the option.
    """

    completed_rule: CompletedRule = CompletedRule.ANY
    unattributed_no_show: Blame = Blame.UNCONFIRMED
    unattributed_cancelled: Blame = Blame.NOBODY
    min_score: int = -5
    max_score: int = 20
    gold_at: int = 10
    green_at: int = 0

    def __post_init__(self) -> None:
        """Check every option; text that spells an enum's value is accepted."""
        for name, kind in (
            ("completed_rule", CompletedRule),
            ("unattributed_no_show", Blame),
            ("unattributed_cancelled", Blame),
        ):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                choices = ", ".join(kind)
                message = f"{name} must be one of: {choices}"
                raise ConfigurationError(message) from None
        for name in ("min_score", "max_score", "gold_at", "green_at"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                message = f"{name} must be a whole number"
                raise ConfigurationError(message)
        if self.min_score > self.max_score:
            message = f"min_score ({self.min_score}) must not be above max_score ({self.max_score})"
            raise ConfigurationError(message)
        if self.green_at > self.gold_at:
            message = f"green_at ({self.green_at}) must not be above gold_at ({self.gold_at})"
            raise ConfigurationError(message)

    @property
    def meaning(self) -> tuple[str, str, str]:
        """The options that decide what a session counts as: the last three arguments of `reputation.outcome`."""
        return (self.completed_rule.value, self.unattributed_no_show.value, self.unattributed_cancelled.value)

    @property
    def version(self) -> str:
        """A digest of every option: two policies share it exactly when they are equal. 12 hexadecimal digits."""
        text = ";".join(f"{name}={value}" for name, value in sorted(asdict(self).items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @classmethod
    def preset(cls, name: str, **options: object) -> Self:
        """Build a preset with some options replaced (None leaves an option as the preset has it).

        Raises ConfigurationError for a preset or an option that does not exist.
        """
        if name not in PRESETS:
            message = f"policy must be one of: {', '.join(PRESETS)}"
            raise ConfigurationError(message)
        unknown = options.keys() - {field.name for field in fields(cls)}
        if unknown:
            message = f"no such policy option: {', '.join(sorted(unknown))}"
            raise ConfigurationError(message)
        given = {key: value for key, value in options.items() if value is not None}
        return cls(**{**asdict(PRESETS[name]), **given})


STANDARD: Final = ReputationPolicy()
"""The default: whoever caused a no-show answers for it, and unproved cause means no penalty."""

LEGACY: Final = ReputationPolicy(
    completed_rule=CompletedRule.OWN,
    unattributed_no_show=Blame.BOTH,
    unattributed_cancelled=Blame.BOTH,
)
"""What WingmanMatch's first version did: both users pay for every no-show and every cancellation."""

PRESETS: Final = {"standard": STANDARD, "legacy": LEGACY}
