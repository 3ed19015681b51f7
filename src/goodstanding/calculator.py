"""From counts to what people see: pure arithmetic, the only place where score and badge are defined."""

from dataclasses import dataclass
from datetime import datetime

from goodstanding.data import BadgeColor, ReputationData, SessionCounts
from goodstanding.policy import ReputationPolicy


@dataclass(frozen=True, slots=True)
class ReputationCalculator:
    """Turns session counts into a reputation under one policy."""

    policy: ReputationPolicy

    def score(self, counts: SessionCounts) -> int:
        """Give `completed - no_shows`, clamped to the policy's bounds (inclusive)."""
        return max(self.policy.min_score, min(self.policy.max_score, counts.completed - counts.no_shows))

    def badge(self, score: int) -> BadgeColor:
        """Give the badge that a score earns; both thresholds are inclusive."""
        if score >= self.policy.gold_at:
            return BadgeColor.GOLD
        if score >= self.policy.green_at:
            return BadgeColor.GREEN
        return BadgeColor.RED

    def calculate(self, counts: SessionCounts, *, now: datetime) -> ReputationData:
        """Compute the reputation as of `now` (aware, UTC)."""
        score = self.score(counts)
        return ReputationData(
            score=score,
            badge_color=self.badge(score),
            completed_sessions=counts.completed,
            no_shows=counts.no_shows,
            cache_timestamp=now,
        )
