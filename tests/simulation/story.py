"""What one seed tells: a fleet, a host that writes, people who read, faults; and what must hold all the while."""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest.mock import patch

import asyncpg
import structlog
from pydantic import SecretStr

from goodstanding import cache, changes, main
from goodstanding import reputation_service as service_module
from goodstanding.broadcast import Freshness
from goodstanding.cache import lease_key
from goodstanding.changes import Relay
from goodstanding.data import UserId
from goodstanding.errors import CacheAwayError, TemporarilyUnavailableError
from goodstanding.memory import MemoryCache, MemoryTier
from goodstanding.reputation_service import ReputationService, Source
from goodstanding.settings import Settings, load_settings
from tests.parts import user
from tests.simulation.bugs import BUGS
from tests.simulation.postgres import Connection, Pool, Postgres, open_connection
from tests.simulation.redis import Keys, Redis, RedisClient
from tests.simulation.world import Process, Route, World

STALE_SECONDS: Final = 2.0
"""Whatever breaks, no answer is older than this, unless it says that it is stale."""

_LASTING: Final = 300
_ARMED_SECONDS: Final = 0.25
_WATCHED: Final = frozenset({"DEL", "PUBLISH", "_fold", "_commit"})
_BEGIN: Final = 0.5
_WRITES_UNTIL: Final = 1.2
_RECOVERY: Final = 2.5
_SHUTDOWN: Final = 8.0
_BURIAL: Final = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is settled before anything happens. Delays are one way, in seconds."""

    scenario: str
    settings: tuple[Settings, ...]
    """One for each process."""
    redis: bool
    users: int
    strangers: int
    delays: tuple[float, ...]
    query_delay: float
    hesitation: float
    skew: float
    batch: int

    @property
    def relays(self) -> int:
        """How many processes may carry changes."""
        return sum(settings.relay for settings in self.settings)

    @property
    def soon(self) -> float:
        """How long a change may take to reach every process while nothing breaks, in seconds."""
        poll = max(settings.relay_poll_ms for settings in self.settings) / 1000
        return poll + 24 * max(self.delays) + (0.08 if self.hesitation else 0.01)


@lru_cache
def _usual() -> Settings:
    return load_settings(database_url="postgresql://app@simulated/app", jwt_secret="x" * 40)


def draw_plan(rng: random.Random, scenario: str) -> Plan:
    """Settle the plan of a seed."""
    redis = rng.random() < 0.75
    processes = rng.choice((2, 2, 3))
    relays = rng.choice(SCENARIOS[scenario].relays)
    deadline = rng.choice((200, 500, 1000))
    life = rng.choice((1, 2, _LASTING, _LASTING))
    options: dict[str, object] = {
        "redis_url": SecretStr("redis://simulated/0" if redis else ""),
        "memory_seconds": rng.choice((0, 1, 10, 300, 300)),
        "relay_poll_ms": rng.choice((20, 100, 200, 200)),
        "cache_ttl_seconds": life,
        "unknown_ttl_seconds": min(life, 30),
        "load_deadline_ms": deadline,
        "cache_wait_ms": rng.choice((0, 50, 200)),
        "redis_deadline_ms": 50,
    }
    slowest = rng.choice((0.0005, 0.002, 0.006))
    return Plan(
        scenario=scenario,
        settings=tuple(
            _usual().model_copy(update={**options, "relay": number < relays}) for number in range(processes)
        ),
        redis=redis,
        users=rng.choice((1, 1, 2, 3)),
        strangers=rng.choice((0, 0, 1)),
        delays=tuple(rng.choice((0.0, 0.0001, slowest / 4, slowest * rng.random(), slowest)) for _ in range(16)),
        # A read may wait for half of the deadline before its own query, which takes two of these at most.
        query_delay=deadline / 1000 * rng.choice((0.01, 0.1, 0.2)),
        hesitation=rng.choice((0.0, 0.0, 0.02)),
        skew=rng.choice((0.0, 0.0, 0.1)),
        batch=rng.choice((1, 2, 2000)),
    )


class Member(Process):
    """A process of the fleet, which runs the product as `goodstanding.main` puts it together."""

    def __init__(self, story: "Story", number: int, generation: int) -> None:
        rng = story.world.rng
        super().__init__(
            story.world,
            f"{'abc'[number]}{generation or ''}",
            uptime=float(rng.randint(100, 9000)),
            skew=rng.uniform(-1, 1) * story.plan.skew,
            hesitation=story.plan.hesitation,
        )
        self.number = number
        self.generation = generation
        self.story = story
        self.to_redis = Route(self.world, story.plan.delays)
        self.to_postgres = Route(self.world, story.plan.delays)
        self.service: ReputationService | None = None
        self.freshness: Freshness | None = None
        self.floors: dict[UserId, float] = {}
        """What was committed before these moments must be in what is read from now on: the user was invalidated."""
        self.ended = asyncio.Event()
        self.main = self.start(self._serve(), name=self.name)

    async def _serve(self) -> None:
        async with main.open_service(self.story.plan.settings[self.number], live=True) as opened:
            self.world.note(self.name, "serves")
            self.service, self.freshness = opened.service, opened.freshness
            await self.ended.wait()
            self.service = None

    @property
    def believes(self) -> bool:
        """Whether it runs and answers whatever is cached."""
        runs = self.alive and self.service is not None and self.world.now >= self.frozen_until
        return runs and self.freshness is not None and self.freshness.trusted()

    def kill(self) -> None:
        """End at once; the machine closes its connections."""
        self.world.note(self.name, "is killed")
        self.alive = False
        for route in (self.to_redis, self.to_postgres):
            for link in sorted(route.links, key=lambda link: link.number):
                link.close()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a seed."""

    seed: int
    scenario: str
    violations: tuple[str, ...]
    trace: str
    events: int
    reads: int


class Story:
    """One run."""

    def __init__(self, seed: int, scenario: str | None = None, *, traced: bool = False) -> None:
        self.seed = seed
        self.world = World(seed, traced=traced)
        rng = self.world.rng
        drawn = rng.choice(list(SCENARIOS))
        self.plan = draw_plan(rng, scenario or drawn)
        self.known = [user(number + 1) for number in range(self.plan.users)]
        self.strangers = [user(0xE0 + number) for number in range(self.plan.strangers)]
        self.everybody = [*self.known, *self.strangers]
        self.redis = Redis(self.world, pause=rng.choice((0.0, 0.2)))
        self.postgres = Postgres(self.world, self.everybody, query_delay=self._query_delay)
        for stranger in self.strangers:
            self.postgres.versions[stranger][:] = [replace(self.postgres.versions[stranger][0], completed=None)]
        self.members: list[Member] = []
        self.dead: list[Member] = []
        self.reads = 0
        self.healed_at = 0.0
        self._rewound = -1.0
        self._kept: list[Keys] = []
        self._armed: dict[str, tuple[Fault, float]] = {}
        self._reach = 4 * max(self.plan.delays)
        self.world.happened = self._happened

    # The run.

    def tell(self) -> Outcome:
        """Run from the beginning to the end."""
        world = self.world
        world.note("world", repr(self.plan)[:2000] if world.traced else "")
        with patch.object(changes, "_BATCH", self.plan.batch):
            try:
                for number in range(len(self.plan.settings)):
                    world.at(world.rng.random() * 0.1, self._begin, number, 0)
                self._write_script()
                world.run(self.healed_at + _RECOVERY if self.healed_at else _WRITES_UNTIL + 0.6)
                self._check_the_end()
                self._shut_down()
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this seed
                world.violated("world", f"{error!r} at {_place(error)}")
            finally:
                violations = tuple(world.violations)
                self._bury()
        return Outcome(self.seed, self.plan.scenario, violations, world.trace, world.events, self.reads)

    def _begin(self, number: int, generation: int) -> None:
        member = Member(self, number, generation)
        while len(self.members) <= number:
            self.members.append(member)
        self.members[number] = member

    def _write_script(self) -> None:
        """Settle when the host writes, who reads when, and what breaks."""
        world, rng = self.world, self.world.rng
        moments = [_BEGIN]
        for _ in range(rng.randint(1, 4)):
            when = rng.uniform(_BEGIN, _WRITES_UNTIL)
            moments.append(when)
            world.at(when, self._write, rng.choice(self.everybody), rng.random())
            if rng.random() < 0.4:
                world.at(when + _soon(rng, 0.3), self._invalidate, self._somebody(), self._some_users())
        scenario = SCENARIOS[self.plan.scenario]
        for fault in rng.choices(scenario.faults, k=rng.randint(1, 3)):
            when = rng.uniform(_BEGIN, _WRITES_UNTIL)
            seconds = rng.choice((0.02 * 50 ** rng.random(), rng.uniform(1.5, 3)))
            if self.plan.scenario != "calm":
                self.healed_at = max(self.healed_at, when + _ARMED_SECONDS + seconds)
            if rng.random() < 0.7:
                world.at(when, self._arm, rng.choice(scenario.moments), fault, seconds)
            else:
                world.at(when, self._break, fault, seconds)
        for moment in moments:
            self._read_around(moment)

    def _read_around(self, moment: float) -> None:
        """Have people read soon after a moment, and some just before it, so that something is cached."""
        rng = self.world.rng
        latest = 3.0 if self.healed_at else 0.5
        for _ in range(rng.randint(2, 6)):
            self.world.at(
                moment + _soon(rng, latest), self._ask, self._somebody(), self._some_users(), rng.random() > 0.1
            )
        if rng.random() < 0.5:
            number, users = self._somebody(), self._some_users()
            for _ in range(2):
                self.world.at(moment - rng.random() * 0.02, self._ask, number, users, True)  # noqa: FBT003 - an event's argument

    def _break(self, fault: "Fault", seconds: float) -> None:
        fault(self, seconds)
        if self.plan.scenario != "calm":
            self._read_around(self.world.now + seconds)
            if self.world.rng.random() < 0.7:
                self.world.after(self.world.rng.random() * 0.05, self.write_again, 0.0)

    def _arm(self, moment: str, fault: "Fault", seconds: float) -> None:
        """Let something break as soon as a server does something, or at last in a while."""
        self._armed[moment] = fault, seconds
        self.world.after(_ARMED_SECONDS, self._fire, moment)

    def _fire(self, moment: str) -> None:
        armed = self._armed.pop(moment, None)
        if armed is not None:
            self._break(*armed)

    def _happened(self, what: str) -> None:
        """Have something break, or somebody read, about when a server does something that matters."""
        rng = self.world.rng
        self._check_belief()
        if what in self._armed:
            self.world.after(rng.random() * self._reach * rng.choice((0, 1)), self._fire, what)
        if what in _WATCHED and self.world.now > _BEGIN and rng.random() < 0.3:
            self.world.after(rng.random() * self._reach, self._ask, self._somebody(), self._some_users(), True)  # noqa: FBT003 - an event's argument

    def _check_belief(self) -> None:
        """Whoever believes what is cached has been told of all that was committed two seconds ago."""
        told_until = self.postgres.changes[0].at if self.postgres.changes else self.world.now
        if self.world.now - told_until > STALE_SECONDS:
            for member in self.members:
                if member.believes:
                    self.world.violated(
                        member.name, f"believes what is cached, with a change waiting since {told_until:.6f}"
                    )

    def _somebody(self) -> int:
        return self.world.rng.randrange(len(self.plan.settings))

    def _some_users(self) -> list[UserId]:
        if self.world.rng.random() < 0.15:
            return self.everybody
        return [self.world.rng.choice(self.everybody)]

    def _query_delay(self) -> float:
        rng = self.world.rng
        return rng.random() * self.plan.query_delay if rng.random() < 0.5 else rng.random() * 0.001

    # What happens in it.

    def _write(self, who: UserId, chance: float) -> None:
        if self.postgres.down:
            return
        self._kept.append(dict(self.redis.keys))
        if chance < 0.1:
            self.postgres.complete_everybody()
        elif chance < 0.25:
            self.postgres.delete(who)
        else:
            self.postgres.complete(who)

    def _ask(self, number: int, users: Sequence[UserId], use_cache: bool) -> None:  # noqa: FBT001 - an event's argument
        member = self.members[number]
        if member.alive and member.service is not None:
            member.start(self._read(member, users, use_cache=use_cache))

    def _invalidate(self, number: int, users: Sequence[UserId]) -> None:
        member = self.members[number]
        if member.alive and member.service is not None:
            member.start(self._drop(member, member.service, users))

    async def _drop(self, member: Member, service: ReputationService, users: Sequence[UserId]) -> None:
        began = self.world.now
        try:
            if len(users) == len(self.everybody) > 1:
                await service.invalidate_all()
            else:
                await service.invalidate(users)
        except CacheAwayError:
            if self.plan.scenario == "calm":
                self.world.violated(member.name, "could not invalidate")
            return
        self.world.note(member.name, f"has invalidated {[who[-2:] for who in users]}, since {began:.6f}")
        if began > self._rewound:
            member.floors.update(dict.fromkeys(users, began))

    async def _read(self, member: Member, users: Sequence[UserId], *, use_cache: bool, final: bool = False) -> bool:
        """Read, and check what is answered; tells whether all of it came from the cache."""
        service = member.service
        if service is None:
            return False
        began = self.world.now
        known = dict(member.floors)
        self.reads += 1
        try:
            answers = await _answers(service, users, use_cache=use_cache)
        except TemporarilyUnavailableError:
            self.world.note(member.name, "could not answer")
            if final or self.plan.scenario == "calm":
                self.world.violated(member.name, "could not answer")
            return False
        # A Redis that was rewound meanwhile may have forgotten that it was told to drop something.
        floors = known if began > self._rewound else {}
        bound = self.plan.soon if self.plan.scenario == "calm" else STALE_SECONDS
        for who, answer in answers.items():
            completed = None if answer.data is None else answer.data.completed_sessions
            since = max(began - bound, floors.get(who, -1.0))
            if answer.source is Source.STALE:
                since = floors.get(who, -1.0)
            elif final or not use_cache:
                since = began
            self.world.note(member.name, f"answers {who[-2:]} = {completed} ({answer.source}), asked {began:.6f}")
            if not self.postgres.may_answer(who, completed, since=since):
                self.world.violated(
                    member.name,
                    f"answers {who[-2:]} = {completed} ({answer.source}) at {began:.6f}, "
                    f"not the truth since {since:.6f}",
                )
        return all(answer.source is Source.HIT for answer in answers.values())

    # What breaks.

    def _victim(self) -> Member | None:
        """Choose a living process, as a rule the one that leads."""
        rng = self.world.rng
        leader = self.postgres.leader
        alive = [member for member in self.members if member.alive]
        if leader is not None and leader.link.process in alive and rng.random() < 0.6:
            return leader.link.process
        return rng.choice(alive) if alive else None

    def kill(self, seconds: float) -> None:
        """Kill a process, and start it again later."""
        member = self._victim()
        if member is not None:
            member.kill()
            self.dead.append(member)
            self.world.after(min(seconds, 1.0), self._begin, member.number, member.generation + 1)

    def freeze(self, seconds: float) -> None:
        """Freeze a process."""
        member = self._victim()
        if member is not None:
            self.world.note(member.name, f"is frozen for {seconds:.3f} s")
            member.freeze(seconds)

    def hang_redis(self, seconds: float) -> None:
        """Let Redis answer nothing."""
        if not self.redis.hung and not self.redis.down:
            self.world.note("redis", f"hangs for {seconds:.3f} s")
            self.redis.hang(seconds)

    def refuse_writes(self, seconds: float) -> None:
        """Let Redis take no writes."""
        self.world.note("redis", f"takes no writes for {seconds:.3f} s")
        self.redis.refusing = True
        self.world.after(seconds, setattr, self.redis, "refusing", False)  # noqa: FBT003 - setattr knows no names

    def stop_redis(self, seconds: float) -> None:
        """Stop Redis, and start it again empty."""
        if not self.redis.down:
            self.world.note("redis", f"is stopped for {seconds:.3f} s, and loses everything")
            self.redis.stop()
            self.world.after(seconds, self.redis.restart, {})

    def rewind_redis(self, seconds: float) -> None:
        """Stop Redis, and start it again, perhaps at once, with what it knew some time ago."""
        if self.redis.down:
            return
        rng = self.world.rng
        keys = rng.choice(self._kept) if self._kept else {}
        self.world.note("redis", f"is stopped; it comes back with {len(keys)} keys of the past")
        self.redis.stop()
        self._rewound = self.world.now
        for member in self.members:
            member.floors.clear()
        self.world.after(seconds if rng.random() < 0.5 else 0.0, self.redis.restart, keys)

    def cut(self, seconds: float) -> None:
        """Hold up everything between a process and a server, or both."""
        member = self._victim()
        if member is not None:
            routes = self.world.rng.choice(
                ([member.to_redis], [member.to_postgres], [member.to_redis, member.to_postgres])
            )
            which = " and ".join("redis" if route is member.to_redis else "postgres" for route in routes)
            self.world.note(member.name, f"is cut off from {which} for {seconds:.3f} s")
            for route in routes:
                route.cut_until = max(route.cut_until, self.world.now + seconds)

    def slow_redis(self, seconds: float) -> None:
        """Let messages between a process and Redis take long."""
        self._slow_down("to_redis", seconds)

    def slow_postgres(self, seconds: float) -> None:
        """Let messages between a process and PostgreSQL take long."""
        self._slow_down("to_postgres", seconds)

    def _slow_down(self, way: str, seconds: float) -> None:
        member = self._victim()
        if member is not None:
            route: Route = getattr(member, way)
            route.slow_until = self.world.now + seconds
            route.slow = self.world.rng.choice((0.01, 0.03, 0.1, 0.5))
            self.world.note(member.name, f"waits up to {route.slow} s {way}, for {seconds:.3f} s")

    def reset(self, _seconds: float) -> None:
        """Break connections of a process."""
        member = self._victim()
        if member is not None:
            route = self.world.rng.choice((member.to_redis, member.to_postgres))
            which = "redis" if route is member.to_redis else "postgres"
            self.world.note(member.name, f"loses connections to {which}")
            links = sorted(route.links, key=lambda link: link.number)
            for link in links if self.world.rng.random() < 0.5 else links[-1:]:
                link.reset()

    def hang_postgres(self, seconds: float) -> None:
        """Let PostgreSQL begin nothing."""
        if not self.postgres.hung and not self.postgres.down:
            self.world.note("postgres", f"hangs for {seconds:.3f} s")
            self.postgres.hang(seconds)

    def stop_postgres(self, seconds: float) -> None:
        """Restart PostgreSQL."""
        if not self.postgres.down:
            self.world.note("postgres", f"is stopped for {seconds:.3f} s")
            self.postgres.stop(seconds)

    def end_sessions(self, _seconds: float) -> None:
        """End every session of PostgreSQL."""
        self.world.note("postgres", "ends every session")
        self.postgres.end_sessions()

    def slow_folds(self, seconds: float) -> None:
        """Let no fold end for a while."""
        self.world.note("postgres", f"ends no fold for {seconds:.3f} s")
        self.postgres.slow_until = max(self.postgres.slow_until, self.world.now + seconds)

    def write_again(self, _seconds: float) -> None:
        """Write as well."""
        self._write(self.world.rng.choice(self.everybody), self.world.rng.random())

    # The end.

    def _check_the_end(self) -> None:
        """Nothing is lost, and everybody answers the truth from the cache."""
        world = self.world
        if self.plan.relays:
            self._wait(lambda: [f"a change of {change.user or 'everybody'}" for change in self.postgres.changes], 2.0)
            world.run(world.now + self.plan.soon)
        else:
            world.run(world.now + STALE_SECONDS)
        lasting = all(settings.cache_ttl_seconds == _LASTING for settings in self.plan.settings)
        for last in (False, False, True):
            if last and self.plan.relays and not self._wait(self._doubters, 1.0):
                # Who asks Redis over a new connection listens anew, so this comes after a read.
                return
            ended: list[asyncio.Task[bool]] = [
                member.start(self._read(member, self.everybody, use_cache=True, final=True)) for member in self.members
            ]
            if not self._wait(lambda: [f"a read of {task.get_name()}" for task in ended if not task.done()], 3.0):  # noqa: B023 - called at once
                return
            world.run(world.now + 0.1)
            for member, task in zip(self.members, ended, strict=True):
                if last and lasting and self.plan.relays and not task.result():
                    world.violated(member.name, "does not answer from the cache")
        self._wait(self._under_way, 2.0)

    def _doubters(self) -> list[str]:
        """Name who does not believe what is cached."""
        return [f"belief of {member.name}" for member in self.members if not member.believes]

    def _under_way(self) -> list[str]:
        """Name what has not ended: loads, reads and leases."""
        left = [
            f"loads of {member.name}"
            for member in self.members
            if (service := member.service) and (service._flights or service._loads or service._refreshing)
        ]
        left += [f"reads of {member.name}" for member in self.members if member.unfinished != {member.main}]
        left += [f"lease of {who}" for who in self.everybody if self.redis.get(lease_key(who).encode()) is not None]
        return left

    def _wait(self, waits_for: Callable[[], list[str]], seconds: float) -> bool:
        """Let time pass until there is nothing to wait for; that it takes longer is a violation."""
        until = self.world.now + seconds
        while (left := waits_for()) and not self.world.violations:
            if self.world.now >= until:
                self.world.violated("world", f"still waits, after {seconds} s, for {', '.join(left)}")
            self.world.run(self.world.now + 0.02)
        return not self.world.violations

    def _shut_down(self) -> None:
        for member in self.members:
            member.start(_set(member.ended))
        self._wait(lambda: [member.name for member in self.members if member.unfinished], _SHUTDOWN)
        for member in self.members:
            if member.main.done() and member.main.exception() is not None:
                self.world.violated(member.name, f"ended by {member.main.exception()!r}")

    def _bury(self) -> None:
        """Let what is left unwind, cut off from everything, so that nothing of it outlives the run."""
        self.world.close()
        for member in {*self.members, *self.dead}:
            if member.alive:
                member.kill()
            member.cut_off = member.alive = True
            member.service = None
            member.frozen_until = 0.0
            if member.unfinished:
                for task in member.unfinished:
                    member.start(_cancel(task))
        self.world.run(self.world.now + _BURIAL)
        for member in {*self.members, *self.dead}:
            member.bury()


async def _set(event: asyncio.Event) -> None:
    event.set()


async def _cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()


def _soon(rng: random.Random, latest: float) -> float:
    """Draw how much later something is, from a tenth of a millisecond on, short times as likely as long ones."""
    return float(0.0001 * ((latest / 0.0001) ** rng.random()))


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


Fault = Callable[[Story, float], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What may break, each as likely; and at which doings of a server it may, when it does not at any moment."""

    faults: tuple[Fault, ...]
    moments: tuple[str, ...] = (
        *("MGET", "SET", "EVAL", "DEL", "PUBLISH", "SUBSCRIBE"),
        *("_counts", "_pending", "_lead", "_fold", "_commit", "_notify"),
    )
    relays: tuple[int, ...] = (1, 2, 2)
    """How many processes may carry changes, each as likely."""


_REDIS: Final = (Story.hang_redis, Story.refuse_writes, Story.stop_redis, Story.rewind_redis)
_NETWORK: Final = (Story.cut, Story.slow_redis, Story.slow_postgres, Story.reset)
_POSTGRES: Final = (Story.hang_postgres, Story.stop_postgres, Story.end_sessions, Story.slow_folds)
SCENARIOS: Final = {
    "calm": Scenario((Story.write_again,)),
    "kills": Scenario((Story.kill,), ("_fold", "_commit", "_commit", "DEL", "EVAL", "_notify")),
    "freezes": Scenario((Story.freeze,), ("_pending", "_pending", "_fold", "_commit", "EVAL", "DEL", "_notify")),
    "a lone relay": Scenario((Story.freeze, Story.slow_postgres), ("_pending", "SUBSCRIBE"), relays=(1,)),
    "no relay": Scenario((Story.freeze, *_REDIS, *_NETWORK, Story.hang_postgres), relays=(0,)),
    "redis": Scenario(_REDIS),
    "network": Scenario(_NETWORK),
    "postgres": Scenario((*_POSTGRES, Story.kill)),
    "everything": Scenario((Story.kill, Story.freeze, *_REDIS, *_NETWORK, *_POSTGRES)),
}


def _here() -> Member:
    return cast("Member", asyncio.get_running_loop())


async def _connect(_url: str, *, timeout: float, command_timeout: float | None = None, **_: object) -> Connection:  # noqa: ASYNC109 - as asyncpg's
    here = _here()
    async with asyncio.timeout(timeout):
        return await open_connection(here, here.to_postgres, here.story.postgres, command_timeout=command_timeout)


async def _create_pool(*_: object, **__: object) -> Pool:
    here = _here()
    return Pool(here, here.to_postgres, here.story.postgres)


def _redis_client(_url: str, *, deadline: float) -> RedisClient:
    here = _here()
    return RedisClient(here, here.to_redis, here.story.redis, deadline=deadline)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * _here().world.rng.random()


async def _answers(
    service: ReputationService, users: Sequence[UserId], *, use_cache: bool
) -> Mapping[UserId, service_module.Answer]:
    """Read as the routes do: one user by the single read, more by a batch."""
    if len(users) > 1:
        return await service.read_many(users, use_cache=use_cache)
    return {users[0]: await service._read(users[0], use_cache=use_cache)}


def _token() -> str:
    return f"{_here().world.rng.getrandbits(64):016x}"


def _clock() -> datetime:
    return _here().clock()


def _timed(kind: Callable[..., object]) -> Callable[..., object]:
    """Build something on the time of the process that builds it."""
    return lambda *args, **named: kind(*args, **named, monotonic=_here().time)


def _log(_logger: object, method: str, event: Any) -> Any:  # noqa: ANN401 - structlog's own types
    _here().world.note(_here().name, f"logs {method} {event}")
    raise structlog.DropEvent


@contextmanager
def simulated(bug: str | None = None, *, traced: bool = False) -> Iterator[None]:
    """Give the product the simulated time, servers and randomness, in place of its own; and plant a bug."""
    logging = structlog.get_config()
    structlog.configure(
        processors=[_log],
        wrapper_class=structlog.make_filtering_bound_logger(10 if traced else 50),
        cache_logger_on_first_use=False,
    )
    try:
        with (
            patch.object(cache, "connect", _redis_client),
            patch.object(asyncpg, "connect", _connect),
            patch.object(asyncpg, "create_pool", _create_pool),
            patch.object(main, "utc_now", _clock),
            patch.object(main, "random", SimpleNamespace(uniform=_uniform)),
            patch.object(main, "Freshness", _timed(Freshness)),
            patch.object(main, "MemoryTier", _timed(MemoryTier)),
            patch.object(main, "MemoryCache", _timed(MemoryCache)),
            patch.object(main, "Relay", _timed(Relay)),
            patch.object(service_module, "_token", _token),
            BUGS[bug].plant() if bug else nullcontext(),
        ):
            yield
    finally:
        structlog.configure(**logging)


def run(seed: int, scenario: str | None = None, *, traced: bool = False) -> Outcome:
    """Run a seed; only inside `simulated`."""
    return Story(seed, scenario, traced=traced).tell()


def run_some(seeds: Sequence[int], *, scenario: str | None, bug: str | None) -> list[Outcome]:
    """Run seeds in a process of their own, up to the first that fails."""
    outcomes = []
    with simulated(bug):
        for seed in seeds:
            outcomes.append(run(seed, scenario))
            if outcomes[-1].violations:
                break
    return outcomes
