"""CoAP for real: the worker, its socket, Kafka; and the whole way to the rows in PostgreSQL beside MQTT."""

import asyncio
import json
import random
import secrets
import socket
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiocoap
import aiokafka
import asyncpg
import pytest
from aiocoap.message import Message
from aiocoap.numbers import codes

from devices.efento import messages as efento
from tests.agents.edges.coap import LossyThread
from tests.faults.worker import realm
from tools.simulator import Places, Plan
from tools.simulator.evidence import records
from tools.stack import Stack, ports
from tools.worker import Worker


def free_address() -> str:
    """Return an address for a CoAP server."""
    return f"127.0.0.1:{ports.choose(set(), random.SystemRandom(), socket.SOCK_DGRAM)}"


async def post(address: str, path: str, payload: bytes, *, content_format: int = 50) -> Message:
    """Send one confirmable request with a client of its own and return the answer."""
    client = await aiocoap.Context.create_client_context()
    try:
        request = Message(code=codes.POST, uri=f"coap://{address}/{path}", payload=payload)
        request.opt.content_format = content_format
        return await asyncio.wait_for(client.request(request).response, 60)
    finally:
        await client.shutdown()


async def raw_messages(env: dict[str, str], since: Any) -> list[dict[str, Any]]:
    """Return what the topic iot_raw_data holds."""
    places = Places.from_env({"DATABASE_URL": "postgresql://nobody@localhost/none", **env})
    return [json.loads(record.value or b"") async for record in records(places, "iot_raw_data", since)]


@pytest.mark.stack
def test_one_record_for_each_request_and_503_while_kafka_is_away(
    stack_session: Stack, kafka: str, tmp_path: Path
) -> None:
    """2.04 and one record each; with Kafka stopped 5.03 with Max-Age, and 2.04 again when it is back."""
    address, name = free_address(), f"c{secrets.token_hex(4)}"
    since = datetime.now(UTC) - timedelta(minutes=1)
    env = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka,
        "STAGES": "coap",
        "COAP_BIND": address,
        "COAP_ANSWER_SECONDS": "2",
        "COAP_MAX_AGE_SECONDS": "7",
        "APP_ID": name,
        "TOPIC_PREFIX": f"{name}.",
        "DATA_DIR": str(tmp_path / "data"),
    }
    worker = Worker(env, log=tmp_path / "worker.log")
    worker.start()
    broker = stack_session.part("kafka")
    try:

        async def many() -> list[Message]:
            return await asyncio.gather(*(post(address, f"telemetry/d{n}", b'{"n": %d}' % n) for n in range(20)))

        assert [answer.code for answer in asyncio.run(many())] == [codes.CHANGED] * 20
        broker.pause()
        try:
            answer = asyncio.run(post(address, "telemetry/away", b'{"n": 1}'))
        finally:
            broker.resume()
        assert (answer.code, answer.opt.max_age) == (codes.SERVICE_UNAVAILABLE, 7)
        for _ in range(30):
            answer = asyncio.run(post(address, "telemetry/away", b'{"n": 1}'))
            if answer.code != codes.SERVICE_UNAVAILABLE:
                break
        assert answer.code == codes.CHANGED
        found = asyncio.run(raw_messages(env, since))
        assert Counter(raw["device_id"] for raw in found) == {**{f"d{n}": 1 for n in range(20)}, "away": 1}
        first = next(raw for raw in found if raw["device_id"] == "d3")
        assert (first["protocol"], first["payload"]) == ("coap", '{"n": 3}')
        assert (first["metadata"]["uri_path"], first["metadata"]["method"]) == ("telemetry/d3", "POST")
        assert worker.stop() == 0
    finally:
        worker.stop()


@pytest.mark.stack
def test_samples_of_two_hours_ago_land_at_two_hours_ago(stack: Stack, tmp_path: Path) -> None:
    """An Efento message that comes late: each sample stands in PostgreSQL at its own time, an error code has no row."""
    address, serial, period = free_address(), secrets.token_bytes(6), 180
    begun = int((datetime.now(UTC) - timedelta(hours=2)).timestamp())
    temperature = {"type": 1, "timestamp": begun, "start_point": -15, "sample_offsets": [0, 3, 8_355_840, 9]}
    door = {"type": 5, "timestamp": begun, "sample_offsets": [-1, 600]}
    message = efento.MEASUREMENTS(
        serial_num=serial, measurement_period_base=period, measurement_period_factor=1, channels=[temperature, door]
    )
    with realm(stack, tmp_path, STAGES="coap,normalizer,ingestor", COAP_BIND=address) as own:
        worker = own.worker().start()
        answer = asyncio.run(post(address, "m", message.SerializeToString(), content_format=42))
        assert answer.code == codes.CREATED
        assert abs(efento.CONFIG.FromString(answer.payload).current_time - begun - 7200) < 60

        def rows() -> list[Any]:
            return asyncio.run(stored(own.env["DATABASE_URL"], serial.hex()))

        worker.wait(lambda: len(rows()) == 5, "storing five samples")
        at = datetime.fromtimestamp(begun, UTC)
        assert [(row["index"], row["time"] - at, row["value"]) for row in rows()] == [
            ("OK_ALARM", timedelta(0), 0.0),
            ("OK_ALARM", timedelta(seconds=599), 1.0),
            ("T", timedelta(0), -1.5),
            ("T", timedelta(seconds=period), -1.2),
            ("T", timedelta(seconds=3 * period), -0.6),
        ]
        assert worker.stop() == 0


async def stored(database_url: str, device_id: str) -> list[Any]:
    """Return a device's rows, by index and time."""
    connection = await asyncpg.connect(database_url)
    try:
        found: list[Any] = await connection.fetch(
            'SELECT "index", time, value FROM readings WHERE device_id = $1 ORDER BY "index", time', device_id
        )
    except asyncpg.UndefinedTableError:
        return []
    finally:
        await connection.close()
    return found


@pytest.mark.stack
def test_a_fleet_over_both_protocols_is_stored(stack: Stack, tmp_path: Path) -> None:
    """600 messages, half of the devices over CoAP (Efento and JSON): all of them are in the database, once."""
    address = free_address()
    with realm(stack, tmp_path, STAGES="mqtt,coap,normalizer,ingestor", COAP_BIND=address) as own:
        worker = own.worker().start()
        plan = Plan(devices=40, seed=9, rate=0, messages=600, duplicates=0.1, late=0.05, coap=0.5)
        fleet = own.fleet(plan, coap_url=f"coap://{address}")
        fleet.start()
        assert fleet.join(180)
        report = own.settle(fleet)
        # a busy machine has CoAP clients ask again, then a later message may overtake
        assert report.ok and not report.unexpected_dead, f"{report.text()}\n{worker.tail()}"
        assert report.acknowledged == report.stored == 600
        assert worker.stop() == 0


@pytest.mark.stack
def test_a_lossy_network_and_a_killed_worker_lose_nothing(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 % of the datagrams are lost either way, and the worker is killed: each device gets its 2.xx, a row is once."""
    # Devices four times as impatient as RFC 7252's, a server to match.
    monkeypatch.setattr("tools.simulator.coap.ACK_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr("tools.simulator.coap.PATIENCE_SECONDS", 12.0)
    address = free_address()
    host, _, port = address.partition(":")
    with (
        LossyThread((host, int(port)), 0.3, seed=4) as network,
        realm(stack, tmp_path, STAGES="coap,normalizer,ingestor", COAP_BIND=address, COAP_ANSWER_SECONDS="8") as own,
    ):
        worker = own.worker().start()
        plan = Plan(devices=100, seed=11, rate=40, messages=150, coap=1.0)
        fleet = own.fleet(plan, coap_url="coap://{}:{}".format(*network.address), drain_seconds=240)
        fleet.start()
        worker.wait(lambda: fleet.acknowledged > 40, "under load")
        worker.kill()
        worker.start()
        assert fleet.join(240)
        report = own.settle(fleet)
        assert report.ok, f"{report.text()}\n{worker.tail()}"
        assert report.acknowledged == report.stored == 150
        assert network.lost > 60
        assert worker.stop() == 0


@pytest.mark.stack
def test_only_known_devices_and_right_keys_get_in(kafka: str, tmp_path: Path) -> None:
    """UNKNOWN_DEVICES=reject follows the topic iot_devices; a device with an OSCORE key is not believed without it."""
    address, name = free_address(), f"k{secrets.token_hex(4)}"
    keys = tmp_path / "oscore.yaml"
    keys.write_text(
        "devices: [{device_id: safe-1, recipient_id: '01', master_secret: '0102030405060708090a0b0c0d0e0f10'}]"
    )
    env = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka,
        "STAGES": "coap",
        "COAP_BIND": address,
        "COAP_OSCORE_KEYS": str(keys),
        "UNKNOWN_DEVICES": "reject",
        "APP_ID": name,
        "TOPIC_PREFIX": f"{name}.",
        "DATA_DIR": str(tmp_path / "data"),
    }
    worker = Worker(env, log=tmp_path / "worker.log").start()
    try:
        assert asyncio.run(post(address, "telemetry/new-1", b'{"n": 1}')).code == codes.FORBIDDEN
        assert asyncio.run(post(address, "telemetry/safe-1", b'{"n": 1}')).code == codes.UNAUTHORIZED
        asyncio.run(register(kafka, f"{name}.iot_devices", "new-1"))

        def welcome() -> bool:
            return asyncio.run(post(address, "telemetry/new-1", b'{"n": 2}')).code == codes.CHANGED

        worker.wait(welcome, "following iot_devices")
        dropped = {reason: worker.metric("headrace_dropped_total", stage="coap", reason=reason) for reason in REASONS}
        assert dropped["unknown_device"] >= 1
        assert dropped["not_secured"] == 1
        assert "unknown devices: reject" in worker.log.read_text()
        assert worker.stop() == 0
    finally:
        worker.stop()


REASONS = ("unknown_device", "not_secured")


async def register(servers: str, topic: str, device_id: str) -> None:
    """Write a device to the topic of devices."""
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers)
    await producer.start()
    try:
        await producer.send_and_wait(topic, json.dumps({"device_id": device_id}).encode(), key=device_id.encode())
    finally:
        await producer.stop()
