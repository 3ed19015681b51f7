"""What reads and writes cost as one user's sessions, the users and the processes grow.

Run it as `python -m benchmarks.growth`: it measures, writes the raw numbers to results/growth.json, and draws from them
what the documentation shows; `--draw` only draws. All sizes of a kind exist at the same time and take turns with a
reference, so that each round gives ratios.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import random
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import structlog
import uvloop
from rich.console import Console

from benchmarks.drawing import RESULTS, draw, page_part
from benchmarks.environment import USERS, Connection, Cores, Environment, describe, filled, opened, user_id
from benchmarks.figures import CONNECTIONS, Effort, Round, flush, hot_requests, in_turns
from benchmarks.in_process import settle
from benchmarks.load import Load, get
from goodstanding import tallies
from goodstanding.data import UserId
from goodstanding.history import QUERIES
from goodstanding.main import open_service
from goodstanding.policy import STANDARD
from goodstanding.reputation_service import ReputationService, Source
from goodstanding.settings import load_settings

SESSIONS_A_MATCH: Final = 2
REFERENCE_SESSIONS: Final = 20
REFERENCE_USERS: Final = 1000
PARTNERS: Final = 10_000
CHECKED: Final = 10_000
COLD_CONNECTIONS: Final = 16
PROCESSES: Final = (1, 2, 3, 4)
RECOUNT: Final = "its statement, to be recounted"
OPERATIONS: Final = (
    *("cached read", "cold read", "its statement", "its statement, a change waiting", RECOUNT),
    *("write", "fold"),
)
FULL: Final = Effort(rounds=7, seconds=2.0, reads=100, keys=1000)
QUICK: Final = Effort(rounds=5, seconds=0.4, reads=20, keys=200)
_REFERENCE: Final = "reference"
_SEED: Final = 20
_GIB: Final = 2**30
_MOST_BYTES: Final = 25 * _GIB
_SPARE_BYTES: Final = 10 * _GIB
# A match's first user has the match's number, modulo the users; the other one is the next of the partners.
_USERS: Final = (
    "insert into public.user_profiles (id)"
    " select md5($1::text || '-user-' || n)::uuid from generate_series($2::integer, $3::integer - 1) as n"
)
_MATCHES: Final = (
    "insert into public.wingman_matches (id, user1_id, user2_id)"
    " select md5($1::text || '-match-' || n)::uuid, md5($1 || '-user-' || n % $4::integer)::uuid,"
    " md5($5::text || '-user-' || (n + 1) % $6::integer)::uuid from generate_series($2::integer, $3::integer - 1) as n"
)
_SESSIONS: Final = (
    "insert into public.wingman_sessions (id, match_id, status, scheduled_time, user1_completed_confirmed_by_user2)"
    " select md5($1::text || '-session-' || n || '-' || k)::uuid, md5($1 || '-match-' || n)::uuid,"
    " (array['completed', 'no_show', 'cancelled', 'scheduled'])[1 + (n + k) % 4], now(), true"
    " from generate_series($2::integer, $3::integer - 1) as n, generate_series(1, $4::integer) as k"
)
# Every key and index of the host's tables: how it goes, and how it comes back; what others need comes first.
_INDEXES: Final = """
select format('alter table %s drop constraint %I', made.conrelid::regclass, made.conname) as drop,
    format('alter table %s add constraint %I %s', made.conrelid::regclass, made.conname, pg_get_constraintdef(made.oid))
        as make,
    made.contype = 'f' as refers
from pg_constraint as made
where made.connamespace = 'public'::regnamespace and made.contype in ('p', 'f')
union all
select format('drop index %s', made.indexrelid::regclass), pg_get_indexdef(made.indexrelid), false
from pg_index as made
join pg_class as host on host.oid = made.indrelid and host.relnamespace = 'public'::regnamespace
where not made.indisprimary
order by refers, make
"""
# How many of these users have another tally than their sessions say. All that fill() inserts was confirmed of user1
# alone, nobody said whose fault anything was, and the policy is the standard: so a no-show is user2's.
_DIFFERING: Final = """
select count(*)
from unnest($1::uuid[]) as someone (id)
left join reputation.tallies as tally on tally.user_id = someone.id
    and tally.policy_version = (select version from reputation.policy)
cross join lateral (
    select count(*) filter (where status = 'completed') as completed,
        count(*) filter (where status = 'no_show' and side = 2) as no_shows
    from (
        select id, 1 as side from public.wingman_matches where user1_id = someone.id
        union all
        select id, 2 from public.wingman_matches where user2_id = someone.id
    ) as match
    join public.wingman_sessions as session on session.match_id = match.id
) as theirs
where (tally.completed, tally.no_shows) is distinct from (theirs.completed, theirs.no_shows)
"""
_WRITE: Final = (
    "update public.wingman_sessions set status = case status when 'completed' then 'no_show' else 'completed' end"
    " where id = md5($1::text)::uuid"
)
T = TypeVar("T")
Samples: TypeAlias = dict[str, dict[str, list[float]]]
"""One number per round, of each operation and each size."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Users of one size, and their matches of two sessions each; all ids are made from the label and a number."""

    name: str
    label: str
    users: int
    matches: int

    def user(self, number: int) -> UserId:
        """Name a user."""
        text = f"{self.label}-user-{number}"
        return UserId(str(UUID(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest())))

    def session(self, rng: random.Random) -> tuple[UserId, str]:
        """Choose a session; gives the first user of it, and what its id is made from."""
        match = rng.randrange(self.matches)
        return self.user(match % self.users), f"{self.label}-session-{match}-{rng.randint(1, SESSIONS_A_MATCH)}"

    async def fill(self, connections: Sequence[Connection], partners: "Crowd") -> None:
        """Insert them all, each connection its share."""
        others = (self.users, partners.label, partners.users)
        async with asyncio.TaskGroup() as tasks:
            for number, connection in enumerate(connections):
                share = (number / len(connections), (number + 1) / len(connections))
                tasks.create_task(self._fill(connection, share, others))

    async def _fill(self, connection: Connection, share: tuple[float, float], others: tuple[int, str, int]) -> None:
        users = [round(self.users * part) for part in share]
        matches = [round(self.matches * part) for part in share]
        await connection.execute(_USERS, self.label, *users)
        await connection.execute(_MATCHES, self.label, *matches, *others)
        await connection.execute(_SESSIONS, self.label, *matches, SESSIONS_A_MATCH)

    async def check(self, connection: Connection) -> None:
        """Compare the tallies of some of them, at most 10,000, with their sessions; raises RuntimeError."""
        rng = random.Random(_SEED)  # noqa: S311 - the same choices in every run
        some = [self.user(number) for number in rng.sample(range(self.users), min(self.users, CHECKED))]
        if differing := await connection.fetchval(_DIFFERING, some):
            message = f"{self.name}: {differing} of {len(some)} tallies are not what the sessions say"
            raise RuntimeError(message)


@dataclass(frozen=True, slots=True)
class Subject:
    """A crowd in its database, and who asks: the service, a connection with the service's login, one of the host's."""

    crowd: Crowd
    service: ReputationService
    reader: Connection
    host: Connection

    async def step(self, rng: random.Random, taken: "Taken") -> None:
        """Do every operation once, each with somebody chosen anew; a read that a fold alters is an error."""
        someone, _ = self.crowd.session(rng)
        await taken.time("its statement", self._counts(someone))
        writer, session = self.crowd.session(rng)
        await taken.time("write", self.host.execute(_WRITE, session))
        before = await taken.time("its statement, a change waiting", self._counts(writer))
        folded = await taken.time("fold", _fold(self.reader))
        if folded.changes != 1 or writer not in folded.users or await self._counts(writer) != before:
            raise RuntimeError(folded)
        someone, _ = self.crowd.session(rng)
        await self.service.invalidate([someone])
        for operation, source in (("cold read", Source.MISS), ("cached read", Source.HIT)):
            answer = await taken.time(operation, self.service.read(someone))
            if answer.source is not source:
                taken.of[operation].pop()  # the machine was too busy for Redis to answer in time: that is not asked
            await settle()

    async def recount(self, rng: random.Random, taken: "Taken") -> None:
        """Read somebody whose tally is void, as it is after a verdict, and have it counted."""
        someone, _ = self.crowd.session(rng)
        before = await self._counts(someone)
        await self.host.fetch(tallies.QUERIES["mark"], someone)
        counted = await taken.time(RECOUNT, self._counts(someone))
        await _fold(self.reader)
        await tallies.recount(self.reader, 100)
        if counted != before or await self._counts(someone) != before:
            raise RuntimeError(before)

    async def _counts(self, user: UserId) -> tuple[int, int]:
        (row,) = await self.reader.fetch(QUERIES["counts"], [user], *STANDARD.meaning)
        return row["completed"], row["no_shows"]


@dataclass(slots=True)
class Taken:
    """Microseconds of each operation."""

    of: dict[str, list[float]] = field(default_factory=dict)

    async def time(self, operation: str, call: Awaitable[T]) -> T:
        """Wait for something, and note for how long."""
        began = time.perf_counter()
        result = await call
        self.of.setdefault(operation, []).append(1_000_000 * (time.perf_counter() - began))
        return result


def sessions(env: Environment, effort: Effort, most: int) -> dict[str, Any]:
    """Compare users with 10, 100, ... sessions with one who has 20; all in one database."""
    sizes = _powers(10, most)
    named = {_REFERENCE: REFERENCE_SESSIONS, **{str(size): size for size in sizes}}
    crowds = [Crowd(name, f"sessions-{name}", 1, size // SESSIONS_A_MATCH) for name, size in named.items()]
    partners = Crowd("partners", "partner", PARTNERS, 0)

    async def measure() -> tuple[Samples, int]:
        url = await _made(env, "sessions", [partners, *crowds], partners)
        async with _subjects(env, [(crowd, "sessions", url) for crowd in crowds]) as subjects:
            taken = await _in_turns(subjects, effort, recounts=True)
        return taken, await _dropped(env, "sessions")

    with _measuring(env):
        taken, size = uvloop.run(measure())
    note = f"The database had {size // 2**20:,} MiB."
    return {"reference": _REFERENCE, "sizes": named, "unit": "µs", "note": note, "values": taken}


def users(env: Environment, effort: Effort, most: int) -> dict[str, Any]:
    """Compare databases of 1,000, 10,000, ... users with one of 1,000, as far as the disk allows."""
    sizes = _powers(REFERENCE_USERS, most)
    named = {_REFERENCE: REFERENCE_USERS, **{str(size): size for size in sizes}}
    bytes_of: dict[str, int] = {}

    async def measure() -> tuple[Samples, str]:
        made = []
        stopped = ""
        for name, size in named.items():
            stopped = _no_room(env, size, bytes_of)
            if stopped:
                break
            database = f"users_{name}"
            crowd = Crowd(name, f"users-{name}", size, size)
            made.append((crowd, database, await _made(env, database, [crowd], crowd)))
            bytes_of[name] = await _bytes(env, database)
        async with _subjects(env, made) as subjects:
            taken = await _in_turns(subjects, effort, recounts=False)
        for _, database, _ in made:
            await _dropped(env, database)
        return taken, stopped

    with _measuring(env):
        taken, stopped = uvloop.run(measure())
    return {
        "reference": _REFERENCE,
        "sizes": {name: named[name] for name in bytes_of},
        "mib": {name: size // 2**20 for name, size in bytes_of.items()},
        "unit": "µs",
        "note": stopped,
        "values": taken,
    }


def processes(env: Environment, effort: Effort, most: int) -> dict[str, Any]:
    """Compare the answers per second of several processes with those of one; all cores for everybody."""
    for pid in (0, env.postgres.pid, env.valkey.pid):
        Cores.pin(pid, *env.cores.both)
    with ExitStack() as stack:
        stack.enter_context(env.relay())
        # How many are answered is asked, so what is late on a busy machine is not to be refused.
        alone = {"GOODSTANDING_RELAY": "false", "GOODSTANDING_LOAD_DEADLINE_MS": "10000"}
        servers = {
            str(number): stack.enter_context(env.goodstanding(pinned=False, workers=number, settings=alone))
            for number in PROCESSES[:most]
        }
        requests = hot_requests(env)
        for server in servers.values():
            env.load(Load("closed", [server.port], requests, CONNECTIONS, seconds=1.0))
        hot = in_turns(env, effort, servers, requests)
        cold: dict[str, list[Round]] = {name: [] for name in servers}
        token = env.token(user_id(0))
        for number in range(-1, effort.rounds):
            # Others than in the round before: a process keeps in memory what it has just read.
            some = [get(user_id((number * effort.keys + each) % USERS), token) for each in range(effort.keys)]
            for name, server in servers.items():
                flush(env)
                cpu = server.cpu_seconds()
                result = env.load(Load("closed", [server.port], some, COLD_CONNECTIONS, seconds=60, once=True))
                if number < 0:
                    continue  # every process opens its connections to PostgreSQL, which may take longer than a read may
                cold[name].append(Round())
                cold[name][-1].add(result, server.cpu_seconds() - cpu)
                # A miss; or, where Redis was too late on a busy machine, a bypass: PostgreSQL answers both.
                if cold[name][-1].hits:
                    message = f"a cold read that was a hit: {result.sources}"
                    raise RuntimeError(message)
    rounds = {"hot read": hot, "cold read": cold}
    cores = _each(rounds, lambda one: one.cpu / one.seconds)
    used = ", ".join(f"{kind} {max(map(statistics.median, of.values())):.2f}" for kind, of in cores.items())
    note = f"Of the cores the processes had at most: {used}."
    return {
        "reference": "1",
        "sizes": {name: int(name) for name in servers},
        "unit": "/s",
        "note": note,
        "generator_busy": _each(rounds, lambda one: one.busy),
        "cores_used": cores,
        "share_of_hits": _each(rounds, lambda one: one.hits / one.requests),
        "values": _each(rounds, lambda one: one.requests / one.seconds),
    }


Measurement = Callable[[Environment, Effort, int], dict[str, Any]]
MEASUREMENTS: Final[Mapping[str, tuple[Measurement, int, int]]] = {
    "sessions": (sessions, 1_000_000, 1000),
    "users": (users, 1_000_000, 10_000),
    "processes": (processes, PROCESSES[-1], PROCESSES[-1]),
}
"""What can be measured, and up to which size: by default and with --quick."""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw what was recorded")
    parser.add_argument("--quick", action="store_true", help="small sizes, short rounds: shows that it works")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="keep the rest")
    for name, (_, most, _) in MEASUREMENTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"up to how many (default {most:,})")
    options = parser.parse_args()
    if not options.draw:
        for name, section in _measured(options):
            print(page_part({name: section}))
            if not options.quick:
                _record(name, section)
    if options.draw or not options.quick:
        draw()


def _measured(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    effort = QUICK if options.quick else FULL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with Console().status("starting PostgreSQL and Valkey") as status, opened() as env:
        for name in options.only:
            status.update(f"measuring {name}")
            machine = describe(env.cores)
            measure, most, quick = MEASUREMENTS[name]
            section = measure(env, effort, getattr(options, name) or (quick if options.quick else most))
            values = {
                kind: {size: _summary(values) for size, values in of.items()} for kind, of in section["values"].items()
            }
            yield name, {"machine": machine, "effort": asdict(effort), **section, "values": values}


def _record(name: str, section: dict[str, Any]) -> None:
    """Write a section to the raw numbers, the others stay; at once, for the next one may take long."""
    recorded = {name: section}
    if RESULTS.exists():
        recorded = json.loads(RESULTS.read_text("utf-8")) | recorded
    ordered = {one: recorded[one] for one in MEASUREMENTS if one in recorded}
    RESULTS.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _powers(first: int, most: int) -> list[int]:
    """Give first, 10 x first, ..., as long as they are not beyond the most."""
    sizes = []
    while first <= most:
        sizes.append(first)
        first *= 10
    return sizes


@contextmanager
def _measuring(env: Environment) -> Iterator[None]:
    """Have the core of whatever is measured, beside PostgreSQL and Valkey on the other one."""
    Cores.pin(0, env.cores.measured)
    try:
        yield
    finally:
        Cores.pin(0, env.cores.rest)


async def _made(env: Environment, database: str, crowds: Sequence[Crowd], partners: Crowd) -> str:
    async def fill(connection: Connection) -> None:
        async with _unindexed(connection), _connected(env.postgres.url(database)) as another:
            for crowd in crowds:
                await crowd.fill((connection, another), partners)
        await connection.execute("vacuum analyze")

    url = await filled(env.postgres, database, fill)
    async with _connected(url) as reader:
        while await tallies.pending(reader):
            await _fold(reader)
    async with _connected(env.postgres.url(database)) as admin:
        for crowd in crowds:
            await crowd.check(admin)
        await admin.execute("checkpoint")
    return url


@asynccontextmanager
async def _unindexed(connection: Connection) -> AsyncIterator[None]:
    """Take keys and indexes off the host's tables, and make them when the rows are there: sorted once, checked once."""
    indexes = await connection.fetch(_INDEXES)
    for index in reversed(indexes):
        await connection.execute(index["drop"])
    yield
    await connection.execute("set maintenance_work_mem = '512MB'")
    for index in indexes:
        await connection.execute(index["make"])
    await connection.execute("reset maintenance_work_mem")


async def _fold(reader: Connection) -> tallies.Folded:
    """Fold as the relay does, but tell no cache."""
    async with reader.transaction(isolation="read_committed"):
        return await tallies.fold(reader, 2000)


async def _bytes(env: Environment, database: str) -> int:
    async with _connected(env.postgres.url()) as admin:
        size: int = await admin.fetchval("select pg_database_size($1::text)", database)
        return size


async def _dropped(env: Environment, database: str) -> int:
    """Drop a database, and give how large it was."""
    size = await _bytes(env, database)
    async with _connected(env.postgres.url()) as admin:
        await admin.execute(await admin.fetchval("select format('drop database %I with (force)', $1::text)", database))
    return size


def _no_room(env: Environment, size: int, bytes_of: Mapping[str, int]) -> str:
    """Tell why the next database cannot be made, judging by the largest one so far; empty when it can."""
    largest = max(bytes_of.items(), key=lambda one: one[1], default=None)
    if largest is None:
        return ""
    needed = round(largest[1] * size / (REFERENCE_USERS if largest[0] == _REFERENCE else int(largest[0])))
    used = sum(bytes_of.values())
    free = shutil.disk_usage(env.postgres.data_dir).free
    if used + needed <= _MOST_BYTES and needed + _SPARE_BYTES <= free:
        return ""
    return (
        f"{size:,} users would need {needed / _GIB:.0f} GiB more: {free / _GIB:.0f} GiB of the disk were free,"
        f" of which at most {_MOST_BYTES / _GIB:.0f} are used."
    )


@asynccontextmanager
async def _subjects(env: Environment, made: Sequence[tuple[Crowd, str, str]]) -> AsyncIterator[list[Subject]]:
    names = {name.removeprefix("GOODSTANDING_").lower(): value for name, value in env.settings.items()}
    async with AsyncExitStack() as stack:
        yield [
            Subject(
                crowd,
                (await stack.enter_async_context(open_service(load_settings(**names | {"database_url": url})))).service,
                await stack.enter_async_context(_connected(url)),
                await stack.enter_async_context(_connected(env.postgres.url(database))),
            )
            for crowd, database, url in made
        ]


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def _in_turns(subjects: Sequence[Subject], effort: Effort, *, recounts: bool) -> Samples:
    """Give the median microseconds of every operation per round, the subjects taking turns at each step."""
    rng = random.Random(_SEED)  # noqa: S311 - the same choices in every run
    medians: Samples = {operation: {} for operation in OPERATIONS if recounts or operation != RECOUNT}
    for number in range(-1, effort.rounds):
        taken = {subject.crowd.name: Taken() for subject in subjects}
        for _ in range(effort.reads):
            for subject in subjects:
                await subject.step(rng, taken[subject.crowd.name])
        for subject in subjects if recounts else ():
            await subject.recount(rng, taken[subject.crowd.name])
        if number >= 0:
            for name, one in taken.items():
                for operation, values in one.of.items():
                    if len(values) < effort.reads / 2 and operation != RECOUNT:
                        message = f"{operation}: Redis was in time for {len(values)} of {effort.reads}"
                        raise RuntimeError(message)
                    medians[operation].setdefault(name, []).append(statistics.median(values))
    return medians


def _each(rounds: Mapping[str, Mapping[str, Sequence[Round]]], say: Callable[[Round], float]) -> Samples:
    return {
        kind: {name: [round(say(one), 3) for one in each] for name, each in of.items()} for kind, of in rounds.items()
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    rounded = [float(f"{value:.4g}") for value in values]
    return {
        "median": statistics.median(rounded),
        "lowest": min(rounded),
        "highest": max(rounded),
        "values": rounded,
    }


if __name__ == "__main__":
    main()
