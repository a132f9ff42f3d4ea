"""Rows and readings a second into the stores, against the embedded PostgreSQL and Valkey.

``python -m bench.stores [--rows N] [--chunk N]`` starts its own servers and prints, for one connection: COPY into the
staging table and one insert (what Headrace does), the same rows again (a redelivery), and ``executemany`` of the upsert
(what a sink does without thinking); then readings a second into the cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
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
_EXECUTEMANY = f"""
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


async def _rate(name: str, count: int, work: Callable[[], Awaitable[None]]) -> float:
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name:<44} {count / wall:>10,.0f} /s {cpu / count * 1e5:>9.2f} CPU s per 100k (client)")
    return count / wall


async def _postgresql(url: str, count: int, chunk: int) -> None:
    store = ReadingStore(url, pool_size=1, application_name="bench")
    await store.start()
    await store.ping()
    rows = make_rows(count)

    async def copy() -> None:
        for part in _chunks(rows, chunk):
            assert not await store.write_readings(part)

    connection = await asyncpg.connect(url)

    async def executemany() -> None:
        for part in _chunks(slow, chunk):
            async with connection.transaction():
                await connection.executemany(_EXECUTEMANY, part)

    ours = await _rate("PostgreSQL: COPY and one insert", count, copy)
    await _rate("PostgreSQL: the same rows again", count, copy)
    slow = make_rows(max(chunk, count // 4), first=count)
    theirs = await _rate("PostgreSQL: executemany", len(slow), executemany)
    print(f"{'COPY and one insert / executemany':<44} {ours / theirs:>10.1f} ×")
    await connection.close()
    await store.stop()


async def _valkey(url: str, count: int, chunk: int) -> None:
    store = LatestStore(url, ttl_seconds=3600, client_name="bench")
    await store.start()
    readings = make_readings(count)

    async def write() -> None:
        for part in _chunks(readings, chunk):
            await store.write(part)

    await _rate("Valkey: readings of 4 values", count, write)
    await _rate("Valkey: the same readings again", count, write)
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
