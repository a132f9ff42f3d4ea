"""The way down, for real: from HTTP through Kafka to a device on the MQTT broker, and its word back."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiocoap
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from devices.efento.messages import CONFIG, MEASUREMENTS
from devices.fluxor import frame
from devices.light_controller.schedule import Operation, build_frame
from tests.faults.worker import Realm, Worker, realm
from tools.stack import Stack

STAGES = "mqtt,normalizer,ingestor,commands"
KEY = "a-key"
BOUND_SECONDS = 60.0

pytestmark = [pytest.mark.stack]


class Http:
    """The API of a worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __call__(self, method: str, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """Return status and JSON of a request."""
        request = urllib.request.Request(  # noqa: S310 - the worker's own address
            f"{self.worker.url}/api/v1{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **({"X-API-Key": key} if key else {})},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                return response.status, json.load(response)
        except urllib.error.HTTPError as exc:
            return exc.code, json.load(exc)

    def states(self, request_id: str) -> list[str]:
        """Return the steps of a command so far."""
        status, found = self("GET", f"/commands/{request_id}")
        return [step["state"] for step in found["transitions"]] if status == 200 else []

    def until(self, request_id: str, state: str) -> dict[str, Any]:
        """Wait for a state; returns the command."""
        return wait_for(
            f"{request_id} {state}, has {self.states(request_id)}",
            lambda: found if (found := self("GET", f"/commands/{request_id}")[1]).get("state") == state else None,
        )


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Return the first true answer of ``condition``; fails, saying ``what``, after a generous bound."""
    until = time.monotonic() + BOUND_SECONDS
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    pytest.fail(f"{what}: not within {BOUND_SECONDS:.0f} s")


class Gateway:
    """A field broker with its controllers, as it behaves on MQTT: hears commands, answers as it is told."""

    def __init__(self, mqtt_url: str, broker_id: str) -> None:
        url = urlsplit(mqtt_url)
        self.broker_id = broker_id
        self.answers: int | None = 1
        self.commands: list[tuple[float, dict[str, Any]]] = []
        self._subscribed = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_message = self._on_message
        self.client.on_subscribe = self.client.on_unsubscribe = lambda *_: self._subscribed.set()
        self.client.connect(url.hostname or "127.0.0.1", url.port or 1883)
        self.client.loop_start()
        self.subscribe(on=True)

    def subscribe(self, *, on: bool) -> None:
        """Hear commands, or hear none from now on; returns once the broker knows."""
        self._subscribed.clear()
        topic = f"broker_data/{self.broker_id}/command"
        self.client.subscribe(topic, qos=1) if on else self.client.unsubscribe(topic)
        assert self._subscribed.wait(30)

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        command = json.loads(message.payload)
        assert not message.retain
        self.commands.append((time.time(), command))
        if self.answers is not None:
            self.feedback(command["uid"], self.answers)

    def feedback(self, uid: str, status: int) -> None:
        """Say what became of a command."""
        self.client.publish(f"broker_data/{self.broker_id}/feedback", json.dumps({"uid": uid, "status": status}), qos=1)

    def climate(self, device_id: int) -> None:
        """Publish a climate frame of a device."""
        offsets, channel = bytes([127] * 4), 12_150 | 4_500 << 16
        payload = frame.FRAME.pack(
            device_id, 0, 4, 2, 0, 0, 0, 5000, 127, 2000, 127, offsets, channel, 0, 0, 0, 0, 0
        ).hex()
        self.client.publish(f"broker_data/{self.broker_id}/{device_id}/data", payload, qos=1).wait_for_publish(30)

    def lights(self, device_id: int, operation: Operation = "read_all", *, task_id: int = 0, alarm: int = 0) -> None:
        """Publish a schedule message of a device."""
        topic = f"broker_data/{self.broker_id}/{device_id}/scheduler_data"
        payload = build_frame(device_id, int(time.time()), operation, task_id=task_id, alarm=alarm)
        self.client.publish(topic, payload, qos=1).wait_for_publish(30)

    def got(self, request_id: str) -> list[dict[str, Any]]:
        """Return what came for a request."""
        return [command for _, command in self.commands if command["uid"] == f"{request_id}-{self.broker_id}"]

    def close(self) -> None:
        """Disconnect."""
        self.client.disconnect()
        self.client.loop_stop()


@contextmanager
def house(stack: Stack, folder: Path, **settings: str) -> Iterator[tuple[Realm, Worker, Http, Gateway]]:
    """Open a realm with a worker that has an API key, and a gateway."""
    broker_id = str(secrets.randbelow(10**9))
    filters = (
        f"broker_data/{broker_id}/+/data,broker_data/{broker_id}/+/scheduler_data,broker_data/{broker_id}/feedback"
    )
    options = {"STAGES": STAGES, "API_KEYS": KEY, "MQTT_TOPICS": filters, **settings}
    with realm(stack, folder, **options) as own:
        worker = own.worker().start()
        gateway = Gateway(own.env["MQTT_URL"], broker_id)
        try:
            yield own, worker, Http(worker), gateway
        finally:
            gateway.close()


def config(device_id: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a climate configuration."""
    return {"device_id": str(device_id), "command_type": "config", "payload": {"T_consigne": 21.5}, **fields}


def test_commands_find_their_end(stack: Stack, tmp_path: Path) -> None:
    """Configuration, schedule, duplicate, failure, a device not heard of, refusals, and how long a command takes."""
    with house(stack, tmp_path, COMMAND_TIMEOUT_SECONDS="30") as (_own, _worker, http, gateway):
        device, other = 2_261_001, 2_261_002
        # what cannot be right is refused before anything is queued
        assert http("POST", "/commands", config(device), key=None)[0] == 401
        status, refused = http("POST", "/commands", config(device, payload={"T_consigne": "warm"}))
        assert (status, refused["pointer"]) == (400, "/payload/T_consigne")
        status, refused = http("POST", "/commands/batch", {"commands": [config(device), config(device, priority="x")]})
        assert (status, refused["pointer"]) == (400, "/commands/1/priority")
        assert http("GET", "/commands/nobody")[0] == 404
        # a device that was never heard of: queued, until it expires or is heard of
        soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
        assert http("POST", "/commands", config(device, request_id="too-late", expires_at=soon))[0] == 202
        status, made = http("POST", "/commands", config(other))
        assert status == 202
        assert http.until("too-late", "EXPIRED")["state"] == "EXPIRED"
        assert http.states("too-late") == ["QUEUED", "EXPIRED"]
        assert http.states(made["request_id"]) == ["QUEUED"]
        gateway.climate(other)
        http.until(made["request_id"], "SUCCESSFUL")
        assert http.states(made["request_id"]) == ["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL"]
        assert not gateway.got("too-late")
        # the same request again
        gateway.climate(device)
        for _ in range(2):
            assert http("POST", "/commands", config(device, request_id="once-1"))[0] == 202
        http.until("once-1", "SUCCESSFUL")
        assert http("POST", "/commands", config(device, request_id="once-1"))[0] == 202
        assert http("POST", "/commands", config(other, request_id="once-1"))[0] == 409
        (body,) = gateway.got("once-1")
        assert body["T_consigne"] == 2150
        # a schedule, and a device that says no
        gateway.lights(other)
        assert http("POST", "/commands", {"device_id": str(other), "command_type": "light_read_all", "request_id": "l"})
        http.until("l", "SUCCESSFUL")
        gateway.answers = 0
        http("POST", "/commands", config(device, command_type="reboot", payload={}, request_id="no"))
        assert http.until("no", "FAILED")["detail"] == "status 0"
        # a batch, in order per device, one at a time
        gateway.answers = 1
        batch = [
            {**config(device, request_id=f"b{n}"), "command_type": "synchronize", "payload": {}} for n in range(20)
        ]
        assert http("POST", "/commands/batch", {"commands": batch})[0] == 202
        for one in batch:
            http.until(one["request_id"], "SUCCESSFUL")
        order = [command["uid"].rpartition("-")[0] for _, command in gateway.commands if command["uid"].startswith("b")]
        assert order == [one["request_id"] for one in batch]
        # from HTTP to the device
        latencies = []
        for number in range(20):
            before = time.time()
            http("POST", "/commands", config(device, request_id=f"t{number}"))
            wait_for("the command", lambda name=f"t{number}": gateway.got(name))
            at = next(at for at, command in gateway.commands if command["uid"].startswith(f"t{number}-"))
            latencies.append(at - before)
            http.until(f"t{number}", "SUCCESSFUL")
        print(
            f"HTTP to device: median {statistics.median(latencies) * 1000:.0f} ms, worst {max(latencies) * 1000:.0f} ms"
        )


def test_a_device_that_answers_too_late(stack: Stack, tmp_path: Path) -> None:
    """No answer: what is safe to repeat is sent again and marked, all else once; a late answer changes nothing."""
    with house(stack, tmp_path, COMMAND_TIMEOUT_SECONDS="2", COMMAND_ATTEMPTS="2") as (_own, _worker, http, gateway):
        device = 2_261_003
        gateway.answers = None
        gateway.climate(device)
        http("POST", "/commands", config(device, request_id="slow"))
        http("POST", "/commands", config(device, command_type="reboot", payload={}, request_id="reboot"))
        found = http.until("slow", "TIMEOUT")
        assert any("twice" in step["detail"] for step in found["transitions"])
        assert http.states("slow").count("TIMEOUT") == 1
        assert len(gateway.got("slow")) == 2
        http.until("reboot", "TIMEOUT")
        assert len(gateway.got("reboot")) == 1
        for late in ("slow", "reboot"):
            gateway.feedback(f"{late}-{gateway.broker_id}", 1)
        gateway.answers = 1
        http("POST", "/commands", config(device, request_id="after"))
        http.until("after", "SUCCESSFUL")
        assert http.states("slow")[-1] == "TIMEOUT"
        assert http("GET", "/commands/slow")[1]["state"] == "TIMEOUT"
        assert http("GET", "/commands/reboot")[1]["state"] == "TIMEOUT"


async def ask(port: int, payload: bytes) -> bytes:
    """Send measurements as a sensor does, confirmable; returns the payload of the answer, which is acknowledged."""
    context = await aiocoap.Context.create_client_context()
    try:
        request = aiocoap.Message(code=aiocoap.POST, uri=f"coap://127.0.0.1:{port}/m", payload=payload)
        return bytes((await asyncio.wait_for(context.request(request).response, BOUND_SECONDS)).payload)
    finally:
        await context.shutdown()


def test_a_sensor_gets_its_configuration_over_coap(stack: Stack, tmp_path: Path) -> None:
    """It waits for the sensor's next request, the newest alone, and ends with the acknowledgement of the answer.

    Killing the worker meanwhile loses nothing.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serial = secrets.token_bytes(6)
    body: dict[str, Any] = {"device_id": serial.hex(), "command_type": "config", "protocol": "coap"}
    measured: Any = MEASUREMENTS()
    measured.serial_num, measured.battery_status, measured.measurement_period_base = serial, True, 60
    channel = measured.channels.add()
    channel.type, channel.timestamp, channel.start_point = 1, int(time.time()) - 600, 215
    channel.sample_offsets.extend([0, 1])
    payload = bytes(measured.SerializeToString())
    stages = "coap,normalizer,ingestor,commands"
    options = {"STAGES": stages, "API_KEYS": KEY, "BROKER_PROFILE": "fast", "COMMAND_TIMEOUT_SECONDS": "5"}
    with realm(stack, tmp_path, **options) as own:
        worker = own.worker(COAP_BIND=f"127.0.0.1:{port}").start()
        http = Http(worker)
        for name, limit in (("old", 5), ("new", 7)):
            assert (
                http("POST", "/commands", {**body, "request_id": name, "payload": {"transfer_limit": limit}})[0] == 202
            )
        http.until("old", "FAILED")
        soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
        late = {
            **body,
            "device_id": "ff" * 6,
            "request_id": "late",
            "payload": {"transfer_limit": 1},
            "expires_at": soon,
        }
        assert http("POST", "/commands", late)[0] == 202
        wait_for("new on its way", lambda: http.states("new") == ["QUEUED"])
        worker.kill()
        worker.start()

        def configured() -> bool:
            answer: Any = CONFIG()
            answer.ParseFromString(asyncio.run(ask(port, payload)))
            assert answer.current_time
            assert answer.transfer_limit in (0, 7)
            return bool(answer.transfer_limit)

        wait_for("the configuration in an answer", configured)
        found = http.until("new", "SUCCESSFUL")
        assert [step["state"] for step in found["transitions"]] == ["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL"]
        wait_for("nothing more in the answers", lambda: not configured())
        http.until("late", "EXPIRED")
