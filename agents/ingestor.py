"""Readings are stored.

Consumes ``iot_validated_data`` (Reading), writes the table ``readings``. Key: device, index, label and sample time.
Guarantee: a reading that Kafka has is a row, however often it is delivered; a redelivered one changes nothing.
Retried: everything that is the database's fault (away, restarting, deadlock, disk full), for ever, its partitions paused.
Dead-lettered: ``poison`` a reading with a value that PostgreSQL can never hold, and it alone.
Dropped: readings of which nothing is to be kept (``not_persisted``: the profile says so).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mode import Service

from agents.stores.base import Row, Store, open_store
from agents.stores.rows import rows_of
from streams import topics
from streams.messages import Reading
from streams.resilience.failures import Retryable
from streams.stage import Stage

ingestor = Stage("ingestor")


class Ingest:
    """Writes readings to a store, a bounded number of rows at a time."""

    def __init__(self, store: Store, chunk_rows: int) -> None:
        self.store = store
        self.chunk_rows = chunk_rows

    async def write(self, readings: Sequence[Reading]) -> Iterable[tuple[int, BaseException]]:
        """Store ``readings``; return position and exception of each that can never be stored whole."""
        rows: list[Row] = []
        ends: list[int] = []
        bad: dict[int, BaseException] = {}
        for position, reading in enumerate(readings):
            try:
                rows += rows_of(reading)
            except Exception as exc:
                bad[position] = exc
            ends.append(len(rows))
        refused: dict[int, BaseException] = {}
        for start in range(0, len(rows), self.chunk_rows):
            part = rows[start : start + self.chunk_rows]
            found = await self.store.write_readings(part)
            if found:
                where = {id(row): start + number for number, row in enumerate(part)}
                refused.update({where[id(entry.row)]: entry.exception for entry in found})
        if refused:
            position = 0
            for number in sorted(refused):
                while ends[position] <= number:
                    position += 1
                bad.setdefault(position, refused[number])
        return sorted(bad.items())


_ingest: Ingest | None = None


def current() -> Ingest:
    """Return the writer to the configured store, made when it is first needed."""
    global _ingest
    if _ingest is None:
        settings = ingestor.settings
        store = open_store(
            settings.database_url,
            pool_size=settings.db_pool_size,
            application_name=ingestor.app.conf.id,
            statement_timeout_seconds=settings.db_statement_timeout_seconds,
            connect_timeout_seconds=settings.connect_timeout_seconds,
        )
        _ingest = Ingest(store, settings.db_chunk_rows)
    return _ingest


@ingestor.agent(topics.validated_data, chunks=True, name="ingestor", concurrency=2)
async def ingest(stream: Any) -> None:
    """Store the readings of each chunk. Two chunks at a time: rows have their own time, so order does not matter."""
    write = current().write
    async for chunk in stream:
        await chunk.all(write)


class StoreLife(Service):
    """Opens and closes the store with the stage."""

    async def on_start(self) -> None:
        """Make ready to connect; a database that is away is waited for by the writes."""
        await current().store.start()

    async def on_stop(self) -> None:
        """Close the connections."""
        await current().store.stop()


ingestor.service(StoreLife)


@ingestor.check("database")
async def database() -> None:
    """Raise while the database does not answer."""
    if _ingest is None:
        raise Retryable("not started yet")
    await _ingest.store.ping()
