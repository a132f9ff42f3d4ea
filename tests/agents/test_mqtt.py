"""The MQTT stage's agent under ``test_context``: batches in, records out, acknowledgement after."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from agents import mqtt
from agents.edges.mqtt_wire import Arrival
from streams import topics
from streams.messages import RawMessage, decoder
from streams.resilience.deadletter import header
from streams.resilience.failures import Retryable

RAW = decoder(RawMessage)


def arrival(topic: str, payload: bytes, *, sha256: str | None = None, size: int | None = None) -> Arrival:
    """Return a message as the broker delivered it."""
    return Arrival(
        topic=topic,
        payload=payload,
        qos=1,
        retain=False,
        dup=False,
        mid=7,
        arrived_at=datetime(2026, 1, 2, tzinfo=UTC),
        size_bytes=size or len(payload),
        sha256=sha256,
    )


class Batch:
    """A batch that notes what became of it."""

    def __init__(self, *messages: Arrival) -> None:
        self.messages = list(messages)
        self.fate: str | None = None

    def acknowledge(self) -> None:
        """Note the acknowledgement."""
        self.fate = "acknowledged"

    def release(self) -> None:
        """Note the release."""
        self.fate = "released"


async def test_a_batch_becomes_raw_messages_in_order() -> None:
    """Each message is a RawMessage keyed by its device, text as it came, other bytes in hex; then it is
    acknowledged.
    """
    batch = Batch(
        arrival("devices/d1/telemetry", b'{"t": 1}'),
        arrival("devices/d2/telemetry", b"\xff\x00"),
        arrival("nobody/knows", b"x"),
    )
    async with mqtt.receive.test_context() as agent:
        await agent.put(batch)
    found = [(topic, key, RAW.decode(value)) for topic, key, value, _ in mqtt.mqtt.app.captured]
    assert [topic for topic, _, _ in found] == [topics.raw_data.name] * 3
    assert [key for _, key, _ in found] == [b"d1", b"d2", b"knows"]
    first, second, _ = (message for _, _, message in found)
    assert (first.payload, first.payload_hex) == ('{"t": 1}', None)
    assert (second.payload, second.payload_hex) == (None, "ff00")
    assert first.metadata == {"mqtt_topic": "devices/d1/telemetry", "mqtt_qos": 1, "mqtt_retain": False}
    assert batch.fate == "acknowledged"


async def test_an_oversize_message_is_a_dead_letter() -> None:
    """What is above the limit is refused at the edge: size, hash and first bytes go to the dead letters."""
    batch = Batch(arrival("devices/d1/telemetry", b"head", sha256="abc", size=2_000_000))
    async with mqtt.receive.test_context() as agent:
        await agent.put(batch)
    ((topic, key, value, headers),) = mqtt.mqtt.app.captured
    assert (topic, key, value) == (topics.errors.name, b"d1", b"head")
    found: Any = headers or []
    assert header(found, "dlq-class") == "rejected"
    assert header(found, "dlq-size") == "2000000"
    assert header(found, "dlq-sha256") == "abc"
    assert batch.fate == "acknowledged"


async def test_a_batch_that_kafka_does_not_take_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that cannot be written is given back to the broker, never acknowledged."""

    async def away(*_: Any) -> Any:
        raise Retryable("no broker")

    monkeypatch.setattr(mqtt.mqtt.app, "send_outgoing", away)
    batch = Batch(arrival("devices/d1/telemetry", b"{}"))
    async with mqtt.receive.test_context() as agent:
        await agent.put(batch)
    assert batch.fate == "released"


def test_request_ids_differ_and_sort_by_time() -> None:
    """A request id is unique, and a later one sorts behind an earlier millisecond's."""
    ids = [mqtt.new_request_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert sorted(one[:12] for one in ids) == [one[:12] for one in ids]
