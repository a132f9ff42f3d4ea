"""The latest readings are kept in Redis or Valkey.

Consumes ``iot_validated_data`` (Reading), writes ``device:{id}:category:{category}:readings`` and publishes on
``device:{id}``. Guarantee: an older sample never replaces a newer one (decided in the server).
Retried: everything that is the server's fault, for ever, its partitions paused; the database goes on meanwhile.
Dead-lettered: ``poison`` a reading that cannot be cached. Dropped: nothing; an older sample counts as handled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mode import Service

from agents.stores.valkey import LatestStore
from streams import topics
from streams.messages import Reading
from streams.resilience.failures import Retryable
from streams.stage import Stage

# one chunk of a partition at a time: what gathers meanwhile is one larger write
caching = Stage("caching", chunks_in_flight=1)

_store: LatestStore | None = None


def current() -> LatestStore:
    """Return the configured cache, made when it is first needed."""
    global _store
    if _store is None:
        settings = caching.settings
        _store = LatestStore(
            settings.redis_url,
            int(settings.redis_ttl_seconds),
            client_name=caching.app.conf.id,
            timeout_seconds=settings.redis_timeout_seconds,
        )
    return _store


async def write(readings: Sequence[Reading]) -> Iterable[tuple[int, BaseException]]:
    """Offer ``readings`` to the cache, in order; return position and exception of each that cannot be cached."""
    count = await current().write(readings)
    if not count.bad:
        return ()
    positions = {id(reading): position for position, reading in enumerate(readings)}
    return sorted({positions[id(entry.row)]: entry.exception for entry in count.bad}.items())


@caching.agent(topics.validated_data, chunks=True, name="caching")
async def cache(stream: Any) -> None:
    """Offer the readings of each chunk to the cache."""
    async for chunk in stream:
        await chunk.all(write)


class CacheLife(Service):
    """Opens and closes the cache with the stage."""

    async def on_start(self) -> None:
        """Make ready to connect; a server that is away is waited for by the writes."""
        await current().start()

    async def on_stop(self) -> None:
        """Close the connections."""
        await current().stop()


caching.service(CacheLife)


@caching.check("redis")
async def redis() -> None:
    """Raise while the server does not answer."""
    if _store is None:
        raise Retryable("not started yet")
    await _store.ping()
