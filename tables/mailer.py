"""What the mailer remembers: whom it has told, and what waits for a digest. On RocksDB, with changelogs.

Guarantee: :meth:`Rows.settled` returns once Kafka has everything that was written, so that a mail which has gone out is
known before the next one goes.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator, MutableMapping
from typing import Any, Final

from settings import Settings
from tables.alarms import PartitionStates, rocksdb_options

_SECONDS: Final = struct.Struct("<d")


def declare(app: Any, settings: Settings) -> tuple[Any, Any]:
    """Return the tables ``mail_sent`` and ``mail_held`` of ``app``: keys and values as bytes."""
    options = rocksdb_options(settings)
    return (
        app.Table("mail_sent", key_type=bytes, value_type=bytes, options=options, help="When each recipient was told."),
        app.Table("mail_held", key_type=bytes, value_type=bytes, options=options, help="What waits for a digest."),
    )


class Rows(PartitionStates):
    """The rows of one partition, as text to bytes."""

    def __init__(self, table: Any, partition: int) -> None:
        super().__init__(table, partition)
        self._pending: list[asyncio.Future[Any]] = []

    def __setitem__(self, key: str, value: bytes) -> None:
        self._changed(key, value)
        self.table.data[key.encode()] = value

    def __delitem__(self, key: str) -> None:
        self._changed(key, None)
        del self.table.data[key.encode()]

    def _changed(self, key: str, value: bytes | None) -> None:
        raw = key.encode()
        self._pending.append(self.table.send_changelog(self.table.partition_for_key(raw), raw, value, "raw", "raw"))

    async def settled(self) -> None:
        """Wait until Kafka has every change; raises what it says to one that it has not taken."""
        pending, self._pending = self._pending, []
        if pending:
            await asyncio.gather(*pending)


class Moments(MutableMapping[str, float]):
    """A mapping to epoch seconds, over one to bytes."""

    def __init__(self, rows: MutableMapping[str, bytes]) -> None:
        self._rows = rows

    def __getitem__(self, key: str) -> float:
        found: tuple[float] = _SECONDS.unpack(self._rows[key])
        return found[0]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._rows.get(key) is not None

    def __setitem__(self, key: str, value: float) -> None:
        self._rows[key] = _SECONDS.pack(value)

    def __delitem__(self, key: str) -> None:
        del self._rows[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
