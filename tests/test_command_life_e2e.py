"""The whole life of a command, for real: climate configuration, light schedule, sensor configuration."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from devices.light_controller.schedule import unpack_alarm
from tests.faults.topics import write
from tests.faults.worker import Realm
from tests.sensor import Sensor
from tests.test_commands_e2e import Gateway, Http, house, wait_for
from tools.stack import Stack, ports

pytestmark = [pytest.mark.stack]

STAGES = "mqtt,coap,normalizer,ingestor,commands"
LIFE = ["QUEUED", "SENT", "DELIVERED", "SUCCESSFUL"]
TASK = {"task_id": 3, "time_beg": 540, "duration": 60, "day": 2, "channel": 1, "active": 1, "run_once": 0}
VECTORS = json.loads((Path(__file__).parents[1] / "devices" / "light_controller" / "vectors.json").read_text())


@dataclass
class Kind:
    """A device and its command; ``appear`` has it send a message, ``got`` tells how often a command has come."""

    device_id: str
    body: dict[str, Any]
    appear: Callable[[], Any]
    got: Callable[[str], int]
    posted: list[str] = field(default_factory=list)

    def post(self, http: Http, name: str, **fields: Any) -> str:
        """Post the command; returns its request id."""
        request_id = f"{name}-{self.device_id}"
        body = {"device_id": self.device_id, "request_id": request_id, **self.body, **fields}
        status, found = http("POST", "/commands", body)
        assert status == 202, found
        return request_id


class Place:
    """A worker, a gateway, and devices of each kind."""

    def __init__(self, own: Realm, http: Http, gateway: Gateway, address: str) -> None:
        self.own, self.http, self.gateway, self.address = own, http, gateway, address
        self.sensors: list[Sensor] = []
        self._number = 2_300_000 + random.SystemRandom().randrange(100_000) * 10

    def mqtt(self, *, lights: bool) -> Kind:
        """Return a controller that was not heard of yet."""
        self._number += 1
        device, gateway = self._number, self.gateway

        def got(request_id: str) -> int:
            return len(gateway.got(request_id))

        if lights:
            body = {"command_type": "light_config_task", "payload": TASK}
            return Kind(str(device), body, lambda: gateway.lights(device), got)
        body = {"command_type": "config", "payload": {"T_consigne": 21.5}}
        return Kind(str(device), body, lambda: gateway.climate(device), got)

    def coap(self) -> tuple[Kind, Sensor]:
        """Return a sensor."""
        sensor = Sensor(self.address)
        self.sensors.append(sensor)
        body = {"command_type": "config", "payload": {"transfer_limit": 9}, "protocol": "coap"}
        return Kind(sensor.device_id, body, sensor.ask, lambda _name: len(sensor.limits())), sensor

    def each(self) -> list[Kind]:
        """Return one of each kind."""
        return [self.mqtt(lights=False), self.mqtt(lights=True), self.coap()[0]]


@contextmanager
def place(stack: Stack, folder: Path, **settings: str) -> Iterator[Place]:
    """Open a place."""
    address = f"127.0.0.1:{ports.choose(set(), random.SystemRandom(), socket.SOCK_DGRAM)}"
    with house(stack, folder, STAGES=STAGES, COAP_BIND=address, **settings) as (own, _worker, http, gateway):
        found = Place(own, http, gateway, address)
        try:
            yield found
        finally:
            for sensor in found.sensors:
                sensor.close()


@pytest.fixture(scope="module")
def patient(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A place where an answer is waited for long enough on any machine."""
    with place(stack, tmp_path_factory.mktemp("patient"), COMMAND_TIMEOUT_SECONDS="60") as found:
        yield found


def until_got(kind: Kind, request_id: str) -> None:
    """Have a device appear until a command has come."""

    def came() -> bool:
        kind.appear()
        return kind.got(request_id) > 0

    wait_for(f"{request_id} at its device", came)


def until_done(http: Http, kind: Kind, request_id: str) -> None:
    """Have a device appear until a command is successful."""

    def done() -> bool:
        kind.appear()
        return http.states(request_id)[-1:] == ["SUCCESSFUL"]

    wait_for(f"{request_id} SUCCESSFUL", done)


def test_from_the_post_to_the_device_word(patient: Place) -> None:
    """Each kind passes every state once; the device has what was asked, and the same request again starts nothing."""
    http, gateway = patient.http, patient.gateway
    climate, lights = patient.mqtt(lights=False), patient.mqtt(lights=True)
    remote, sensor = patient.coap()
    for kind in (climate, lights, remote):
        kind.appear()
        for _ in range(2):
            kind.post(http, "life")
    until_got(remote, f"life-{remote.device_id}")
    for kind in (climate, lights, remote):
        name = f"life-{kind.device_id}"
        http.until(name, "SUCCESSFUL")
        kind.post(http, "life")
        kind.appear()
        assert http.states(name) == LIFE
        assert kind.got(name) == 1
    (body,) = gateway.got(f"life-{climate.device_id}")
    assert (body["id_capteur"], body["T_consigne"]) == (int(climate.device_id), 2150)
    (body,) = gateway.got(f"life-{lights.device_id}")
    wanted = VECTORS["commands"]["config_task_3"]
    assert (body["sync_header"], body["sync_alarm"]) == (wanted["sync_header"], wanted["sync_alarm"])
    assert sensor.limits() == [9]


def test_a_task_is_in_the_schedule_once_the_controller_tells(patient: Place) -> None:
    """The controller answers a new task with its schedule message: the merged schedule of the database has it."""
    http, gateway, lights = patient.http, patient.gateway, patient.mqtt(lights=True)
    lights.appear()
    name = lights.post(http, "task")
    http.until(name, "SUCCESSFUL")
    (body,) = gateway.got(name)
    task = unpack_alarm(body["sync_alarm"])
    gateway.lights(int(lights.device_id), "create", task_id=task.task_id, alarm=body["sync_alarm"])

    def tasks() -> dict[str, Any]:
        path = f"/devices/{lights.device_id}/readings?index=SCHEDULE_STATE&label=tasks&limit=1"
        rows = http("GET", path)[1].get("readings") or []
        return dict(json.loads(rows[0]["value_text"])) if rows else {}

    wait_for("the task in the schedule", tasks)
    assert tasks() == {"3": {**{k: v for k, v in TASK.items() if k != "task_id"}, "active": True, "run_once": False}}


def test_what_no_device_takes_in_time_expires(patient: Place) -> None:
    """Controllers that were never heard of and a sensor that asks nothing: EXPIRED, and nothing goes out later."""
    http, kinds = patient.http, patient.each()
    soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
    for kind in kinds:
        kind.post(http, "late", expires_at=soon)
    for kind in kinds:
        name = f"late-{kind.device_id}"
        http.until(name, "EXPIRED")
        assert http.states(name) == ["QUEUED", "EXPIRED"]
        kind.appear()
        # what comes later goes out, and it alone
        after = kind.post(http, "after", priority=1)
        until_got(kind, after)
        http.until(after, "SUCCESSFUL")
        assert (kind.got(after), http.states(name)) == (1, ["QUEUED", "EXPIRED"])
    assert not any(patient.gateway.got(f"late-{kind.device_id}") for kind in kinds)


def test_a_lost_acknowledgement_is_made_good_by_the_hash(patient: Place) -> None:
    """A sensor whose acknowledgement never arrives and that comes back with another hash has its configuration."""
    http = patient.http
    remote, sensor = patient.coap()
    remote.appear()
    wait_for("the hash in the table", lambda: http("GET", f"/devices/{remote.device_id}/readings?limit=1")[0] == 200)
    name = remote.post(http, "hash")

    def came() -> bool:
        sensor.ask(acknowledge=False)
        return bool(sensor.limits())

    wait_for("the configuration at the sensor", came)
    wait_for("SENT", lambda: "SENT" in http.states(name))
    assert http.states(name) == ["QUEUED", "SENT"]
    sensor.hash += 1
    sensor.ask(acknowledge=False)
    found = http.until(name, "SUCCESSFUL")
    assert http.states(name) == LIFE
    assert "hash: 7 before, 8 now" in json.dumps(found)


def test_a_device_that_is_off_line_or_answers_too_late(stack: Stack, tmp_path: Path) -> None:
    """Off line: what is safe to repeat reaches it when it is back. Too late: TIMEOUT, and no later word changes it."""
    with place(stack, tmp_path, COMMAND_TIMEOUT_SECONDS="8", COMMAND_ATTEMPTS="3") as here:
        http, gateway = here.http, here.gateway
        kinds = here.each()
        for kind in kinds:
            kind.appear()
        wait_for("the devices", lambda: all(http("GET", f"/devices/{k.device_id}")[0] == 200 for k in kinds))
        gateway.subscribe(on=False)
        away = [kind.post(http, "away") for kind in kinds]
        for name in away[:2]:
            wait_for("SENT to nobody", lambda name=name: "SENT" in http.states(name))
            assert "nobody subscribes" in json.dumps(http("GET", f"/commands/{name}")[1])
        assert http.states(away[2]) == ["QUEUED"]
        gateway.subscribe(on=True)
        until_got(kinds[2], away[2])
        for kind, name in zip(kinds, away, strict=True):
            assert "DELIVERED" in str(http.until(name, "SUCCESSFUL"))
            assert kind.got(name) == 1
        # nobody answers
        gateway.answers = None
        climate, lights = here.mqtt(lights=False), here.mqtt(lights=True)
        remote, sensor = here.coap()
        late = [kind.post(http, "late") for kind in (climate, lights, remote)]
        climate.appear()
        lights.appear()

        def ended() -> bool:
            sensor.ask(acknowledge=False)
            return all(http("GET", f"/commands/{name}")[1].get("state") == "TIMEOUT" for name in late)

        wait_for("every time-out", ended)
        for name in late[:2]:
            assert len(gateway.got(name)) == 3
            gateway.feedback(f"{name}-{gateway.broker_id}", 1)
        sensor.hash += 1
        sensor.ask()
        gateway.answers = 1
        for kind in (climate, lights, remote):
            after = kind.post(http, "after")
            # a sensor has had configurations before, so that what it got does not tell that this one has come
            until_done(http, kind, after)
        for name in late:
            states = http.states(name)
            assert (states[-1], states.count("TIMEOUT"), "SUCCESSFUL" in states) == ("TIMEOUT", 1, False)


def test_iot_devices_says_who_gets_commands(stack: Stack, tmp_path: Path) -> None:
    """With UNKNOWN_DEVICES=reject only who is named; the topic's profile gives the protocol; not who is not active."""
    with place(stack, tmp_path, UNKNOWN_DEVICES="reject", COMMAND_TIMEOUT_SECONDS="60") as here:
        http = here.http
        remote, sensor = here.coap()
        body = {"device_id": remote.device_id, "command_type": "config", "payload": {"transfer_limit": 9}}

        def register(**fields: Any) -> None:
            device = json.dumps({"device_id": remote.device_id, "profile": "efento", **fields}).encode()
            write(here.own, "iot_devices", [(remote.device_id.encode(), device)])

        def answer(status: int, name: str) -> Any:
            found, text = http("POST", "/commands", {**body, "request_id": name})
            return text if found == status else None

        assert answer(400, "unknown")["pointer"] == "/device_id"
        register()
        wait_for("the device to be known", lambda: answer(202, "known"))
        wait_for("the configuration at the sensor", lambda: sensor.ask().transfer_limit == 9)
        assert http.until("known", "SUCCESSFUL")["protocol"] == "coap"
        register(active=False)
        refused = wait_for("the device to be inactive", lambda: answer(400, "inactive"))
        assert (refused["pointer"], "not active" in refused["error"]) == ("/device_id", True)
