"""What the mailer remembers: whom it has told, and what waits for a digest. On RocksDB, with changelogs.

Guarantee: :meth:`Rows.settled` returns once Kafka has everything that was written, so that a mail which has gone out is
known before the next one goes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, MutableMapping
from typing import Any, Final

from settings import Settings
from tables.rows import LocalStates, publish, reached, rocksdb_options

_SECONDS: Final = struct.Struct("<d")


def declare(app: Any, settings: Settings) -> tuple[Any, Any]:
    """Return the tables ``mail_sent`` and ``mail_held`` of ``app``: keys and values as bytes."""
    options = rocksdb_options(settings)
    return (
        app.Table("mail_sent", key_type=bytes, value_type=bytes, options=options, help="When each recipient was told."),
        app.Table("mail_held", key_type=bytes, value_type=bytes, options=options, help="What waits for a digest."),
    )


class Rows(LocalStates):
    """The rows of one partition, as text to bytes."""

    def __init__(self, app: Any, table: Any, partition: int) -> None:
        super().__init__(table, partition)
        self.app = app
        self._changes: dict[str, bytes | None] = {}

    def __setitem__(self, key: str, value: bytes) -> None:
        super().__setitem__(key, value)
        self._changes[key] = value

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._changes[key] = None

    async def settled(self) -> None:
        """Write every change to the changelog and wait; what Kafka does not take is written by the next call."""
        changes = dict(self._changes)
        if changes:
            last = await publish(self.app, self.table, self.partition, changes)
            reached(self.table, self.partition, last)
            for key, value in changes.items():
                if self._changes.get(key, value) == value:
                    self._changes.pop(key, None)


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
