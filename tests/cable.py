"""A network between somebody and a server, in a process of its own: cut, slow, refusing, or leading elsewhere."""

import asyncio
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import uvloop

_PIECE: Final = 1 << 16
_SECONDS: Final = 30.0


@dataclass(slots=True)
class Cable:
    """The near end; `url` leads to the server by way of the cable. All on loopback."""

    process: asyncio.subprocess.Process
    url: str

    @classmethod
    async def to(cls, url: str) -> "Cable":
        """Lay a cable to the server of a URL."""
        parts = urlsplit(url)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.cable", str(parts.hostname), str(parts.port)),
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        cable = cls(process, "")
        port = int(await cable._answer())
        credentials, _, _ = parts.netloc.rpartition("@")
        cable.url = parts._replace(netloc=f"{credentials}@127.0.0.1:{port}").geturl()
        return cable

    def cut(self) -> None:
        """Carry nothing any more; connections stay, and nothing is lost, as TCP sees it."""
        self.process.send_signal(signal.SIGSTOP)

    def mend(self) -> None:
        """Carry again, what was sent meanwhile first."""
        self.process.send_signal(signal.SIGCONT)

    async def slow(self, seconds: float) -> None:
        """Hold back so long whatever the server says from now on."""
        await self._tell(f"slow {seconds}")

    async def refuse(self) -> None:
        """End every connection and take none."""
        await self._tell("refuse")

    async def accept(self) -> None:
        """Take connections again."""
        await self._tell("accept")

    async def lead_to(self, url: str) -> None:
        """Lead to another server; connections to the one before end."""
        parts = urlsplit(url)
        await self._tell(f"lead {parts.hostname} {parts.port}")

    def end(self) -> None:
        """Take it away, whatever state it is in."""
        if self.process.returncode is None:
            self.process.kill()

    async def _tell(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n".encode())
        await self._answer()

    async def _answer(self) -> bytes:
        assert self.process.stdout is not None
        async with asyncio.timeout(_SECONDS):
            line = await self.process.stdout.readline()
        assert line, "the cable's process has ended"
        return line


class _Far:
    """The far end, in the cable's own process."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._delay = 0.0
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def run(self) -> None:
        """Do what is said on standard input, a line each, until it ends."""
        loop = asyncio.get_running_loop()
        said = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), sys.stdin)
        await self._listen()
        self._say(str(self._port))
        while line := (await said.readline()).decode().split():
            match line:
                case ["slow", seconds]:
                    self._delay = float(seconds)
                case ["refuse"]:
                    await self._refuse()
                case ["accept"]:
                    await self._listen()
                case ["lead", host, port]:
                    self._target = (host, int(port))
                    self._hang_up()
                case _:
                    raise ValueError(line)
            self._say("done")

    @staticmethod
    def _say(words: str) -> None:
        sys.stdout.write(f"{words}\n")
        sys.stdout.flush()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._hang_up()

    def _hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        far = None
        try:
            far_reader, far = await asyncio.open_connection(*self._target)
            self._writers.add(far)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pipe(reader, far, delayed=False))
                group.create_task(self._pipe(far_reader, writer, delayed=True))
        except* (OSError, RuntimeError):
            pass  # RuntimeError is how uvloop tells of a transport that is closed
        finally:
            for one in (writer, far):
                if one is not None:
                    self._writers.discard(one)
                    one.transport.abort()

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, delayed: bool) -> None:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1000)

        async def pass_on() -> None:
            while (due := await pieces.get())[1]:
                if due[0] > loop.time():
                    await asyncio.sleep(due[0] - loop.time())
                target.write(due[1])
                await target.drain()
            with suppress(OSError):
                target.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(pass_on())
            piece = b"begin"
            while piece:
                piece = await source.read(_PIECE)
                await pieces.put((loop.time() + (self._delay if delayed else 0.0), piece))


if __name__ == "__main__":
    uvloop.run(_Far(sys.argv[1], int(sys.argv[2])).run())
