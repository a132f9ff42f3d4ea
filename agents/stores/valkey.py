"""The latest reading of every device in Valkey or Redis, and a live channel for each device.

=================================================  ======
=============================================================== ``device:{id}:category:{category}:readings``
HASH    field = index, value = Reading JSON plus ``category`` ``device:{id}:categories``                         SET
the categories of which there is a hash ``devices``                                        SET     ids of all devices;
one may be listed whose hashes have expired ``device:{id}``                                    channel every value
that is written, as it is written =================================================  ======
===============================================================

Guarantees:

- **An older sample never replaces a newer one**, whoever writes and in whatever order: a script in the server
  compares the times of the samples, so that no two writers can interleave. A sample of the same time replaces (a
  correction).
- **Written twice is written once**: a value that is there already, byte for byte, is neither written nor published
  again.
- Readings of a chunk are applied one by one, in order: each that is newer than what is stored is written *and*
  published, so that a subscriber sees every step and not only the last of a chunk.
- Every key that is written lives for ``ttl_seconds`` from then on.
- A reading that cannot be stored (its text is not valid Unicode; its key is held by something that is not a hash) is
  handed back alone. Everything else that goes wrong (READONLY, OOM, LOADING, a lost connection) is redis-py's
  exception, and the whole call is right to be made again.

The time is taken from the stored JSON itself, ``timestamp`` being its first field: a second key for times could be
evicted alone, and then an old sample would win. The script makes the names of its keys itself: one server, not a
Redis Cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from agents.stores.base import BadRow
from devices.model import Reading, Value
from streams.resilience.failures import Poison

__all__ = ["DEFAULT_CATEGORY", "LatestStore", "WriteCount"]

DEFAULT_CATEGORY: Final = "measurements"

# The server is busy with one script for about 5 µs a reading; others get their turn in between.
_READINGS_PER_SCRIPT: Final = 256

# ARGV: time to live in seconds (0: for ever); MessagePack of a list of groups, one device and category each: [device,
# category, [index, JSON, index, JSON, ...]], as text (cmsgpack knows no binary type). One argument, because redis-py
# spends 1.5 µs on each. Returns written, older, unchanged, and for each group that was refused its number (from 1)
# and the reason. EVAL and not EVALSHA: a kilobyte in a chunk of hundreds, and no server restart can make the script
# unknown.
_SCRIPT: Final = """
local function stamp(json)
  local day, fraction = string.match(json, '"timestamp":"(%d%d%d%d%-%d%d%-%d%dT%d%d:%d%d:%d%d)%.?(%d*)')
  if not day then return '' end
  return day .. fraction
end
local ttl = tonumber(ARGV[1])
local reply = {0, 0, 0}
for number, group in ipairs(cmsgpack.unpack(ARGV[2])) do
  local device, category, offered = group[1], group[2], group[3]
  local hash = 'device:' .. device .. ':category:' .. category .. ':readings'
  local categories = 'device:' .. device .. ':categories'
  local kind = redis.call('TYPE', hash).ok
  local kind_of_set = redis.call('TYPE', categories).ok
  if kind ~= 'none' and kind ~= 'hash' then
    reply[#reply + 1] = number
    reply[#reply + 1] = hash .. ' is a ' .. kind .. ', not a hash'
  elseif kind_of_set ~= 'none' and kind_of_set ~= 'set' then
    reply[#reply + 1] = number
    reply[#reply + 1] = categories .. ' is a ' .. kind_of_set .. ', not a set'
  else
    local fresh = false
    for i = 1, #offered, 2 do
      local index, json = offered[i], offered[i + 1]
      local old = redis.call('HGET', hash, index)
      if old == json then
        reply[3] = reply[3] + 1
        fresh = true
      elseif old and stamp(old) > stamp(json) then
        reply[2] = reply[2] + 1
      else
        redis.call('HSET', hash, index, json)
        redis.call('PUBLISH', 'device:' .. device, json)
        reply[1] = reply[1] + 1
        fresh = true
      end
    end
    if fresh then
      redis.call('SADD', categories, category)
      redis.call('SADD', KEYS[1], device)
      if ttl > 0 then
        redis.call('EXPIRE', hash, ttl)
        redis.call('EXPIRE', categories, ttl)
      end
    end
  end
end
if ttl > 0 and reply[1] + reply[3] > 0 then redis.call('EXPIRE', KEYS[1], ttl) end
return reply
"""


class _Latest(msgspec.Struct, gc=False):
    """What is stored: a Reading plus ``category``; ``timestamp`` is first, where the script finds it at once."""

    timestamp: datetime
    device_id: str
    index: str
    category: str
    request_id: str
    values: list[Value]
    labels: list[str]
    display_names: list[str]
    metadata: dict[str, Any]


@dataclass(slots=True)
class WriteCount:
    """What became of the readings of one call; the four add up to their number."""

    written: int = 0
    older: int = 0
    unchanged: int = 0
    bad: list[BadRow] = field(default_factory=list)


@dataclass(slots=True)
class _Group:
    """The readings of one device and category within one script."""

    device_id: str
    category: str
    readings: list[Reading] = field(default_factory=list)
    offered: list[str] = field(default_factory=list)


class LatestStore:
    """The cache. ``timeout_seconds`` bounds connecting and each exchange; ``ttl_seconds`` 0 keeps keys for ever."""

    def __init__(
        self,
        url: str,
        ttl_seconds: int,
        *,
        client_name: str = "headrace",
        timeout_seconds: float = 5.0,
        max_connections: int = 16,
    ) -> None:
        self._url = url
        self._ttl_seconds = ttl_seconds
        self._options: dict[str, Any] = {
            "client_name": client_name,
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            # A call that finds all connections taken waits: those who have them are bounded.
            "max_connections": max_connections,
            "timeout": None,
            # One immediate try more: after a restart of the server every pooled connection is stale once.
            "retry": Retry(NoBackoff(), 1),
            "protocol": 2,
        }
        self._encode = msgspec.json.Encoder(decimal_format="number").encode
        self._client: Any = None

    async def start(self) -> None:
        """Make ready to connect. Does not connect, and does not fail while the server is away."""
        if self._client is None:
            self._client = redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(self._url, **self._options))

    async def stop(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def ping(self) -> None:
        """Return when the server answers; raise redis-py's exception otherwise, within the timeout."""
        await self._connected().ping()

    async def write(self, readings: Sequence[Reading]) -> WriteCount:
        """Offer ``readings``, in order, to the cache, in one pipeline. Raises redis-py's exceptions and ``OSError``."""
        count = WriteCount()
        batches = self._batches(readings, count.bad)
        if not batches:
            return count
        pipeline = self._connected().pipeline(transaction=False)
        for batch in batches:
            groups = [(group.device_id, group.category, group.offered) for group in batch]
            pipeline.eval(_SCRIPT, 1, "devices", self._ttl_seconds, msgspec.msgpack.encode(groups))
        for batch, reply in zip(batches, await pipeline.execute(), strict=True):
            count.written += reply[0]
            count.older += reply[1]
            count.unchanged += reply[2]
            for number, reason in zip(reply[3::2], reply[4::2], strict=True):
                error = Poison(f"the cache cannot hold this reading: {reason.decode(errors='replace')}")
                count.bad += [BadRow(reading, error) for reading in batch[number - 1].readings]
        return count

    async def latest(self, device_id: str) -> dict[str, dict[str, Any]]:
        """Return ``{category: {index: reading}}`` of one device, each reading as its JSON object; empty if unknown."""
        client = self._connected()
        categories = sorted(name.decode() for name in await client.smembers(f"device:{device_id}:categories"))
        pipeline = client.pipeline(transaction=False)
        for category in categories:
            pipeline.hgetall(f"device:{device_id}:category:{category}:readings")
        hashes = await pipeline.execute() if categories else []
        return {
            category: {index.decode(): msgspec.json.decode(value) for index, value in sorted(stored.items())}
            for category, stored in zip(categories, hashes, strict=True)
            if stored
        }

    def _connected(self) -> Any:
        if self._client is None:
            raise redis.ConnectionError("the cache is not started, or stopped already: call start() first")
        return self._client

    def _batches(self, readings: Sequence[Reading], bad: list[BadRow]) -> list[list[_Group]]:
        """Encode and group ``readings``; those that cannot be encoded go to ``bad``. A device's order is kept."""
        batches: list[list[_Group]] = []
        groups: dict[tuple[str, str], _Group] = {}
        for position, reading in enumerate(readings):
            if position % _READINGS_PER_SCRIPT == 0 and groups:
                batches.append(list(groups.values()))
                groups = {}
            category = str(reading.metadata.get("category") or DEFAULT_CATEGORY)
            time = reading.timestamp
            try:
                encoded = self._encode(
                    _Latest(
                        time if time.tzinfo is UTC else time.astimezone(UTC),
                        reading.device_id,
                        reading.index,
                        category,
                        reading.request_id,
                        reading.values,
                        reading.labels,
                        reading.display_names,
                        reading.metadata,
                    )
                )
            except (ValueError, TypeError, OverflowError, RecursionError) as exc:
                bad.append(BadRow.because(reading, exc))
                continue
            key = (reading.device_id, category)
            group = groups.get(key)
            if group is None:
                group = groups[key] = _Group(reading.device_id, category)
            group.readings.append(reading)
            group.offered += (reading.index, encoded.decode())
        if groups:
            batches.append(list(groups.values()))
        return batches
