"""What a realm's topics hold, what its groups have committed, and records written there past every connector."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient

from tests.faults.worker import Realm
from tools.simulator.evidence import records

_BEGINNING = datetime(2020, 1, 1, tzinfo=UTC)
#: Headers of every dead letter (the contract); `dlq-request-id` is there where it is known.
LETTER_HEADERS = {
    "dlq-stage",
    "dlq-topic",
    "dlq-partition",
    "dlq-offset",
    "dlq-timestamp",
    "dlq-group",
    "dlq-class",
    "dlq-exception",
    "dlq-message",
    "dlq-attempts",
    "dlq-first-failure",
    "dlq-last-failure",
}


def raw_message(device_id: str, number: int, payload: str, topic: str | None = None) -> bytes:
    """Return a RawMessage of a plain JSON device as the MQTT stage writes it."""
    message = {
        "request_id": f"r-{device_id}-{number}",
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "device_id": device_id,
        "protocol": "mqtt",
        "payload": payload,
        "payload_hex": None,
        "metadata": {"mqtt_topic": topic or f"devices/{device_id}/telemetry", "mqtt_qos": 1, "mqtt_retain": False},
    }
    return json.dumps(message).encode()


def read(own: Realm, topic: str) -> list[Any]:
    """Return all records that a topic of the contract holds."""

    async def collect() -> list[Any]:
        return [record async for record in records(own.places, topic, _BEGINNING)]

    return asyncio.run(collect())


def write(
    own: Realm, topic: str, values: Sequence[tuple[bytes | None, bytes | None]], partition: int | None = None
) -> list[int]:
    """Write (key, value) records in one batch each; return their offsets."""

    async def send() -> list[int]:
        producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=own.env["KAFKA_BOOTSTRAP_SERVERS"], max_request_size=8 << 20, linger_ms=50
        )
        await producer.start()
        try:
            waiting = [
                await producer.send(own.places.topic(topic), value, key=key, partition=partition)
                for key, value in values
            ]
            return [done.offset for done in await asyncio.gather(*waiting)]
        finally:
            await producer.stop()

    return asyncio.run(send())


def committed(own: Realm, group: str) -> dict[tuple[str, int], int]:
    """Return the committed offsets of a group, by (topic, partition)."""

    async def ask() -> dict[tuple[str, int], int]:
        admin = AIOKafkaAdminClient(bootstrap_servers=own.env["KAFKA_BOOTSTRAP_SERVERS"], request_timeout_ms=20_000)
        await admin.start()
        try:
            found = await admin.list_consumer_group_offsets(group)
        finally:
            await admin.close()
        return {(tp.topic, tp.partition): entry.offset for tp, entry in found.items()}

    return asyncio.run(ask())


class Switches:
    """Moments at which no worker ran, and what the normalizer had committed then."""

    def __init__(self, own: Realm) -> None:
        self._own = own
        self._moments: list[tuple[float, dict[tuple[str, int], int]]] = []

    def note(self) -> None:
        """Take down the committed offsets; to be called while no worker runs."""
        self._moments.append((time.time() * 1000, committed(self._own, f"{self._own.name}-normalizer")))

    def read_anew(self) -> tuple[int, list[str]]:
        """Return how many messages the normalizer handled again, and those of them that were committed before."""
        where = {}
        for record in read(self._own, "iot_raw_data"):
            where[json.loads(record.value)["request_id"]] = (record.topic, record.partition, record.offset)
        seen: Counter[tuple[str, ...]] = Counter()
        again = 0
        wrong = []
        for record in sorted(read(self._own, "iot_validated_data"), key=lambda one: (one.partition, one.offset)):
            reading = json.loads(record.value)
            name = (reading["request_id"], reading["index"], reading["timestamp"])
            seen[name] += 1
            if seen[name] == 1:
                continue
            again += 1
            topic, partition, offset = where[reading["request_id"]]
            before = [offsets for at, offsets in self._moments if at <= record.timestamp]
            if before and offset < before[-1].get((topic, partition), 0):
                wrong.append(f"{topic}[{partition}]@{offset} {name}")
        return again, wrong
