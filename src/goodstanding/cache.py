"""The Redis tier: read many, lease, fill, invalidate; every operation under one deadline, and never retried.

One protocol, the lease, gives stampede protection and safety against stale writes at once. Whoever misses may take
the user's lease; only its holder stores what it loaded, and only while the lease still holds. An invalidation deletes
value and lease together, so a load that began before an invalidation can never fill after it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from itertools import groupby, islice, repeat
from operator import itemgetter
from typing import Any, Final, Protocol, Self
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from goodstanding.breaker import Breaker, watch
from goodstanding.data import UserId
from goodstanding.entry import Entry, Fetched, Lives, Rejection, decode, encode
from goodstanding.errors import TemporarilyUnavailableError
from goodstanding.metrics import CACHE_REJECTED
from goodstanding.tasks import background, check_cancelled

PREFIX: Final = "reputation:user:"
PROBE_SECONDS: Final = 0.5
"""How often Redis is asked to take a write: so soon is a Redis that takes none noticed, and one that is back."""

_LANES: Final = 2
_MOST_JOINED: Final = 100
_TICKS: Final = 25
_SCAN_COUNT: Final = 1000
_PROBE_KEY: Final = "goodstanding:probe"
_PROBE_MS: Final = 10_000
_MOST_PROBE_KEYS: Final = 1000
_SCRIPTS: Final = files("goodstanding")
_FILL: Final = _SCRIPTS.joinpath("fill.lua").read_text("utf-8")
_RELEASE: Final = _SCRIPTS.joinpath("release.lua").read_text("utf-8")
_OURS: Final = re.compile(rb"reputation:user:[0-9a-f-]{36}|\{reputation:user:[0-9a-f-]{36}\}:(?:lease|good)")

Command = tuple[str | bytes | int, ...]


class CacheAwayError(TemporarilyUnavailableError):
    """The cache cannot be asked now; the answer must come from elsewhere."""


class Cache(Protocol):
    """What the service asks of a cache. Every method raises CacheAwayError while the cache cannot be asked."""

    @property
    def available(self) -> bool:
        """Whether the cache is being asked at all."""
        ...

    async def fetch(self, user_ids: Sequence[UserId]) -> list[Fetched]:
        """Read what is cached about each user, and whether a lease is out; one round trip, same order."""
        ...

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read the last known good copies; same order."""
        ...

    async def lease(
        self, user_ids: Sequence[UserId], token: str, *, seize: bool = False, unless_cached: bool = False
    ) -> list[bool]:
        """Take the users' leases under one token; tells which were got.

        `seize` takes them from whoever holds them, `unless_cached` only where there is no value to be served.
        """
        ...

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store entries whose leases still hold this token, and end those leases; tells which were stored."""
        ...

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back without a value."""
        ...

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Drop value, lease and last known good copy together."""
        ...

    async def invalidate_all(self) -> int:
        """Drop everything about every user; gives the number of cached values dropped."""
        ...


def value_key(user_id: UserId) -> str:
    """Name the key of a user's cached reputation."""
    return f"{PREFIX}{user_id}"


def lease_key(user_id: UserId) -> str:
    """Name the key of a user's lease; the hash tag puts it into the value's Cluster slot."""
    return f"{{{PREFIX}{user_id}}}:lease"


def last_good_key(user_id: UserId) -> str:
    """Name the key of a user's last known good copy, in the same slot."""
    return f"{{{PREFIX}{user_id}}}:good"


class RedisCache:
    """The cache in Redis or Valkey. Open it with `open`; it owns its connections and its tasks.

    All commands that are issued in one loop tick travel as one round trip.
    """

    def __init__(self, client: "Redis | RedisCluster", *, deadline: float, policy: str, lives: Lives) -> None:
        self._client = client
        self._deadline = deadline
        self._policy = policy
        self._lives = lives
        self._breaker = Breaker("redis")
        self._pending: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = []
        self._wake = asyncio.Event()
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, deadline: float, policy: str, lives: Lives) -> AsyncIterator[Self]:
        """Open the cache; `deadline` in seconds. A Redis that is away now is only noted: it may come back."""
        client = connect(url, deadline=deadline)
        try:
            cache = cls(client, deadline=deadline, policy=policy, lives=lives)
            async with background() as spawn:
                for _ in range(_LANES):
                    spawn(cache._lane())
                try:
                    await cache.probe()
                except CacheAwayError:
                    cache._breaker.open()
                spawn(watch(cache._breaker, cache.probe, every=PROBE_SECONDS, while_closed=True))
                try:
                    yield cache
                finally:
                    cache._close()
        finally:
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(deadline * 4):
                    await _disconnect(client)

    @property
    def available(self) -> bool:
        """Whether Redis is being asked at all."""
        return self._breaker.closed

    async def fetch(self, user_ids: Sequence[UserId]) -> list[Fetched]:
        """Read value and lease of each user in one round trip."""
        replies = await self._send([("MGET", value_key(user), lease_key(user)) for user in user_ids])
        return [
            Fetched(self._accept(value, user), None if lease is None else lease.decode("ascii", "replace"))
            for user, (value, lease) in zip(user_ids, replies, strict=True)
        ]

    async def fetch_last_good(self, user_ids: Sequence[UserId]) -> list[Entry | None]:
        """Read the last known good copies in one round trip."""
        replies = await self._send([("MGET", last_good_key(user)) for user in user_ids])
        return [self._accept(value, user) for user, (value,) in zip(user_ids, replies, strict=True)]

    async def lease(
        self, user_ids: Sequence[UserId], token: str, *, seize: bool = False, unless_cached: bool = False
    ) -> list[bool]:
        """Take leases that live as long as a load may; at most one holder each."""
        condition = () if seize else ("NX",)
        commands: list[Command] = [
            ("SET", lease_key(user), token, *condition, "PX", self._lives.lease) for user in user_ids
        ]
        if unless_cached:
            # Looked at once the lease is ours: from then on nobody else fills.
            commands += [("MGET", value_key(user)) for user in user_ids]
        replies = await self._send(commands)
        got = [bool(reply) for reply in replies[: len(user_ids)]]
        filled = (
            [
                user
                for user, is_ours, (value,) in zip(user_ids, got, replies[len(user_ids) :], strict=True)
                if is_ours and value is not None and self._is_served(value, user)
            ]
            if unless_cached
            else []
        )
        if filled:
            await self.release(filled, token)
        return [is_ours and user not in filled for user, is_ours in zip(user_ids, got, strict=True)]

    async def fill(self, entries: Mapping[UserId, Entry], token: str) -> list[bool]:
        """Store entries whose leases still hold this token."""
        replies = await self._send(
            [
                (
                    *("EVAL", _FILL, 3, value_key(user), lease_key(user), last_good_key(user), token),
                    encode(entry, user_id=user, policy=self._policy),
                    self._lives.unknown if entry.data is None else self._lives.value,
                    0 if entry.data is None else self._lives.last_good,
                )
                for user, entry in entries.items()
            ]
        )
        return [reply == 1 for reply in replies]

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back without a value, where they are still ours."""
        await self._send([("EVAL", _RELEASE, 1, lease_key(user), token) for user in user_ids])

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Drop value, lease and last known good copy of each user, atomically per user."""
        await self._send([("DEL", value_key(user), lease_key(user), last_good_key(user)) for user in user_ids])

    async def invalidate_all(self) -> int:
        """Drop every user's keys with SCAN and UNLINK, a thousand at a time; never KEYS, never FLUSH.

        Leases go first, in a pass of their own: after it no load that began before this call can fill any more,
        so that the second pass misses nothing.
        """
        await self._unlink_matching(f"{{{PREFIX}*}}:lease")
        return await self._unlink_matching(f"*{PREFIX}*")

    async def add(self, increments: Mapping[str, int], ttl_seconds: int) -> Mapping[str, int]:
        """Add to shared counters; each lives `ttl_seconds` after its last change."""
        commands: list[Command] = []
        for key, amount in increments.items():
            commands += [("INCRBY", key, amount), ("EXPIRE", key, ttl_seconds)]
        replies = await self._send(commands)
        return dict(zip(increments, replies[::2], strict=True))

    async def probe(self) -> None:
        """Ask Redis to take a write: one that cannot be written cannot be invalidated, so it must not be read."""
        try:
            async with _within(self._deadline):
                await self._client.initialize()
                pipeline = self._client.pipeline(transaction=False)
                for key in self._probe_keys():
                    pipeline.set(key, b"1", px=_PROBE_MS)
                await pipeline.execute()
        except Exception as error:
            if isinstance(error, ResponseError):
                self._breaker.open()
            else:
                self._breaker.failed()
            raise CacheAwayError from error

    def _probe_keys(self) -> Sequence[str]:
        """Give a key for every server that takes writes: of a Cluster, one for each primary."""
        if not isinstance(self._client, RedisCluster):
            return [_PROBE_KEY]
        wanted = {node.name for node in self._client.get_primaries()}
        keys: dict[str, str] = {}
        for key in (f"{_PROBE_KEY}:{number}" for number in range(_MOST_PROBE_KEYS)):
            node = self._client.get_node_from_key(key)
            if node is not None:
                keys.setdefault(node.name, key)
            if keys.keys() >= wanted:
                break
        return [*keys.values()]

    def _accept(self, text: bytes | None, user_id: UserId) -> Entry | None:
        if text is None:
            return None
        entry = decode(text, user_id=user_id, policy=self._policy)
        if isinstance(entry, Rejection):
            CACHE_REJECTED.labels(entry.value).inc()
            return None
        return entry

    def _is_served(self, text: bytes, user_id: UserId) -> bool:
        return isinstance(decode(text, user_id=user_id, policy=self._policy), Entry)

    async def _unlink_matching(self, pattern: str) -> int:
        dropped = 0
        batch: list[bytes] = []
        if not self._breaker.closed:
            raise CacheAwayError
        try:
            async for key in self._client.scan_iter(match=pattern, count=_SCAN_COUNT):
                if _OURS.fullmatch(key):
                    batch.append(key)
                    if len(batch) >= _SCAN_COUNT:
                        dropped += await self._unlink(batch)
                        batch = []
        except CacheAwayError:
            raise
        except Exception as error:
            self._breaker.failed()
            raise CacheAwayError from error
        return dropped + await self._unlink(batch)

    async def _unlink(self, keys: Iterable[bytes]) -> int:
        keys = list(keys)
        replies = await self._send([("UNLINK", key) for key in keys])
        return sum(int(reply) for key, reply in zip(keys, replies, strict=True) if not key.startswith(b"{"))

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        """Hand commands to the next round trip and wait for their replies, in order."""
        if self._closed or not self._breaker.closed:
            raise CacheAwayError
        if not commands:
            return []
        replies: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._pending.append((commands, replies))
        self._wake.set()
        return await replies

    def _close(self) -> None:
        """Tell whoever still asks, or asks later, that nobody answers any more."""
        self._closed = True
        for _, future in self._pending:
            _fail(future, None)

    async def _lane(self) -> None:
        """Carry what is pending to Redis, one round trip after another, until cancelled."""
        while True:
            check_cancelled()
            await self._wake.wait()
            self._wake.clear()
            batch, self._pending = self._pending, []
            batch = [(commands, future) for commands, future in batch if not future.done()]
            if batch and self._breaker.closed:
                await self._round_trip(batch)
            else:
                # The circuit opened while these waited for a lane: they need not find out for themselves.
                for _, future in batch:
                    _fail(future, None)

    async def _round_trip(self, batch: Sequence[tuple[Sequence[Command], "asyncio.Future[list[Any]]"]]) -> None:
        try:
            async with _within(self._deadline):
                replies = iter(await self._exchange([command for commands, _ in batch for command in commands]))
        except asyncio.CancelledError as error:
            for _, future in batch:
                _fail(future, error)
            raise
        except Exception as error:  # noqa: BLE001 - a connection that dies under redis-py raises more than RedisError
            self._breaker.failed()
            for _, future in batch:
                _fail(future, error)
            return
        self._breaker.succeeded()
        for commands, future in batch:
            mine = list(islice(replies, len(commands)))
            refusal = next((reply for reply in mine if isinstance(reply, Exception)), None)
            if refusal is not None:
                # OOM, READONLY, MISCONF, NOAUTH ...: Redis answered, and said that it cannot do its part.
                self._breaker.open()
                _fail(future, refusal)
            elif not future.done():
                future.set_result(mine)

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands as one round trip; gives their replies, an exception where Redis refused one."""
        if isinstance(self._client, RedisCluster):
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute(raise_on_error=False)
        runs = [*_runs(commands)]
        # What redis-py's own pipeline does, without what it does beside it, which costs as much as the round trip.
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call] # redis-py leaves it untyped
        answers: list[Any] = []
        try:
            joined = [(run[0][0], *(word for command in run for word in command[1:])) for run in runs]
            await connection.send_packed_command(connection.pack_commands(joined))
            for _ in joined:
                try:
                    answers.append(await connection.read_response())
                except ResponseError as error:
                    answers.append(error)
        except BaseException:
            # Replies that nobody waited for must not be the next caller's.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)
        return [reply for run, answer in zip(runs, answers, strict=True) for reply in _shares(run, answer)]


def _runs(commands: Sequence[Command]) -> Iterator[list[Command]]:
    """Put neighbouring MGETs together to be sent as one: Redis and its client work per command more than per key."""
    for name, group in groupby(commands, itemgetter(0)):
        run = [*group]
        step = _MOST_JOINED if name == "MGET" else 1
        yield from (run[start : start + step] for start in range(0, len(run), step))


def _shares(run: Sequence[Command], answer: Any) -> Iterator[Any]:  # noqa: ANN401 - any command's reply
    """Give each command of a run its part of the answer; an error is everybody's."""
    if len(run) == 1 or isinstance(answer, Exception):
        return repeat(answer, len(run))
    values = iter(answer)
    return ([*islice(values, len(command) - 1)] for command in run)


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """Bound a wait as asyncio.timeout does, but in the event loop's own time: what the loop was late does not count.

    A loop that is busy for longer than the deadline finds its timers due before it has read, or even sent, anything.
    Under a plain timeout a burst of requests looks like a hung Redis, and the database gets the whole burst.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        handle = loop.call_later(seconds / _TICKS, lambda: tick(_TICKS - 1))

        def tick(left: int) -> None:
            nonlocal handle
            if left:
                handle = loop.call_later(seconds / _TICKS, tick, left - 1)
            else:
                timeout.reschedule(loop.time())

        try:
            yield
        finally:
            handle.cancel()


def _fail(future: "asyncio.Future[list[Any]]", cause: BaseException | None) -> None:
    if not future.done():
        away = CacheAwayError()
        away.__cause__ = cause
        future.set_exception(away)


async def _disconnect(client: "Redis | RedisCluster") -> None:
    """Close a client's connections, and those of the Sentinels that it asks: redis-py leaves them open."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        for watcher in pool.sentinel_manager.sentinels:
            await watcher.aclose()


def connect(url: str, *, deadline: float) -> "Redis | RedisCluster":
    """Build a client for a single server, a Sentinel service or a Cluster; `deadline` in seconds, no retries.

    `redis+sentinel://[user:password@]host:port,host:port/service/db`, `redis+cluster://host:port`, and with
    `rediss+...` the same over TLS. Nothing is connected yet.
    """
    scheme, _, rest = url.partition("://")
    base, _, topology = scheme.partition("+")
    # redis-py's defaults wait 60 s on a hung server, and retry; and the hand-shakes that it adds to a new connection
    # cost round trips that the deadline has to pay for.
    options: dict[str, Any] = {
        # The last resort: all but a walk over the keys ends by our own deadline, which forgives a busy loop.
        "socket_timeout": 10 * deadline,
        "socket_connect_timeout": 10 * deadline,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if topology == "cluster":
        return RedisCluster.from_url(f"{base}://{rest}", **options)
    options["driver_info"] = None
    if topology == "sentinel":
        parts = urlsplit(f"{base}://{rest}")
        credentials, _, hosts = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        service, _, database = parts.path.strip("/").partition("/")
        nodes = [urlsplit(f"//{host}") for host in hosts.split(",")]
        # One that hangs leaves time to ask the next, and then the master.
        brief = {"socket_timeout": deadline / 3, "socket_connect_timeout": deadline / 3}
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call] # redis-py leaves it untyped
            [(node.hostname, node.port or 26379) for node in nodes], sentinel_kwargs=options | brief
        )
        client: Redis = sentinel.master_for(
            service,
            db=int(database or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
            ssl=base == "rediss",
            **options,
        )
        return client
    return Redis.from_url(url, **options)
