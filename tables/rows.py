"""The rows of tables on RocksDB, one partition at a time, written under the stages' own commit control.

Guarantee: :func:`store` returns once Kafka has the changelog of all that was written, and only then is it in the local
store; so a row that can be read is a row that a new owner of the partition reads too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from faust.types import TP

from settings import Settings

_OFFSET_KEY = b"__faust\0offset__"


def rocksdb_options(settings: Settings) -> dict[str, int]:
    """Return options that bound a table's memory; Faust's own defaults are 2 GiB of cache per partition."""
    return {
        "block_cache_size": max(1 << 20, settings.rocksdb_cache_bytes // 8),
        "write_buffer_size": settings.rocksdb_write_buffer_bytes,
        "max_write_buffer_number": 2,
    }


async def publish(app: Any, table: Any, partition: int, changes: Mapping[str, bytes | None]) -> int | None:
    """Write changes of one partition to the table's changelog, None for a row that goes; returns once Kafka has them.

    Returns the offset of the last one, for :func:`reached`.

    Whole batches instead of Faust's record by record: a state changes with every reading. What the local store is to
    hold is then written through :class:`LocalStates`.
    """
    if not changes or app.testing:
        return None
    producer = await app.maybe_start_producer()
    topic = table.changelog_topic.get_topic_name()
    sent = await producer.send_to(topic, partition, [(key.encode(), value) for key, value in changes.items()])
    last = 0
    for count, future in sent:
        last = (await future).offset + count - 1
    return last


def reached(table: Any, partition: int, offset: int | None) -> None:
    """Note how far of its changelog the local store has, so that a start with this folder reads on from there."""
    if offset is not None:
        table.data.set_persisted_offset(TP(table.changelog_topic.get_topic_name(), partition), offset)


class LocalStates(MutableMapping[str, bytes]):
    """The rows of one partition in the local store; what changes is in the changelog already (:func:`publish`).

    Reads and writes only while an event of that partition is at hand (Faust's rule).
    """

    def __init__(self, table: Any, partition: int) -> None:
        self.table = table
        self.partition = partition

    def __getitem__(self, key: str) -> bytes:
        found = self.table.data.get(key.encode())
        if found is None:
            raise KeyError(key)
        return bytes(found)

    def get(self, key: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        """Return the row of ``key``."""
        found = self.table.data.get(key.encode())
        return default if found is None else bytes(found)

    def __setitem__(self, key: str, value: bytes) -> None:
        self.table.data[key.encode()] = value

    def __delitem__(self, key: str) -> None:
        del self.table.data[key.encode()]

    def _pairs(self) -> Iterator[tuple[str, bytes]]:
        store = self.table.data
        database = getattr(store, "_dbs", {}).get(self.partition)
        # a store in memory (tests) has no partitions
        pairs = store.items() if not hasattr(store, "_dbs") else database.items() if database is not None else ()
        for key, value in pairs:
            if bytes(key) != _OFFSET_KEY:
                yield bytes(key).decode(), bytes(value)

    def items(self) -> Any:
        """Return the rows of this partition, to be gone through once: a million of them are in no list."""
        return self._pairs()

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self._pairs())

    def __len__(self) -> int:
        return sum(1 for _ in self._pairs())


async def store(app: Any, table: Any, partition: int, changes: Mapping[str, bytes | None]) -> None:
    """Write changes of one partition, None for a row that goes: to the changelog, then to the local store."""
    last = await publish(app, table, partition, changes)
    rows = LocalStates(table, partition)
    for key, value in changes.items():
        if value is not None:
            rows[key] = value
        elif key in rows:
            del rows[key]
    reached(table, partition, last)
