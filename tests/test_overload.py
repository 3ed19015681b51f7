"""`goodstanding serve`, asked for more than it can load: it refuses at once, and goes on with everything else."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Final

import httpx2
import pytest

from goodstanding.embedded import Postgres, Valkey
from tests.parts import Proxy, eventually
from tests.serving import (
    SINGLE,
    Backend,
    bearer,
    check_problem,
    client_of_command,
    environment_of,
    free_port,
    open_backend,
)

_COUNT_SECONDS: Final = 0.05
_FIRST: Final = 20
_CROWD: Final = 150
_LIMITED: Final = {
    "GOODSTANDING_DATABASE_POOL_SIZE": "1",
    "GOODSTANDING_LOAD_DEADLINE_MS": "4000",
    "GOODSTANDING_READ_LIMIT_PER_MINUTE": "1000000",
}


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@asynccontextmanager
async def _slowly_served(backend: Backend) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve with one connection to a PostgreSQL that answers slowly; gives a client of any number of connections."""
    proxy = Proxy(backend.database.service_url, delay=lambda: _COUNT_SECONDS)
    port = free_port()
    async with proxy.serve():
        variables = environment_of(backend.settings()) | _LIMITED | {"GOODSTANDING_DATABASE_URL": proxy.url}
        serve = client_of_command("goodstanding", "serve", "--port", str(port), port=port, environment=variables)
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, serve)
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits, headers=bearer()
            ) as client:
                yield client
            await asyncio.to_thread(stack.close)


async def test_it_refuses_at_once_and_answers_everything_else(backend: Backend) -> None:
    """Of a crowd that nobody knows some are loaded; who would wait in vain is refused before the others are answered.

    Meanwhile hits, the health check and the metrics are answered.
    """
    users = [backend.user() for _ in range(1 + _FIRST + _CROWD)]
    cached, first, crowd = users[0], users[1 : 1 + _FIRST], users[1 + _FIRST :]
    async with _slowly_served(backend) as client:
        statuses = []

        async def read(user: str) -> httpx2.Response:
            answer = await client.get(SINGLE.format(user))
            if user in crowd:
                statuses.append(answer.status_code)
            return answer

        # Until some were loaded nobody knows how long it takes.
        assert {200} == {one.status_code for one in await asyncio.gather(*map(read, first))}
        # Whatever relay there is, what is as young as this is served.
        assert 200 == (await read(cached)).status_code
        async with asyncio.TaskGroup() as group:
            reads = [group.create_task(read(user)) for user in crowd]
            await eventually(lambda: 503 in statuses)
            hit = await read(cached)
            live = await client.get("/health/live")
            metrics = await client.get("/metrics", headers=bearer("service_role"))
            assert any(not one.done() for one in reads)
    assert [200] * 3 == [one.status_code for one in (hit, live, metrics)]
    assert "goodstanding; hit" in hit.headers["cache-status"]
    answers = [one.result() for one in reads]
    refused = [one for one in answers if one.status_code != 200]
    assert 0 < len(refused) < _CROWD
    for one in refused:
        check_problem(one, 503, "temporarily_unavailable")
        assert 0 < int(one.headers["retry-after"]) <= 60
    counted = re.findall(r"^goodstanding_loads_refused_total (\d+)", metrics.text, re.MULTILINE)
    assert 1 <= int(counted[0]) <= len(refused)
    assert 200 in statuses[statuses.index(503) + 1 :]
