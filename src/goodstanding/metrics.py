"""Every metric, once. They live in prometheus-client's default registry, so a host app's /metrics shows them too.

Several worker processes add up when PROMETHEUS_MULTIPROC_DIR is set before this module is imported (`serve` does).
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

if sys.platform != "win32":
    import fcntl

_FOLDERS: Final = "goodstanding-metrics-"
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

REQUEST_SECONDS: Final = Histogram(
    "goodstanding_http_request_seconds",
    "Time to answer a request, by route template, status and where the answer came from "
    "(cache, database, stale, or none where no reputation was read).",
    ("route", "method", "status", "source"),
    buckets=_SECONDS,
)
REQUESTS_REFUSED: Final = Counter(
    "goodstanding_http_refused_total",
    "Requests refused before any route saw them whole, by code: bad_request (malformed), headers_too_large, "
    "payload_too_large, request_timeout.",
    ("code",),
)
CACHE_READS: Final = Counter(
    "goodstanding_cache_reads_total",
    "Reputations looked up in the cache, by result: hit, miss, or away where the cache could not be asked.",
    ("result",),
)
CACHE_REJECTED: Final = Counter(
    "goodstanding_cache_rejected_total",
    "Cached entries that were not served, by reason: corrupt, other_policy, other_user.",
    ("reason",),
)
CACHE_FILLS: Final = Counter(
    "goodstanding_cache_fills_total",
    "Attempts to store a loaded value, by result: stored, or lost where the lease no longer held.",
    ("result",),
)
LOADS: Final = Counter(
    "goodstanding_loads_total",
    "Users loaded from PostgreSQL, by reason: miss, refresh (ahead of expiry), request (use_cache=false), away.",
    ("reason",),
)
LOADS_REFUSED: Final = Counter(
    "goodstanding_loads_refused_total", "Users refused with 503 because as many loads waited as may."
)
STALE_SERVED: Final = Counter(
    "goodstanding_stale_served_total", "Last known good copies served because PostgreSQL could not answer."
)
INVALIDATIONS: Final = Counter(
    "goodstanding_invalidations_total",
    "Users whose cached reputation was dropped, by result: done or failed.",
    ("result",),
)
QUERY_SECONDS: Final = Histogram(
    "goodstanding_query_seconds", "Time of a database query, by its name.", ("query",), buckets=_SECONDS
)
QUERY_ERRORS: Final = Counter("goodstanding_query_errors_total", "Database queries that failed, by name.", ("query",))
DEPENDENCY_UP: Final = Gauge(
    "goodstanding_dependency_up",
    "1 while the dependency's circuit is closed (for relay: while one is heard), 0 while it is open.",
    ("dependency",),
    multiprocess_mode="livemin",
)
CHANGES_FOLDED: Final = Counter("goodstanding_changes_folded_total", "Changes that this process's relay carried on.")
CHANGE_SECONDS: Final = Histogram(
    "goodstanding_change_seconds",
    "Age of the oldest change of a batch when its users' cached reputations were dropped.",
    buckets=(*_SECONDS, 10.0, 60.0, 600.0),
)
RELAY_FAILURES: Final = Counter(
    "goodstanding_relay_failures_total",
    "Failures that ended an attempt of this process's relay to carry changes, by cause (an exception's class).",
    ("cause",),
)
USERS_RECOUNTED: Final = Counter("goodstanding_users_recounted_total", "Users whose tally the relay counted again.")
RELAY_LEADING: Final = Gauge(
    "goodstanding_relay_leading",
    "1 while this process's relay carries the changes; over the fleet the sum is 1.",
    multiprocess_mode="livesum",
)
BROADCAST_LISTENERS: Final = Gauge(
    "goodstanding_broadcast_listeners",
    "Processes that hear which users changed.",
    multiprocess_mode="livesum",
)
RATE_LIMITED: Final = Counter(
    "goodstanding_rate_limited_total", "Requests refused by a rate limit, by kind.", ("kind",)
)
STREAMS: Final = Gauge("goodstanding_streams", "Streams that are open.", multiprocess_mode="livesum")
STREAM_EVENTS: Final = Counter("goodstanding_stream_events_total", "Events that were sent, over all streams.")
STREAMS_ENDED: Final = Counter(
    "goodstanding_streams_ended_total",
    "Streams that ended, by reason: gone (the client), slow (it did not read), expired (its token), revoked (the key "
    "of its token), aged (after an hour), stopped (we).",
    ("reason",),
)


def render() -> bytes:
    """Give the metrics of this process, or of all worker processes together, as Prometheus text."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


@contextmanager
def shared_folder() -> Iterator[None]:
    """Let the worker processes that are started in the block add up, in a folder that goes when it ends.

    Whoever is killed leaves his behind. The next one of the same user removes it, unless a process of it is left: each
    holds a lock, which no process outlives.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        _remove_unless_held(path)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDERS))
        _hold(folder)
        if folder.exists():  # else somebody who starts as well took it for one that was left
            break
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hold(folder: Path) -> None:
    """Keep a folder from being removed by others, as long as this process lives."""
    if sys.platform != "win32":
        with suppress(OSError):  # not every file system knows locks; there nobody removes anything
            # Never closed: that would end the lock.
            fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH)


def _remove_unless_held(folder: Path) -> None:
    if sys.platform != "win32":
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def forget_ended_processes() -> None:
    """Drop what worker processes that have ended said of the present, and hold the folder: a worker's first deed."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None or os.name != "posix":
        return
    _hold(Path(folder))
    for pid in {int(path.stem.rpartition("_")[2]) for path in Path(folder).glob("gauge_live*.db")}:
        try:
            os.kill(pid, 0)
        except OSError:  # nobody has this number now, or somebody else
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
