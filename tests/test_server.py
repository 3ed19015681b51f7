"""`goodstanding serve` as processes of their own: one or several, and how they end."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import IO

import httpx2
import psutil
import pytest
import redis

from goodstanding.embedded import Postgres, Valkey
from tests.serving import (
    NIL,
    SINGLE,
    Backend,
    bearer,
    command,
    environment_of,
    free_port,
    open_backend,
    token,
    wait_until,
)

pytestmark = pytest.mark.slow
_SECONDS = 30
_CROWD = 80


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


class TestProcesses:
    """One process, or several."""

    def test_workers_add_up_and_end_with_sigterm(self, backend: Backend, tmp_path: Path) -> None:
        """Whichever worker is asked for metrics, it tells those of all; SIGTERM ends them all and leaves nothing."""
        port = free_port()
        variables = {
            **environment_of(backend.settings()),
            "GOODSTANDING_METRICS_PUBLIC": "true",
            "TMPDIR": str(tmp_path),
        }
        with command("goodstanding", "serve", "--workers", "2", "--port", str(port), environment=variables) as process:
            assert process.stdout is not None
            _read_until(process.stdout, "Application startup complete.", times=2)
            reads = 24
            for _ in range(reads):
                # A connection each, so that both workers get some.
                answer = httpx2.get(f"http://127.0.0.1:{port}{SINGLE.format(NIL)}", headers=bearer())
                assert 404 == answer.status_code
            for _ in range(6):
                told = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
                counted = [
                    float(line.rpartition(" ")[2])
                    for line in told.splitlines()
                    if line.startswith("goodstanding_http_request_seconds_count") and 'status="404"' in line
                ]
                assert float(reads) == sum(counted)
            assert list(tmp_path.glob("goodstanding-metrics-*/*.db"))
            process.send_signal(signal.SIGTERM)
            assert 0 == process.wait(30)
        assert [] == list(tmp_path.glob("goodstanding-metrics-*"))

    @pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_serve_in_order(self, backend: Backend, tmp_path: Path, ending: signal.Signals) -> None:
        """SIGTERM and Ctrl-C end `serve` with status 0, without a traceback and without leftovers."""
        port = free_port()
        variables = environment_of(backend.settings()) | {"TMPDIR": str(tmp_path), "PORT": str(port)}
        with command("goodstanding", "serve", environment=variables) as process:
            assert process.stdout is not None
            wait_until(lambda: _listens(port))
            assert 200 == httpx2.get(f"http://127.0.0.1:{port}/health/ready").status_code
            # One worker keeps nothing on disk, so a process that is killed leaves nothing.
            assert [] == [*tmp_path.iterdir()]
            process.send_signal(ending)
            told, _ = process.communicate(timeout=30)
            assert 0 == process.returncode
        assert "Application shutdown complete." in told
        assert "Traceback" not in told
        assert [] == [*tmp_path.iterdir()]

    def test_what_is_under_way_is_answered_first(
        self, backend: Backend, postgres: Postgres, valkey: Valkey, tmp_path: Path
    ) -> None:
        """A request that waits for PostgreSQL when SIGTERM comes still gets its answer."""
        port, user = free_port(), backend.user(completed=1)
        variables = environment_of(backend.settings()) | {
            "GOODSTANDING_LOAD_DEADLINE_MS": "9000",
            "PORT": str(port),
            "TMPDIR": str(tmp_path),
        }
        with (
            command("goodstanding", "serve", environment=variables) as process,
            redis.Redis.from_url(valkey.url()) as store,
            ThreadPoolExecutor(1) as pool,
        ):
            assert process.stdout is not None
            wait_until(lambda: _listens(port))
            postgres.pause()
            try:
                url = f"http://127.0.0.1:{port}{SINGLE.format(user)}"
                answer = pool.submit(httpx2.get, url, headers=bearer(), timeout=30)
                wait_until(lambda: bool(store.exists(f"{{reputation:user:{user}}}:lease")))
                process.send_signal(signal.SIGTERM)
                _read_until(process.stdout, "Shutting down")
            finally:
                postgres.resume()
            assert 1 == answer.result(30).json()["score"]
            assert 0 == process.wait(30)


@contextmanager
def _serving(backend: Backend, *words: str, ready: int = 1) -> Iterator[tuple[psutil.Process, int]]:
    """Run `goodstanding serve` until so many processes serve; gives the first one, and the port."""
    port = free_port()
    with command(
        "goodstanding", "serve", "--port", str(port), *words, environment=environment_of(backend.settings())
    ) as process:
        assert process.stdout is not None
        _read_until(process.stdout, "Application startup complete.", times=ready)
        wait_until(lambda: _listens(port))
        yield psutil.Process(process.pid), port


def _request() -> bytes:
    return f"GET {SINGLE.format(NIL)} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token()}\r\n\r\n".encode()


def _status(connection: socket.socket) -> int:
    with HTTPResponse(connection, method="GET") as answer:
        answer.begin()
        answer.read()
        return answer.status


class TestTheEnd:
    """Whoever has been let in is answered."""

    def test_whoever_waits_to_be_accepted_is_answered(self, backend: Backend) -> None:
        """A crowd that connected, and asked, before the process got to run and learnt that it has to end."""
        with _serving(backend) as (process, port), ExitStack() as stack:
            process.suspend()
            try:
                crowd = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=_SECONDS))
                    for _ in range(_CROWD)
                ]
                for one in crowd:
                    one.sendall(_request())
                process.terminate()
            finally:
                process.resume()
            assert [404] * _CROWD == [_status(one) for one in crowd]
            process.wait(_SECONDS)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_whoever_gets_a_connection_is_answered_until_nobody_gets_one(self, backend: Backend, workers: int) -> None:
        """Several ask again and again, over a new connection each time: the first thing that fails is to connect."""
        with _serving(backend, "--workers", str(workers), ready=workers) as (process, port):
            asked, some = [0] * 4, threading.Event()

            def ask(number: int) -> None:
                while True:
                    try:
                        connection = socket.create_connection(("127.0.0.1", port), timeout=_SECONDS)
                    except ConnectionRefusedError:
                        return
                    with connection:
                        connection.sendall(_request())
                        assert 404 == _status(connection)
                    asked[number] += 1
                    if min(asked) > 20:
                        some.set()

            with ThreadPoolExecutor(len(asked)) as pool:
                asking = [pool.submit(ask, number) for number in range(len(asked))]
                some.wait(_SECONDS)
                process.terminate()
                for one in asking:
                    one.result(_SECONDS)
            assert min(asked) > 20
            process.wait(_SECONDS)

    def test_the_next_request_over_an_idle_connection_is_answered_and_is_the_last(self, backend: Backend) -> None:
        """Whoever sent it could not know of the end; he is told not to send another."""
        with _serving(backend) as (process, port):
            with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as connection:
                for _ in range(3):
                    connection.sendall(_request())
                    assert 404 == _status(connection)
                process.terminate()
                wait_until(lambda: not _listens(port))
                connection.sendall(_request())
                with HTTPResponse(connection, method="GET") as answer:
                    answer.begin()
                    assert (404, True) == (answer.status, answer.will_close)
                    answer.read()
                assert not connection.recv(1)
            process.wait(_SECONDS)

    @pytest.mark.skipif(os.name == "nt", reason="kills as POSIX does")
    def test_workers_end_with_whoever_began_them(self, backend: Backend) -> None:
        """Killed, the first process can end nobody; the others see it, and the port is free again."""
        with _serving(backend, "--workers", "2", ready=2) as (process, port):
            workers = process.children(recursive=True)
            assert len(workers) >= 2
            process.kill()
            psutil.wait_procs(workers, timeout=_SECONDS)
            assert [] == [one for one in workers if one.is_running()]
            assert not _listens(port)


def _listens(port: int) -> bool:
    """Tell whether a server takes connections; what it prints comes before that."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def _read_until(stream: IO[str], text: str, *, times: int = 1) -> None:
    for line in stream:
        times -= text in line
        if times == 0:
            return
    pytest.fail(f"the process ended before it said: {text}")
