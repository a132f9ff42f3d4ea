"""What the conformance suite asks of a sink, and the adapters that give it an answer.

A new sink is one class here and its name in :data:`SINKS`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import asyncpg
import redis.asyncio as redis

from agents.stores.postgresql import ReadingStore
from agents.stores.rows import rows_of
from agents.stores.valkey import LatestStore
from devices.model import Reading
from streams.resilience.failures import FailureClass, classify

EPOCH = datetime(2024, 5, 1, tzinfo=UTC)
# So long that a busy machine is never taken for a server that does not answer.
PATIENCE_SECONDS = 60.0


def reading(device: int, second: int, index: str = "1", **changed: Any) -> Reading:
    """Return a reading of two values whose content follows from its key and time."""
    fields: dict[str, Any] = {
        "request_id": f"request-{device}-{index}-{second}",
        "timestamp": EPOCH + timedelta(seconds=second),
        "device_id": f"device-{device}",
        "index": index,
        "values": [device + second / 10, f"text {second}"],
        "labels": ["level", "state"],
        "display_names": ["Level", "State"],
        "metadata": {"category": "measurements", "units": ["m", None]},
    }
    return Reading(**(fields | changed))


class Sink(abc.ABC):
    """A sink under test, open between :meth:`open` and :meth:`close`."""

    part: ClassVar[str]
    """The part of the embedded stack that it writes to."""

    def __init__(self, url: str, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        self.url = url
        self.timeout_seconds = timeout_seconds

    @abc.abstractmethod
    async def open(self) -> None:
        """Start it; must not need the server."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Stop it."""

    @abc.abstractmethod
    async def ping(self) -> None:
        """Ask the server for an answer."""

    @abc.abstractmethod
    async def write(self, readings: Sequence[Reading]) -> list[Reading]:
        """Write one chunk; return the readings that were refused, each once."""

    @abc.abstractmethod
    async def stored(self) -> dict[Any, Any]:
        """Return all that the server holds, read past the sink."""

    @abc.abstractmethod
    def expected(self, readings: Iterable[Reading]) -> dict[Any, Any]:
        """Return what the server must hold after ``readings`` were written, in any order and number."""

    @abc.abstractmethod
    def unstorable(self) -> list[Reading]:
        """Return readings that this sink can never store, of different kinds, each of a device of its own."""


class PostgreSQLSink(Sink):
    """Keeps every value; the key of a row is device, index, label and time."""

    part = "postgresql"

    async def open(self) -> None:
        self.store = ReadingStore(
            self.url,
            pool_size=2,
            statement_timeout_seconds=self.timeout_seconds,
            connect_timeout_seconds=self.timeout_seconds,
            slack_seconds=self.timeout_seconds,
        )
        await self.store.start()

    async def close(self) -> None:
        await self.store.stop()

    async def ping(self) -> None:
        await self.store.ping()

    async def write(self, readings: Sequence[Reading]) -> list[Reading]:
        of_row = {row: reading for reading in readings for row in rows_of(reading)}
        bad = await self.store.write_readings([row for reading in readings for row in rows_of(reading)])
        assert {classify(entry.exception) for entry in bad} <= {FailureClass.POISON}
        refused = {id(of_row[entry.row]): of_row[entry.row] for entry in bad}
        return list(refused.values())

    async def stored(self) -> dict[Any, Any]:
        connection = await asyncpg.connect(self.url)
        rows = await connection.fetch("SELECT * FROM readings")
        await connection.close()
        return {tuple(row)[:4]: tuple(row)[4:] for row in rows}

    def expected(self, readings: Iterable[Reading]) -> dict[Any, Any]:
        return {row[:4]: row[4:] for reading in readings for row in rows_of(reading)}

    def unstorable(self) -> list[Reading]:
        # More than 2704 bytes that do not compress: no index entry can hold such a key.
        incompressible = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(3000))
        return [
            reading(9001, 1, values=["a\x00b", "fine"]),
            reading(9002, 1, values=["\ud800", "fine"]),
            reading(9003, 1, labels=[incompressible, "state"]),
        ]


class ValkeySink(Sink):
    """Keeps the newest reading of each device, category and index."""

    part = "valkey"

    async def open(self) -> None:
        self.store = LatestStore(self.url, ttl_seconds=3600, timeout_seconds=self.timeout_seconds)
        await self.store.start()

    async def close(self) -> None:
        await self.store.stop()

    async def ping(self) -> None:
        await self.store.ping()

    async def write(self, readings: Sequence[Reading]) -> list[Reading]:
        count = await self.store.write(readings)
        assert count.written + count.older + count.unchanged + len(count.bad) == len(readings)
        assert {classify(entry.exception) for entry in count.bad} <= {FailureClass.POISON}
        return [entry.row for entry in count.bad]

    async def stored(self) -> dict[Any, Any]:
        async with redis.Redis.from_url(self.url) as client:
            found = {}
            for device in await client.smembers("devices"):
                for category in await client.smembers(b"device:%b:categories" % device):
                    key = b"device:%b:category:%b:readings" % (device, category)
                    if await client.type(key) == b"hash":
                        hashed = await client.hgetall(key)
                        found.update({(device.decode(), category.decode(), i.decode()): v for i, v in hashed.items()})
            return found

    def expected(self, readings: Iterable[Reading]) -> dict[Any, Any]:
        newest: dict[Any, Reading] = {}
        for one in readings:
            key = (one.device_id, one.metadata["category"], one.index)
            if key not in newest or newest[key].timestamp <= one.timestamp:
                newest[key] = one
        return {key: latest_json(one) for key, one in newest.items()}

    def unstorable(self) -> list[Reading]:
        return [
            reading(9001, 1, labels=["\ud800", "state"]),
            reading(9002, 1, metadata={"category": "measurements", "unit": {1, 2}, "depth": _deep(2000)}),
        ]


def latest_json(one: Reading) -> bytes:
    """Return what the contract's hash holds for a reading."""
    import msgspec

    plain = msgspec.to_builtins(one)
    first = {"timestamp": plain["timestamp"], "device_id": one.device_id, "index": one.index}
    return msgspec.json.encode({**first, "category": one.metadata["category"], **plain})


def _deep(levels: int) -> Any:
    nested: Any = []
    for _ in range(levels):
        nested = [nested]
    return nested


SINKS = {"postgresql": PostgreSQLSink, "valkey": ValkeySink}
