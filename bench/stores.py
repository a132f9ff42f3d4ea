"""Rows and readings a second into the stores, against the embedded PostgreSQL and Valkey.

``python -m bench.stores [--rows N] [--chunk N]`` starts its own servers and prints, for one connection: COPY into the
staging table and one insert (what Headrace does), the same rows again (a redelivery), ``executemany`` of the upsert,
and the upsert row by row; then readings a second into the cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import uvloop

from agents.stores.base import Row
from agents.stores.postgresql import COLUMNS, ReadingStore
from agents.stores.valkey import LatestStore
from devices.model import Reading
from tools.stack import Stack

_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
_LABELS = ("power", "voltage", "temperature", "flow")
_UPSERT = f"""
INSERT INTO readings ({", ".join(COLUMNS)}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING
"""  # noqa: S608  (constants only)


def make_rows(count: int, devices: int = 300, first: int = 0) -> list[Row]:
    """Return ``count`` rows as a fleet of ``devices`` sends them: each sample four labels, the devices in turn."""
    rows: list[Row] = []
    for n in range(first, first + count):
        sample, label = divmod(n, len(_LABELS))
        turn, device = divmod(sample, devices)
        moment = _EPOCH + timedelta(seconds=turn, microseconds=device)
        rows.append(
            (f"device-{device:05d}", "1", _LABELS[label], moment, n * 0.25, None, "V", f"request-{sample:012d}")
        )
    return rows


def make_readings(count: int, devices: int = 300) -> list[Reading]:
    """Return ``count`` readings of four values each, the devices in turn, each later than the one before."""
    return [
        Reading(
            request_id=f"request-{n:012d}",
            timestamp=_EPOCH + timedelta(milliseconds=n),
            device_id=f"device-{n % devices:05d}",
            index=str(n // devices % 4),
            values=[n * 0.25, 230.1, 21.5, True],
            labels=list(_LABELS),
            display_names=list(_LABELS),
            metadata={"category": "measurements", "units": ["W", "V", "°C", None], "persist": [True] * 4},
        )
        for n in range(count)
    ]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class _Tally:
    """Rows, seconds and CPU seconds of this process that one way of writing took, over all its turns."""

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.wall_seconds, self.cpu_seconds = name, 0, 0.0, 0.0

    async def turn(self, rows: int, work: Awaitable[None]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        await work
        self.wall_seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.rows += rows

    @property
    def rate(self) -> float:
        return self.rows / self.wall_seconds

    def show(self) -> None:
        cpu = self.cpu_seconds / self.rows * 1e5
        print(f"{self.name:<44} {self.rate:>10,.0f} /s {cpu:>9.2f} CPU s per 100k (client)")


async def _postgresql(url: str, count: int, chunk: int) -> None:
    store = ReadingStore(url, pool_size=1, application_name="bench")
    await store.start()
    await store.ping()
    connection = await asyncpg.connect(url)

    async def copy(rows: Sequence[Row]) -> None:
        for part in _chunks(rows, chunk):
            assert not await store.write_readings(part)

    async def executemany(rows: Sequence[Row]) -> None:
        for part in _chunks(rows, chunk):
            async with connection.transaction():
                await connection.executemany(_UPSERT, part)

    async def one_by_one(rows: Sequence[Row]) -> None:
        for row in rows:
            await connection.execute(_UPSERT, *row)

    ours, again = _Tally("PostgreSQL: COPY and one insert"), _Tally("PostgreSQL: the same rows again")
    many, single = _Tally("PostgreSQL: executemany, one transaction"), _Tally("PostgreSQL: one statement a row")
    # In turns, so that a table that grows and a machine that is busy are the same for all.
    turn = 4 * chunk
    for first in range(0, count, turn):
        rows = make_rows(2 * turn + chunk // 5, first=first * 3)
        await ours.turn(turn, copy(rows[:turn]))
        await many.turn(turn, executemany(rows[turn : 2 * turn]))
        await single.turn(len(rows) - 2 * turn, one_by_one(rows[2 * turn :]))
        await again.turn(turn, copy(rows[:turn]))
    for tally in (ours, again, many, single):
        tally.show()
    print(f"{'COPY and one insert / executemany':<44} {ours.rate / many.rate:>10.1f} ×")
    print(f"{'COPY and one insert / one statement a row':<44} {ours.rate / single.rate:>10.1f} ×")
    await connection.close()
    await store.stop()


async def _valkey(url: str, count: int, chunk: int) -> None:
    store = LatestStore(url, ttl_seconds=3600, client_name="bench")
    await store.start()
    readings = make_readings(count)

    async def write() -> None:
        for part in _chunks(readings, chunk):
            await store.write(part)

    for name in ("Valkey: readings of 4 values", "Valkey: the same readings again"):
        tally = _Tally(name)
        await tally.turn(count, write())
        tally.show()
    await store.stop()


def main() -> None:
    """Start the two servers, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=400_000, help="rows to write (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=5_000, help="rows in one call (default %(default)s)")
    options = parser.parse_args()
    with Stack.temporary(("postgresql", "valkey")) as stack:
        stack.start("postgresql", "valkey")
        uvloop.run(_postgresql(stack.env["DATABASE_URL"], options.rows, options.chunk))
        uvloop.run(_valkey(stack.env["REDIS_URL"], options.rows // 4, options.chunk))


if __name__ == "__main__":
    main()
