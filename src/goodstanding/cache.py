"""The Redis tier: read many, lease, fill, invalidate; every operation under one deadline, and never retried.

One protocol, the lease, gives stampede protection and safety against stale writes at once. Whoever misses may take
the user's lease; only its holder stores what it loaded, and only while the lease still holds. An invalidation deletes
value and lease together, so a load that began before an invalidation can never fill after it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from importlib.resources import files
from typing import Any, Final, Protocol, Self
from urllib.parse import unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from goodstanding.breaker import Breaker, watch
from goodstanding.data import UserId
from goodstanding.entry import Entry, Fetched, Lives, Rejection, decode, encode, is_recent
from goodstanding.errors import CacheAwayError
from goodstanding.metrics import CACHE_REJECTED
from goodstanding.tasks import Spawn, background
from goodstanding.wire import ClusterWire, Command, Subscription, Wire, open_writer, within

PREFIX: Final = "reputation:user:"
PROBE_SECONDS: Final = 0.5
"""How often Redis is asked to take a write: so soon is a Redis that takes none noticed, and one that is back."""

_MOST_DECODED: Final = 4096
_SCAN_COUNT: Final = 1000
_PROBE_KEY: Final = "goodstanding:probe"
_PROBE_MS: Final = 10_000
_MOST_PROBE_KEYS: Final = 1000
_SCRIPTS: Final = files("goodstanding")
_LOOK: Final = _SCRIPTS.joinpath("look.lua").read_text("utf-8")
_FILL: Final = _SCRIPTS.joinpath("fill.lua").read_text("utf-8")
_RELEASE: Final = _SCRIPTS.joinpath("release.lua").read_text("utf-8")
_VOUCH: Final = _SCRIPTS.joinpath("vouch.lua").read_text("utf-8")
_USERS_A_MESSAGE: Final = 500
_OURS: Final = re.compile(rb"reputation:user:[0-9a-f-]{36}|\{reputation:user:[0-9a-f-]{36}\}:(?:lease|good)")


class Cache(Protocol):
    """What the service asks of a cache. Every method raises CacheAwayError while the cache cannot be asked."""

    @property
    def available(self) -> bool:
        """Whether the cache is being asked at all."""
        ...

    def peek(self, user_id: str) -> bytes | None:
        """Give what is served of a user without asking anybody, if anything is, packed; any text may be asked for."""
        ...

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read what is cached about each user, and whether a lease is out; one round trip, same order.

        With a token, whoever has neither is leased under it.
        """
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

    def __init__(
        self,
        client: "Redis | RedisCluster",
        spawn: Spawn,
        *,
        deadline: float,
        policy: str,
        lives: Lives,
        oldest: Callable[[], datetime | None],
    ) -> None:
        self._client = client
        self._deadline = deadline
        self._policy = policy
        self._lives = lives
        self._oldest = oldest
        self._subscription: Subscription | None = None
        # A server's databases share their channels, and another database is another app's.
        pool = getattr(client, "connection_pool", None)
        self._channel = f"goodstanding:{(pool.connection_kwargs.get('db') if pool is not None else None) or 0}"
        self._decoded: dict[UserId, tuple[bytes, Entry]] = {}
        """What was read before: the same text is the same entry."""
        self._breaker = Breaker("redis")
        self._closed = False
        self._wire: Wire | ClusterWire
        if isinstance(client, RedisCluster):
            self._wire = ClusterWire(client, self._breaker, spawn, deadline=deadline)
        else:
            self._wire = Wire(
                client.connection_pool, self._breaker, spawn, deadline=deadline, connected=self._resubscribe
            )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        deadline: float,
        policy: str,
        lives: Lives,
        oldest: Callable[[], datetime | None] = lambda: None,
    ) -> AsyncIterator[Self]:
        """Open the cache; `deadline` in seconds. A Redis that is away now is only noted: it may come back.

        Values that were computed before `oldest()` are misses.
        """
        client = connect(url, deadline=deadline)
        try:
            async with background() as spawn:
                cache = cls(client, spawn, deadline=deadline, policy=policy, lives=lives, oldest=oldest)
                try:
                    await cache.probe()
                except CacheAwayError:
                    cache._breaker.open()
                spawn(watch(cache._breaker, cache.probe, every=PROBE_SECONDS, while_closed=True))
                try:
                    yield cache
                finally:
                    # Whoever still asks, or asks later, is told that nobody answers any more.
                    cache._closed = True
                    cache._wire.close()
        finally:
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(deadline * 4):
                    await _disconnect(client)

    @property
    def available(self) -> bool:
        """Whether Redis is being asked at all."""
        return self._breaker.closed

    def peek(self, _user_id: str) -> bytes | None:
        """Give nothing: Redis has to be asked."""
        return None

    async def fetch(self, user_ids: Sequence[UserId], *, token: str | None = None) -> list[Fetched]:
        """Read value and lease of each user in one round trip; with a token, take the lease of whom nobody knows."""
        asked = self._oldest()
        commands: list[Command] = (
            [("MGET", value_key(user), lease_key(user)) for user in user_ids]
            if token is None
            else [("EVAL", _LOOK, 2, value_key(user), lease_key(user), token, self._lives.lease) for user in user_ids]
        )
        replies = await self._send(commands)
        oldest = self._oldest_of(asked)
        return [
            Fetched(self._accept(value, user, oldest), None if lease is None else lease.decode("ascii", "replace"))
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
        asked = self._oldest()
        replies = await self._send(commands)
        oldest = self._oldest_of(asked)
        got = [bool(reply) for reply in replies[: len(user_ids)]]
        filled = (
            [
                user
                for user, is_ours, (value,) in zip(user_ids, got, replies[len(user_ids) :], strict=True)
                if is_ours and value is not None and self._is_served(value, user, oldest)
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
                    self._lives.unknown if entry.body is None else self._lives.value,
                    0 if entry.body is None else self._lives.last_good,
                )
                for user, entry in entries.items()
            ]
        )
        return [reply == 1 for reply in replies]

    async def release(self, user_ids: Sequence[UserId], token: str) -> None:
        """Give leases back without a value, where they are still ours."""
        await self._send([("EVAL", _RELEASE, 1, lease_key(user), token) for user in user_ids])

    async def invalidate(self, user_ids: Sequence[UserId]) -> None:
        """Drop value, lease and last known good copy of each user, atomically per user, and then tell every process."""
        await self._in_order(
            [("DEL", value_key(user), lease_key(user), last_good_key(user)) for user in user_ids],
            [
                ("PUBLISH", self._channel, " ".join(("changed", *user_ids[start : start + _USERS_A_MESSAGE])))
                for start in range(0, len(user_ids), _USERS_A_MESSAGE)
            ],
        )

    async def invalidate_all(self) -> int:
        """Drop every user's keys with SCAN and UNLINK, a thousand at a time; never KEYS, never FLUSH.

        Leases go first, in a pass of their own: after it no load that began before this call can fill any more,
        so that the second pass misses nothing.
        """
        await self._unlink_matching(f"{{{PREFIX}*}}:lease")
        dropped = await self._unlink_matching(f"*{PREFIX}*")
        await self.say("all")
        return dropped

    async def say(self, message: str) -> None:
        """Tell every process that listens."""
        await self._send([("PUBLISH", self._channel, message)])

    async def say_vouched(self, message: str) -> None:
        """Tell every process, and only from a Redis that has lost no invalidation: one that may have is emptied first.

        One that was restarted, or a replica that was promoted, may have again what was dropped. So each server holds
        the name of its own run: another run is not the one that is written there. After it was emptied nothing is
        said, since that may have taken long: say it again, if it still holds. Raises CacheAwayError.
        """
        keys = [f"{{{key}}}:run" for key in self._probe_keys()]
        doubted = await self._vouch(keys, "", message)
        if doubted:
            await self.invalidate_all()
            for run in set(doubted.values()):
                await self._vouch([key for key in keys if doubted.get(key) == run], run, "")

    async def _vouch(self, keys: Sequence[str], run: str, message: str) -> dict[str, str]:
        """Ask each server whether its run is vouched for, and the last to say the message; gives the doubted runs."""
        *others, last = keys
        for asked, said in ((others, ""), ([last], message)):
            replies = await self._send([("EVAL", _VOUCH, 1, key, run, self._channel, said) for key in asked])
            doubted = {key: reply.decode() for key, reply in zip(asked, replies, strict=True) if reply != 1}
            if doubted:
                return doubted
        return {}

    @asynccontextmanager
    async def subscription(
        self, receive: Callable[[bytes], None], lost: Callable[[], None], answered: Callable[[], None]
    ) -> AsyncIterator[Subscription]:
        """Listen to what every process is told; raises CacheAwayError. One at a time.

        `answered` is called with each answer to the subscription's questions. `lost` is called at the moment from which
        on something may be missed. That is also whenever the connection of the commands is made anew: Redis may be
        another one since then.
        """
        # The connection of the commands first: one that is made for the next command would end this at once.
        await self._send([("EXISTS", _PROBE_KEY)])
        try:
            writer = await open_writer(self._listening_pool(), deadline=self._deadline)
        except Exception as error:
            raise CacheAwayError from error
        self._subscription = Subscription(writer, self._channel, receive, lost, answered)
        try:
            try:
                async with within(self._deadline):
                    await self._subscription.wait_until_confirmed()
            except TimeoutError as error:
                raise CacheAwayError from error
            yield self._subscription
        finally:
            self._subscription.close()
            self._subscription = None

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
            async with within(self._deadline):
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

    def _resubscribe(self) -> None:
        if self._subscription is not None:
            self._subscription.close()

    def _listening_pool(self) -> ConnectionPool:
        if not isinstance(self._client, RedisCluster):
            return self._client.connection_pool
        # Any node will do: in a Cluster a message reaches all of them.
        node = self._client.get_random_node()
        return ConnectionPool(connection_class=node.connection_class, **node.connection_kwargs)

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

    def _accept(self, text: bytes | None, user_id: UserId, oldest: datetime | None = None) -> Entry | None:
        if text is None:
            return None
        known = self._decoded.get(user_id)
        if known is not None and known[0] == text:
            entry = known[1]
        else:
            decoded = decode(text, user_id=user_id, policy=self._policy)
            if isinstance(decoded, Rejection):
                CACHE_REJECTED.labels(decoded.value).inc()
                return None
            entry = decoded
            if len(self._decoded) >= _MOST_DECODED:
                self._decoded.clear()
            self._decoded[user_id] = text, entry
        return entry if is_recent(entry, oldest) else None

    def _oldest_of(self, asked: datetime | None) -> datetime | None:
        """Give how old may be what was just read, where this was the answer when it was asked for.

        A beat that came meanwhile says nothing of it; a loss does, for it may come from another Redis.
        """
        return self._oldest() or asked

    def _is_served(self, text: bytes, user_id: UserId, oldest: datetime | None) -> bool:
        entry = decode(text, user_id=user_id, policy=self._policy)
        return isinstance(entry, Entry) and is_recent(entry, oldest)

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

    async def _in_order(self, first: Sequence[Command], then: Sequence[Command]) -> None:
        """Carry out some commands before others; on one connection one round trip does that."""
        if isinstance(self._client, RedisCluster):
            await self._send(first)
            await self._send(then)
        else:
            await self._send([*first, *then])

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        """Hand commands to the next round trip and wait for their replies, in order."""
        if self._closed or not self._breaker.closed:
            raise CacheAwayError
        if not commands:
            return []
        return await self._wire.send(commands)


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
