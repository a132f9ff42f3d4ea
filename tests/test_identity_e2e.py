"""Whose message is it, for real: MQTT devices that are unknown, and such that claim to be another."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import paho.mqtt.publish as paho
import pytest

from tests.faults.worker import Realm, realm
from tests.test_coap_e2e import register, stored
from tools.simulator.evidence import records
from tools.stack import Stack

FRAME = json.loads((Path(__file__).parents[1] / "devices" / "fluxor" / "vectors.json").read_text())[0]


def publish(own: Realm, topic: str, payload: str) -> None:
    """Publish one message at QoS 1, acknowledged by the broker."""
    host, port = own.env["MQTT_URL"].removeprefix("mqtt://").split(":")
    paho.single(topic, payload, qos=1, hostname=host, port=int(port))


async def letters(own: Realm, since: datetime) -> Counter[tuple[str, str]]:
    """Count dead letters by device and first word of the reason."""
    found: Counter[tuple[str, str]] = Counter()
    async for record in records(own.places, "iot_errors", since):
        headers = dict(record.headers)
        assert headers["dlq-class"] == b"rejected"
        found[(record.key or b"").decode(), headers["dlq-message"].decode().split(":")[0]] += 1
    return found


@pytest.mark.stack
def test_unknown_and_false_devices_are_rejected_and_a_registered_one_gets_in(stack: Stack, tmp_path: Path) -> None:
    """UNKNOWN_DEVICES=reject over MQTT: dead letters for strangers and impostors, rows once a device is registered."""
    since = datetime.now(UTC) - timedelta(minutes=1)
    with realm(stack, tmp_path, STAGES="mqtt,normalizer,ingestor", UNKNOWN_DEVICES="reject") as own:
        worker = own.worker().start()
        for device_id in ("new-1", "4711"):
            asyncio.run(register(own.env["KAFKA_BOOTSTRAP_SERVERS"], f"{own.name}.iot_devices", device_id))

        def welcome() -> bool:
            publish(own, "devices/new-1/telemetry", '{"t": 1}')
            return bool(asyncio.run(stored(own.env["DATABASE_URL"], "new-1")))

        worker.wait(welcome, "following iot_devices")
        publish(own, "devices/stranger/telemetry", '{"t": 1}')
        publish(own, "broker_data/b1/4711/data", FRAME["mqtt_payload_ascii_hex"])

        def refused(reason: str) -> float:
            return worker.metric("headrace_refused_messages_total", reason=reason)

        worker.wait(lambda: refused("unknown_device") >= 1 and refused("another_device") == 1, "refusing both")
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        found = asyncio.run(letters(own, since))
        assert found["stranger", "unknown_device"] == 1
        assert found["4711", "another_device"] == 1
        assert asyncio.run(stored(own.env["DATABASE_URL"], "stranger")) == []
        assert asyncio.run(stored(own.env["DATABASE_URL"], "4711")) == []
        assert "unknown devices over MQTT: reject" in worker.log.read_text()
        assert worker.stop() == 0
