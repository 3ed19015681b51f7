"""The models of the contract: what they promise, and what they refuse."""

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Final, get_args

import pytest
from pydantic import BaseModel, ValidationError

from goodstanding import responses
from goodstanding.data import AtFault, BadgeColor, ReputationData
from goodstanding.entry import body
from goodstanding.errors import GoodstandingError
from goodstanding.reputation_service import MOST_USERS
from goodstanding.responses import (
    AttributionRequest,
    BatchRequest,
    BatchResponse,
    LiveResponse,
    ProblemResponse,
    ReadyResponse,
    ReputationResponse,
)
from tests.serving import NIL

_DATA: Final = ReputationData(
    score=20,
    badge_color=BadgeColor.GOLD,
    completed_sessions=12_345,
    no_shows=3,
    cache_timestamp=datetime(2026, 11, 22, 16, 39, 0, 123456, tzinfo=UTC),
)


def _models() -> list[type[BaseModel]]:
    return [
        value
        for value in vars(responses).values()
        if isinstance(value, type) and issubclass(value, BaseModel) and value is not BaseModel
    ]


def test_the_model_is_the_data() -> None:
    """The response has the data's members, in the data's order."""
    assert [field.name for field in fields(ReputationData)] == list(ReputationResponse.model_fields)


def test_what_is_written_by_hand_is_what_the_model_reads() -> None:
    """The body that is written without Pydantic is valid under the model, and means the same."""
    told = ReputationResponse.model_validate_json(body(_DATA))
    assert _DATA == ReputationData(**dict(told))
    batch = BatchResponse.model_validate_json(b'{"reputations":{"%s":%s}}' % (NIL.encode(), body(_DATA)))
    assert {NIL: told} == batch.reputations


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"score": None}, {"badge_color": "blue"}, {"no_shows": -1}, {"completed_sessions": -1}]
)
def test_nothing_else_is_a_reputation(change: dict[str, Any]) -> None:
    """A sixth member, an unknown badge and a negative count are no reputation."""
    fine = dict(ReputationResponse.model_validate_json(body(_DATA)))
    with pytest.raises(ValidationError):
        ReputationResponse.model_validate(fine | change)


@pytest.mark.parametrize("model", _models())
def test_every_model_has_examples_of_its_own(model: type[BaseModel]) -> None:
    """Every model shows an example, which is valid, and says what it is."""
    schema = model.model_json_schema()
    assert schema["description"].endswith(".")
    assert schema["examples"]
    for example in schema["examples"]:
        model.model_validate(example)


def test_a_batch_takes_as_many_as_the_service() -> None:
    """The bound of a batch is the service's own."""
    assert MOST_USERS == len(BatchRequest(user_ids=["x"] * MOST_USERS).user_ids)
    for wrong in ([], ["x"] * (MOST_USERS + 1)):
        with pytest.raises(ValidationError):
            BatchRequest(user_ids=wrong)


def test_a_batch_is_read_strictly() -> None:
    """Numbers are no texts, and a misspelt member is no batch."""
    for wrong in (b'{"user_ids":[1]}', b'{"user_id":["x"]}', b'{"user_ids":["x"],"more":1}'):
        with pytest.raises(ValidationError):
            BatchRequest.model_validate_json(wrong)


def test_a_verdict_names_what_the_domain_knows() -> None:
    """The faults that a verdict may name are the domain's."""
    assert {fault.value for fault in AtFault} == set(get_args(AttributionRequest.model_fields["at_fault"].annotation))


@pytest.mark.parametrize(("given", "kept"), [(" a\n", "a"), ("x" * 1000, "x" * 1000), ("zwei\nZeilen", "zwei\nZeilen")])
def test_a_reason_is_trimmed(given: str, kept: str) -> None:
    """A reason loses the white space around it, and nothing else."""
    assert kept == AttributionRequest(at_fault="both", reason=given).reason


@pytest.mark.parametrize("reason", ["", "  ", "\n", "x" * 1001, "a\x00b", "\x00"])
def test_a_reason_that_cannot_be_kept(reason: str) -> None:
    """An empty, an endless and a NUL-holding reason are refused."""
    with pytest.raises(ValidationError):
        AttributionRequest(at_fault="both", reason=reason)


def test_a_problem_is_an_error_of_ours() -> None:
    """The example of a problem is one that exists, with its very words."""
    [example] = ProblemResponse.model_json_schema()["examples"]
    [error] = [kind for kind in GoodstandingError.__subclasses__() if kind.code == example["code"]]
    assert (error.status, error.title, error.default_detail) == (
        example["status"],
        example["title"],
        example["detail"],
    )


def test_health() -> None:
    """Health knows its few words and no other."""
    assert "alive" == LiveResponse(status="alive").status
    with pytest.raises(ValidationError):
        ReadyResponse.model_validate({"status": "ready", "degraded": ["the database at 10.0.0.1"]})
