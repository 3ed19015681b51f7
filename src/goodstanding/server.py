"""The server behind `goodstanding serve`: uvicorn, in one process or in several, that ends without dropping anybody."""

import asyncio
import signal
import socket
import sys
import threading
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from multiprocessing import connection, parent_process
from typing import Any, Final

import uvicorn
from uvicorn.supervisors import Multiprocess, multiprocess

from goodstanding.metrics import shared_folder

_ACCEPTED_AT_ONCE: Final = 16
_TURNS: Final = 2


def serve(app: Any, *, factory: str, host: str, port: int, workers: int) -> bool:  # noqa: ANN401 - any ASGI application
    """Serve an application until SIGTERM or SIGINT; tells whether it started.

    Each of several workers serves what the factory of that name, "module:function", gives it.
    """
    _allow_open_files()
    # uvicorn ends in order and then raises the signal again; by default that would skip what is cleaned up here.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with shared_folder() if workers > 1 else nullcontext():
        config = uvicorn.Config(
            app if workers == 1 else factory,
            factory=workers > 1,
            host=host,
            port=port,
            workers=workers,
            http=_http_protocol(),
            access_log=False,
            log_config=None,
            # X-Forwarded-For is believed by GOODSTANDING_TRUSTED_PROXIES alone.
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=10,
            # By default a worker that does not answer for 5 s is killed; on a busy machine its start may take longer,
            # and it would be killed again and again.
            timeout_worker_healthcheck=60,
        )
        with suppress(KeyboardInterrupt):
            if workers > 1:
                _Workers(config, _listening(config)).run()
            else:
                server = _Server(config)
                server.run(_listening(config))
                return server.started
    return True


class _Server(uvicorn.Server):
    """One process. Closing a listening socket resets whoever has connected and was not accepted: here nobody."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept who is waiting, and only then end."""
        loop = asyncio.get_running_loop()
        last = sockets[0].dup() if sockets else None
        for listening in (*self.servers, *(sockets or ())):
            listening.close()
        for one in [] if last is None else _accepted(last, most=self.config.backlog):
            await loop.connect_accepted_socket(self._protocol, one)
        # Whoever was accepted last becomes a connection that is told of the end.
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg] # as the server itself does
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _accepted(listening: socket.socket, *, most: int) -> list[socket.socket]:
    """Accept everybody, and close at once: between the two nobody should come."""
    accepted: list[socket.socket] = []
    listening.settimeout(0)
    with listening, suppress(OSError):
        while len(accepted) < most:
            accepted.append(listening.accept()[0])
    return accepted


class _Worker(multiprocess.Process):
    """One of several processes; it ends with the one that began it, even if that was killed."""

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the new process."""
        threading.Thread(target=_follow_parent, daemon=True).start()
        super().target(sockets)

    @property
    def server(self) -> uvicorn.Server:
        """The server of this process."""
        if self._server is None:
            self._server = _Server(self.config)
        return self._server


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        signal.raise_signal(signal.SIGTERM)


class _Workers(Multiprocess):
    """Several processes on one address."""

    def init_processes(self) -> None:
        """Start them; the supervisor knows no other way to say of which kind."""
        multiprocess.Process = _Worker  # type: ignore[misc]
        super().init_processes()

    def terminate_all(self) -> None:
        """End them all. As long as this process listened too, whoever came would be accepted by nobody."""
        for one in self.sockets:
            one.close()
        super().terminate_all()


def _listening(config: uvicorn.Config) -> list[socket.socket]:
    """Bind the one address, as often as a turn of the loop shall accept a connection.

    uvloop accepts one for each socket in each turn; under load a turn is long, and whoever comes would wait for many.
    """
    bound = config.bind_socket()
    return [bound, *(bound.dup() for _ in range(_ACCEPTED_AT_ONCE - 1 if find_spec("uvloop") is not None else 0))]


def _http_protocol() -> str:
    """Name the server's HTTP protocol: ours where httptools is there, else what the server chooses."""
    return "goodstanding.http_protocol:HotProtocol" if find_spec("httptools") is not None else "auto"


def _allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one: every stream is one, and 1024 is a common default."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - not on every platform

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS takes no infinity here.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
