"""What Prometheus reads: of one process, of several together, and over HTTP."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from goodstanding import create_app
from goodstanding.embedded import Postgres, Valkey
from goodstanding.metrics import forget_ended_processes, render, shared_folder
from tests.serving import (
    BATCH,
    INVALIDATE,
    SINGLE,
    Backend,
    bearer,
    check_problem,
    clean_environment,
    client_of,
    open_backend,
)

_WORKER: Final = """
import sys
from goodstanding.metrics import DEPENDENCY_UP, LOADS, REQUEST_SECONDS, forget_ended_processes
forget_ended_processes()
LOADS.labels("miss").inc(3)
REQUEST_SECONDS.labels("/r", "GET", 200, "cache").observe(0.01)
DEPENDENCY_UP.labels("redis").set(int(sys.argv[1]))
sys.stdout.write("done\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def backend(postgres: Postgres, valkey: Valkey, template: str) -> Iterator[Backend]:
    """Give this module's database and Valkey."""
    with open_backend(postgres, valkey, template) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx2.Client]:
    """Give a client of a service with open metrics."""
    with client_of(create_app(backend.settings(metrics_public=True))) as opened:
        yield opened


def _samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("goodstanding_")
    }


def _sum(text: str, name: str, **labels: str) -> float:
    return sum(
        value
        for (sample, found), value in _samples(text).items()
        if sample == name and frozenset(labels.items()) <= found
    )


class _Worker:
    """Another process that counts into the shared folder and lives until it is told to end."""

    def __init__(self, folder: Path, up: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(up)],
            env=clean_environment({"PROMETHEUS_MULTIPROC_DIR": str(folder)}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert "done\n" == self.process.stdout.readline()

    def end(self) -> None:
        self.process.communicate(timeout=30)


def test_worker_processes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of all workers add up, of ended ones too, and a dependency is up where every living worker says so."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    seeing, blind = _Worker(tmp_path, up=1), _Worker(tmp_path, up=0)
    try:
        told = render().decode()
        assert 6.0 == _sum(told, "goodstanding_loads_total", reason="miss")
        assert 2.0 == _sum(told, "goodstanding_http_request_seconds_count", route="/r", source="cache")
        assert 0.0 == _sum(told, "goodstanding_dependency_up", dependency="redis")
        blind.end()
        forget_ended_processes()
        told = render().decode()
        assert 1.0 == _sum(told, "goodstanding_dependency_up", dependency="redis")
        assert 6.0 == _sum(told, "goodstanding_loads_total", reason="miss")
    finally:
        seeing.end()
        blind.end()


def test_a_folder_goes_with_its_last_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed `serve` left is removed by the next one, but not while a worker of it lives, nor anything else."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    used, left, linked, other = (
        tmp_path / name
        for name in ("goodstanding-metrics-1", "goodstanding-metrics-2", "goodstanding-metrics-3", "another")
    )
    for folder in (used, left, other):
        folder.mkdir()
        (folder / "something").touch()
    linked.symlink_to(other, target_is_directory=True)
    worker = _Worker(used, up=1)
    try:
        with shared_folder():
            mine = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
            assert {mine, used, linked, other} == {*tmp_path.iterdir()}
            with shared_folder():
                assert mine.exists()
            assert (used / "something").exists()
        assert {used, linked, other} == {*tmp_path.iterdir()}
        worker.process.kill()
    finally:
        worker.end()
    with shared_folder():
        assert not used.exists()
    assert {linked, other} == {*tmp_path.iterdir()}
    assert [other / "something"] == [*other.iterdir()]


def test_one_process_has_nothing_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a shared folder a process tells its own metrics."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    forget_ended_processes()
    assert b"goodstanding_loads_total" in render()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


def test_requests_are_timed_by_route_status_and_source(backend: Backend, client: httpx2.Client) -> None:
    """A request is counted under its route's template, method, status and where the reputation came from."""
    single = SINGLE.format("{user_id}")
    before = client.get("/metrics").text
    users = [backend.user(completed=1), backend.user()]
    for user in (*users, *users):
        client.get(SINGLE.format(user), headers=bearer()).raise_for_status()
    client.head(SINGLE.format(users[0]), headers=bearer()).raise_for_status()
    client.post(BATCH, json={"user_ids": users}, headers=bearer()).raise_for_status()
    client.post(BATCH, json={"user_ids": [*users, backend.user()]}, headers=bearer()).raise_for_status()
    client.post(INVALIDATE.format(users[0]), headers=bearer("service_role")).raise_for_status()
    check_problem(client.get(SINGLE.format("x"), headers=bearer()), 422)
    after = client.get("/metrics").text

    def counted(route: str, method: str, status: str, source: str) -> float:
        labels = {"route": route, "method": method, "status": status, "source": source}
        name = "goodstanding_http_request_seconds_count"
        return _sum(after, name, **labels) - _sum(before, name, **labels)

    assert 2.0 == counted(single, "GET", "200", "database")
    assert 2.0 == counted(single, "GET", "200", "cache")
    assert 1.0 == counted(single, "HEAD", "200", "cache")
    assert 1.0 == counted(single, "GET", "422", "none")
    assert 1.0 == counted(BATCH, "POST", "200", "cache")
    assert 1.0 == counted(BATCH, "POST", "200", "database")
    assert 1.0 == counted(INVALIDATE.format("{user_id}"), "POST", "200", "none")
    assert 3.0 == _sum(after, "goodstanding_cache_fills_total", result="stored") - _sum(
        before, "goodstanding_cache_fills_total", result="stored"
    )
    assert 3.0 == _sum(after, "goodstanding_loads_total", reason="miss") - _sum(
        before, "goodstanding_loads_total", reason="miss"
    )


def test_no_metric_names_anybody(backend: Backend, client: httpx2.Client) -> None:
    """No label holds an id, a subject or an unknown path, so a client cannot make the metrics grow."""
    users = [backend.user() for _ in range(5)]
    for user in users:
        client.get(SINGLE.format(user), headers=bearer(sub=f"subject-of-{user}"))
        client.get(f"/nope/{user}")
        client.request("PURGE", SINGLE.format(user))
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for user in users:
        assert user not in answer.text
    assert "nope" not in answer.text
    assert "PURGE" not in answer.text
    assert 1.0 == _sum(answer.text, "goodstanding_dependency_up", dependency="redis")
