"""Readings are stored, and the lives of alerts and commands.

Consumes ``iot_validated_data`` (Reading), ``iot_alerts``, ``iot_alert_actions``, ``device_commands``,
``iot_command_status``; writes the tables ``readings``, ``alerts`` and ``commands``. Key of a reading: device, index,
label and sample time. Guarantee: a reading that Kafka has is a row, however often it is delivered; a redelivered one
changes nothing. Retried: everything that is the database's fault (away, restarting, deadlock, disk full), for ever, its
partitions paused. Dead-lettered: ``poison`` a reading with a value that PostgreSQL can never hold, and it alone.
Dropped: readings of which nothing is to be kept (``not_persisted``: the profile says so).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from mode import Service

from agents.stores.base import BadRow, Row, Store, open_store
from agents.stores.gathering import GatheredWrites
from agents.stores.rows import rows_of
from streams import topics
from streams.messages import Reading
from streams.resilience.failures import Retryable
from streams.stage import Stage

# one chunk of a partition that is written and one that waits: what gathers meanwhile is one larger chunk
ingestor = Stage("ingestor", chunks_in_flight=2)


#: Transactions at a time: while one waits for the disk, the rows of the next are copied.
WRITERS = 2


class Ingest:
    """Writes readings to a store, a bounded number of rows at a time, those of several chunks together."""

    def __init__(self, store: Store, chunk_rows: int) -> None:
        self.store = store
        self.chunk_rows = chunk_rows
        self._store_rows = GatheredWrites(store.write_readings, chunk_rows, WRITERS)

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
            found = await self._store_rows(part)
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


@ingestor.agent(topics.validated_data, chunks=True, name="ingestor", concurrency=8)
async def ingest(stream: Any) -> None:
    """Store the readings of each chunk, eight chunks at a time: rows have their own time, so order does not matter."""
    write = current().write
    async for chunk in stream:
        await chunk.all(write)


Lives = Callable[[Sequence[Any]], Awaitable[list[BadRow]]]


def write_lives(method: str) -> Callable[[list[Any]], Awaitable[Iterable[tuple[int, BaseException]]]]:
    """Return a handler that hands messages to ``method`` of the store and tells which can never be stored."""

    async def write(items: list[Any]) -> Iterable[tuple[int, BaseException]]:
        store_method: Lives | None = getattr(current().store, method, None)
        if store_method is None:
            # a store of readings alone (line protocol) keeps no lives
            return ()
        positions = {id(item): position for position, item in enumerate(items)}
        return sorted({positions[id(bad.row)]: bad.exception for bad in await store_method(items)}.items())

    return write


@ingestor.agent(topics.alerts, chunks=True, name="ingestor-alerts")
async def ingest_alerts(stream: Any) -> None:
    """Keep the life of each alert."""
    write = write_lives("write_alerts")
    async for chunk in stream:
        await chunk.all(write)


@ingestor.agent(topics.alert_actions, chunks=True, name="ingestor-alert-actions")
async def ingest_alert_actions(stream: Any) -> None:
    """Keep who has acknowledged an alert, and why."""
    write = write_lives("write_alert_actions")
    async for chunk in stream:
        await chunk.all(write)


@ingestor.agent(topics.commands, chunks=True, name="ingestor-commands")
async def ingest_commands(stream: Any) -> None:
    """Keep each command."""
    write = write_lives("write_commands")
    async for chunk in stream:
        await chunk.all(write)


@ingestor.agent(topics.command_status, chunks=True, name="ingestor-command-status")
async def ingest_command_statuses(stream: Any) -> None:
    """Keep each step in the life of a command."""
    write = write_lives("write_command_statuses")
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
