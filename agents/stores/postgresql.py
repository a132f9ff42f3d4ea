"""Readings, alerts and commands in PostgreSQL or TimescaleDB.

Guarantees: those of :mod:`agents.stores.base`, and for readings: the first value that was stored under a key (device,
index, label, time) stays. Whatever is delivered again, in whatever order, and also twice in one chunk, changes
nothing.

Many rows are one transaction of four round trips: BEGIN, binary COPY into a temporary table of the session, one
``INSERT … SELECT … ON CONFLICT DO NOTHING``, COMMIT. Few are one statement with the columns as arrays, which is a
transaction by itself: a single round trip. Either insert is sorted by key, so that two writers whose chunks overlap
take their locks in the same order and cannot deadlock, and so that neighbours in the index are written together.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from agents.stores.base import BadRow, Row
from agents.stores.database import Database, ItemsRefused, blames_items
from agents.stores.lives import LifeWriter
from agents.stores.queries import ReadSide
from streams.resilience.failures import Poison

__all__ = ["ReadingStore"]

COLUMNS = ("device_id", "index", "label", "time", "value", "value_text", "unit", "request_id")
_STAGING = "headrace_staging"

# IF NOT EXISTS in the round trip of BEGIN costs 20 µs and asks nothing of the session: a connection pooler may hand us
# another one each time. Temporary tables are not written ahead; the rows go with the transaction.
_BEGIN = f"""
BEGIN;
CREATE TEMPORARY TABLE IF NOT EXISTS {_STAGING} (
    device_id text COLLATE "C", index text COLLATE "C", label text COLLATE "C", time timestamptz,
    value double precision, value_text text, unit text, request_id text
) ON COMMIT DELETE ROWS
"""
# ctid is the order of arrival in a table that was empty: of two rows with one key, the first wins.
_INSERT = f"""
INSERT INTO readings ({", ".join(COLUMNS)})
SELECT DISTINCT ON (device_id, index, label, time) {", ".join(COLUMNS)}
FROM {_STAGING}
ORDER BY device_id, index, label, time, ctid
ON CONFLICT DO NOTHING
"""  # noqa: S608  (constants only)
#: Up to so many rows one statement is quicker than COPY; beyond, encoding the arrays costs more than the round trips
#: (measured on the embedded server: 2.8 against 6.0 ms for 8 rows, equal at 500).
FEW_ROWS = 200
_INSERT_FEW = f"""
INSERT INTO readings ({", ".join(COLUMNS)})
SELECT DISTINCT ON (1, 2, 3, 4)
    device_id COLLATE "C", index COLLATE "C", label COLLATE "C", time, value, value_text, unit, request_id
FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::double precision[], $6::text[], $7::text[], $8::text[]
) WITH ORDINALITY AS few({", ".join(COLUMNS)}, number)
ORDER BY 1, 2, 3, 4, number
ON CONFLICT DO NOTHING
"""  # noqa: S608  (constants only)


class ReadingStore(Database, LifeWriter, ReadSide):
    """The database of Headrace; see :class:`~agents.stores.database.Database` for the arguments."""

    async def write_readings(self, rows: Sequence[Row]) -> list[BadRow]:
        """Store ``rows`` in one transaction and return those that PostgreSQL can never take.

        About 5,000 rows a call are fastest. Raises asyncpg's exceptions, ``OSError`` and ``TimeoutError`` for what can
        succeed later; then none of the rows is stored, or some, and the call is to be made again.
        """
        write = self._insert_few if len(rows) <= FEW_ROWS else self._copy_and_insert
        return await self.write_separating(rows, write, _refusal)

    async def _insert_few(self, rows: Sequence[Row]) -> None:
        async with self.connection() as connection:
            try:
                await connection.execute(_INSERT_FEW, *zip(*rows, strict=True))
            except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError, OverflowError) as exc:
                if not blames_items(exc):
                    raise
                raise ItemsRefused(exc) from exc

    async def _copy_and_insert(self, rows: Sequence[Row]) -> None:
        async with self.transaction(_BEGIN) as connection:
            try:
                await connection.copy_records_to_table(_STAGING, records=rows, columns=COLUMNS)
            except (ValueError, OverflowError) as exc:
                if not blames_items(exc):
                    raise
                raise ItemsRefused(exc) from exc
            await connection.execute(_INSERT)


def _refusal(row: Row) -> Exception | None:
    """Return why ``row`` can never be stored, for the reasons that need no server to be known."""
    for name, value in zip(COLUMNS, row, strict=True):
        if isinstance(value, str):
            if "\x00" in value:
                return Poison(f"column {name} holds a NUL character, which PostgreSQL's text cannot")
            try:
                value.encode()
            except UnicodeEncodeError as exc:
                return exc
        elif isinstance(value, datetime):
            try:
                value.timestamp()
            except (ValueError, OverflowError) as exc:
                return exc
    return None
