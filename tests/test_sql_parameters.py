"""Values reach PostgreSQL as parameters: read from the source, of Python and of SQL."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.serving import root

_PACKAGE: Final = root() / "src" / "goodstanding"
_SENDS: Final = frozenset({"execute", "executemany", "fetch", "fetchrow", "fetchval", "fetchmany", "prepare", "cursor"})
_WORDS: Final = frozenset({"query", "command", None})
"""What these call a query that is no first argument; None is `**words`, which may hold one."""
_ALLOWED: Final = {
    # Files of the package, and names for constants of the module.
    ("demo.py", "(_FOLDER / 'host.sql').read_text(encoding='utf-8')"),
    ("migrate.py", "migration.sql"),
    ("migrate.py", "statement"),
    ("migrate.py", "sql"),
    ("migrate.py", "unless"),
    # `format` quotes the words of a statement that takes no parameters.
    ("demo.py", "await connection.fetchval('select format($1, variadic $2::text[])', template, words)"),
    # A cache fetches too: for users.
    ("memory.py", "user_ids"),
    ("memory.py", "missing"),
    ("reputation_service.py", "[*look.leases]"),
    ("reputation_service.py", "flight.users"),
}
_SQL: Final = re.compile(
    r"\s*(select|insert\s+into|update|delete\s+from|merge|truncate|drop|create|alter|grant|revoke|copy|call|do|listen|"
    r"notify|set\s+(local|role|session))\b.*\b(from|into|set|table|schema|role|function|reputation|public|where|to)\b",
    re.IGNORECASE | re.DOTALL,
)
_PRINTED: Final = {"select reputation.rebuild('{}', '{}', '{}');"}
"""What `migrate --dry-run` prints for a person; its values are the policy's words."""


def _is_constant(query: ast.expr) -> bool:
    """Tell whether a query is a literal, a constant of a module, or a member of such a constant."""
    match query:
        case ast.Constant(value=str()):
            return True
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(), attr=name):
            return name.isupper()
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(value=ast.Name(), attr=name)):
            return name.isupper()
        case ast.IfExp(body=one, orelse=other):
            return _is_constant(one) and _is_constant(other)
    return False


def _sent(call: ast.Call) -> Iterator[ast.expr]:
    """Give what may be the query of a call, whether by its place or by its name."""
    yield from call.args[:1]
    yield from (word.value for word in call.keywords if word.arg in _WORDS)


def _built(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Find every query that is no constant, and every text like SQL that is put together."""
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if name in _SENDS:
                yield from ((node.lineno, ast.unparse(query)) for query in _sent(node) if not _is_constant(query))
            case ast.JoinedStr(values=parts):
                text = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
                if _SQL.match(text):
                    yield node.lineno, text
            case (
                ast.BinOp(left=ast.Constant(value=str() as text), op=ast.Mod() | ast.Add())
                | ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="format"))
            ):
                if _SQL.match(text):
                    yield node.lineno, text
            case (
                ast.Assign(value=ast.Constant(value=str() as text))
                | ast.AnnAssign(value=ast.Constant(value=str() as text))
            ):
                # A template that is filled in elsewhere.
                if _SQL.match(text) and re.search(r"%s|%\(|\{\w*\}", text) and text not in _PRINTED:
                    yield node.lineno, text


def _talks_to_postgresql(module: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Import | ast.ImportFrom) and "asyncpg" in ast.unparse(node) for node in ast.walk(module)
    )


_MODULES: Final = {path.name: ast.parse(path.read_text("utf-8")) for path in sorted(_PACKAGE.glob("*.py"))}


@pytest.mark.parametrize("name", _MODULES)
def test_every_query_is_a_constant(name: str) -> None:
    """No query is put together from pieces: what changes is a parameter.

    In no module, whether it knows the driver or was given a connection.
    """
    assert [] == [(line, query) for line, query in _built(_MODULES[name]) if (name, query) not in _ALLOWED]


def test_only_these_modules_send_queries() -> None:
    """A module that talks to PostgreSQL says so by importing its driver."""
    talking = {name for name, module in _MODULES.items() if _talks_to_postgresql(module)}
    assert {"broadcast.py", "changes.py", "demo.py", "doctor.py", "history.py", "migrate.py", "owner.py"} <= talking
    for name, module in _MODULES.items():
        if name not in talking:
            assert not [text for _, text in _built(module) if _SQL.match(text)], name


@pytest.mark.parametrize(
    "code",
    [
        'connection.fetch(f"select * from t where id = {x}")',
        'connection.fetch("select * from t where id = %s" % x)',
        'connection.fetch("select * from t where id = " + x)',
        'connection.fetch("select * from t where id = {}".format(x))',
        'connection.execute(" ".join(["drop table", x]))',
        "connection.fetchval(query)",
        "query = \"delete from t where id = '%s'\"",
        'text = f"insert into reputation.{x} values (1)"',
        "connection.execute(QUERIES[x] + y)",
        "connection.execute(str(QUERIES))",
        "connection.fetch(query=x)",
        "connection.executemany(command=QUERIES[x] + y, args=z)",
        "connection.fetch(*x)",
        "connection.fetch(**x)",
    ],
)
def test_what_is_built_is_found(code: str) -> None:
    """The check finds each way of putting a query together."""
    assert list(_built(ast.parse(code)))


@pytest.mark.parametrize("path", sorted(_PACKAGE.rglob("*.sql")), ids=lambda path: path.name)
def test_sql_that_makes_sql_lets_postgresql_quote(path: Path) -> None:
    """A dynamic statement comes from `format`, and what is put in is quoted, as a name (%I) or as a text (%L)."""
    code = re.sub(r"--[^\n]*", "", path.read_text("utf-8"))
    for statement in re.findall(r"\bexecute\s+(?!on\b|function\b|procedure\b)([^;]*);", code, re.IGNORECASE):
        assert re.match(r"pg_catalog\.format\(\s*'", statement), statement
        [template, *_] = re.findall(r"'((?:[^']|'')*)'", statement)
        assert set(re.findall(r"%.?", template)) <= {"%I", "%L"}, statement
