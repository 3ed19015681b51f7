"""Goodstanding tells people who are about to meet whether the other one turns up."""

from importlib.metadata import version as _version
from typing import Final

from goodstanding.calculator import ReputationCalculator
from goodstanding.data import BadgeColor, ReputationData, SessionCounts, parse_user_id
from goodstanding.errors import GoodstandingError
from goodstanding.main import create_app, open_service, router
from goodstanding.policy import ReputationPolicy
from goodstanding.reputation_service import ReputationService
from goodstanding.settings import Settings, load_settings

__all__ = [
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

__version__: Final = _version("goodstanding")
