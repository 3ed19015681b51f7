"""A connection as the owner of the host app's tables, and errors that a person can read."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg

from goodstanding.errors import ConfigurationError, TemporarilyUnavailableError

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

Report = Callable[[str], None]
"""Receives one line per step, for people."""

_CONNECT_SECONDS: Final = 10.0
_MENDABLE: Final = {
    (asyncpg.InsufficientPrivilegeError,): "this login lacks a right: it must be the owner of the host's tables",
    (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
    ): "PostgreSQL refused the login or knows no such database",
    (
        asyncpg.InvalidSchemaNameError,
        asyncpg.UndefinedTableError,
        asyncpg.UndefinedFunctionError,
    ): "this database is not migrated: run goodstanding migrate",
}


@asynccontextmanager
async def connected(database_url: str, say: Report) -> AsyncIterator["Connection"]:
    """Connect so that a pooler in transaction mode works too: no named statements, no session state.

    Raises ConfigurationError for what the operator can mend, TemporarilyUnavailableError when nobody answers.
    """
    try:
        connection = await asyncpg.connect(database_url, timeout=_CONNECT_SECONDS, statement_cache_size=0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError) as error:
        raise _explained(error) from error

    def warn(_: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.severity_en == "WARNING":
            say(str(message.message))

    connection.add_log_listener(warn)
    try:
        yield connection
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise _explained(error) from error
    finally:
        await connection.close(timeout=_CONNECT_SECONDS)


def silent(_: str) -> None:
    """Report to nobody."""


def _explained(error: Exception) -> Exception:
    """Turn a database's failure into one line for the operator, without the text of a query or an address."""
    if not isinstance(error, asyncpg.PostgresError):
        return TemporarilyUnavailableError("PostgreSQL cannot be reached.")
    if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
        return TemporarilyUnavailableError("PostgreSQL ended the connection.")
    if error.sqlstate == "GS001":
        return ConfigurationError(str(error.args[0]))
    for kinds, message in _MENDABLE.items():
        if isinstance(error, kinds):
            return ConfigurationError(message)
    return ConfigurationError(f"PostgreSQL refused a step (SQLSTATE {error.sqlstate})")
