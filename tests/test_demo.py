"""The demo as a visitor meets it: started from outside, used over HTTP, ended, killed and started again."""

import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import asyncpg
import httpx2
import psutil
import pytest

from goodstanding import demo, embedded
from goodstanding.demo import Ending, Event, ending
from goodstanding.embedded import Postgres, Server, Valkey
from goodstanding.errors import ConfigurationError
from tests.conftest import connect
from tests.parts import eventually
from tests.streaming import streaming

pytestmark = pytest.mark.slow
_SECONDS: Final = 60.0
_RUN: Final = """
import signal
import sys
from pathlib import Path
from goodstanding import demo

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have had it ignored
{before}
demo.run(port=0, data_dir=Path(sys.argv[1]))
"""
_BREAK_THE_SEED: Final = 'demo._SQL["seed"] += "; select 1 / 0"'
_DIE_AFTER_THE_SEED: Final = """
async def die(url):
    signal.raise_signal(signal.SIGKILL)

demo.upgrade = die
"""


@dataclass(frozen=True, slots=True)
class Demo:
    """A running demo and what it printed."""

    process: "subprocess.Popen[str]"
    folder: Path
    printed: str

    @classmethod
    def start(cls, folder: Path, *, before: str = "") -> Self:
        """Start a demo in a process of its own; reads what it prints until it is ready or ends."""
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(before=before), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C"):
                break
        return cls(process, folder, "".join(printed))

    def end(self, how: signal.Signals) -> tuple[int, str]:
        """Send a signal; gives the exit code and what was printed after it."""
        self.process.send_signal(how)
        said, _ = self.process.communicate(timeout=_SECONDS)
        return self.process.returncode, said

    def word(self, pattern: str) -> str:
        """Find a word in what was printed."""
        found = re.search(pattern, self.printed)
        assert found is not None, self.printed
        return found.group(1)

    @property
    def address(self) -> str:
        """The address of the page, without the last slash."""
        return self.word(r"page +(http://127\.0\.0\.1:\d+)/\n")

    @property
    def token(self) -> str:
        """The visitor's token."""
        return self.word(r"token +(\S+)\n")

    def client(self) -> httpx2.Client:
        """Give a client with the visitor's token."""
        return httpx2.Client(
            base_url=self.address, headers={"Authorization": f"Bearer {self.token}"}, timeout=_SECONDS, trust_env=False
        )

    @asynccontextmanager
    async def database(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Connect to the demo's database as the superuser."""
        folder = self.folder / "postgres"
        port = (folder / "cluster" / "postmaster.pid").read_text().splitlines()[3]
        password = (folder / "password").read_text()
        async with connect(f"postgresql://postgres:{password}@127.0.0.1:{port}/wingman") as connection:
            yield connection


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Run the demo once for the module, after a first start that failed and a second that was killed."""
    folder = tmp_path_factory.mktemp("demo")
    failed = Demo.start(folder, before=_BREAK_THE_SEED)
    failed.process.communicate(timeout=_SECONDS)
    assert "DivisionByZeroError" in failed.printed
    killed = Demo.start(folder, before=_DIE_AFTER_THE_SEED)
    killed.process.communicate(timeout=_SECONDS)
    assert -signal.SIGKILL == killed.process.returncode
    assert "Making the host app's tables" in killed.printed
    running = Demo.start(folder)
    yield running
    running.process.kill()
    running.process.communicate(timeout=_SECONDS)


@pytest.fixture
def client(demonstration: Demo) -> Iterator[httpx2.Client]:
    """Give a client of the running demo."""
    with demonstration.client() as client:
        yield client


def reputation(client: httpx2.Client, user_id: str) -> dict[str, Any]:
    """Read a reputation by the contract."""
    response = client.get(f"/api/user/reputation/{user_id}")
    assert 200 == response.status_code
    value: dict[str, Any] = response.json()
    return value


def counts(value: dict[str, Any]) -> tuple[int, int]:
    """Give completed sessions and no-shows."""
    return value["completed_sessions"], value["no_shows"]


def pairs(rows: Sequence[asyncpg.Record]) -> dict[str, int]:
    """Give rows of a name and a number as a mapping."""
    return {row[0]: row[1] for row in rows}


def write(client: httpx2.Client, user_id: str, event: str, **headers: str) -> httpx2.Response:
    """Let a session end."""
    return client.post("/demo/sessions", json={"user_id": user_id, "event": event}, headers=headers)


def cast(client: httpx2.Client) -> dict[str, str]:
    """Give the ids of the users on the page by their names."""
    return {user["display_name"]: user["user_id"] for user in client.get("/demo/users").json()}


def test_interrupted_starts_leave_all_or_nothing(demonstration: Demo) -> None:
    """A failed and a killed start were no hindrance: every row is there, once."""
    assert re.search(r"3,000 users and 40,\d\d\d sessions are there", demonstration.printed)


def test_the_page_shows_every_badge(client: httpx2.Client) -> None:
    """Twelve users are on the page, around every threshold and at both bounds."""
    users = cast(client)
    answer = client.post("/api/user/reputation/batch", json={"user_ids": list(users.values())})
    scores = {name: answer.json()["reputations"][user_id]["score"] for name, user_id in users.items()}
    assert {
        "Amara Okafor": 20,
        "Lena Fischer": 15,
        "Ravi Menon": 10,
        "Mateo Cruz": 9,
        "Sofia Rossi": 4,
        "Ines Duarte": 3,
        "Zara Ahmed": 0,
        "Noah Kim": 0,
        "Tom Baker": -1,
        "Olga Petrova": -2,
        "Yuki Tanaka": -3,
        "Liam Walsh": -5,
    } == scores


async def test_the_history_is_spread_as_in_life(demonstration: Demo) -> None:
    """Every status, every flag (NULL too), every verdict and every badge occurs in numbers."""
    async with demonstration.database() as connection:
        statuses = pairs(await connection.fetch("select status, count(*) from public.wingman_sessions group by 1"))
        flags = await connection.fetch(
            "select user1_completed_confirmed_by_user2, user2_completed_confirmed_by_user1"
            " from public.wingman_sessions group by 1, 2 having count(*) > 100"
        )
        verdicts = pairs(await connection.fetch("select at_fault, count(*) from reputation.attributions group by 1"))
        scores = [
            row["score"]
            for row in await connection.fetch(
                "select completed - no_shows as score from reputation.counts("
                "(select array_agg(id) from public.user_profiles), 'any', 'unconfirmed', 'nobody')"
            )
        ]
    assert {"scheduled", "in_progress", "completed", "cancelled", "no_show"} == statuses.keys()
    assert 300 < min(statuses.values())
    assert {(True, True), (True, False), (False, True), (None, True), (None, False)} <= {tuple(row) for row in flags}
    assert {"user1", "user2", "both", "nobody"} == verdicts.keys()
    assert 100 < min(verdicts.values())
    assert 300 < sum(score >= 10 for score in scores)
    assert 300 < sum(0 <= score < 10 for score in scores)
    assert 300 < sum(score < 0 for score in scores)


async def test_the_service_logs_in_as_in_production(demonstration: Demo, client: httpx2.Client) -> None:
    """The service's connections belong to a mere member of goodstanding_service, the tables to no superuser."""
    await eventually(lambda: client.get("/health/ready").json()["status"] == "ready")
    async with demonstration.database() as connection:
        used = await connection.fetch(
            "select distinct role.rolname, role.rolsuper or role.rolbypassrls as powerful,"
            " pg_has_role(role.oid, 'goodstanding_service', 'usage') as serves"
            " from pg_stat_activity join pg_roles as role on role.rolname = usename"
            " where datname = 'wingman' and pid <> pg_backend_pid() order by 1"
        )
        owners = await connection.fetch("select distinct tableowner from pg_tables where schemaname = 'public'")
    assert [("demo_service", False, True), ("host_owner", False, False)] == [tuple(row) for row in used]
    assert ["host_owner"] == [row["tableowner"] for row in owners]


def test_a_completed_session_turns_a_badge_gold(client: httpx2.Client) -> None:
    """One more completed session and the badge is gold at once, although the old one was cached."""
    user_id = cast(client)["Mateo Cruz"]
    assert "green" == reputation(client, user_id)["badge_color"]
    written = write(client, user_id, "complete").json()
    assert "completed" == written["status"]
    after = reputation(client, user_id)
    assert ("gold", 10, 10, 0) == (after["badge_color"], after["score"], *counts(after))


def test_every_window_sees_what_one_does(demonstration: Demo, client: httpx2.Client) -> None:
    """Two windows watch the whole cast; a button in one of them changes the badge in both, without a reload."""
    users = cast(client)
    ravi = users["Ravi Menon"]
    with demonstration.client() as other, streaming(client, *users.values()) as one, streaming(other, ravi) as two:
        shown = {event.data["user_id"]: event.data["badge_color"] for event in (one.event() for _ in users)}
        assert shown[ravi] == two.event().data["badge_color"] == "gold"
        write(client, ravi, "miss")
        for window in (one, two):
            event = window.event()
            assert (ravi, "green", 9) == tuple(event.data[name] for name in ("user_id", "badge_color", "score"))


@pytest.mark.parametrize(
    ("event", "user", "partner"),
    [
        ("complete", (1, 0), (1, 0)),
        ("miss", (0, 1), (0, 0)),
        ("cancel", (0, 0), (0, 0)),
        ("cancel_their_fault", (0, 1), (0, 0)),
    ],
)
def test_an_event_counts_as_the_rules_say(
    client: httpx2.Client, event: str, user: tuple[int, int], partner: tuple[int, int]
) -> None:
    """Each button changes the counts of the user and of the partner as the standard policy says, at once."""
    user_id = cast(client)["Noah Kim"]
    write(client, user_id, "complete")  # so that there is a match, whose other user is known
    partner_id = write(client, user_id, "cancel").json()["partner_id"]
    before = {one: counts(reputation(client, one)) for one in (user_id, partner_id)}
    written = write(client, user_id, event).json()
    assert partner_id == written["partner_id"]
    for one, (completed, no_shows) in ((user_id, user), (partner_id, partner)):
        assert (before[one][0] + completed, before[one][1] + no_shows) == counts(reputation(client, one))


async def test_what_is_written_is_a_row_of_the_host_app(demonstration: Demo, client: httpx2.Client) -> None:
    """The answer of a button is the row in wingman_sessions, and its verdict stands in reputation.attributions."""
    written = write(client, cast(client)["Yuki Tanaka"], "cancel_their_fault").json()
    async with demonstration.database() as connection:
        row = await connection.fetchrow(
            "select session.status, verdict.at_fault, verdict.said_by from public.wingman_sessions as session"
            " join reputation.attributions as verdict on verdict.session_id = session.id where session.id = $1",
            written["session_id"],
        )
    assert (written["status"], written["at_fault"], "demo") == tuple(row or ())


async def test_the_second_user_of_a_match_is_told_apart(demonstration: Demo, client: httpx2.Client) -> None:
    """A user who is user2 of every match misses a session as user2."""
    async with demonstration.database() as connection:
        user_id = await connection.fetchval(
            "select user2_id::text from public.wingman_matches as match where not exists ("
            "select from public.wingman_matches as other where other.user1_id = match.user2_id) limit 1"
        )
    before = counts(reputation(client, user_id))
    written = write(client, user_id, "miss").json()
    assert ("user2", False) == (written["user_is"], written["user2_completed_confirmed_by_user1"])
    assert (before[0], before[1] + 1) == counts(reputation(client, user_id))


def test_only_its_own_page_writes(demonstration: Demo, client: httpx2.Client) -> None:
    """A page of another origin is refused, and nothing is written; the demo's own page is not."""
    user_id = cast(client)["Ines Duarte"]
    before = counts(reputation(client, user_id))
    for origin in ("http://evil.example", "null", "http://[", f"{demonstration.address}0"):
        refused = write(client, user_id, "miss", Origin=origin)
        assert (403, "forbidden") == (refused.status_code, refused.json()["code"])
    assert before == counts(reputation(client, user_id))
    assert 200 == write(client, user_id, "cancel", Origin=demonstration.address).status_code


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"user_id": "11111111-2222-4333-8444-555555555555", "event": "miss"}, 404, "user_not_found"),
        ({"user_id": "nobody", "event": "miss"}, 422, "invalid_user_id"),
        ({"user_id": "11111111-2222-4333-8444-555555555555", "event": "explode"}, 422, "invalid_input"),
        ({"user_id": "11111111-2222-4333-8444-555555555555", "event": "miss", "more": 1}, 422, "invalid_input"),
        ({}, 422, "invalid_input"),
    ],
)
def test_bad_input_is_a_problem_not_a_crash(
    client: httpx2.Client, body: dict[str, object], status: int, code: str
) -> None:
    """Unknown users, wrong ids and wrong events are answered like everywhere else in the API."""
    response = client.post("/demo/sessions", json=body)
    assert (status, code) == (response.status_code, response.json()["code"])


def test_the_page_needs_nothing_from_elsewhere(demonstration: Demo, client: httpx2.Client) -> None:
    """The page is one document with the token in it; it loads nothing, and its policy forbids it to."""
    page = client.get("/")
    assert "text/html; charset=utf-8" == page.headers["content-type"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert demonstration.token in page.text
    assert {"http://www.w3.org/2000/svg"} == set(re.findall(r"https?://[^\s'\"<>]+", page.text))


def curl(line: str) -> httpx2.Response:
    """Send what a curl line says."""
    words = shlex.split(line)
    name, _, value = words[words.index("-H") + 1].partition(": ")
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    with httpx2.Client(timeout=_SECONDS, trust_env=False) as client:
        return client.request(method, words[-1], headers={name: value})


def test_the_printed_curl_lines_work(demonstration: Demo) -> None:
    """The two printed lines read a reputation and drop it from the cache."""
    read, invalidate = re.findall(r"^ *(curl .*)$", demonstration.printed, re.MULTILINE)
    curl(read)
    assert "goodstanding; hit" == curl(read).headers["cache-status"].rpartition(";")[0]
    assert {"success": True, "message": "The cached reputation is gone."} == curl(invalidate).json()
    assert "goodstanding; fwd=miss" == curl(read).headers["cache-status"]


def test_a_folder_in_use_is_named(demonstration: Demo) -> None:
    """A second demo on the same folder says which folder is in use."""
    with pytest.raises(ConfigurationError, match="in use by another process") as caught:
        demo.run(port=0, data_dir=demonstration.folder)
    assert str(demonstration.folder) in caught.value.detail


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    """A taken port is one line that names it, and no folder is made."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as caught:
            demo.run(port=port, data_dir=tmp_path / "demo")
    expected = f"port {port} of 127.0.0.1 cannot be used: Address already in use; choose another with --port"
    assert expected == caught.value.detail
    assert not (tmp_path / "demo").exists()


def processes(folder: Path) -> Sequence[psutil.Process]:
    """Give the servers that run on a demo's folder."""
    servers: tuple[Server, ...] = (Postgres(folder / "postgres"), Valkey(folder / "valkey"))
    return [process for server in servers for process in server._family()]  # noqa: SLF001 - what is left of them


def test_it_ends_quietly_and_keeps_its_data(demonstration: Demo) -> None:
    """Ctrl-C, SIGTERM and SIGKILL end everything without a traceback; the next start keeps data and tokens."""
    with demonstration.client() as client:
        user_id = cast(client)["Sofia Rossi"]
        write(client, user_id, "complete")
        expected = counts(reputation(client, user_id))
    running = demonstration
    for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        assert (code, "") == running.end(how)
        assert [] == embedded._still_alive(processes(demonstration.folder))  # noqa: SLF001 - the condition to wait for
        running = Demo.start(demonstration.folder)
        assert "Making" not in running.printed
        with running.client() as client:
            client.headers["Authorization"] = f"Bearer {demonstration.token}"
            assert expected == counts(reputation(client, user_id))
    assert (130, "") == running.end(signal.SIGINT)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event.COMPLETE, Ending("completed", user_confirmed=True, partner_confirmed=True)),
        (Event.MISS, Ending("no_show", user_confirmed=False, partner_confirmed=True)),
        (Event.CANCEL, Ending("cancelled", user_confirmed=False, partner_confirmed=False)),
        (Event.CANCEL_THEIR_FAULT, Ending("cancelled", user_confirmed=False, partner_confirmed=False)),
    ],
)
def test_every_event_has_an_ending(event: Event, expected: Ending) -> None:
    """Each event leaves one status, and confirms those who came."""
    assert expected == ending(event)


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a folder the data lives in the user's cache directory."""
    monkeypatch.setattr(demo, "cache_directory", lambda: tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigurationError, match=r"cache/demo/postgres: "):
        demo.run(port=0)
