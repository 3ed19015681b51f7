"""The alert rules speak of what the service measures; promtool checks what they mean (`make alerts`)."""

import re
from pathlib import Path
from typing import Final

from prometheus_client import REGISTRY

import goodstanding.metrics
from goodstanding.settings import PREFIX, Settings

RULES: Final = Path(__file__).parent.parent / "deploy" / "prometheus" / "alerts.yml"


def test_the_rules_name_only_metrics_that_exist() -> None:
    """Every metric in the rules is one of ours, under the name in which Prometheus stores it."""
    assert goodstanding.metrics.render()
    ours = {
        name
        for metric in REGISTRY.collect()
        for name in (metric.name, *(f"{metric.name}_{suffix}" for suffix in ("total", "bucket", "count", "sum")))
    }
    named = set(re.findall(r"\bgoodstanding_[a-z_]+", RULES.read_text()))
    assert {"goodstanding_cache_reads_total", "goodstanding_dependency_up"} <= named <= ours


def test_the_rules_name_only_settings_that_exist() -> None:
    """Every setting that a runbook tells to change is one."""
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+", RULES.read_text()))
    assert named <= {f"{PREFIX}{field.upper()}" for field in Settings.model_fields}
    assert named


def test_every_rule_says_when_how_bad_and_what_to_do() -> None:
    """Each alert waits, has a severity, a summary and a runbook."""
    rules = RULES.read_text().split("- alert: ")[1:]
    for rule in rules:
        for part in ("expr:", "for:", "severity:", "summary:", "runbook:"):
            assert 1 == rule.count(part), rule
    assert 8 == len(rules)
