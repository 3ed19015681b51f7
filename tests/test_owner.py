"""The operator's connection: its failures are one line each, without an address or the text of a query."""

import pytest

from goodstanding.errors import ConfigurationError, GoodstandingError, TemporarilyUnavailableError
from goodstanding.owner import connected

from .conftest import Database

TOLD: list[str] = []


@pytest.mark.parametrize(
    ("query", "kind", "message"),
    [
        ("select * from reputation.nothing", ConfigurationError, "run goodstanding migrate"),
        ("set role postgres", ConfigurationError, "must be the owner of the host's tables"),
        ("select 1 / 0", ConfigurationError, r"refused a step \(SQLSTATE 22012\)"),
        ("select pg_terminate_backend(pg_backend_pid())", TemporarilyUnavailableError, "ended the connection"),
        (
            "do $$ begin raise exception using errcode = 'GS001', message = 'mend this'; end $$",
            ConfigurationError,
            "^mend",
        ),
    ],
)
async def test_a_failure_is_one_line(
    database: Database, query: str, kind: type[GoodstandingError], message: str
) -> None:
    """What the operator can mend is told apart from what is for later."""
    with pytest.raises(kind, match=message) as caught:
        async with connected(database.owner_url, TOLD.append) as connection:
            await connection.execute(query)
    assert "\n" not in caught.value.detail
    assert "select" not in caught.value.detail


async def test_nobody_there_is_for_later() -> None:
    """An address where nobody listens is not shown."""
    with pytest.raises(TemporarilyUnavailableError, match="cannot be reached"):
        async with connected("postgresql://nobody:hidden@127.0.0.1:1/nowhere", TOLD.append):
            pass


async def test_a_warning_is_reported(database: Database) -> None:
    """What PostgreSQL warns of reaches the operator."""
    told: list[str] = []
    async with connected(database.owner_url, told.append) as connection:
        await connection.execute("do $$ begin raise notice 'not this'; raise warning 'this'; end $$")
    assert ["this"] == told
