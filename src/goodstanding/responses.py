"""The bodies of the HTTP contract as Pydantic models: what the OpenAPI document promises and requests are read by."""

import json
from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from goodstanding.data import BadgeColor

_USER: Final = "3f2b8c1e-9d4a-4c6b-8e5f-1a2b3c4d5e6f"
_REPUTATION: Final[dict[str, JsonValue]] = {
    "score": 7,
    "badge_color": "green",
    "completed_sessions": 8,
    "no_shows": 1,
    "cache_timestamp": "2026-11-22T16:39:00.123456Z",
}


STREAM_EXAMPLE: Final = f"""retry: 2000

event: reputation
data: {json.dumps({"user_id": _USER, **_REPUTATION}, separators=(",", ":"))}
id: 9f3c2b7a01d45e86

event: user_not_found
data: {{"user_id":"1c9e6a52-7b3d-4f08-a1c4-5d2e8f7b9a60"}}
id: 27d1e0c4b86a93f5

:
"""

STREAM_EVENT: Final = {
    "type": "object",
    "properties": {
        "event": {"enum": ["reputation", "user_not_found"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "`user_id` and, unless nobody has that id, the five members.",
        },
        "id": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    },
    "required": ["event", "data", "id"],
}
"""One event as a JSON Schema."""


class ReputationResponse(BaseModel):
    """One user's reputation: exactly these five members, in this order."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_REPUTATION]})

    score: Annotated[int, Field(description="Completed sessions minus no-shows, within the policy's bounds.")]
    badge_color: Annotated[BadgeColor, Field(description="What a person sees at a glance.")]
    completed_sessions: Annotated[int, Field(ge=0, description="Sessions that count as completed; exact.")]
    no_shows: Annotated[int, Field(ge=0, description="Sessions that this user missed; exact.")]
    cache_timestamp: Annotated[datetime, Field(description="When the value was computed; UTC.")]


class BatchRequest(BaseModel):
    """Whose reputations are asked for."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"user_ids": [_USER]}]})

    user_ids: Annotated[
        list[Annotated[str, Field(json_schema_extra={"format": "uuid"})]],
        Field(min_length=1, max_length=100, description="1 to 100 user ids; either case."),
    ]


class BatchResponse(BaseModel):
    """Each id as it was sent, with its reputation, or null where no such user exists."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reputations": {_USER: _REPUTATION}}]})

    reputations: dict[str, ReputationResponse | None]


class DoneResponse(BaseModel):
    """An administrative call was carried out."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"success": True, "message": "The cached reputation is gone."}]}
    )

    success: Literal[True]
    message: str


class AttributionRequest(BaseModel):
    """A verdict on who caused a no-show or a cancellation."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"at_fault": "user2", "reason": "user1 waited at the venue until 19:40"}]},
    )

    at_fault: Annotated[Literal["user1", "user2", "both", "nobody"], Field(description="Whom the verdict names.")]
    reason: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=1000, pattern=r"^[^\x00]*$"),
        Field(description="Why; kept for good, 1 to 1000 characters."),
    ]


class LiveResponse(BaseModel):
    """The process runs."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "alive"}]})

    status: Literal["alive"]


class ReadyResponse(BaseModel):
    """Whether the service can answer, and which dependency it does without."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "degraded", "degraded": ["cache"]}]})

    status: Literal["ready", "degraded", "unavailable"]
    degraded: list[Literal["database", "cache", "relay", "jwks"]]


class ProblemResponse(BaseModel):
    """An error (RFC 9457): `detail` is for people, `code` for programs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "User not found",
                    "status": 404,
                    "detail": "No user has this id.",
                    "code": "user_not_found",
                }
            ]
        }
    )

    type: Literal["about:blank"]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    code: str
